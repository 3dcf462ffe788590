"""Clauses on the shape of a value function's curve: it rises, and it is concave on gains, also when reflected."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from halos_pl.conformance.clause import explained
from halos_pl.conformance.curve import EPS, Curve
from halos_pl.conformance.rounding import Function
from halos_pl.conformance.search import bends_up, falls
from halos_pl.conformance.value_case import ValueFunctionCase
from halos_pl.conformance.witness import number, pair
from value_functions import ValueFunction


@explained(
    example="""
        def forward(self, u):
            return torch.sin(u)
        """,
    cure="""Check the sign of each term and of each parameter that may be negative; F.softplus(raw) keeps a learnable
    factor positive. Where v would fall, let it saturate instead, with clamp, sigmoid or tanh.""",
)
def non_decreasing(case: ValueFunctionCase) -> str | None:
    """A better outcome is never valued less than a worse one: v'(u) >= 0 everywhere, and v never jumps down.

    Also after an optimizer has moved the learnable parameters: each of them far up and far down.
    """
    return _first(case, lambda curve, v: (place := falls(curve)) and _fall_in_numbers(_values(v), *place, "v"))


@explained(
    example="""
        def forward(self, u):
            return torch.where(u > 0, u.square() + u, u)
        """,
    cure="""Use a form whose slope shrinks or stays constant: sigmoid, log1p, 1 - exp(-u), a power of at most 1, or a
    straight line. A kink may only bend down.""",
)
def concave_on_gains(case: ValueFunctionCase) -> str | None:
    """Each further gain counts for less: on u > 0 the slope of v never grows, and v never jumps.

    Also after an optimizer has moved the learnable parameters: each of them far up and far down.
    """
    return _first(case, lambda curve, v: (place := bends_up(curve)) and _bend_in_numbers(_values(v), *place, "v"))


@explained(
    example="""
        def forward(self, u):
            return torch.sin(u)
        """,
    cure="""Let v rise on losses (u < 0) as well: reflection maps them to gains. Or set model.reflect_undesirable to
    false.""",
)
def undesirable_non_decreasing(case: ValueFunctionCase) -> str | None:
    """With `reflect_undesirable: true`, undesirable rows are valued by -v(-u), which must not fall either.

    Required of an objective that reflects (under arXiv v1: of one that does not); for a value function alone it is only
    reported.
    """

    def witness(curve: Curve, v: ValueFunction) -> str | None:
        place = falls(curve.reflected)
        return place and _fall_in_numbers(_reflected_values(v), *place, "v~") + _MIRROR

    return _first(case, witness)


@explained(
    example="""
        def forward(self, u):
            return F.logsigmoid(u)
        """,
    cure="""Use an S-shaped v (sigmoid, tanh, Kahneman and Tversky's power function), or set model.reflect_undesirable
    to false.""",
)
def undesirable_concave_on_gains(case: ValueFunctionCase) -> str | None:
    """With `reflect_undesirable: true`, the slope of -v(-u) must not grow on u > 0: v must be convex on losses.

    Required of an objective that reflects (under arXiv v1: of one that does not); for a value function alone it is only
    reported.
    """

    def witness(curve: Curve, v: ValueFunction) -> str | None:
        place = bends_up(curve.reflected)
        return place and _bend_in_numbers(_reflected_values(v), *place, "v~") + _MIRROR

    return _first(case, witness)


# For a value function alone these are only reported.
UNDESIRABLE = (undesirable_non_decreasing, undesirable_concave_on_gains)
_MIRROR = ", where v~(u) = -v(-u)"


def _first(case: ValueFunctionCase, witness: Callable[[Curve, ValueFunction], str | None]) -> str | None:
    """The witness of v as it is; else of v with some learnable parameter moved, if there is one."""
    if found := witness(case.curve, case.fresh()):
        return found
    found_moved = ((witness(curve, v), words) for words, v, curve in case.pushed)
    return next((f"{found}, with {words}" for found, words in found_moved if found), None)


def _values(v: ValueFunction) -> Function:
    return torch.no_grad()(lambda u: v(u.clone()))


def _reflected_values(v: ValueFunction) -> Function:
    return torch.no_grad()(lambda u: -v(-u))


def _rounded(x: float, digits: int) -> list[float]:
    scale = 10.0**digits
    return [math.floor(x * scale) / scale, math.ceil(x * scale) / scale]


def _fall_in_numbers(f: Function, u1: float, u2: float, name: str) -> str:
    """Text that shows f(u1) > f(u2), with as few digits as possible."""
    candidates = [(a, b) for d in range(15) for a in _rounded(u1, d) for b in _rounded(u2, d) if a < b]
    candidates.append((u1, u2))
    values = f(torch.tensor(candidates, dtype=torch.float64).flatten()).view(-1, 2)
    falling = values[:, 0] - values[:, 1] > 4 * EPS * values.abs().sum(dim=1)
    if not bool(falling.any()):
        return f"the slope of {name} is negative at u = {(u1 + u2) / 2!r}"
    at = int(falling.nonzero()[0])
    a, b = pair(*values[at].tolist())
    u1, u2 = candidates[at]
    x, y = (f"{u:.15g}" for u in (u1, u2)) if (u1, u2) != candidates[-1] else (repr(u1), repr(u2))
    return f"{name}({x}) = {a} > {name}({y}) = {b}"


def _bend_in_numbers(f: Function, u1: float, u2: float, name: str) -> str:
    """Text that shows f(c) below the chord from c - w to c + w, with as few digits as possible."""
    c = u1 + (u2 - u1) * torch.linspace(0, 1, 201, dtype=torch.float64)
    w = (u2 - u1 + 1e-9) * 2.0 ** torch.arange(-8, 8, dtype=torch.float64)
    w = torch.cat([w, 10.0 ** torch.arange(-8, 1)])
    centers, widths = (x.flatten() for x in torch.meshgrid(c, w, indexing="ij"))
    inside = centers - widths > 0

    def gap(center: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points = torch.stack([center - width, center, center + width])
        low, middle, high = f(points.flatten()).view(3, -1)
        chord = (low + high) / 2
        return chord - middle - 8 * EPS * (low.abs() + high.abs() + middle.abs()), middle, chord

    depth = gap(centers, widths)[0].masked_fill(~inside, -torch.inf).nan_to_num(nan=-torch.inf)
    at = int(depth.argmax())
    if not depth[at] > 0:
        return f"the slope of {name} is larger at u = {u2!r} than at u = {u1!r}"
    center, width = float(centers[at]), float(widths[at])
    candidates = [(x, y) for d in range(15) for x in _rounded(center, d) for y in _rounded(width, d) if 0 < y < x] + [
        (center, width)
    ]
    tried = torch.tensor(candidates, dtype=torch.float64)
    depth, middle, chord = gap(tried[:, 0], tried[:, 1])
    at = int((depth > 0).nonzero()[0])
    center, width = candidates[at]
    a, b = pair(float(middle[at]), float(chord[at]))
    shown = number if at < len(candidates) - 1 else repr
    x, low, high = map(shown, (center, center - width, center + width))
    return f"{name}({x}) = {a} < {b} = ({name}({low}) + {name}({high})) / 2"
