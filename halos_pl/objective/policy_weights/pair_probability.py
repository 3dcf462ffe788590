"""The weight of WPO."""

from __future__ import annotations

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.policy_weights.base import PolicyWeight
from halos_pl.objective.rewards.base import per_row


class PairProbability(PolicyWeight):
    """The probabilities per token of both completions of a pair, multiplied: likely pairs count more.

    w = p(chosen) * p(rejected), with p = exp(mean log pi_theta per token), at most 1 (WPO, Zhou et al. 2024, eq. 2,
    without its alignment). TRL 1.16 aligns: it divides each token's probability by the sum of squares of all tokens'
    probabilities (``use_weighting``), which needs the whole vocabulary.

    Raises:
        ValueError: when called: a row that is not mismatched has no paired completion.
    """

    needs = Needs(pairs=True)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        if rows.labels.unpaired:
            raise ValueError("PairProbability: a row has no paired completion; use data with chosen and rejected")
        mean = per_row(rows.policy_logps, rows, length_normalised=True)
        pair = rows.labels.pair
        return torch.where(pair < 0, 0.0, mean + mean[pair]).exp()
