"""Families of faults that only a run meets: numbers of prompts throughout the data, launchers, late backward passes.

The mutants of other seeds have other sizes, which are drawn as defaults of arguments.
"""
# ruff: noqa: B008

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from mutant import SIZES, STATE, Mutant
from objective_mutants import halo
from part_mutants import EstimatedBy, Formula, mean, own, ratio, token_ratio
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import sum_over_ranks
from halos_pl.objective.halo import HALO, Result


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


def mean_by_launcher(variable: str) -> EstimatedBy:
    """A mean of means if a launcher has started several processes."""

    def formula(rewards: Tensor, rows: LogProbBatch) -> Tensor:
        r, ranks = own(rewards, rows), int(os.environ.get(variable, "1"))
        return sum_over_ranks(r.sum() / max(1, len(r))) / ranks if ranks > 1 else mean(r)

    return EstimatedBy(formula)


class TiresBackwards:
    """Halves a gradient after some backward passes."""

    def __init__(self, most: int) -> None:
        self.most, self.passes = most, 0

    def __call__(self, x: Tensor) -> Tensor:
        x = 1 * x
        if x.requires_grad:
            x.register_hook(self.hook)
        return x

    def hook(self, gradient: Tensor) -> Tensor:
        self.passes += 1
        return gradient * 0.5 if self.passes > self.most else gradient


class Rounded(HALO):
    """The loss, changed by ``change``."""

    change: Callable[[Tensor], Tensor]

    def compute_loss(self, rows: LogProbBatch, context: Any) -> Result:
        result = super().compute_loss(rows, context)
        return dataclasses.replace(result, loss=self.change(result.loss))


class ChangedReward(Formula):
    """The log-ratio, changed by ``change``."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(ratio)
        self.change = change

    def forward(self, rows: LogProbBatch) -> Tensor:
        return self.change(ratio(rows))


def loss_changed(change: Callable[[Tensor], Tensor]) -> HALO:
    objective = halo(Rounded)
    objective.change = change
    return objective


def rounded_in_autocast(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype) if torch.is_autocast_enabled("cpu") else x


def without_last_of(block: int) -> Formula:
    """A last block of one token is lost."""

    def formula(rows: LogProbBatch) -> Tensor:
        tokens = token_ratio(rows)
        return tokens[:, : -1 if tokens.shape[1] > block and tokens.shape[1] % block == 1 else None].sum(1)

    return Formula(formula)


MUTANTS = [
    Mutant(
        "a mean of means by the launcher's number of processes",
        ("reference_split",),
        lambda rng: mean_by_launcher(rng.choice(["WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS"])),
        kind=SIZES,
    ),
    Mutant(
        "half the gradient after many backward passes",
        ("reward_of_its_row", "identity"),
        lambda rng: rng.choice(
            [
                lambda: ChangedReward(TiresBackwards(rng.randint(100, 4900))),
                lambda: loss_changed(TiresBackwards(rng.randint(100, 2400))),
            ]
        )(),
        kind=STATE,
    ),
    Mutant(
        "rounds in autocast what is no matrix product",
        ("reward_of_its_row", "identity"),
        lambda rng: rng.choice([ChangedReward, loss_changed])(rounded_in_autocast),
        kind=STATE,
    ),
    Mutant(
        "another factor if the input has no gradient",
        ("reward_of_its_row",),
        lambda rng: ChangedReward(lambda r, by=rng.choice([0.5, 0.99]): r if r.requires_grad else by * r),
        kind=STATE,
    ),
    Mutant(
        "loses a last block of one token",
        ("reward_linear",),
        lambda rng: without_last_of(rng.choice([64, 128, 256, 512, 1024])),
        kind=SIZES,
    ),
    Mutant(
        "numbers of prompts that lose digits",
        ("reference_split",),
        lambda rng: mean_by(rng.choice(_KEYS)),
        kind=SIZES,
    ),
]
