"""The other completion of the pair."""

from __future__ import annotations

import torch
from torch import Tensor

from halos_pl.outcomes import Needs, Rows
from halos_pl.reference_points.base import ReferencePoint


class Rival(ReferencePoint):
    """z0 = reward of the pair's other completion, with gradient.

    This makes DPO a HALO: Q puts all its mass on the rejected completion (Ethayarajh et al., ICML 2024,
    proof of Thm. 3.5).

    Raises:
        ValueError: when called with a row, not a probe, that has no rival.
    """

    scope = "row"
    needs = Needs(rivals=True)

    def forward(self, rewards: Tensor, rows: Rows) -> Tensor:
        alone = rows.rival < 0
        if bool((alone & rows.train).any()):
            raise ValueError("Rival: a row has no rival; this reference point needs data with chosen and rejected")
        rival = torch.where(alone, 0.0, rewards[rows.rival])
        self.report(rival[rows.train], rows=1.0)
        return rival
