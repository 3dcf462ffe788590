"""The curve of a value function: values and slopes on a dense float64 grid, and their rounding errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halos_pl.conformance.rounding import Function, values_per_outcome

EPS = torch.finfo(torch.float64).eps
# The grid is dense up to EDGE nats, has steps of 0.1 nats up to FAR and is logarithmic up to END, where it only finds
# faults that do not end soon after they began.
EDGE, FAR, END = 100.0, 1e4, 1e8
CELLS = 500_000
# Number of values that one call of v may compute on the way, so that v may look up thousands of knots in little memory.
VALUES_AT_ONCE = 1 << 24
# ``F.softplus`` jumps by 2e-9 where it becomes linear, which its users cannot help: a jump by this share of the range
# of v is allowed there.
JUMP = 3e-8


class WrongShapeError(ValueError):
    """A function returned a tensor of another shape than its input."""


# Upstream gradients of v, which reveal a backward that alters them. Powers of two divide exactly.
LARGEST_COTANGENT = 4.0
_COTANGENTS = (1.0, -1.0, LARGEST_COTANGENT, -0.5, 0.25, -2.0, -1.0)


@lru_cache(maxsize=4)
def _cotangents(dtype: torch.dtype) -> Tensor:
    """One per row of the largest batch, in aperiodic order."""
    if dtype != torch.float64:
        return _cotangents(torch.float64).to(dtype)
    draw = torch.Generator().manual_seed(0)
    order = torch.randint(len(_COTANGENTS), (2 * CELLS,), generator=draw)
    return torch.tensor(_COTANGENTS, dtype=dtype)[order]


def cotangents(like: Tensor) -> Tensor:
    """Signed powers of two that differ between rows, of the shape and dtype of ``like``."""
    every, n = _cotangents(like.dtype), like.numel()
    every = every if n <= len(every) else every.repeat(1 + n // len(every))
    return every[:n].view(like.shape)


def rows_at_once(v: Function) -> int:
    """How many outcomes v may be handed in one call: for as many, all its intermediate results fit into 128 MB."""
    return max(1, int(VALUES_AT_ONCE / values_per_outcome(v)))


def in_pieces(v: Function, u: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`value_and_slope` of a long [n], in several calls if intermediate results would be too large."""
    rows = rows_at_once(v) if len(u) > 4096 else len(u)
    if len(u) <= rows:
        return value_and_slope(v, u)
    pieces = [value_and_slope(v, piece) for piece in u.split(rows)]
    return torch.cat([value for value, _ in pieces]), torch.cat([slope for _, slope in pieces])


def value_and_slope(v: Function, u: Tensor, view: Function | None = None) -> tuple[Tensor, Tensor]:
    """v(u) and dv/du by autograd, both of the shape of ``u``; a slope of 0 where v has no gradient.

    Args:
        v: a value function.
        u: nats.
        view: maps ``u`` to the input of v, and the slopes likewise; default: v is called with ``u``.
    """
    value, slope = called(v, u, view)
    return value, slope()


def called(v: Function, u: Tensor, view: Function | None = None) -> tuple[Tensor, Callable[[], Tensor]]:
    """:func:`value_and_slope` with the backward pass still to come: v(u), and a function that returns dv/du."""
    view = view or (lambda tensor: tensor)
    with torch.enable_grad():
        leaf = u.detach().requires_grad_()
        inputs = view(leaf.clone())  # a copy, so that only its clause reports a change in place
        shape = inputs.shape
        value = v(inputs)
        if value.shape != shape:
            raise WrongShapeError(f"v of {tuple(shape)} has shape {tuple(value.shape)}")
        back = cotangents(value)
        # Of the sum, since torch imports sympy (half a second) if it is passed an upstream gradient.
        total = (value * back).sum()
    value = value.detach()

    def slope() -> Tensor:
        found = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
        return torch.zeros_like(value) if found is None else view(found.detach()) / back

    return value, slope


@dataclass(frozen=True)
class Curve:
    """v and its slope at many points.

    Attributes:
        u: nats, float64 [n], ascending.
        value, slope: v(u) and v'(u), float64 [n].
        seams: nats, float64 [2, k]: between which two points ``F.softplus`` becomes linear.
        sums: float64 [2, m]: at some points, ascending (nats), the size of what v rounds there on the way (utility);
            see :func:`~halos_pl.conformance.rounding.sums`.
    """

    u: Tensor
    value: Tensor
    slope: Tensor
    seams: Tensor
    sums: Tensor

    @classmethod
    def of(cls, v: Function, u: Tensor, seams: Tensor, sums: Tensor) -> Curve:
        """v at the points ``u``."""
        return cls(u, *in_pieces(v, u), seams, sums)

    def with_points(self, other: Curve) -> Curve:
        """The curve with further points, in any order."""
        other = other.part(other.u.argsort())
        # Merged, since sorting a million points anew takes longer than computing most value functions there.
        place = torch.searchsorted(self.u, other.u, right=True) + torch.arange(len(other.u))
        old = torch.ones(len(self.u) + len(other.u), dtype=torch.bool)
        old[place] = False

        def merged(old_values: Tensor, further: Tensor) -> Tensor:
            return (
                torch.empty(len(old), dtype=old_values.dtype)
                .masked_scatter_(old, old_values)
                .index_copy_(0, place, further)
            )

        names = ("u", "value", "slope")
        return replace(self, **{name: merged(getattr(self, name), getattr(other, name)) for name in names})

    def part(self, index: Any) -> Curve:
        """A subset of the points."""
        return replace(self, u=self.u[index], value=self.value[index], slope=self.slope[index])

    def finite(self) -> Curve:
        """The points with finite value and slope."""
        kept = self.value.isfinite() & self.slope.isfinite()
        return self if bool(kept.all()) else self.part(kept)

    # Bounds on the effect of rounding at each point. A jump is a fault however small it is, so nothing is allowed for
    # it but what rounding of float64 explains: of v, of what it adds up, and of the slopes that an increment is
    # compared with; at seams also the jump of softplus.

    @cached_property
    def noise(self) -> Tensor:
        """How far the values are off by rounding, utility, float64 [n]."""
        at_zero = self.value[int(torch.searchsorted(self.u, 0.0).clamp(max=len(self.u) - 1))]
        size = self.value.abs() + (self.u * self.slope).abs()
        # Near 0 intermediate results may be larger than v itself, which starts at 0: as large as 1 nat away.
        near = size[self.u.abs() <= 1]
        size = torch.maximum(size, near.max() if len(near) else size.new_zeros(()))
        gap = self.u.diff()
        gap = torch.maximum(F.pad(gap, (1, 0)), F.pad(gap, (0, 1)))
        value = 64 * EPS * size + 8 * EPS * self._summed + 1e-7 * self.slope.abs() * gap
        if self.seams.numel():
            reach = JUMP * _outward((self.value - at_zero).abs(), self.u)
            first = torch.searchsorted(self.u, self.seams[0].contiguous())
            beyond = torch.searchsorted(self.u, self.seams[1].contiguous(), right=True)
            steps = torch.zeros(len(self.u) + 1, dtype=torch.long)
            steps.index_add_(0, first, torch.ones_like(first)).index_add_(0, beyond, -torch.ones_like(beyond))
            value = value + reach * (steps.cumsum(0)[:-1] > 0)
        return value

    @cached_property
    def slope_noise(self) -> Tensor:
        """How far the slopes are off by rounding, utility per nat, float64 [n]."""
        steepest = _outward(self.slope.abs(), self.u)
        return 64 * EPS * steepest + 8 * EPS * self._summed / self.u.abs().clamp(min=1)

    @cached_property
    def _summed(self) -> Tensor:
        """The size of what v rounds on the way to each point, the larger of those around it, utility, float64 [n]."""
        place = torch.searchsorted(self.sums[0].contiguous(), self.u).clamp(max=self.sums.shape[1] - 1)
        return torch.maximum(self.sums[1][place], self.sums[1][(place - 1).clamp(min=0)])

    @cached_property
    def reflected(self) -> Curve:
        """-v(-u): how v acts on a reflected row, over the same range."""
        sums = torch.stack([-self.sums[0].flip(0), self.sums[1].flip(0)])
        return Curve(-self.u.flip(0), -self.value.flip(0), self.slope.flip(0), -self.seams.flip(0), sums)


@lru_cache(maxsize=2)
def grid(cells: int = CELLS) -> Tensor:
    """Outcomes in nats, ascending, for both signs.

    With the default number of cells in steps of 4e-4 up to 100 and of 0.1 up to 10,000; by orders of magnitude near 0
    and, 5,000 each, up to 10^8.
    """
    half = cells // 2
    step = 0.1 * CELLS / cells
    # Steps that are not round numbers, so that no periodic fault hides between the points.
    near = torch.arange(1, half + 1, dtype=torch.float64) * (EDGE / half * 0.99999871)
    far = torch.arange(EDGE, FAR, step * 0.9999871, dtype=torch.float64)
    tiny = torch.logspace(-12, -3, 2000, dtype=torch.float64)
    huge = torch.logspace(4, 8, max(2000, 20000 * cells // CELLS), dtype=torch.float64)
    side = torch.cat([tiny, near, far, huge]).sort().values
    return torch.cat([-side.flip(0), side.new_zeros(1), side])


def _outward(values: Tensor, u: Tensor) -> Tensor:
    """Largest of ``values`` between 0 and each point, on the same side of 0."""
    zero = int(torch.searchsorted(u, 0.0))
    losses = values[:zero].flip(0).cummax(0).values.flip(0) if zero else values[:0]
    gains = values[zero:].cummax(0).values if zero < len(values) else values[:0]
    return torch.cat([losses, gains])
