"""The risk-neutral value function."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.ranges import POSITIVE, Range


class Identity(ValueFunction):
    """v(u) = beta * u: risk-neutral, as every nat has the same value.

    The paper's ablation "v = identity" (Ethayarajh et al., ICML 2024, Table 2). The reference point then
    only shifts the loss, unless it has a gradient.

    Args:
        beta: value of one nat.

    Raises:
        ValueError: beta is not above 0.
    """

    ranges: Mapping[str, Range] = {"beta": POSITIVE}

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = self.accepted("beta", beta)

    def forward(self, u: Tensor) -> Tensor:
        return self.beta * u
