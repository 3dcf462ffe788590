"""The contract of a reference point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import sum_over_ranks
from value_functions.discovery import Declared


@dataclass(frozen=True)
class Estimate:
    """z0 of a step or of its rows, and its accuracy. Everything but ``value`` is only logged (``outcome/z0_*``).

    Attributes:
        value: nats, a scalar for all rows or [n].
        standard_error: standard error of ``value``, nats; 0 if it is exact.
        rows: number of rows averaged for the estimate of one row; None if unknown.
        clamped: share of rows whose estimate was clamped to a bound.
        mean: estimate before clamping, averaged over the rows, nats; default: the mean of ``value``.
        further: other figures by name.
    """

    value: Tensor
    standard_error: Tensor | float = 0.0
    rows: Tensor | float | None = None
    clamped: Tensor | float = 0.0
    mean: Tensor | None = None
    further: Mapping[str, Tensor | float] = field(default_factory=dict)

    def select(self, index: Tensor) -> Estimate:
        """The estimate for the rows ``index`` (LongTensor [m])."""
        return replace(self, value=self.value[index]) if self.value.dim() else self

    @property
    def estimate(self) -> Tensor:
        """The mean before clamping over the rows, nats, float32 scalar without gradient."""
        return (self.value if self.mean is None else self.mean).detach().float().mean()

    def figures(self) -> dict[str, Tensor]:
        """The logged figures by name, float32 scalars without gradient."""
        estimate = self.estimate
        figures = {
            "standard_error": self.standard_error,
            "rows": 0.0 if self.rows is None else self.rows,
            "clamped": self.clamped,
            **self.further,
        }
        scalars = {"estimate": estimate}
        for name, figure in figures.items():
            # full, not as_tensor: copying a number to a device waits for it, filling does not.
            scalars[name] = (
                figure.detach().to(estimate.device, torch.float32)
                if isinstance(figure, Tensor)
                else torch.full((), figure, dtype=torch.float32, device=estimate.device)
            )
        return scalars


class ReferencePoint(nn.Module, Declared, ABC):
    """Estimates z0 = E_Q[r(x, y')], with which the rewards of a step are compared.

    A subclass is a small ``nn.Module`` with keyword-only hyper-parameters and one method, ``forward``. In a file of
    this package it is available by its bare name, without registration; in any other importable module, by its dotted
    path.

    Attributes:
        scope: ``step``: estimated for a whole optimizer step over all ranks, without gradient; called once per step,
            regardless of micro-batches. ``row``: computed from the row itself and the rows that stay with it (its
            paired completion; with ``needs.whole_step``, all rows), with gradient.
        per_row: whether a reference point of scope ``step`` gives each row its own number instead of one for the step.
        within_prompt: whether an outcome r - z0 stays the same if all rewards of a prompt shift by the same number.
            Preferences determine a learned reward only up to such shifts.
        needs: inputs that must be available when ``forward`` is called. A ``step`` reference point that does not need
            ``step_rewards`` may only read the rewards of mismatched rows.
        violates: clause to reason; see :class:`~value_functions.discovery.Declared`.
    """

    scope: Literal["step", "row"] = "step"
    per_row: bool = False
    within_prompt: bool = False
    needs: Needs = Needs()

    @abstractmethod
    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        """The reference point of each row.

        Args:
            rewards: nats, float [n]; detached if ``scope`` is ``step``. For a reward per token, the mean over each
                row's tokens.
            rows: rows that the rewards belong to.

        Returns:
            Nats, one number for all rows, or [n].
        """


class MeanOverRanks:
    """Mean and standard error of a sample that is distributed over the ranks.

    Two reductions (sum and count, then squared deviations) make it exact for any distribution of rows over ranks.

    Attributes:
        mean: float scalar; 0 if no rank has a value.
        standard_error: standard error of the mean, float scalar; 0 for fewer than two values.
        count: number of values over all ranks, float scalar.
    """

    def __init__(self, values: Tensor) -> None:
        values = values.detach().float()
        self._here = len(values)
        here = values.sum()
        total, self.count = sum_over_ranks(torch.stack([here, torch.full_like(here, self._here)]))
        some = self.count.clamp(min=1)
        self.mean = total / some
        squares = sum_over_ranks((values - self.mean).square().sum())
        variance = squares / (self.count - 1).clamp(min=1)
        self.standard_error = (variance / some).sqrt()

    @property
    def empty(self) -> bool:
        """Whether no rank has a value; a rank with values knows without waiting for its device."""
        return self._here == 0 and bool(self.count == 0)

    def estimate(self) -> Estimate:
        """The mean as a reference point."""
        return Estimate(self.mean, standard_error=self.standard_error, rows=self.count)
