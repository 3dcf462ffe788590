"""The clause of weights that depend on the policy: they have no gradient, and do not depend on how a step is split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.conformance.clause import Clause, explained
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.halo_case import RELATIVE, HaloCase
from halos_pl.conformance.ranks import Ranks, namespaces
from halos_pl.conformance.smallest import smallest
from halos_pl.conformance.step_split import shares
from halos_pl.conformance.steps import Step, asked, gradient_of, padded, paddings, with_leaf
from halos_pl.conformance.witness import pair
from halos_pl.objective.policy_weighted import PolicyWeighted

#: The verdict on an objective with a policy weight.
VERDICT = "composite: policy-dependent weights"


@dataclass(frozen=True)
class WeightedCase:
    """What the clause needs.

    Attributes:
        target: the objective.
        of: the case of its HALO.
        examples: number of steps to try.
    """

    target: PolicyWeighted
    of: HaloCase
    examples: int


@explained(
    example="""
        def forward(self, rewards, rows):
            return torch.rand_like(rewards)
        """,
    cure="""Compute the weight from the rewards and rows of the step alone, in any order and padding; sum over the ranks
    with halos_pl.distributed what all rows share. Keep what it remembers in get_extra_state, and change it in training
    only, once per call.""",
)
def policy_weight(case: WeightedCase) -> str | None:
    """The loss is that of the HALO with constant weights, which are finite and at least 0.

    Its gradient is the HALO's, times the weights: they have none of their own. The losses of micro-batches, and of
    ranks, sum to the loss of the step. Padding, validations and resuming do not change it.
    """

    target = case.target

    def fault(step: Step) -> str | None:
        if step.huge or not case.of.counts(step):
            return None
        rows = asked(step.rows(), target.needs)
        loss, slope = _loss(duplicate(target), rows)
        right, right_slope = _expected(duplicate(target), rows)
        size = RELATIVE * (abs(loss) + abs(right)) + 1e-9
        if not abs(loss - right) <= size:
            return "loss {}, {} with the weights held constant".format(*pair(loss, right))
        if witness := _differ(slope, right_slope, "with the weights held constant"):
            return witness
        parts = case.of.micro_batches(rows)
        split, split_slope = _loss(duplicate(target), rows, parts)
        if not abs(loss - split) <= size:
            return f"loss {{}}, {{}} in {len(parts)} micro-batches".format(*pair(loss, split))
        if witness := _differ(slope, split_slope, f"in {len(parts)} micro-batches"):
            return witness
        for columns in paddings(step):
            wide, _ = _loss(duplicate(target), padded(rows, columns))
            if not abs(loss - wide) <= size:
                return f"loss {{}}, {{}} with {columns} more columns of padding".format(*pair(loss, wide))
        return _later(target, rows) or _on_ranks(target, rows, step, loss)

    return smallest(fault, target.needs, examples=max(10, case.examples // 2))


def _loss(target: PolicyWeighted, rows: LogProbBatch, parts: list[Tensor] | None = None) -> tuple[float, Tensor]:
    """The loss of a step as training computes it, and its gradient in the policy's outputs."""
    leaf, rows = with_leaf(rows, target.needs)
    context = target.prepare(rows.detach())
    every = [rows.labels.train_index] if parts is None else parts
    losses = [target.compute_loss(rows.select(part), context.select(part)).loss for part in every]
    loss = torch.stack(losses).sum()
    return float(loss.detach()), gradient_of(loss, leaf)


def _expected(target: PolicyWeighted, rows: LogProbBatch) -> tuple[float, Tensor]:
    """The same, by the HALO alone, with its weights or outcomes multiplied by the policy's weights."""
    leaf, rows = with_leaf(rows, target.needs)
    with torch.no_grad():
        context, held = target.of.prepare(rows.detach()), rows.detach()
        weight = target.policy_weight(target.of.reward(held), held)
    if target.policy_weight.acts_on == "outcome":
        context = replace(context, scale=weight)
    else:
        own = context.weight if weight.dim() == 1 else context.weight[:, None]
        context = replace(context, weight=own * weight)
    train = rows.labels.train_index
    loss = target.of.compute_loss(rows.select(train), context.select(train)).loss
    return float(loss.detach()), gradient_of(loss, leaf)


def _later(target: PolicyWeighted, rows: LogProbBatch) -> str | None:
    """Whether a second step depends on a validation before it, or on what the state dict lacks."""
    used, resumed = duplicate(target), duplicate(target)
    _loss(used, rows)
    validated = duplicate(used).eval()
    _loss(validated, rows)
    resumed.load_state_dict(used.state_dict())
    loss, _ = _loss(duplicate(used), rows)
    for words, copy in (("after a validation", validated.train()), ("resumed from its state dict", resumed)):
        other, _ = _loss(copy, rows)
        if not abs(loss - other) <= RELATIVE * (abs(loss) + abs(other)) + 1e-9:
            return f"loss {{}} of a second step, {{}} {words}".format(*pair(loss, other))
    return None


def _differ(slope: Tensor, other: Tensor, where: str) -> str | None:
    off = (slope - other).abs()
    if bool((off <= 10 * RELATIVE * slope.abs().max() + 1e-12).all()):
        return None
    i = int(off.argmax())
    a, b = pair(float(slope.flatten()[i]), float(other.flatten()[i]))
    return f"slope {a} of the loss in a log-prob, {b} {where}"


def _on_ranks(target: PolicyWeighted, rows: LogProbBatch, step: Step, loss: float) -> str | None:
    parts = shares(rows, target.needs, step.seed, 2)

    def on_rank(index: Tensor) -> Callable[[], float]:
        copy = duplicate(target)  # here, since two threads must not copy at once
        return lambda: _loss(copy, rows.select(index))[0]

    jobs: list[Callable[[], Any]] = [on_rank(index) for index in parts]
    summed = sum(Ranks(2).run(jobs, namespaces(target)))
    if abs(summed - loss) <= 10 * RELATIVE * (abs(summed) + abs(loss)) + 1e-9:
        return None
    return f"loss {{}}, {{}} on ranks of {' and '.join(str(len(part)) for part in parts)} rows".format(
        *pair(loss, summed)
    )


def clause_of(target: PolicyWeighted, case: HaloCase, examples: int) -> Clause:
    """The clause, bound to a target and the case of its HALO."""
    return Clause(policy_weight.__name__, partial(policy_weight, WeightedCase(target, case, examples)))
