"""The value function of EXO for pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.ranges import ANY, Range


class ExoPair(ValueFunction):
    """v(u) = -KL(q || p): q = (sigmoid(beta u), sigmoid(-beta u)), p = (1 - epsilon, epsilon).

    EXO, the reverse KL divergence from the smoothed preference (Ji et al. 2024, eq. 16). It peaks where
    sigmoid(beta u) = 1 - epsilon and falls towards log(1 - epsilon) beyond, so it is not the value function of a HALO.

    Args:
        beta: 1 / nats.
        label_smoothing: epsilon in (0, 0.5), the probability that the rejected completion is preferred.

    Raises:
        ValueError: epsilon is outside its range; at 0 the divergence would be infinite.
    """

    ranges: Mapping[str, Range] = {"beta": ANY, "label_smoothing": Range(0, 0.5)}
    violates: Mapping[str, str] = {
        "non_decreasing": "it peaks where sigmoid(beta u) = 1 - epsilon",
        "concave_on_gains": "it levels off towards log(1 - epsilon) beyond its peak",
    }

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> None:
        super().__init__()
        self.beta = self.accepted("beta", beta)
        self.label_smoothing = self.accepted("label_smoothing", label_smoothing)

    def forward(self, u: Tensor) -> Tensor:
        x = self.beta * u
        wins, loses = math.log1p(-self.label_smoothing), math.log(self.label_smoothing)
        divergence = torch.sigmoid(x) * (F.logsigmoid(x) - wins) + torch.sigmoid(-x) * (F.logsigmoid(-x) - loses)
        return -divergence
