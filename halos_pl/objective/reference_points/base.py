"""The contract of a reference point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import sum_over_ranks
from value_functions.discovery import Declared


@dataclass(frozen=True)
class Estimate:
    """z0 of a step or of its rows, and how good the estimate is. All but ``value`` is only logged (``outcome/z0_*``).

    Attributes:
        value: nats, a scalar for all rows or [n].
        standard_error: nats, of ``value``; 0 if it is exact.
        rows: how many rows the estimate of one row averages; None if unknown.
        clamped: share of rows whose estimate was replaced by a bound.
        mean: nats, the estimate before any clamp, averaged over the rows; left out, the mean of ``value``.
        further: other figures by name.
    """

    value: Tensor
    standard_error: Tensor | float = 0.0
    rows: Tensor | float | None = None
    clamped: Tensor | float = 0.0
    mean: Tensor | None = None
    further: Mapping[str, Tensor | float] = field(default_factory=dict)

    def select(self, index: Tensor) -> Estimate:
        """The estimate of the rows ``index`` (LongTensor [m])."""
        return replace(self, value=self.value[index]) if self.value.dim() else self

    def figures(self) -> dict[str, Tensor]:
        """The logged figures by name, float32 scalars without gradient."""
        mean = self.value if self.mean is None else self.mean
        figures = {
            "standard_error": self.standard_error,
            "rows": self.rows or 0.0,
            "clamped": self.clamped,
            **self.further,
        }
        of_float = {"estimate": mean.detach().float().mean()}
        for name, figure in figures.items():
            of_float[name] = torch.as_tensor(figure, dtype=torch.float32, device=mean.device).detach()
        return of_float


class ReferencePoint(nn.Module, Declared, ABC):
    """Estimates z0 = E_Q[r(x, y')], what the rewards of a step are compared with.

    A subclass is a small ``nn.Module`` with keyword-only hyper-parameters and one method, ``forward``. In a file of
    this package it is found by its bare name, without being registered anywhere; in any other importable module, by its
    dotted path.

    Attributes:
        scope: ``step``: estimated for a whole optimizer step over all ranks, without gradient, called once
            per step however the step is split into micro-batches. ``row``: read off the row itself and the
            rows that stay with it (its paired completion; with ``needs.whole_step`` all of them), with gradient.
        per_row: of scope ``step``: gives each row a number of its own instead of one for the step.
        needs: which rows must have been scored before ``forward`` is called. A ``step`` reference point that
            does not ask for ``step_rewards`` may read the rewards of mismatched rows only.
        violates: clause to reason; see :class:`~value_functions.discovery.Declared`.
        excused: clause to reason, of ``reference_in_range`` and ``reference_shift_equivariant``: an estimate of z0 that
            is by design no mean of the rewards at hand. Reports list these failures as ``expected``, with the reason,
            and they do not count against a loss. A subclass with a ``forward`` of its own inherits none.
    """

    scope: Literal["step", "row"] = "step"
    per_row: bool = False
    needs: Needs = Needs()
    excused: Mapping[str, str] = MappingProxyType({})
    _statements = ("violates", "excused")

    @abstractmethod
    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        """The reference point of each row.

        Args:
            rewards: nats, float [n]; detached where ``scope`` is ``step``. Where the reward is one of tokens, the
                mean over each row's tokens.
            rows: the rows that the rewards belong to.

        Returns:
            nats, one number for all rows, or [n].
        """


class MeanOverRanks:
    """Mean and standard error of a sample that is spread over the ranks.

    Two reductions (sum and count, then squared deviations): exact, however rows fall on ranks.

    Attributes:
        mean: float scalar, 0 where no rank holds a value.
        standard_error: float scalar, of the mean; 0 for fewer than two values.
        count: float scalar, number of values over all ranks.
    """

    def __init__(self, values: Tensor) -> None:
        values = values.detach().float()
        total, self.count = sum_over_ranks(torch.stack([values.sum(), values.new_tensor(float(len(values)))]))
        self.mean = total / self.count.clamp(min=1)
        squares = sum_over_ranks((values - self.mean).square().sum())
        variance = squares / (self.count - 1).clamp(min=1)
        self.standard_error = (variance / self.count.clamp(min=1)).sqrt()

    def estimate(self) -> Estimate:
        """Their mean as a reference point."""
        return Estimate(self.mean, standard_error=self.standard_error, rows=self.count)
