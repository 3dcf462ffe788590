"""Reference points that do not read the rewards."""

from __future__ import annotations

from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.objective.reference_points.base import Estimate, ReferencePoint


class Zero(ReferencePoint):
    """z0 = 0: outcomes are the rewards themselves (a degenerate reference)."""

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        return Estimate(rewards.new_zeros(()))


class Constant(ReferencePoint):
    """z0 = a fixed number: a margin that every reward has to exceed (a degenerate reference).

    Args:
        value: z0, nats.
    """

    def __init__(self, *, value: float) -> None:
        super().__init__()
        self.value = float(value)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        return Estimate(rewards.new_full((), self.value))
