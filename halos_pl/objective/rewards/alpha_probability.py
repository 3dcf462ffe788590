"""The reward of AlphaPO."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.objective.rewards.base import Reward, per_row
from value_functions.bounded import bounded_exp


class AlphaProbability(Reward):
    """r = (1 - p^-alpha) / alpha, where p = exp(mean log pi_theta per token).

    AlphaPO (Gupta et al. 2025, eq. 5). Needs no reference model. r tends to the mean log-prob, the reward of SimPO, as
    alpha tends to 0. Where the exponent exceeds 40, it continues linearly.

    Args:
        alpha: exponent, not 0; above 0, unlikely completions lose more than their log-prob.

    Raises:
        ValueError: alpha is 0.
    """

    violates: Mapping[str, str] = {
        "reward_zero_at_reference": "it has no reference model",
        "reward_linear": "a power of the probability",
    }

    def __init__(self, *, alpha: float = 0.25) -> None:
        super().__init__()
        if alpha == 0:
            raise ValueError("AlphaProbability: alpha is 0, where r is the mean log-prob; choose LogProb")
        self.alpha = float(alpha)

    def forward(self, rows: LogProbBatch) -> Tensor:
        mean = per_row(rows.policy_logps, rows, length_normalised=True)
        return (1 - bounded_exp(-self.alpha * mean)) / self.alpha
