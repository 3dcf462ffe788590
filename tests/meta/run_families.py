"""Families of faults that only a run meets: numbers of prompts throughout the data, launchers, widths in between.

The mutants of other seeds have other sizes, which are drawn as defaults of arguments.
"""
# ruff: noqa: B008

from __future__ import annotations

from collections.abc import Callable

import torch
from mutant import SIZES, Mutant
from part_mutants import EstimatedBy
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs


def mean_by(key: Callable[[Tensor], Tensor]) -> EstimatedBy:
    """The mean of the rows whose prompts have the same ``key``."""

    def formula(rewards: Tensor, rows: LogProbBatch) -> Tensor:
        number = key(rows.labels.group)
        same = ((number[:, None] == number[None, :]) & rows.labels.train).to(rewards)
        return torch.where(same.any(dim=1), same @ rewards.detach() / same.sum(dim=1).clamp(min=1), rewards.detach())

    part = EstimatedBy(formula, needs=Needs(step_rewards=True, groups=True))
    part.per_row = True
    return part


_KEYS: list[Callable[[Tensor], Tensor]] = [
    lambda group: group.to(torch.int16),
    lambda group: group.float(),
    lambda group: group.int(),
    lambda group: group.int() * 4096,
    lambda group: group % 10_000,
]

MUTANTS = [
    Mutant(
        "numbers of prompts that lose digits",
        ("reference_split",),
        lambda rng: mean_by(rng.choice(_KEYS)),
        kind=SIZES,
    ),
]
