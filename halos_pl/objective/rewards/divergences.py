"""Rewards of policies that are constrained by a divergence other than the reverse KL."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.rewards.base import Reward, log_ratios
from value_functions.bounded import bounded_exp


class ForwardKL(Reward):
    """r = 1 - exp(-log-ratio): DPO under a forward-KL constraint instead of the reverse one.

    The score of Wang et al. 2023 ("Beyond reverse KL", table 1), shifted so that r = 0 where policy equals
    reference. Not linear in the log-ratio. Below -40 nats it continues linearly, where exp would overflow.
    """

    needs = Needs(reference=True)
    violates: Mapping[str, str] = {"reward_linear": "1 - exp(-log-ratio), from a forward KL constraint"}

    def forward(self, rows: LogProbBatch) -> Tensor:
        return 1 - bounded_exp(-log_ratios(self, rows).sum(dim=1))


class JensenShannon(Reward):
    """r = log 2 + log sigmoid(log-ratio): DPO under a Jensen-Shannon constraint.

    The score of Wang et al. 2023 ("Beyond reverse KL", table 1), shifted so that r = 0 where policy equals
    reference. Not linear in the log-ratio.
    """

    needs = Needs(reference=True)
    violates: Mapping[str, str] = {"reward_linear": "log sigmoid of the log-ratio, from a Jensen-Shannon constraint"}

    def forward(self, rows: LogProbBatch) -> Tensor:
        return math.log(2) + F.logsigmoid(log_ratios(self, rows).sum(dim=1))


class AlphaDivergence(Reward):
    """r = (exp((alpha - 1) * log-ratio) - 1) / (alpha - 1): DPO under an alpha-divergence constraint.

    The score of Wang et al. 2023 ("Beyond reverse KL", table 1), up to its constant factor as in TRL, and
    shifted so that r = 0 where policy equals reference. Not linear in the log-ratio. Where the exponent
    exceeds 40, it continues linearly.

    Args:
        alpha: order of the divergence, in (0, 1); r tends to the log-ratio towards 1, and to ``ForwardKL`` towards 0.

    Raises:
        ValueError: alpha is outside (0, 1).
    """

    needs = Needs(reference=True)
    violates: Mapping[str, str] = {"reward_linear": "a power of the ratio, from an alpha-divergence constraint"}

    def __init__(self, *, alpha: float = 0.5) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(f"AlphaDivergence: alpha is {alpha}; it must be in (0, 1)")
        self.alpha = float(alpha)

    def forward(self, rows: LogProbBatch) -> Tensor:
        slope = self.alpha - 1
        return (bounded_exp(slope * log_ratios(self, rows).sum(dim=1)) - 1) / slope
