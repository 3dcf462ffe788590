"""Feedback on all completions of a prompt at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.feedback.base import Feedback, Judgement


class EveryRow(Feedback):
    """a = -1 and w = 1 for every row, desirable or not; the loss is a mean over rows or prompts.

    For losses in which the scores enter through the reference point, such as ``Calibrated`` and ``GroupLogSumExp``.

    Args:
        per_prompt: whether to divide by the number of prompts instead of the number of rows.
    """

    def __init__(self, *, per_prompt: bool = False) -> None:
        super().__init__()
        self.per_prompt = per_prompt
        self.needs = Needs(undesirable=True, groups=per_prompt)

    def forward(self, rows: LogProbBatch) -> Judgement:
        kept = rows.labels.train.float()
        return Judgement(-torch.ones_like(kept), kept, (_share(rows) if self.per_prompt else kept).sum())


class SoftmaxOfScores(Feedback):
    """a = -1 for every row, and weights that sum to 1 over the rows of a prompt: the softmax of their scores.

    The target distribution of InfoNCA (Chen et al. 2024, eq. 6) and of list-softmax losses; the loss is a mean over
    prompts. Without scores in the data, a desirable row has score 1 and an undesirable one 0.

    Args:
        temperature: unit of the scores, above 0; towards 0, all the weight is on the best rows.

    Raises:
        ValueError: the temperature is not above 0.
    """

    needs = Needs(undesirable=True, groups=True)

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"SoftmaxOfScores: temperature is {temperature}; it must be above 0")
        self.temperature = float(temperature)

    def forward(self, rows: LogProbBatch) -> Judgement:
        kept, score = rows.labels.train, rows.labels.score
        scaled = torch.where(_same(rows), (score[None, :] - score[:, None]) / self.temperature, -torch.inf)
        weight = torch.where(kept, (-scaled.logsumexp(dim=1)).exp(), 0.0)
        return Judgement(-torch.ones_like(weight), weight, _share(rows).sum())


def _same(rows: LogProbBatch) -> Tensor:
    """BoolTensor [n, n]: rows with a loss that answer the same prompt; each row for itself in any case."""
    same = rows.labels.same_prompt
    return same | torch.eye(len(rows), dtype=torch.bool, device=same.device)


def _share(rows: LogProbBatch) -> Tensor:
    """float [n]: 1 / k for each of a prompt's k rows, so that they sum to the number of prompts; 0 if mismatched."""
    return rows.labels.train / _same(rows).sum(dim=1)
