"""The hyperbolic tangent as a value function."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.ranges import POSITIVE, Range


class Tanh(ValueFunction):
    """v(u) = tanh(beta * u): concave in gains, convex in losses, v(0) = 0, between -1 and 1.

    Equals 2 * sigmoid(2 beta u) - 1: KTO with twice the risk aversion and twice the scale. The slope at 0 is beta,
    as for ``Identity`` and ``CARA``.

    Args:
        beta: 1 / nats.

    Raises:
        ValueError: beta is not above 0.
    """

    ranges: Mapping[str, Range] = {"beta": POSITIVE}

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = self.accepted("beta", beta)

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(self.beta * u)
