"""Random value functions with hyper-parameters, whose branches depend on these, and what they do in float64."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from hypothesis import strategies as st
from torch import Tensor

from value_functions import ValueFunction
from value_functions.ranges import ANY, NOT_NEGATIVE, POSITIVE, Range

VALUES = {"a": (-2.0, -0.5, 0.0, 1.0, 3.0), "b": (0.5, 1.0, 3.0), "c": (0.0, 0.5, 2.0)}
_SCALARS = ["a", "b", "c", "-c", "a * b", "a + c", "c - b", "b * c - 1", "1 - a * b", "a * a - c", "0.0", "1.0", "-2.0"]
_RISING = ["b", "c", "b * c", "1.0", "a * a", "0.5 / b"]  # never below 0
_SLOPES = st.sampled_from([*_RISING, *_RISING, "a", "b - c"])
_scalar = st.sampled_from(_SCALARS)


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("torch.minimum({}, {} + 0 * u)".format, inner, _scalar),
        st.builds("torch.maximum({}, {} + 0 * u)".format, inner, _scalar),
        st.builds("torch.minimum({}, {})".format, inner, inner),
        st.builds("torch.where(u < {}, {}, {})".format, _scalar, inner, inner),
        st.builds("torch.where({} + 0 * u <= 0, {}, {})".format, _scalar, inner, inner),
        st.builds("torch.where(({} + 0 * u) == 0, {}, {})".format, _scalar, inner, inner),
        st.builds("({}) * ({})".format, _SLOPES, inner),
        st.builds("({}) - F.relu({} - ({}))".format, inner, inner, _scalar),
        st.builds("F.logsigmoid(({}) * ({}))".format, _SLOPES, inner),
    )


FORMULAS = st.recursive(
    st.one_of(st.just("u"), st.builds("({}) * u".format, _SLOPES), st.builds("u - ({})".format, _scalar)),
    _grown,
    max_leaves=3,
)


class Parametrized(ValueFunction):
    """v(u) by a formula in u and three hyper-parameters."""

    ranges: Mapping[str, Range] = {"a": ANY, "b": POSITIVE, "c": NOT_NEGATIVE}

    def __init__(self, *, formula: str, a: float = 1.0, b: float = 0.5, c: float = 2.0) -> None:
        super().__init__()
        self.formula = formula
        self.a, self.b, self.c = self.accepted("a", a), self.accepted("b", b), self.accepted("c", c)

    def forward(self, u: Tensor) -> Tensor:
        names = {"u": u, "a": self.a, "b": self.b, "c": self.c, "torch": torch, "F": torch.nn.functional}
        value: Tensor = eval(self.formula, names)
        return value


def violation(formula: str, claim: str) -> str:
    """Where the function breaks a claim for some of ``VALUES``, in float64; empty if nowhere."""
    for numbers in product(*VALUES.values()):
        chosen = dict(zip(VALUES, numbers, strict=True))
        thresholds = [0.0, *(float(eval(text, {}, chosen)) for text in _SCALARS)]
        places = {x / s for x in thresholds for s in (1.0, *numbers) if s}
        near = sorted({x + e for x in places for e in (-3.0, -0.1, -1e-3, 0.0, 1e-3, 0.1, 3.0)})
        u = torch.tensor(near, dtype=torch.float64)
        y = Parametrized(formula=formula, **chosen)(u)
        if claim == "non_decreasing":
            wrong = y[1:] < y[:-1] - 1e-9
        else:
            kept = u > 0 if claim == "concave_on_gains" else u < 0
            x, z = u[kept], y[kept]
            bend = (z[1:-1] - z[:-2]) * (x[2:] - x[1:-1]) - (z[2:] - z[1:-1]) * (x[1:-1] - x[:-2])
            wrong = bend < -1e-9 if claim == "concave_on_gains" else bend > 1e-9
        if wrong.any():
            return f"{claim} of {formula} at {chosen}"
    return ""
