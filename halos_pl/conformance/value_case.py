"""The state that the clauses of a value function share: fresh copies, its curve, and its values in each dtype."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from halos_pl.conformance.clause import Case, Law
from halos_pl.conformance.curve import CELLS, EDGE, FAR, Curve, grid, in_pieces, rows_at_once, value_and_slope
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.rounding import sums, values_per_outcome
from halos_pl.conformance.search import survey
from halos_pl.conformance.states import pushed
from halos_pl.conformance.sweep import suspects
from value_functions import ValueFunction

# Each clause may compute about 10^8 numbers, in and between the operations of v; a cell is never wider than 0.004 nats.
_VALUES_OF_A_CLAUSE, _FEWEST_CELLS = 10**8, 50_000
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def varied_outcomes(n: int) -> Tensor:
    """n distinct outcomes of both signs, near and far, in no order; nats, float64 [n]."""
    steps = torch.arange(n, dtype=torch.float64)
    size = 10 ** ((steps * 0.618034) % 1 * 5 - 3)  # 1e-3 to 100
    return torch.where(steps % 2 == 0, size, -size)


# The outcomes of the call before all others.
FIRST = varied_outcomes(16)


class Sample(NamedTuple):
    """v and v' at outcomes ``u``: computed in the dtype of ``u``, and exactly (in float64)."""

    u: Tensor
    value: Tensor
    slope: Tensor
    exact_value: Tensor
    exact_slope: Tensor


class ValueFunctionCase(Case):
    """One value function under check.

    Args:
        value_function: the target. Each clause calls a fresh copy, so that one with a memory does not spoil the others.
        laws: its clauses.
        thorough: whether to search a grid four times as dense.
    """

    def __init__(self, value_function: ValueFunction, laws: tuple[Law, ...], *, thorough: bool = False) -> None:
        super().__init__(value_function, laws)
        self.target = value_function
        self.thorough = thorough

    def fresh(self) -> ValueFunction:
        """A copy in training mode that has not been called."""
        return duplicate(self.target)

    def witness(self, law: Law) -> str | None:
        _ = self.first_call  # before any clause calls v
        return super().witness(law)

    @cached_property
    def first_call(self) -> tuple[Tensor, Tensor] | None:
        """Value and slope at ``FIRST`` before all other calls of v; None if it raises, which a clause reports."""
        try:
            return value_and_slope(self.fresh(), FIRST)
        except (Exception, SystemExit):
            return None

    @cached_property
    def affordable(self) -> int:
        """How many outcomes a clause may try: fewer if v computes many numbers for each."""
        return int(_VALUES_OF_A_CLAUSE / values_per_outcome(self.fresh()))

    @cached_property
    def cells(self) -> int:
        """Number of cells in the dense part of the grid."""
        return min(CELLS * (4 if self.thorough else 1), max(self.affordable, _FEWEST_CELLS))

    @cached_property
    def largest_batch(self) -> int:
        """How many outcomes are handed over in one call at most."""
        return rows_at_once(self.fresh())

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes in which v must work. Losses are in float32, so its operations need not exist in bfloat16."""
        try:
            value_and_slope(self.fresh(), torch.tensor([0.5, -0.5], dtype=torch.bfloat16))
        except Exception:  # whatever goes wrong in the other dtypes too, some clause reports
            return DTYPES[:-1]
        return DTYPES

    @cached_property
    def curve(self) -> Curve:
        """v in float64 over |u| <= 1e8."""
        return survey(self.fresh(), self.cells)

    @cached_property
    def pushed(self) -> list[tuple[str, ValueFunction, Curve]]:
        """v after an optimizer has moved its parameters: the move in words, v, and its curve on a coarser grid."""
        moved = [*pushed(self.target, draws=20 if self.thorough else 2, most=16), *suspects(self.target)]
        return [(words, v, survey(duplicate(v), min(self.cells, 20_000), most=100)) for words, v in moved]

    @cached_property
    def grid_points(self) -> Tensor:
        """Outcomes for the other dtypes: round and odd ones, near 0 and far out."""
        size = torch.cat(
            [
                torch.logspace(-38, -9, 30, dtype=torch.float64),
                torch.logspace(-9, 4, 800, dtype=torch.float64),
                torch.linspace(0, 100, 1001, dtype=torch.float64),
                torch.linspace(100, FAR, 1001, dtype=torch.float64),
            ]
        )
        return torch.cat([size, -size])

    @cached_property
    def samples(self) -> dict[torch.dtype, Sample]:
        """v in each dtype and exactly: at every bfloat16 number; in float32 also at much of the grid."""
        steps = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        positive = steps[(steps >= 0) & (steps <= FAR)]
        dense = grid(self.cells)
        outcomes = {
            torch.float64: self.grid_points,
            torch.float32: torch.cat([self.grid_points, dense[dense.abs() <= EDGE][::4]]).float(),
            torch.bfloat16: torch.cat([positive, -positive]),
        }
        return {
            dtype: Sample(u, *in_pieces(self.fresh(), u), *in_pieces(self.fresh(), u.double()))
            for dtype, u in outcomes.items()
            if dtype in self.dtypes
        }

    @cached_property
    def single_precision(self) -> str | None:
        """A witness that v rounds its input to float32, so that anything finer is noise; else None."""
        u = self.grid_points
        value, slope = in_pieces(self.fresh(), u)
        rounded = in_pieces(self.fresh(), u.float().double())[0]
        # Outcomes at which a different u must have a different value.
        telling = (u.abs() > 0.1) & (u.abs() < 10) & (slope.abs() > 1e-3) & (u != u.float().double())
        alike = telling & (value == rounded)
        if int(alike.sum()) < 20 or int(alike.sum()) < 0.99 * int(telling.sum()):
            return None
        at = int(alike.nonzero()[0])
        return (
            f"u in float64 is rounded to float32 or less: v({float(u[at])!r}) = v({float(u[at].float())!r}) ="
            f" {float(value[at])!r}; compute in the dtype of u"
        )

    def size_around(self, v: ValueFunction, u: Tensor) -> Tensor:
        """The size of what v rounds: the largest |v| and |u v'| near each outcome and its opposite.

        Within 1 nat and within half of the outcome. The opposite counts because v may cancel there what it adds up
        here.

        Returns:
            utility, float64 [n].
        """
        near = torch.cat([u + d for d in (-1.0, -0.3, 0.0, 0.3, 1.0)] + [u * f for f in (0.5, 0.8, 1.25, 1.5)])
        near = torch.cat([near, -near]).clamp(-FAR, FAR)
        value, slope = in_pieces(v, near)
        size = (value.abs() + (near * slope).abs()).nan_to_num(posinf=0.0)
        size = size.view(len(near) // max(1, len(u)), len(u)).max(dim=0).values
        return size

    def slope_around(self, v: ValueFunction, u: Tensor) -> Tensor:
        """The size of what a slope of v may be the difference of: that of v per nat, at most the steepest slope.

        Returns:
            utility per nat, float64 [n].
        """
        slope = self.curve.slope
        return torch.minimum(
            torch.maximum(self.size_around(v, u), sums(v, u)) / u.abs(), slope[slope.isfinite()].abs().max()
        )
