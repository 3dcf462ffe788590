"""The log-odds of ORPO."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.objective.rewards.base import Reward, per_row


class LogOdds(Reward):
    """log[p / (1 - p)] of p = exp(mean log pi_theta per token), the geometric mean of the tokens' probabilities.

    ORPO (Hong et al. 2024, eq. 4). Needs no reference model; not linear in any log-ratio. Mean log-probs
    are clamped to at most -1e-6, where the odds are a million to one.
    """

    violates: Mapping[str, str] = {
        "reward_zero_at_reference": "it has no reference model",
        "reward_linear": "log-odds are not linear in log-probs",
    }

    def forward(self, rows: LogProbBatch) -> Tensor:
        mean = per_row(rows.policy_logps, rows, length_normalised=True).clamp(max=-1e-6)
        return mean - torch.log(-torch.expm1(mean))
