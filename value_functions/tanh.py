"""The hyperbolic tangent as a value function."""

from __future__ import annotations

import torch
from torch import Tensor

from value_functions.base import ValueFunction


class Tanh(ValueFunction):
    """v(u) = tanh(beta * u): concave in gains, convex in losses, v(0) = 0, between -1 and 1.

    Equals 2 * sigmoid(2 beta u) - 1: KTO with twice the risk aversion and twice the scale. The slope at 0 is beta,
    as for ``Identity`` and ``CARA``.

    Args:
        beta: 1 / nats.

    Raises:
        ValueError: beta is not above 0.
    """

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"Tanh: beta is {beta}; it must be above 0")
        self.beta = float(beta)

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(self.beta * u)
