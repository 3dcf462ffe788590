"""Figures of held-out rows, over all batches and ranks of an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import BinaryAUROC

from halos_pl.distributed import sum_over_ranks
from halos_pl.training.engine import Part
from halos_pl.training.metrics import Losses, Means, Weighted, into_unit_interval, with_margin


class HeldOutFigures:
    """Sums figures until they are read.

    Attributes:
        means: figures of rows, by name.
    """

    def __init__(self) -> None:
        self.means = Means()
        self._auroc = BinaryAUROC()

    def reset(self) -> None:
        """Forgets everything."""
        self.means = Means()
        self._auroc.reset()

    def add(self, part: Part, figures: dict[str, Weighted], reward: Tensor | None) -> None:
        """Adds a part of a batch: its figures, and its rewards in nats, [m], where it has some."""
        self.means.add(figures)
        if reward is not None:
            scores = into_unit_interval(reward)
            self._auroc.update(scores, part.rows.labels.desirable.long().to(scores.device))

    def add_losses(self, losses: Losses, rows: Tensor) -> None:
        """Adds a batch's losses, which count with its number of rows: summed over ranks, loss * rows / rows."""
        here = rows.float()
        everywhere = sum_over_ranks(here)
        self.means.add({name: (value * everywhere, here) for name, value in losses.items()})

    def compute(self, device: torch.device) -> dict[str, float]:
        """The figures of all ranks, the same on each; starts anew afterwards."""
        means = with_margin(self.means.compute(empty=False))
        targets: Any = self._auroc.target
        labels = torch.cat(list(targets)) if targets else torch.zeros(0)
        both = sum_over_ranks(torch.stack([(labels == 0).sum(), (labels == 1).sum()]).float().to(device))
        if bool((both > 0).all()):
            means["rewards/auroc"] = float(self._auroc.compute())
        self._auroc.reset()
        return means
