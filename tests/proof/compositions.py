"""Random compositions whose truth is known by construction: sound ones, and sound ones with one planted fault.

Sums, positive multiples and minima of functions that never fall and are concave on gains have both properties, and so
has a rising concave function of such a one. Any function that never falls may replace it on losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from value_functions import ValueFunction

Formula = Callable[[Tensor], Tensor]


class Composed(ValueFunction):
    """v(u) = formula(u)."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, u: Tensor) -> Tensor:
        return self.formula(u)


@dataclass(frozen=True)
class Case:
    """A function, and the claims that do not hold for it.

    Attributes:
        text: its formula.
        v: the function.
        fails: names of the claims that a planted fault breaks.
    """

    text: str
    v: Formula
    fails: tuple[str, ...] = ()


def _number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda x: round(x, 3))


# Rising and concave on the whole line, so that they may also be outer functions.
CONCAVE: dict[str, Callable[[float], Formula]] = {
    "log sigmoid": lambda s: lambda u: F.logsigmoid(s * u),
    "linear": lambda s: lambda u: s * u,
    "least": lambda s: lambda u: torch.minimum(s * u, 1 + 0.3 * s * u),
    "hinge": lambda s: lambda u: (s * u).clamp(max=3.0),
    "smooth hinge": lambda s: lambda u: 0.5 * (s * u - torch.sqrt((s * u) ** 2 + 1)),
    "soft minimum": lambda s: lambda u: -torch.logaddexp(-s * u, -(0.3 * s * u + 1)),
    "log normal": lambda s: lambda u: torch.special.log_ndtr(s * u),
    "exponential": lambda s: (
        lambda u: (
            -torch.exp(-s * u.clamp(min=-20 / s)) + math.exp(20) * (s * u + 20).clamp(max=0)  # its tangent beyond
        )
    ),
}
_LANGEVIN_AT_HALF = 1 / math.tanh(0.5) - 2


def _langevin(x: Tensor) -> Tensor:
    """coth(x) - 1 / x, whose tail is that of 1 / x although exponentials of x are in it; a line below 1/2."""
    y = x.clamp(min=0.5)
    return torch.where(x < 0.5, 0.33 * (x - 0.5) + _LANGEVIN_AT_HALF, 1 / torch.tanh(y) - 1 / y)


def _table(x: Tensor) -> Tensor:
    """tanh between 9 knots, by a table."""
    knots = torch.linspace(-4, 4, 9, dtype=x.dtype)
    values = torch.tanh(knots)
    i = torch.searchsorted(knots, x.contiguous()).clamp(1, 8)
    slope = (values[i] - values[i - 1]) / (knots[i] - knots[i - 1])
    return values[i - 1] + slope * (x - knots[i - 1])


# Rising, and concave on gains alone.
S_SHAPED: dict[str, Callable[[float], Formula]] = {
    "sigmoid": lambda s: lambda u: torch.sigmoid(s * u),
    "tanh": lambda s: lambda u: torch.tanh(s * u),
    "arctan": lambda s: lambda u: torch.atan(s * u),
    "erf": lambda s: lambda u: torch.erf(s * u),
    "algebraic": lambda s: lambda u: s * u / torch.sqrt(1 + (s * u) ** 2),
    "rational": lambda s: lambda u: s * u / (1 + (s * u).abs()),
    "asinh": lambda s: lambda u: torch.asinh(s * u),
    "power": lambda s: lambda u: torch.where(u < 0, s * u, (s * u.clamp(min=0) + 0.01) ** 0.7 - 0.01**0.7),
    "logarithm": lambda s: lambda u: torch.where(u < 0, s * u, torch.log1p(s * u.clamp(min=0))),
    "soft clip": lambda s: lambda u: F.softplus(s * u + 2) - F.softplus(s * u),
    "gamma": lambda s: lambda u: torch.where(u < 0, s * u, 1 - (1 + s * u / 3) * torch.exp(-s * u.clamp(min=0))),
    "langevin": lambda s: lambda u: _langevin(s * u),
    "steps on losses": lambda s: lambda u: torch.floor((s * u).clamp(-3, 0)) + torch.tanh(s * u),
    "rounded losses": lambda s: lambda u: torch.where(u < 0, torch.round((s * u).clamp(min=-3)), s * u),
    "table": lambda s: lambda u: _table(s * u),
    "gompertz": lambda s: lambda u: torch.exp(-torch.exp(-s * u.clamp(min=-3 / s))),
}
BOUNDED = ("sigmoid", "tanh", "arctan", "erf", "algebraic", "rational", "gompertz", "soft clip", "langevin")


@st.composite
def atoms(draw: st.DrawFn, names: tuple[str, ...] = (*CONCAVE, *S_SHAPED)) -> Case:
    name, scale = draw(st.sampled_from(names)), draw(_number(0.02, 3.0))
    return Case(f"{name}({scale} u)", (CONCAVE | S_SHAPED)[name](scale))


def _sum(parts: tuple[Case, Case, float]) -> Case:
    a, b, weight = parts
    return Case(f"{a.text} + {weight} {b.text}", lambda u: a.v(u) + weight * b.v(u))


def _least(parts: tuple[Case, Case, float]) -> Case:
    a, b, shift = parts
    return Case(f"min({a.text}, {b.text} + {shift})", lambda u: torch.minimum(a.v(u), b.v(u) + shift))


def _outer(parts: tuple[str, float, Case]) -> Case:
    name, scale, inner = parts
    return Case(f"{name}({scale} {inner.text})", lambda u: CONCAVE[name](scale)(inner.v(u)))


def _steeper_losses(parts: tuple[Case, float]) -> Case:
    a, factor = parts
    text = f"{a.text}, {factor} times on losses"
    return Case(text, lambda u: torch.where(u < 0, factor * (a.v(u) - a.v(0 * u)) + a.v(0 * u), a.v(u)))


def sound(atom: st.SearchStrategy[Case] | None = None) -> st.SearchStrategy[Case]:
    """Functions that never fall and are concave on gains."""
    weight = _number(0.05, 3.0)
    return st.recursive(
        atoms() if atom is None else atom,
        lambda inner: st.one_of(
            st.tuples(inner, inner, weight).map(_sum),
            st.tuples(inner, inner, _number(-1.0, 1.0)).map(_least),
            st.tuples(st.sampled_from(tuple(CONCAVE)), weight, inner).map(_outer),
            st.tuples(inner, weight).map(_steeper_losses),
        ),
        max_leaves=3,
    )


@st.composite
def faulty(draw: st.DrawFn) -> Case:
    """A sound function with a jump or a bend, or one that is bounded and is pulled down far out."""
    base, place, size = draw(sound()), draw(_number(0.5, 50.0)), draw(_number(0.01, 1.0))
    kind = draw(st.sampled_from(["jumps down", "jumps up", "bends", "falls beyond", "falls from there on"]))
    if kind == "jumps down":
        drop = size * (1 + abs(float(base.v(torch.tensor(place, dtype=torch.float64)))))
        both = ("non_decreasing", "concave_on_gains")
        return Case(f"{base.text}, jump -{drop} at {place}", lambda u: base.v(u) - drop * (u > place), both)
    if kind == "jumps up":
        text = f"{base.text}, jump {size} at {place}"
        return Case(text, lambda u: base.v(u) + size * (u > place), ("concave_on_gains",))
    if kind == "bends":  # a smooth base, so that no kink of its own outweighs it
        smooth = draw(atoms(("sigmoid", "tanh", "arctan", "erf", "asinh", "log sigmoid")))
        text = f"{smooth.text}, bend {size} at {place}"
        return Case(text, lambda u: smooth.v(u) + size * F.relu(u - place), ("concave_on_gains",))
    if kind == "falls beyond":
        bounded = draw(atoms(BOUNDED))
        text = f"{bounded.text} falls beyond {place}"
        return Case(text, lambda u: bounded.v(u) - size * F.relu(u - place), ("non_decreasing",))
    text = f"{base.text} to {place}, then falls"
    return Case(text, lambda u: base.v(u.clamp(max=place)) - size * F.relu(u - place), ("non_decreasing",))
