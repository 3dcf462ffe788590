"""The log-sigmoid value function of DPO."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.ranges import POSITIVE, Range


class LogSigmoid(ValueFunction):
    """v(u) = log sigmoid(beta * u): concave everywhere, below 0, close to beta * u for large losses.

    The value function of DPO (Rafailov et al. 2023, eq. 7; shown to be a HALO in Ethayarajh et al., ICML
    2024, Thm. 3.5) and, applied to undesirable rows too, of the paper's ablation "v = log sigma".

    Args:
        beta: risk aversion, 1 / nats.

    Raises:
        ValueError: beta is not above 0.
    """

    ranges: Mapping[str, Range] = {"beta": POSITIVE}

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = self.accepted("beta", beta)

    def forward(self, u: Tensor) -> Tensor:
        return F.logsigmoid(self.beta * u)
