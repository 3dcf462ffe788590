"""The risk-neutral value function."""

from __future__ import annotations

from torch import Tensor

from value_functions.base import ValueFunction


class Identity(ValueFunction):
    """v(u) = beta * u: risk-neutral, as every nat has the same value.

    The paper's ablation "v = identity" (Ethayarajh et al., ICML 2024, Table 2). The reference point then
    only shifts the loss, unless it has a gradient.

    Args:
        beta: value of one nat.

    Raises:
        ValueError: beta is not above 0.
    """

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"Identity: beta is {beta}; it must be above 0")
        self.beta = float(beta)

    def forward(self, u: Tensor) -> Tensor:
        return self.beta * u
