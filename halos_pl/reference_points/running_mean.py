"""A mean over the rewards of this and earlier steps."""

from __future__ import annotations

import torch
from torch import Tensor

from halos_pl.outcomes import Needs, Rows
from halos_pl.reference_points.base import MeanOverRanks, ReferencePoint


class RunningMean(ReferencePoint):
    """z0 = mean reward of the rows seen so far, this step's included, no gradient.

    The reward shift of BCO (Jung et al. 2024, section 4): all rows, desirable and undesirable alike, counted
    equally. Mean and count are part of the state dict, so a resumed run goes on where it was; they move in
    training only, once per step, and are the same on every rank. They are numbers, not buffers, because a
    Trainer of half precision would round buffers.

    Args:
        decay: None for the plain mean over all rows so far; a number in [0, 1) for an exponential moving
            average of the steps' means, ``decay`` being the share of the old average that is kept.

    Raises:
        ValueError: for a decay outside [0, 1).
    """

    needs = Needs(step_rewards=True)

    def __init__(self, *, decay: float | None = None) -> None:
        super().__init__()
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"RunningMean: decay is {decay}; it must be in [0, 1), or null for a plain mean")
        self.decay = decay
        self.mean = 0.0
        self.count = 0

    def get_extra_state(self) -> dict[str, float]:
        return {"mean": self.mean, "count": self.count}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.mean, self.count = state["mean"], int(state["count"])

    def forward(self, rewards: Tensor, rows: Rows) -> Tensor:
        sample = MeanOverRanks(rewards[rows.train])
        if self.training and sample.count > 0:
            count = self.count + int(sample.count)
            # The first step has nothing to keep: the share below is 0 for it, under either rule.
            keep = self.count / count if self.decay is None or self.count == 0 else self.decay
            self.mean = keep * self.mean + (1 - keep) * float(sample.mean)
            self.count = count
        mean = torch.full_like(sample.mean, self.mean)
        self.diagnostics = {
            "estimate": mean,
            "step_mean": sample.mean,
            "standard_error": sample.standard_error,
            "rows": torch.full_like(sample.mean, self.count),
        }
        return mean
