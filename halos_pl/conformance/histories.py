"""Histories of a feedback: slopes that it may have observed in earlier steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.objective.feedback import Feedback, Judgement, Slopes

#: Mean |dv/du| of desirable and undesirable rows in each step of a history; None for a step without such rows.
HISTORIES: dict[str, tuple[tuple[float | None, float | None], ...]] = {
    "after steps with flat desirable rows": ((0.1, 0.1), (1e-9, 0.2), (0.0, 0.2)),
    "after steps with flat undesirable rows": ((0.1, 0.1), (0.2, 1e-9), (0.2, 0.0)),
    "after steps without slopes": ((0.0, 0.0), (0.0, 0.0)),
    "after steps with steep desirable rows": ((1e4, 0.1), (1e7, 0.1)),
    "after steps of which some lack a class": ((None, 0.1), (0.1, 0.3), (0.1, None)),
}
Told = list[tuple[LogProbBatch, Slopes]]


def told(
    feedback: Feedback, steps: Sequence[tuple[float | None, float | None]], drawn: Callable[[int], LogProbBatch]
) -> Told:
    """Lets a feedback judge and observe the steps of a history.

    Args:
        feedback: the feedback, which changes.
        steps: the steps, as in ``HISTORIES``.
        drawn: function from a number to rows of a small step.

    Returns:
        The rows and slopes of each step.
    """
    seen: Told = []
    for number, means in enumerate(steps):
        rows = drawn(number)
        of_desirable, of_undesirable = (mean is not None for mean in means)
        here = torch.where(rows.labels.desirable, of_desirable, of_undesirable)
        # Pairs stay together.
        rows = rows.select((here | rows.labels.mismatched | (rows.labels.pair >= 0)).nonzero().squeeze(1))
        slopes = _slopes(rows, Judgement(*feedback(rows)), means, number)
        feedback.observe(slopes)
        seen.append((rows, slopes))
    return seen


def _slopes(rows: LogProbBatch, judged: Judgement, means: tuple[float | None, float | None], seed: int) -> Slopes:
    train = rows.labels.train_index
    draw = torch.Generator().manual_seed(seed)
    good, bad = (mean or 0.0 for mean in means)
    desirable, weight, own = (column[train] for column in (rows.labels.desirable, judged.weight, rows.labels.weight))
    size = torch.where(desirable, good, bad) * (0.5 + torch.rand(len(train), generator=draw))
    u = torch.randn(len(train), generator=draw)
    slope = judged.sign[train] * weight * size / judged.denominator.clamp(min=1)
    return Slopes(desirable, weight * own, u, slope * own, u, judged.denominator, own)


def retold(feedback: Feedback, history: Told, share: Callable[[LogProbBatch], Tensor]) -> None:
    """Lets a feedback observe a history on a rank.

    Args:
        feedback: the rank's feedback, which changes.
        history: rows and slopes of each step over all ranks.
        share: function from the rows of a step to the positions of this rank's rows.
    """
    for rows, slopes in history:
        index = share(rows)
        feedback(rows.select(index))
        place = torch.full((len(rows),), -1).index_put((rows.labels.train_index,), torch.arange(len(slopes.weight)))
        feedback.observe(slopes.select(place[index][place[index] >= 0]))
