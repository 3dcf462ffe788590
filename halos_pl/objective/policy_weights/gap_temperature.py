"""The temperature of beta-DPO."""

from __future__ import annotations

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.policy_weights.base import ActsOn, PolicyWeight
from halos_pl.objective.reference_points.base import MeanOverRanks


class GapTemperature(PolicyWeight):
    """A factor of all outcomes of a step that grows with the step's mean reward gap: 1 + rate * (mean gap - M).

    Beta-DPO (Wu et al. 2024, eq. 8): beta becomes beta times this factor. M is an exponential moving average of the
    mean gap r_chosen - r_rejected over steps, which starts from 0 and includes this step. The paper also draws a subset
    of each batch at random, which is not done here. M is in the state dict and changes in training only.

    Args:
        rate: change of the factor per nat (alpha).
        momentum: weight of the old M, in [0, 1).
        least: lower bound of the factor, above 0.

    Raises:
        ValueError: an argument is outside its range; when called: a row has no paired completion, or the reward is one
            number per token.
    """

    acts_on: ActsOn = "outcome"
    needs = Needs(pairs=True)

    def __init__(self, *, rate: float = 0.6, momentum: float = 0.9, least: float = 0.01) -> None:
        super().__init__()
        if not 0 <= momentum < 1 or not least > 0:
            raise ValueError(
                f"GapTemperature: momentum is {momentum} and least {least}; momentum must be in [0, 1), least above 0"
            )
        self.rate, self.momentum, self.least = float(rate), float(momentum), float(least)
        self.mean = 0.0

    def get_extra_state(self) -> dict[str, float]:
        return {"mean": self.mean}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.mean = state["mean"]

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        if rows.labels.unpaired:
            raise ValueError("GapTemperature: a row has no paired completion; use data with chosen and rejected")
        if rewards.dim() > 1:  # a mean over them would depend on padding
            raise ValueError("GapTemperature compares rewards of rows, so it needs a reward per row, such as LogRatio")
        chosen = (rows.labels.desirable & rows.labels.train).nonzero().squeeze(1)
        of_step = MeanOverRanks(rewards[chosen] - rewards[rows.labels.pair[chosen]])
        gap = float(of_step.mean)
        if self.training and float(of_step.count):
            self.mean = self.momentum * self.mean + (1 - self.momentum) * gap
        return torch.full_like(rewards, max(1 + self.rate * (gap - self.mean), self.least))
