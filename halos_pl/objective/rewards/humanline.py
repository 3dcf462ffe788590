"""The log-ratio of token probabilities as people perceive them, clamped."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.rewards.base import Reward, log_ratios, per_row


class HumanlineLogRatio(Reward):
    """Sum of clamped token log-ratios: sum_t clamp(log pi_theta / pi_ref, low, high).

    Humanline (Liu et al. 2025, "Humanline: online alignment as perceptual loss"): people perceive token
    probabilities with a distortion, which clamping imitates. Tokens outside the range have no gradient, so r is
    not linear in the log-ratio. Meant for a reference that is re-synced with the policy (``SyncedCopy``). Clamped on
    one side and normalised, it is the log of GMPO's ratio (Zhao et al. 2025, eq. 4).

    Args:
        low, high: range of a token's log-ratio, nats: log epsilon_P and log epsilon_R; null for no bound.
        length_normalised: whether to divide by the number of completion tokens: nats per token.

    Raises:
        ValueError: not low < 0 < high, or both are null.
    """

    needs = Needs(reference=True)
    violates: Mapping[str, str] = {"reward_linear": "tokens outside [low, high] are clamped"}

    def __init__(self, *, low: float | None = -1.0, high: float | None = 1.5, length_normalised: bool = False) -> None:
        super().__init__()
        if low is None and high is None:
            raise ValueError("HumanlineLogRatio: low and high are null, so nothing is clamped; choose LogRatio")
        if not (low is None or low < 0) or not (high is None or high > 0):
            raise ValueError(f"HumanlineLogRatio: the range is {low} to {high}; low must be below 0 and high above 0")
        self.low, self.high, self.length_normalised = low, high, length_normalised

    def forward(self, rows: LogProbBatch) -> Tensor:
        return per_row(log_ratios(self, rows).clamp(self.low, self.high), rows, self.length_normalised)
