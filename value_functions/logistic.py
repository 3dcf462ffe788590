"""The logistic value function of KTO."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.ranges import POSITIVE, Range


class Logistic(ValueFunction):
    """v(u) = sigmoid(beta * u): concave in gains, convex in losses, saturating on both sides.

    The value function of KTO (Ethayarajh et al., ICML 2024, eq. 7). The gradient vanishes
    far from the reference point, so extreme, possibly mislabelled rows are ignored (Prop. 4.1).

    Args:
        beta: risk aversion, 1 / nats. The higher it is, the sooner gains saturate.

    Raises:
        ValueError: beta is not above 0.
    """

    ranges: Mapping[str, Range] = {"beta": POSITIVE}

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = self.accepted("beta", beta)

    def forward(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.beta * u)
