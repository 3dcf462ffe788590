"""Constant absolute risk aversion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.bounded import bounded_exp
from value_functions.ranges import POSITIVE, Range


class CARA(ValueFunction):
    """v(u) = 1 - e^(-beta u): concave everywhere, at most 1, slope beta at 0.

    Exponential utility (Pratt 1964): risk aversion does not depend on the outcome, so adding a constant to all
    outcomes changes no choice. Losses beyond 40 / beta nats continue linearly, as exp would overflow.

    Args:
        beta: absolute risk aversion, 1 / nats; above 0.

    Raises:
        ValueError: beta is not above 0.
    """

    ranges: Mapping[str, Range] = {"beta": POSITIVE}

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = self.accepted("beta", beta)

    def forward(self, u: Tensor) -> Tensor:
        x = -self.beta * u
        # expm1 is exact for small outcomes; the tangent replaces it before it overflows.
        return torch.where(x < 1, -torch.expm1(x.clamp(max=1)), 1 - bounded_exp(x))
