"""The squared value function of IPO and SPPO."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.ranges import POSITIVE, Range


class Quadratic(ValueFunction):
    """v(u) = -(u - 1 / (2 beta))^2: a target; beyond it, more is worse.

    IPO (Azar et al. 2023, eq. 17, where beta is tau) and SPPO (Wu et al. 2024, eq. 4.4). It falls beyond its target, so
    it is not the value function of a HALO.

    Args:
        beta: 1 / nats; the target is at 1 / (2 beta) nats.

    Raises:
        ValueError: beta is not above 0.
    """

    ranges: Mapping[str, Range] = {"beta": POSITIVE}
    violates: Mapping[str, str] = {"non_decreasing": "it falls beyond its target 1 / (2 beta)"}

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = self.accepted("beta", beta)

    def forward(self, u: Tensor) -> Tensor:
        return -(u - 1 / (2 * self.beta)).square()
