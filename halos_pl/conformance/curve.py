"""The curve of a value function: values and slopes on a dense float64 grid, and their rounding errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
EDGE, FAR = 100.0, 1e4
CELLS = 500_000
# ``F.softplus`` jumps by 2e-9 where it becomes linear, which its users cannot help: a jump by this share of the range
# of v is allowed there.
JUMP = 3e-8
Function = Callable[[Tensor], Tensor]


class WrongShapeError(ValueError):
    """A function returned a tensor of another shape than its input."""


# Upstream gradients of v, which reveal a backward that alters them. Powers of two divide exactly.
LARGEST_COTANGENT = 4.0
_COTANGENTS = (1.0, -1.0, LARGEST_COTANGENT, -0.5, 0.25, -2.0, -1.0)


@lru_cache(maxsize=1)
def _cotangents() -> Tensor:
    """One per row of the largest batch, in aperiodic order."""
    draw = torch.Generator().manual_seed(0)
    order = torch.randint(len(_COTANGENTS), (2 * CELLS,), generator=draw)
    return torch.tensor(_COTANGENTS, dtype=torch.float64)[order]


def cotangents(like: Tensor) -> Tensor:
    """Signed powers of two that differ between rows, of the shape and dtype of ``like``."""
    every, n = _cotangents(), like.numel()
    every = every if n <= len(every) else every.repeat(1 + n // len(every))
    return every[:n].view(like.shape).to(like.dtype)


def value_and_slope(v: Function, u: Tensor, view: Function | None = None) -> tuple[Tensor, Tensor]:
    """v(u) and dv/du by autograd, both of the shape of ``u``; a slope of 0 where v has no gradient.

    Args:
        v: a value function.
        u: nats.
        view: maps ``u`` to the input of v, and the slopes likewise; default: v is called with ``u``.
    """
    view = view or (lambda tensor: tensor)
    with torch.enable_grad():
        leaf = u.detach().clone().requires_grad_()
        inputs = view(leaf.clone())  # a copy, so that only its clause reports a change in place
        shape = inputs.shape
        value = v(inputs)
        if value.shape != shape:
            raise WrongShapeError(f"v of {tuple(shape)} has shape {tuple(value.shape)}")
        slope = None
        if value.requires_grad:
            back = cotangents(value)
            # Of the sum, since torch imports sympy (half a second) if it is passed an upstream gradient.
            (slope,) = torch.autograd.grad((value * back).sum(), leaf, allow_unused=True)
    value = value.detach()
    return value, torch.zeros_like(value) if slope is None else view(slope.detach()) / back


@dataclass(frozen=True)
class Noise:
    """Bounds on the effect of rounding at each point of a curve.

    Attributes:
        value, slope: float64 [n].
    """

    value: Tensor
    slope: Tensor


@dataclass(frozen=True)
class Curve:
    """v and its slope at many points.

    Attributes:
        u: nats, float64 [n], ascending.
        value, slope: v(u) and v'(u), float64 [n].
        seams: nats, float64 [2, k]: between which two points ``F.softplus`` becomes linear.
    """

    u: Tensor
    value: Tensor
    slope: Tensor
    seams: Tensor

    @classmethod
    def of(cls, v: Function, u: Tensor, seams: Tensor) -> Curve:
        """v at the points ``u``."""
        return cls(u, *value_and_slope(v, u), seams)

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

    @cached_property
    def noise(self) -> Noise:
        """Rounding of float64, relative to the size of v at each point; at its seams also the jump of ``F.softplus``.

        A jump is a fault however small it is, so nothing is allowed for it but what rounding explains: of v, and of
        the slopes that an increment is compared with.
        """
        at_zero = self.value[int(torch.searchsorted(self.u, 0.0).clamp(max=len(self.u) - 1))]
        steepest = _outward(self.slope.abs(), self.u)
        size = self.value.abs() + (self.u * self.slope).abs()
        # Near 0 intermediate results may be larger than v itself, which starts at 0: as large as 1 nat away.
        near = size[self.u.abs() <= 1]
        size = torch.maximum(size, near.max() if len(near) else size.new_zeros(()))
        gap = self.u.diff()
        gap = torch.maximum(F.pad(gap, (1, 0)), F.pad(gap, (0, 1)))
        value = 64 * EPS * size + 1e-7 * self.slope.abs() * gap
        if self.seams.numel():
            reach = JUMP * _outward((self.value - at_zero).abs(), self.u)
            first = torch.searchsorted(self.u, self.seams[0].contiguous())
            beyond = torch.searchsorted(self.u, self.seams[1].contiguous(), right=True)
            steps = torch.zeros(len(self.u) + 1, dtype=torch.long)
            steps.index_add_(0, first, torch.ones_like(first)).index_add_(0, beyond, -torch.ones_like(beyond))
            value = value + reach * (steps.cumsum(0)[:-1] > 0)
        return Noise(value, 64 * EPS * steepest)

    def reflected(self) -> Curve:
        """-v(-u): how v acts on a reflected row."""
        return Curve(-self.u.flip(0), -self.value.flip(0), self.slope.flip(0), -self.seams.flip(0))


def grid(cells: int = CELLS) -> Tensor:
    """Outcomes in nats, ascending: dense on [-100, 100], by orders of magnitude near 0 and up to 1e4."""
    side = (
        torch.cat(
            [
                torch.logspace(-12, -3, 2000, dtype=torch.float64),
                # A step that is not a round number, so that no periodic fault hides between the points.
                torch.arange(1, cells // 2 + 1, dtype=torch.float64) * (EDGE / (cells // 2) * 0.99999871),
                torch.logspace(2, 4, 20000, dtype=torch.float64),
            ]
        )
        .sort()
        .values
    )
    return torch.cat([-side.flip(0), side.new_zeros(1), side])


def _outward(values: Tensor, u: Tensor) -> Tensor:
    """Largest of ``values`` between 0 and each point, on the same side of 0."""
    zero = int(torch.searchsorted(u, 0.0))
    losses = values[:zero].flip(0).cummax(0).values.flip(0) if zero else values[:0]
    gains = values[zero:].cummax(0).values if zero < len(values) else values[:0]
    return torch.cat([losses, gains])
