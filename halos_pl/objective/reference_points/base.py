"""The contract of a reference point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import sum_over_ranks


class ReferencePoint(nn.Module, ABC):
    """Estimates z0 = E_Q[r(x, y')], what the rewards of a step are compared with.

    Attributes:
        scope: ``step``: estimated for a whole optimizer step over all ranks, without gradient, called once
            per step however the step is split into micro-batches. ``row``: read off the row itself and the
            rows that stay with it (its paired completion; with ``needs.whole_step`` all of them), with gradient.
        per_row: with scope ``step``: gives each row a number of its own instead of one for the step.
        needs: which rows must have been scored before ``forward`` is called. A ``step`` reference point that
            does not ask for ``step_rewards`` may read the rewards of mismatched rows only.
        diagnostics: what the last call had to say about its estimate, a float scalar a name; logged under
            ``outcome/z0_*``. See :meth:`report`.
    """

    scope: Literal["step", "row"] = "step"
    per_row: bool = False
    needs: Needs = Needs()

    def __init__(self) -> None:
        super().__init__()
        self.diagnostics: dict[str, Tensor] = {}

    @abstractmethod
    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        """The reference point of each row.

        Args:
            rewards: nats, float [n]; detached where ``scope`` is ``step``. Where the reward is one of tokens, the
                mean over each row's tokens.
            rows: the rows that the rewards belong to.

        Returns:
            nats, a scalar for all rows or [n].
        """

    def report(
        self,
        estimate: Tensor,
        *,
        standard_error: Tensor | float = 0.0,
        rows: Tensor | float = 0.0,
        clamped: Tensor | float = 0.0,
        **more: Tensor,
    ) -> None:
        """Sets the diagnostics, the same four for every reference point.

        Args:
            estimate: nats, scalar or [n], before any clamp; of several the mean is kept.
            standard_error: nats, of the estimate, 0 where it is no estimate but exact.
            rows: how many rows are behind the estimate of one row.
            clamped: share of rows whose estimate was replaced by a bound.
            more: whatever else there is to say.
        """
        estimate = estimate.detach().float().mean()
        figures = {"standard_error": standard_error, "rows": rows, "clamped": clamped, **more}
        self.diagnostics = {"estimate": estimate}
        for name, value in figures.items():
            self.diagnostics[name] = torch.as_tensor(value, dtype=torch.float32, device=estimate.device).detach()


class MeanOverRanks:
    """Mean and standard error of a sample that is spread over the ranks.

    Two reductions (sum and count, then squared deviations): exact, and blind to how rows fall on ranks.

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
