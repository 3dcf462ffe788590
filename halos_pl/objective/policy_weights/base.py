"""The contract of a policy weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from value_functions.discovery import Declared

ActsOn = Literal["loss", "outcome"]


class PolicyWeight(nn.Module, Declared, ABC):
    """A number for each row, or each token, that depends on the policy and has no gradient.

    In a HALO (Ethayarajh et al., ICML 2024, Def. 3.4), signs and weights do not depend on the policy, so a loss with a
    policy weight is none. :class:`~halos_pl.objective.policy_weighted.PolicyWeighted` applies it.

    A subclass is a small ``nn.Module`` with keyword-only hyper-parameters and one method, ``forward``. It is called
    once per optimizer step, on rows without gradient. What it remembers belongs in ``get_extra_state``.

    Attributes:
        acts_on: ``loss`` if the number multiplies the row's weight; ``outcome`` if it multiplies u = r - z0 before v.
        needs: inputs that the rows must provide, beside those of the HALO.
        violates: clause to reason; see :class:`~value_functions.discovery.Declared`.
    """

    acts_on: ActsOn = "loss"
    needs: Needs = Needs()

    @abstractmethod
    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        """The number of each row or token, at least 0.

        Args:
            rewards: the HALO's rewards in nats, float [n], or [n, T] for a reward per token; without gradient.
            rows: this rank's share of the step, including mismatched rows.

        Returns:
            float [n], or [n, T] with a reward per token.
        """
