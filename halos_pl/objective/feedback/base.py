"""The contract of feedback, and shared helpers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.feedback.slopes import Slopes
from value_functions.discovery import Declared


class Judgement(NamedTuple):
    """People's judgement of each row, as signs and weights.

    Attributes:
        sign: float [n], a in {-1, +1}; -1: raising the value lowers the loss (desirable).
        weight: float [n], w >= 0; 0 for mismatched rows.
        denominator: float scalar, this rank's share of the denominator of the step's loss.
    """

    sign: Tensor
    weight: Tensor
    denominator: Tensor


class Feedback(nn.Module, Declared, ABC):
    """Judges rows by their labels alone, not by ``policy_logps``: a and w do not depend on theta.

    The loss multiplies w by the row's own weight (``Labels.weight``), so a feedback must not.

    What a feedback knows of earlier steps, it knows from :meth:`observe`, and keeps in ``get_extra_state``.

    A subclass is a small ``nn.Module`` with keyword-only hyper-parameters and one method, ``forward``. In a file of
    this package it is available by its bare name, without registration; in any other importable module, by its dotted
    path.

    Attributes:
        needs: inputs that the rows must provide.
        follows_slopes: whether the weights follow what :meth:`observe` is told, so as to set the ratio of the classes'
            slopes.
        violates: clause to reason; see :class:`~value_functions.discovery.Declared`.
    """

    needs: Needs = Needs(undesirable=True)
    follows_slopes: bool = False

    @abstractmethod
    def forward(self, rows: LogProbBatch) -> Judgement:
        """Sign, weight and denominator.

        Args:
            rows: this rank's share of a step, including mismatched rows; the log-probs may not have been computed yet.
        """

    def observe(self, slopes: Slopes) -> None:
        """Called once per optimizer step on every rank, after the step's losses; by default, it does nothing.

        Until the next call, ``forward`` must depend on its rows alone.

        Args:
            slopes: how the loss of the step depends on the rewards of this rank's rows.
        """


Denominator = Literal["rows", "pairs", "tokens"]


def denominator_of(rows: LogProbBatch, kind: Denominator) -> Tensor:
    """Number of rows, pairs or tokens with a loss on this rank, float scalar."""
    train = rows.labels.train
    counted: dict[str, Callable[[], Tensor]] = {
        "rows": lambda: train,
        "pairs": lambda: train & rows.labels.desirable,
        "tokens": lambda: rows.mask & train[:, None],
    }
    return counted[kind]().sum().float()


def require_pairs(feedback: Feedback, rows: LogProbBatch) -> None:
    """Refuses rows without a paired completion.

    Raises:
        ValueError: a row has none; names the class of ``feedback``.
    """
    if rows.labels.unpaired:
        name = type(feedback).__name__
        raise ValueError(f"{name}: a row has no paired completion; this feedback needs data with chosen and rejected")
