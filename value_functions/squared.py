"""The squared value function of regressions on scores."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.ranges import POSITIVE, Range


class Squared(ValueFunction):
    """v(u) = -(beta u)^2: the reference point itself is the target.

    With a reference point made of scores, this is the loss of REBEL (Gao et al. 2024, eq. 6), A*-PO (Brantley et al.
    2025, eq. 4), QRPO (Matrenok et al. 2025, eq. 12) and DRO (Richemond et al. 2024, eq. 4), which regress the
    log-ratio on scores. It falls on gains, so it is not the value function of a HALO.

    Args:
        beta: unit of the scores per nat, 1 / nats; above 0.

    Raises:
        ValueError: beta is not above 0.
    """

    ranges: Mapping[str, Range] = {"beta": POSITIVE}
    violates: Mapping[str, str] = {"non_decreasing": "it falls on gains: the target is u = 0"}

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = self.accepted("beta", beta)

    def forward(self, u: Tensor) -> Tensor:
        return -(self.beta * u).square()
