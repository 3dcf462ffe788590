"""The margin of a pair, as in AOT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.rewards.base import Reward


class PairMargin(Reward):
    """log pi_theta of the row minus that of its paired completion, with gradient through both; uses no reference.

    AOT compares these margins, quantile by quantile, with those of the reference (Melnyk et al. 2024, "Distributional
    preference alignment via optimal transport", paired variant); see ``SortedMargins``.

    Mismatched rows, which have no paired completion, get 0.

    Raises:
        ValueError: when called: any other row has no paired completion.
    """

    needs = Needs(pairs=True)
    violates: Mapping[str, str] = {
        "reward_zero_at_reference": "it has no reference model",
        "reward_linear": "it depends on the paired completion as well",
        "reward_of_its_row": "it depends on the paired completion as well",
    }

    def forward(self, rows: LogProbBatch) -> Tensor:
        logps, alone = rows.policy_logps.sum(dim=1), rows.labels.pair < 0
        if rows.labels.unpaired:
            raise ValueError(
                "PairMargin: a row has no paired completion; this reward needs data with chosen and rejected"
            )
        return torch.where(alone, 0.0, logps - logps[rows.labels.pair])
