"""The log-ratio of token probabilities as people perceive them, clamped."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.rewards.base import Reward, log_ratios


class HumanlineLogRatio(Reward):
    """Sum of clamped token log-ratios: sum_t clamp(log pi_theta / pi_ref, low, high).

    Humanline (Liu et al. 2025, "Humanline: online alignment as perceptual loss"): people perceive token
    probabilities with a distortion, which clamping imitates. Tokens outside the range have no gradient, so r is
    not linear in the log-ratio. Meant for a reference that is re-synced with the policy (``SyncedCopy``).

    Args:
        low, high: range of a token's log-ratio, nats: log epsilon_P and log epsilon_R.

    Raises:
        ValueError: not low < 0 < high.
    """

    needs = Needs(reference=True)
    violates: Mapping[str, str] = {"reward_linear": "tokens outside [low, high] are clamped"}

    def __init__(self, *, low: float = -1.0, high: float = 1.5) -> None:
        super().__init__()
        if not low < 0 < high:
            raise ValueError(f"HumanlineLogRatio: the range is {low} to {high}; low must be below 0 and high above 0")
        self.low, self.high = float(low), float(high)

    def forward(self, rows: LogProbBatch) -> Tensor:
        return log_ratios(self, rows).clamp(self.low, self.high).sum(dim=1)
