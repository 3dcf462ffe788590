"""No reference point."""

from __future__ import annotations

from torch import Tensor

from halos_pl.outcomes import Rows
from halos_pl.reference_points.base import ReferencePoint


class Zero(ReferencePoint):
    """z0 = 0: outcomes are the rewards themselves (a degenerate reference)."""

    def forward(self, rewards: Tensor, rows: Rows) -> Tensor:
        return rewards.new_zeros(())
