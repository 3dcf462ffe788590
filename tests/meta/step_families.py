"""Families of parts whose fault shows in some steps only: with holes in masks, ranks without rows, ties, large sizes.

The mutants of other seeds have other sizes and factors, which are drawn as defaults of arguments.
"""
# ruff: noqa: B008

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from mutant import SIZES, STATE, VALUES, Mutant
from objective_mutants import halo
from part_families import Weighs, of_prompt
from part_mutants import EstimatedBy, Formula, own, ratio, token_ratio
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import sum_over_ranks
from halos_pl.objective.feedback import Binary, Feedback, Judgement
from halos_pl.objective.halo import HALO, Result
from halos_pl.objective.reference_points import Estimate, ReferencePoint


def leading(rows: LogProbBatch) -> Tensor:
    """BoolTensor [n, T]: as many tokens as carry a loss, but the first ones."""
    return torch.arange(rows.mask.shape[1], device=rows.mask.device) < rows.mask.sum(dim=1, keepdim=True)


def holes(rows: LogProbBatch) -> Tensor:
    """Number of tokens without loss before the last one with loss, [n]."""
    places = torch.arange(1, rows.mask.shape[1] + 1, device=rows.mask.device)
    last = (rows.mask * places).amax(dim=1)
    return last - rows.mask.sum(dim=1)


def weighted(weight: Callable[[LogProbBatch], Tensor], **parts: Any) -> EstimatedBy:
    """A mean of rewards with weights by row."""

    def formula(rewards: Tensor, rows: LogProbBatch) -> Tensor:
        w = weight(rows)[rows.labels.train].double()
        total, count = sum_over_ranks(torch.stack([(w * own(rewards, rows)).sum(), w.sum()]))
        return (total / torch.where(count == 0, 1.0, count)).to(rewards)

    return EstimatedBy(formula, **parts)


def counted(least: float) -> Callable[[Tensor, LogProbBatch], Tensor]:
    def formula(rewards: Tensor, rows: LogProbBatch) -> Tensor:
        r = own(rewards, rows)
        total, count = sum_over_ranks(torch.stack([r.sum(), r.new_tensor(max(least, len(r)))]))
        return total / count

    return formula


def of_pair(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    return torch.where(rows.labels.pair < 0, rewards, rewards[rows.labels.pair])


def paired(formula: Callable[[Tensor, LogProbBatch], Tensor]) -> EstimatedBy:
    return EstimatedBy(formula, scope="row", needs=Needs(pairs=True))


def pair_detached_at_ties(share: float) -> EstimatedBy:
    def formula(rewards: Tensor, rows: LogProbBatch) -> Tensor:
        r = of_pair(rewards, rows)
        return torch.where(r == rewards, share * r + (1 - share) * r.detach(), r)

    return paired(formula)


class CountsAtLeast(Feedback):
    """Thumbs up and down, with a denominator of at least ``least`` on each rank."""

    needs = Needs(undesirable=True)

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def forward(self, rows: LogProbBatch) -> Judgement:
        right: Judgement = Binary()(rows)
        return right._replace(denominator=right.denominator.clamp(min=self.least))


class Changes(HALO):
    """The loss of changed rows, plus a term."""

    rows: Callable[[LogProbBatch], LogProbBatch] = staticmethod(lambda rows: rows)
    term: Callable[[LogProbBatch, Tensor], Tensor | float] = staticmethod(lambda rows, reward: 0.0)

    def compute_loss(self, rows: LogProbBatch, context: Any) -> Result:
        result = super().compute_loss(self.rows(rows), context)
        term = self.term(rows, self.reward(rows)) / context.denominator
        return dataclasses.replace(result, loss=result.loss + term)


def changed(**how: Any) -> HALO:
    objective = halo(Changes)
    for name, value in how.items():
        setattr(objective, name, value)
    return objective


def only(kept: Callable[[LogProbBatch], Tensor]) -> Callable[[LogProbBatch], LogProbBatch]:
    """The rows with log-probs of 0 at all tokens that are not ``kept``."""

    def change(rows: LogProbBatch) -> LogProbBatch:
        logps = {
            name: torch.where(kept(rows), getattr(rows, name), 0.0) for name in ("policy_logps", "reference_logps")
        }
        return dataclasses.replace(rows, **logps)  # type: ignore[arg-type]

    return change


def reading(size: int) -> Formula:
    part = Formula(lambda rows: token_ratio(rows)[:, :size].sum(1))
    part.needs = Needs(reference=True, pairs=True)
    return part


def halved_if_wide(size: int) -> Callable[[LogProbBatch], float]:
    """A factor of rows with more than ``size`` columns of padding."""
    return lambda rows: 0.5 if int((~rows.mask.any(dim=0)).sum()) > size else 1.0


class CountsEpochs(Formula):
    """Twice the log-ratio after some turns to training."""

    def __init__(self, most: int) -> None:
        super().__init__(ratio)
        self.most, self.epochs = most, 0

    def train(self, mode: bool = True) -> CountsEpochs:
        self.epochs = getattr(self, "epochs", 0) + mode
        return super().train(mode)

    def forward(self, rows: LogProbBatch) -> Tensor:
        return super().forward(rows) * (1 + (self.epochs > self.most))


_BY_WIDTH: dict[str, Callable[[Callable[[LogProbBatch], float]], nn.Module]] = {
    "reward_padding": lambda factor: Formula(lambda rows: ratio(rows) * factor(rows)),
    "reference_split": lambda factor: EstimatedBy(lambda r, rows: counted(1.0)(r, rows) * factor(rows)),
    "feedback_split": lambda factor: Weighs(lambda rows, k: torch.tensor(factor(rows)), Needs(undesirable=True)),
    "reference_split of a loss": lambda factor: changed(
        term=lambda rows, r: (factor(rows) - 1) * rows.policy_logps.sum()
    ),
}

MUTANTS = [
    *(
        Mutant(
            f"{of or 'a part'} that changes in much wider batches",
            (clause,),
            lambda rng, make=make: make(halved_if_wide(rng.randint(100, 8000))),
            kind=SIZES,
        )
        for (clause, _, of), make in ((name.partition(" of "), make) for name, make in _BY_WIDTH.items())
    ),
    Mutant(
        "another factor after some epochs",
        ("reward_of_its_row",),
        lambda rng: CountsEpochs(rng.randint(5, 100)),
        kind=STATE,
    ),
    Mutant(
        "reads the first tokens, as many as have a loss",
        ("reward_linear",),
        lambda rng: Formula(lambda rows: (token_ratio(rows) * leading(rows)).sum(1)),
        kind=SIZES,
    ),
    Mutant(
        "reads a few thousand tokens of a pair",
        ("reward_linear",),
        lambda rng: reading(rng.randint(1100, 8100)),
        kind=SIZES,
    ),
    Mutant(
        "another factor in steps of many rows",
        ("reward_of_its_row",),
        lambda rng: Formula(
            lambda rows, size=rng.randint(300, 4000), factor=rng.choice([0.5, 0.99, 2]): (
                ratio(rows) * (factor if len(rows) > size else 1)
            )
        ),
        kind=SIZES,
    ),
    Mutant(
        "weights that fall with holes",
        ("reference_in_range",),
        lambda rng: weighted(lambda rows, by=rng.choice([1.0, 0.5]): rows.mask.sum(1) - by * holes(rows)),
        kind=SIZES,
    ),
    Mutant(
        "weights that vanish for far scores",
        ("reference_in_range",),
        lambda rng: weighted(
            lambda rows, by=rng.choice([-1, 1]): (by * rows.labels.score.double()).exp().clamp(max=1e30)
        ),
        kind=SIZES,
    ),
    Mutant(
        "rounds the rewards of many rows",
        ("reference_in_range",),
        lambda rng: EstimatedBy(
            lambda r, rows, size=rng.randint(300, 4000): counted(0.0)(r.half().to(r) if len(r) > size else r, rows)
        ),
        kind=SIZES,
    ),
    Mutant(
        "a rank without rows counts",
        ("reference_split",),
        lambda rng: EstimatedBy(counted(rng.choice([0.5, 1.0]))),
        kind=SIZES,
    ),
    Mutant(
        "a share of the gradient at ties",
        ("reference_detached",),
        lambda rng: pair_detached_at_ties(rng.uniform(0, 0.9)),
    ),
    Mutant(
        "weights that turn negative with holes",
        ("feedback_weight",),
        lambda rng: Weighs(lambda rows, k, by=rng.uniform(0.1, 0.5): 1 - by * holes(rows)),
        kind=SIZES,
    ),
    Mutant(
        "weights that turn negative with the length",
        ("feedback_weight",),
        lambda rng: Weighs(lambda rows, k, size=rng.randint(1200, 8100): 1 - rows.mask.sum(1) / size),
        kind=SIZES,
    ),
    Mutant(
        "a denominator of at least 1 on each rank",
        ("feedback_split",),
        lambda rng: CountsAtLeast(rng.choice([0.5, 1.0])),
        kind=SIZES,
    ),
    Mutant(
        "the loss of the first tokens",
        ("identity",),
        lambda rng: changed(rows=only(lambda rows: leading(rows) | ~rows.mask)),
        kind=SIZES,
    ),
    Mutant(
        "a gradient in the first step",
        ("identity",),
        lambda rng: changed(
            term=lambda rows, r, size=rng.choice([1, 3]): (
                (r - r.detach()).sum() if len(r) > size and bool((r == 0).all()) else 0.0
            )
        ),
        kind=VALUES,
    ),
    Mutant(
        "a term for prompts with many rows",
        ("identity",),
        lambda rng: changed(
            term=lambda rows, r, size=rng.randint(34, 63): (
                0.1 * rows.policy_logps.sum() if len(rows) and int(of_prompt(rows).max()) > size else 0.0
            )
        ),
        kind=SIZES,
    ),
    Mutant(
        "a term without rows",
        ("reference_split",),
        lambda rng: changed(term=lambda rows, r, by=rng.choice([0.1, -1.0]): by * (not len(rows))),
        kind=SIZES,
    ),
]


class ReturnsEarly(ReferencePoint):
    """The mean of the step's rewards, which a rank without any does not wait for."""

    needs = Needs(step_rewards=True)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        r = own(rewards, rows)
        return Estimate(counted(1.0)(rewards, rows) if len(r) else rewards.new_zeros(()))


def longest(rows: LogProbBatch) -> Tensor:
    return ratio(rows) + 0 * rows.mask.sum(dim=1).max()


# What a rank without rows makes raise, by the clause that says so.
FAILS_WITHOUT_ROWS: dict[str, Callable[[], nn.Module]] = {
    "reward_of_its_row": lambda: Formula(longest),
    "reference_split": ReturnsEarly,
    "feedback_split": lambda: Weighs(lambda rows, k: torch.ones(len(rows)) + 0 * rows.mask.sum(dim=1).max()),
}


SOUND: dict[str, Callable[[Random], nn.Module]] = {
    "log-probs of padding set to 0": lambda rng: changed(rows=only(lambda rows: rows.mask)),
    "the larger reward of the pair": lambda rng: paired(
        rng.choice(
            [
                lambda r, rows: torch.maximum(r, of_pair(r, rows)),
                lambda r, rows: torch.where(r > of_pair(r, rows), r, of_pair(r, rows)),
                lambda r, rows: torch.stack([r, of_pair(r, rows)]).amax(dim=0),
            ]
        )
    ),
    "a soft maximum of the pair": lambda rng: paired(
        lambda r, rows, by=rng.choice([0.1, 1.0, 10.0]): (
            (w := torch.stack([r, of_pair(r, rows)])) * (w / by).softmax(dim=0)
        ).sum(dim=0)
    ),
    "the root of the number of tokens with loss": lambda rng: Formula(
        lambda rows: (token_ratio(rows) * rows.mask).sum(1) / rows.mask.sum(1).to(rows.policy_logps).sqrt()
    ),
    "weights by the share of tokens with loss": lambda rng: weighted(lambda rows: rows.mask.sum(1) / (1 + holes(rows))),
}
