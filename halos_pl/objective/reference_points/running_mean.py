"""A mean over the estimates of this and earlier steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.reference_points.base import Estimate, ReferencePoint
from halos_pl.objective.reference_points.batch import BatchMean


class RunningMean(ReferencePoint):
    """z0 = mean of another estimate over the steps so far, this one included, no gradient.

    Over ``BatchMean``, its default, the reward shift of BCO (Jung et al. 2024, section 4): all rows, desirable
    and undesirable alike, counted equally. Over ``MismatchedKL`` a steadier estimate of KTO's z0. Mean and
    count are part of the state dict, so a resumed run goes on where it was; they move in
    training only, once per step, and are the same on every rank. They are numbers, not buffers, because a
    Trainer of half precision would round buffers.

    Args:
        of: what is averaged; of scope ``step``, one number a step.
        decay: None for the plain mean over all rows so far, each step counted with its rows; a number in [0, 1)
            for an exponential moving average of the steps' estimates, ``decay`` being the share of the old average
            that is kept.

    Raises:
        ValueError: for a decay outside [0, 1), or an ``of`` that gives each row a number or that needs nothing; when
            called, for one that does not say that it does.
    """

    def __init__(self, *, of: ReferencePoint | None = None, decay: float | None = None) -> None:
        super().__init__()
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"RunningMean: decay is {decay}; it must be in [0, 1), or null for a plain mean")
        self.of = of or BatchMean()
        each = self.of.scope != "step" or self.of.per_row
        if each or self.of.needs == Needs():
            why = "gives a number for each row, not one a step" if each else "looks at no row"
            raise ValueError(f"RunningMean: {type(self.of).__name__} {why}; there is no mean to keep")
        self.needs = self.of.needs
        self.decay = decay
        self.mean = 0.0
        self.count = 0

    @property
    def excused(self) -> Mapping[str, str]:  # type: ignore[override]
        """What the averaged estimate is excused from."""
        return self.of.excused

    @property
    def violates(self) -> Mapping[str, str]:  # type: ignore[override]
        """What the averaged estimate violates."""
        return self.of.violates

    def get_extra_state(self) -> dict[str, float]:
        return {"mean": self.mean, "count": self.count}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.mean, self.count = state["mean"], int(state["count"])

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        of_step = self.of(rewards, rows)
        if of_step.value.dim():
            raise ValueError(f"RunningMean: {type(self.of).__name__} gives a number for each row, not one a step")
        rows_behind = 1 if of_step.rows is None else int(of_step.rows)  # one that does not say counts each step equally
        if self.training and rows_behind > 0:
            count = self.count + rows_behind
            # The first step has nothing to keep: the share below is 0 for it, under either rule.
            keep = self.count / count if self.decay is None or self.count == 0 else self.decay
            self.mean = keep * self.mean + (1 - keep) * float(of_step.value)
            self.count = count
        return Estimate(
            torch.full_like(of_step.value, self.mean),
            standard_error=of_step.standard_error,
            rows=float(self.count),
            clamped=of_step.clamped,
            further={"step_estimate": of_step.figures()["estimate"]},
        )
