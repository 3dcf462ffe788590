"""The other completion of the pair."""

from __future__ import annotations

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.reference_points.base import Estimate, ReferencePoint


class PairedCompletion(ReferencePoint):
    """z0 = reward of the pair's other completion, with gradient.

    This makes DPO a HALO: Q puts all its mass on the rejected completion (Ethayarajh et al., ICML 2024,
    proof of Thm. 3.5).

    Raises:
        ValueError: when called: a row that is not mismatched has no paired completion.
    """

    scope = "row"
    within_prompt = True
    needs = Needs(pairs=True)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        if rows.labels.unpaired:
            raise ValueError(
                "PairedCompletion: a row has no paired completion; use data with chosen and rejected completions"
            )
        return Estimate(torch.where(rows.labels.pair < 0, 0.0, rewards[rows.labels.pair]), rows=1.0)
