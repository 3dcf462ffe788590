"""The contract of a reward, and the log-ratio that most rewards are based on."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from value_functions.discovery import Declared


class Reward(nn.Module, Declared, ABC):
    """r(x, y): the implied reward of a completion, in nats; it measures how strongly the policy prefers it.

    A subclass is a small ``nn.Module`` with keyword-only hyper-parameters and one method, ``forward``. In a file of
    this package it is available by its bare name, without registration; in any other importable module, by its dotted
    path.

    In a HALO (Ethayarajh et al., ICML 2024, Def. 3.4) r = l(y) * log[pi_theta(y|x) / pi_ref(y|x)] with l > 0.

    Attributes:
        needs: inputs that the rows must provide. A reward that reads ``rows.reference_logps`` needs ``reference``.
        violates: clause to reason; see :class:`~value_functions.discovery.Declared`.
    """

    needs: Needs = Needs()

    @abstractmethod
    def forward(self, rows: LogProbBatch) -> Tensor:
        """The reward of each row, which depends on that row alone.

        Args:
            rows: n rows, including mismatched ones.

        Returns:
            Nats, with the gradient of ``rows.policy_logps``: float [n], or [n, T] for a reward per token, whose values
            outside ``rows.mask`` may be any finite numbers.
        """


def per_row(token_values: Tensor, rows: LogProbBatch, length_normalised: bool) -> Tensor:
    """Sum or mean of ``token_values`` [n, T] over each row's tokens, float [n]."""
    total = token_values.sum(dim=1)
    return total / rows.mask.sum(dim=1) if length_normalised else total


def log_ratios(reward: Reward, rows: LogProbBatch) -> Tensor:
    """log pi_theta / pi_ref of each token, nats, float [n, T].

    Raises:
        ValueError: the rows have no reference log-probs; names the class of ``reward``.
    """
    if rows.reference_logps is None:
        raise ValueError(
            f"{type(reward).__name__} needs reference log-probs: choose a reference_model, or reward: LogProb"
        )
    return rows.policy_logps - rows.reference_logps
