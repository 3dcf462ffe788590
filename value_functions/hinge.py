"""The hinge value function of RSO and SLiC."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.ranges import ANY, POSITIVE, Range


class Hinge(ValueFunction):
    """v(u) = min(0, beta * u - margin): linear up to the margin, constant beyond.

    With ``margin=1`` this gives the hinge loss of RSO (Liu et al. 2023, eq. 10), with ``beta=1`` the calibration
    loss of SLiC (Zhao et al. 2023, eq. 1).

    Args:
        beta: value of one nat, 1 / nats; above 0.
        margin: value of beta * u beyond which the function is constant.

    Raises:
        ValueError: beta is not above 0, or a number is not finite.
    """

    ranges: Mapping[str, Range] = {"beta": POSITIVE, "margin": ANY}

    def __init__(self, *, beta: float = 0.1, margin: float = 1.0) -> None:
        super().__init__()
        self.beta, self.margin = self.accepted("beta", beta), self.accepted("margin", margin)

    def forward(self, u: Tensor) -> Tensor:
        return (self.beta * u - self.margin).clamp(max=0)
