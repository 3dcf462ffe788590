"""The token log-ratio of DPPO."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.rewards.base import Reward, log_ratios


class TotalVariationLogRatio(Reward):
    """Log-ratio of each token, [n, T], constant where the token's probability has moved by more than a bound.

    DPPO-Binary-TV (Qi et al. 2026, arXiv 2602.04879; ``dppo_tv`` of verl): pi_theta is clamped to [pi_ref - low,
    pi_ref + high] before its logarithm is taken, so a token whose probability has moved further has no gradient. PPO's
    clip bounds the ratio instead, which rare tokens exceed at once. ``high`` alone is for rows with positive advantage,
    ``low`` alone for the others.

    Args:
        low, high: bounds of the change of probability, in (0, 1); null for no bound.

    Raises:
        ValueError: a bound is outside (0, 1), or both are null.
    """

    needs = Needs(reference=True)
    violates: Mapping[str, str] = {
        "reward_linear": "tokens whose probability moved further than the bounds are constant"
    }

    def __init__(self, *, low: float | None = None, high: float | None = 0.2) -> None:
        super().__init__()
        if low is None and high is None:
            raise ValueError(
                "TotalVariationLogRatio: low and high are null, so nothing is clamped; choose TokenLogRatio"
            )
        for name, bound in (("low", low), ("high", high)):
            if bound is not None and not 0 < bound < 1:
                raise ValueError(f"TotalVariationLogRatio: {name} is {bound}; it must be in (0, 1), or null")
        self.low, self.high = low, high

    def forward(self, rows: LogProbBatch) -> Tensor:
        ratios = log_ratios(self, rows)
        before = rows.policy_logps.detach() - ratios.detach()  # log pi_ref
        if self.high is not None:
            ratios = torch.minimum(ratios, torch.log(before.exp() + self.high) - before)
        if self.low is not None:  # log 0 where the probability cannot fall by so much: no bound
            ratios = torch.maximum(ratios, torch.log((before.exp() - self.low).clamp(min=0)) - before)
        return ratios
