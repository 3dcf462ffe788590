"""The value function of DiscoPOP, discovered by a language model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.bounded import bounded_exp
from value_functions.ranges import ANY, POSITIVE, Range


class DiscoPOP(ValueFunction):
    """With x = beta * u and m = sigmoid(x / tau): v = (1 - m) * log sigmoid(x) - m * e^-x.

    The log-ratio modulated loss of Lu et al. 2024 ("Discovering preference optimization algorithms", eq. 5):
    logistic for losses, exponential for gains. Not monotone around 0, so it is not the value function of a HALO.

    Args:
        beta: 1 / nats.
        tau: width of the transition between the two, in units of x; above 0.

    Raises:
        ValueError: tau is not above 0, or a number is not finite.
    """

    ranges: Mapping[str, Range] = {"beta": ANY, "tau": POSITIVE}
    violates: Mapping[str, str] = {
        "non_decreasing": "it falls around u = 0, in the transition from the logistic to the exponential",
        "concave_on_gains": "it rises again after that dip",
    }

    def __init__(self, *, beta: float = 0.1, tau: float = 0.05) -> None:
        super().__init__()
        self.beta, self.tau = self.accepted("beta", beta), self.accepted("tau", tau)

    def forward(self, u: Tensor) -> Tensor:
        x = self.beta * u
        # As one exponential: m * e^-x would be 0 * inf for large losses.
        exponential = bounded_exp(F.logsigmoid(x / self.tau) - x)
        return torch.sigmoid(-x / self.tau) * F.logsigmoid(x) - exponential
