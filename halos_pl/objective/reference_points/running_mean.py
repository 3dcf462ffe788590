"""The mean of another estimate over steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.reference_points.base import Estimate, ReferencePoint
from halos_pl.objective.reference_points.batch import BatchMean


class RunningMean(ReferencePoint):
    """z0 = mean of another estimate over all steps up to the current one, no gradient.

    With ``BatchMean``, the default, this is the reward shift of BCO (Jung et al. 2024, section 4): all rows, desirable
    and undesirable alike, count equally. With ``MismatchedKL`` it is a smoother estimate of KTO's z0. Mean and count
    are in the state dict, so a resumed run continues with them; they change in training only, once per step, and are
    equal on all ranks. They are numbers, not buffers, as a Trainer in half precision would round buffers.

    Args:
        of: reference point to average; of scope ``step``, with one number per step.
        decay: None for the mean over all rows so far, with each step weighted by its number of rows; a number in [0, 1)
            for an exponential moving average over steps, where ``decay`` is the weight of the old average.

    Raises:
        ValueError: decay is outside [0, 1), or ``of`` gives a number for each row or needs no inputs; when called:
            ``of`` turns out to give a number for each row.
    """

    def __init__(self, *, of: ReferencePoint | None = None, decay: float | None = None) -> None:
        super().__init__()
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"RunningMean: decay is {decay}; it must be in [0, 1), or null for a plain mean")
        self.of = of or BatchMean()
        each = self.of.scope != "step" or self.of.per_row
        if each or self.of.needs == Needs():
            why = "gives a number for each row, not one per step" if each else "does not depend on the rows"
            raise ValueError(f"RunningMean: {type(self.of).__name__} {why}, so it cannot be averaged over steps")
        self.needs = self.of.needs
        self.decay = decay
        self.mean = 0.0
        self.count = 0

    @property
    def violates(self) -> Mapping[str, str]:  # type: ignore[override]
        """The clauses that the averaged estimate violates."""
        return self.of.violates

    def get_extra_state(self) -> dict[str, float]:
        return {"mean": self.mean, "count": self.count}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.mean, self.count = state["mean"], int(state["count"])

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        of_step = self.of(rewards, rows)
        if of_step.value.dim():
            raise ValueError(f"RunningMean: {type(self.of).__name__} gives a number for each row, not one per step")
        number = of_step.value.detach()
        rows_of_step = torch.ones_like(number) * (1 if of_step.rows is None else of_step.rows)
        # The mean is a number on the host, so this waits for the device, once. If the number of rows is unknown, each
        # step counts equally.
        value, weight = (torch.stack([number, rows_of_step]).tolist()) if self.training else (0.0, 0.0)
        if weight > 0:
            count = self.count + int(weight)
            # In the first step there is no old mean, so its weight is 0 either way.
            keep = self.count / count if self.decay is None or self.count == 0 else self.decay
            self.mean = keep * self.mean + (1 - keep) * value
            self.count = count
        return Estimate(
            torch.full_like(of_step.value, self.mean),
            standard_error=of_step.standard_error,
            rows=float(self.count),
            clamped=of_step.clamped,
            further={"step_estimate": of_step.estimate},
        )
