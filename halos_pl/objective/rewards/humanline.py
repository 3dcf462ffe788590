"""The log-ratio with perceived, clamped token probabilities."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.rewards.base import Reward, log_ratios


class HumanlineLogRatio(Reward):
    """Log-ratio with each token's share clamped: sum_t clamp(log pi_theta / pi_ref, low, high).

    Humanline (Liu et al. 2025, "Humanline: online alignment as perceptual loss"): people perceive token
    probabilities with distortion, which is imitated by clipping. A token outside the range has no gradient, so r
    is not linear in the log-ratio. Made for a reference that is re-synced with the policy (``SyncedCopy``).

    Args:
        low, high: nats, log epsilon_P and log epsilon_R.

    Raises:
        ValueError: unless low < 0 < high.
    """

    needs = Needs(reference=True)
    violates: Mapping[str, str] = {"reward_linear": "tokens outside [low, high] are clamped"}

    def __init__(self, *, low: float = -1.0, high: float = 1.5) -> None:
        super().__init__()
        if not low < 0 < high:
            raise ValueError(f"HumanlineLogRatio: the range is {low} to {high}; it must include 0")
        self.low, self.high = float(low), float(high)

    def forward(self, rows: LogProbBatch) -> Tensor:
        return log_ratios(self, rows).clamp(self.low, self.high).sum(dim=1)
