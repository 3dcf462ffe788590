"""Rewards: what a completion is worth to the policy, in nats."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from halos_pl.outcomes import Needs, Rows


class Reward(nn.Module, ABC):
    """r(x, y) of each row.

    A HALO in the sense of Ethayarajh et al. (ICML 2024, Def. 3.4) takes
    r = l(y) * log[pi_theta(y|x) / pi_ref(y|x)] with l > 0.
    """

    needs: Needs = Needs()

    @abstractmethod
    def forward(self, rows: Rows) -> Tensor:
        """Rewards in nats, float [n], with the gradient of ``rows.policy_logps``."""


def _per_row(token_values: Tensor, rows: Rows, length_normalised: bool) -> Tensor:
    total = token_values.sum(dim=1)
    return total / rows.mask.sum(dim=1) if length_normalised else total


class LogRatio(Reward):
    """Implied reward of DPO and KTO: sum over completion tokens of log pi_theta / pi_ref.

    Rafailov et al. 2023, eq. 5, without beta (which belongs to the value function here, so that rewards stay
    in nats and comparable between ablations).

    Args:
        length_normalised: divide by the number of completion tokens, l(y) = 1 / \\|y\\|: nats per token.
    """

    needs = Needs(reference=True)

    def __init__(self, *, length_normalised: bool = False) -> None:
        super().__init__()
        self.length_normalised = length_normalised

    def forward(self, rows: Rows) -> Tensor:
        if rows.reference_logps is None:
            raise ValueError("LogRatio needs reference log-probs: choose a reference_model, or reward: LogProb")
        return _per_row(rows.policy_logps - rows.reference_logps, rows, self.length_normalised)


class LogProb(Reward):
    """Plain log-probability: sum over completion tokens of log pi_theta. Needs no reference model.

    Equals ``LogRatio`` up to a constant where pi_ref is uniform over completions (Ethayarajh et al., ICML
    2024, section 4.3, the variant without a reference model); otherwise it is no HALO reward.

    Args:
        length_normalised: divide by the number of completion tokens: nats per token.
    """

    def __init__(self, *, length_normalised: bool = False) -> None:
        super().__init__()
        self.length_normalised = length_normalised

    def forward(self, rows: Rows) -> Tensor:
        return _per_row(rows.policy_logps, rows, self.length_normalised)
