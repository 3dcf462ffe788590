"""The contract of a reward, and the log-ratio that most of them are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from value_functions.discovery import Declared


class Reward(nn.Module, Declared, ABC):
    """r(x, y): what a completion is worth to the policy, in nats.

    A subclass is a small ``nn.Module`` with keyword-only hyper-parameters and one method, ``forward``. In a file of
    this package it is found by its bare name, without being registered anywhere; in any other importable module, by its
    dotted path.

    In a HALO (Ethayarajh et al., ICML 2024, Def. 3.4) r = l(y) * log[pi_theta(y|x) / pi_ref(y|x)] with l > 0.

    Attributes:
        needs: what the rows must provide. A reward that reads ``rows.reference_logps`` needs ``reference``.
        violates: clause to reason; see :class:`~value_functions.discovery.Declared`.
    """

    needs: Needs = Needs()

    @abstractmethod
    def forward(self, rows: LogProbBatch) -> Tensor:
        """The reward of each row, which depends on that row alone.

        Args:
            rows: n rows, mismatched ones included.

        Returns:
            Nats, with the gradient of ``rows.policy_logps``: float [n], or one of each token, [n, T]. In a reward of
            tokens, places outside ``rows.mask`` may hold any finite number.
        """


def per_row(token_values: Tensor, rows: LogProbBatch, length_normalised: bool) -> Tensor:
    """Sum of ``token_values`` [n, T] over each row's tokens, or their mean; float [n]."""
    total = token_values.sum(dim=1)
    return total / rows.mask.sum(dim=1) if length_normalised else total


def log_ratios(reward: Reward, rows: LogProbBatch) -> Tensor:
    """log pi_theta / pi_ref of each token, nats, float [n, T].

    Raises:
        ValueError: if the rows carry no reference log-probs, naming the class of ``reward``.
    """
    if rows.reference_logps is None:
        raise ValueError(
            f"{type(reward).__name__} needs reference log-probs: choose a reference_model, or reward: LogProb"
        )
    return rows.policy_logps - rows.reference_logps
