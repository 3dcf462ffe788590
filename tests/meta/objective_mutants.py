"""Objectives with one mistake each, most of them a HALO whose ``compute_loss`` was overridden."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from mutant import SIZES, STATE, Mutant, Value
from part_mutants import MUTANTS as PARTS
from part_mutants import EstimatedBy, mean, own
from torch import Tensor
from value_mutants import MUTANTS as VALUES
from value_mutants import REFLECTED, only_by_tokens

from halos_pl.batch import LogProbBatch
from halos_pl.objective.composite import Sum, SumContext
from halos_pl.objective.feedback import Binary, Feedback, Pairwise
from halos_pl.objective.halo import HALO, Result, TermContext
from halos_pl.objective.reference_points import Estimate, MismatchedKL, PairedCompletion, ReferencePoint
from halos_pl.objective.rewards import LogRatio, Reward, TokenLogRatio
from value_functions import Identity, Logistic, LogSigmoid, ValueFunction


def halo(kind: type[HALO] = HALO, **parts: Any) -> HALO:
    """KTO without the clamp, which passes every clause, with some parts exchanged."""
    sound: dict[str, Any] = {
        "reward": LogRatio(),
        "reference_point": MismatchedKL(clamp=False),
        "value_function": Logistic(),
        "feedback": Binary(),
        "reflect_undesirable": True,
        "loss_offset": 1.0,
    }
    return kind(**(sound | parts))


def with_part(part: ValueFunction | Reward | ReferencePoint | Feedback) -> HALO:
    """... with ``part`` in its place."""
    kinds = {
        ValueFunction: "value_function",
        Reward: "reward",
        ReferencePoint: "reference_point",
        Feedback: "feedback",
    }
    return halo(**{next(name for kind, name in kinds.items() if isinstance(part, kind)): part})


class Spoiled(HALO):
    """A HALO whose loss ``spoil`` changes after the fact; the outcomes that it shows stay right."""

    spoil: Callable[[Tensor, LogProbBatch, TermContext, Result], Tensor]

    def compute_loss(self, rows: LogProbBatch, context: TermContext) -> Result:
        result = super().compute_loss(rows, context)
        return dataclasses.replace(result, loss=type(self).spoil(result.loss, rows, context, result))


def spoiled(
    name: str, change: Callable[[Tensor, LogProbBatch, TermContext, Result], Tensor], kind: str = "", **parts: Any
) -> Mutant:
    spoiler = type("Spoiled", (Spoiled,), {"spoil": staticmethod(change)})
    return Mutant(name, ("identity",), lambda rng: halo(spoiler, **{k: part() for k, part in parts.items()}), kind)


class OwnDenominator(HALO):
    """Each rank divides by what is on it, so that the ranks' losses do not sum to the step's."""

    def prepare(self, rows: LogProbBatch) -> TermContext:
        return dataclasses.replace(super().prepare(rows), denominator=self.feedback(rows)[2])


class TwoValues(HALO):
    """Another value function for undesirable rows, which the one that it shows says nothing of."""

    other: ValueFunction

    def compute_loss(self, rows: LogProbBatch, context: TermContext) -> Result:
        reward = self.reward(rows)
        u = reward - (context.reference_point or self.reference_point(reward, rows)).value
        v, w = self.value_function, self.other
        undesirable = -w(-u) if self.reflect_undesirable else w(u)
        judged = torch.where(context.sign < 0, -v(u), undesirable)
        result = super().compute_loss(rows, context)
        return dataclasses.replace(
            result, loss=(context.weight * (self.loss_offset + judged)).sum() / context.denominator
        )


def two_values(name: str, other: Callable[[Random], ValueFunction], **parts: Any) -> Mutant:
    def make(rng: Random) -> HALO:
        objective = halo(TwoValues, **parts)
        objective.other = other(rng)
        return objective

    return Mutant(name, ("one_value_function", "identity"), make)


class _Asymmetric(ValueFunction):
    """Looks at who is asking: its scale depends on a label that was put beside it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.undesirable: Tensor | None = None

    def forward(self, u: Tensor) -> Tensor:
        if self.undesirable is None or self.undesirable.shape != u.shape:
            return torch.sigmoid(u)
        return torch.sigmoid(u * torch.where(self.undesirable, self.scale, 1.0).to(u))


class LabelsBehindTheBack(HALO):
    """Hands the labels to the value function, which scales undesirable rows on its own."""

    def compute_loss(self, rows: LogProbBatch, context: TermContext) -> Result:
        self.value_function.undesirable = ~rows.labels.desirable  # type: ignore[assignment]
        try:
            return super().compute_loss(rows, context)
        finally:
            self.value_function.undesirable = None  # type: ignore[assignment]


class LateReference(HALO):
    """Estimates a step's reference point again in ``compute_loss``, with gradient and from the micro-batch."""

    def compute_loss(self, rows: LogProbBatch, context: TermContext) -> Result:
        reward = self.reward(rows)
        return super().compute_loss(rows, dataclasses.replace(context, reference_point=Estimate(reward.mean())))


class LaterPenalty(HALO):
    """A term that imitates, from the second step on or in evaluation only."""

    in_evaluation: bool

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.steps = 0

    def compute_loss(self, rows: LogProbBatch, context: TermContext) -> Result:
        self.steps += 1
        result = super().compute_loss(rows, context)
        late = not self.training if self.in_evaluation else self.steps > 1
        return dataclasses.replace(result, loss=result.loss - 0.1 * late * rows.policy_logps.mean())


class OwnSum(Sum):
    """A sum that adds a term of its own to those that it shows."""

    def compute_loss(self, rows: LogProbBatch, context: SumContext) -> Result:
        result = super().compute_loss(rows, context)
        return dataclasses.replace(result, loss=result.loss - 0.1 * rows.policy_logps.sum())


def recomputed(
    objective: HALO, rows: LogProbBatch, context: TermContext, weight: Callable[[Tensor], Tensor] = lambda w: w
) -> Tensor:
    """The loss of KTO by hand, with other weights."""
    u = objective.reward(rows) - context.reference_point.value
    v = objective.value_function
    judged = torch.where(context.sign < 0, -v(u), -v(-u))
    return (weight(context.weight) * (1 + judged)).sum() / context.denominator


class OtherWeights(HALO):
    """KTO by hand with the weights that ``weights`` makes of the right ones."""

    weights: Callable[[Tensor], Tensor]

    def compute_loss(self, rows: LogProbBatch, context: TermContext) -> Result:
        result = super().compute_loss(rows, context)
        return dataclasses.replace(result, loss=recomputed(self, rows, context, type(self).weights))


def other_weights(name: str, change: Callable[[Tensor], Tensor], **weights: float) -> Mutant:
    kind = type("OtherWeights", (OtherWeights,), {"weights": staticmethod(change)})
    return Mutant(name, ("identity",), lambda rng: halo(kind, feedback=Binary(**weights)))


def lacks(need: str) -> Mutant:
    """Training leaves out what a part of it needs."""
    kind = type(
        "Lacks", (HALO,), {"needs": property(lambda self: dataclasses.replace(HALO.needs.fget(self), **{need: 0}))}
    )
    return Mutant(f"needs no {need}", ("identity",), lambda rng: halo(kind))


MUTANTS = [
    *map(lacks, ("undesirable", "mismatched")),
    Mutant("each rank divides by its own rows", ("reference_split",), lambda rng: halo(OwnDenominator)),
    other_weights("forgets the weight", torch.ones_like, lambda_undesirable=0.5),
    other_weights("`weight or 1.0`", lambda w: torch.where(w == 0, 1.0, w), lambda_undesirable=0.0),
    other_weights("squares the weight", torch.square, lambda_desirable=1.3),
    spoiled("adds the mean log-prob", lambda loss, rows, c, r: loss - 1e-2 * rows.policy_logps.mean()),
    spoiled("adds an L2 penalty", lambda loss, rows, c, r: loss + 1e-3 * rows.policy_logps.square().mean()),
    spoiled(
        "adds a KL penalty",
        lambda loss, rows, c, r: loss + 0.1 * (rows.policy_logps - rows.reference_logps).mean(),  # type: ignore[operator]
    ),
    spoiled(
        "divides by a likelihood",
        lambda loss, rows, c, r: loss / (1 + rows.policy_logps.detach().exp().mean()),
    ),
    spoiled("doubles the loss", lambda loss, rows, c, r: 2 * loss),
    spoiled("the logarithm of the loss", lambda loss, rows, c, r: loss.clamp(min=1e-6).log()),
    spoiled("the square of the loss", lambda loss, rows, c, r: loss.square()),
    spoiled("wrong sign of the loss", lambda loss, rows, c, r: -loss),
    spoiled("forgets the denominator", lambda loss, rows, c, r: loss * c.denominator),
    spoiled(
        "adds an NLL term, DPO",
        lambda loss, rows, c, r: loss - 0.1 * rows.policy_logps[rows.labels.desirable].sum() / c.denominator,
        reference_point=PairedCompletion,
        feedback=Pairwise,
        value_function=LogSigmoid,
    ),
    spoiled(
        "adds a penalty in large steps",
        lambda loss, rows, c, r: loss - 0.1 * (len(rows) > 32) * rows.policy_logps.mean(),
        kind=SIZES,
    ),
    spoiled(
        "adds a penalty on late tokens",
        lambda loss, rows, c, r: loss - 0.1 * rows.policy_logps[:, 8:].sum(),
        kind=SIZES,
    ),
    *(
        Mutant(
            f"adds a penalty {when}",
            ("identity",),
            lambda rng, later=later: halo(type("Later", (LaterPenalty,), {"in_evaluation": later})),
            STATE,
        )
        for when, later in (("from the second step on", False), ("in evaluation", True))
    ),
    Mutant("a sum of one term that adds another", ("identity",), lambda rng: OwnSum([halo()])),
    Mutant(
        "tokens are centred within their row",
        ("elementwise",),
        lambda rng: halo(
            reward=TokenLogRatio(), value_function=Value(only_by_tokens("subtracts a row's mean over tokens"))
        ),
    ),
    spoiled("the loss is detached", lambda loss, rows, c, r: loss.detach() + 0 * rows.policy_logps.sum()),
    two_values("log sigma for undesirable rows", lambda rng: LogSigmoid()),
    two_values("another beta for undesirable rows", lambda rng: Logistic(beta=rng.choice([0.09, 0.2, 1.0]))),
    two_values("risk-neutral for undesirable rows", lambda rng: Identity(), reflect_undesirable=False),
    two_values("another beta for undesirable rows, same", lambda rng: Logistic(beta=0.15), reflect_undesirable=False),
    Mutant(
        "labels behind the value function's back",
        ("one_value_function", "identity", "elementwise", "deterministic"),
        lambda rng: halo(LabelsBehindTheBack, value_function=_Asymmetric(rng.choice([0.5, 1.5]))),
    ),
    Mutant(
        "reference point again in each micro-batch",
        ("reference_detached", "identity", "reference_split"),
        lambda rng: halo(LateReference, reference_point=EstimatedBy(lambda r, rows: mean(own(r, rows)))),
    ),
    *(
        Mutant(f"{name}, reflected", clauses, lambda rng, make=make: halo(value_function=make(rng)))
        for name, (clauses, make) in REFLECTED.items()
    ),
]

# A fault is to be found behind an objective as well: one mutant of each clause of the parts.
_PLANTED: dict[str, Mutant] = {}
for _mutant in (*VALUES, *PARTS):
    if not _mutant.clauses[0].startswith("undesirable"):
        _PLANTED.setdefault(_mutant.clauses[0], _mutant)
PLANTED = [
    Mutant(f"KTO: {m.name}", m.clauses, lambda rng, m=m: with_part(m.make(rng)))  # type: ignore[arg-type]
    for m in _PLANTED.values()
]
