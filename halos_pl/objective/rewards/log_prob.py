"""The plain log-probability, without a reference model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.objective.rewards.base import Reward, per_row


class LogProb(Reward):
    """Plain log-probability: sum over completion tokens of log pi_theta. Needs no reference model.

    Equals ``LogRatio`` up to a constant if pi_ref is uniform over completions (Ethayarajh et al., ICML 2024,
    section 4.3, the variant without a reference model); otherwise it is not the reward of a HALO.

    Args:
        length_normalised: whether to divide by the number of completion tokens: nats per token.
    """

    violates: Mapping[str, str] = {"reward_zero_at_reference": "it has no reference model"}

    def __init__(self, *, length_normalised: bool = False) -> None:
        super().__init__()
        self.length_normalised = length_normalised

    def forward(self, rows: LogProbBatch) -> Tensor:
        return per_row(rows.policy_logps, rows, self.length_normalised)
