"""The clauses of an objective: those of its four parts, and those on how the loss follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.conformance import feedback, reference_point, reward, value_function
from halos_pl.conformance.clause import Clause, Law, explained
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.halo_case import RELATIVE, HaloCase
from halos_pl.conformance.loss_split import loss_split
from halos_pl.conformance.reference_point import reference_in_range
from halos_pl.conformance.reference_split import reference_split
from halos_pl.conformance.report import Definition
from halos_pl.conformance.reward import reward_of_its_row
from halos_pl.conformance.sees_more import joined, sees_more
from halos_pl.conformance.smallest import smallest
from halos_pl.conformance.steps import Step, asked, gradient_of, with_leaf
from halos_pl.conformance.value_curve import UNDESIRABLE, concave_on_gains, non_decreasing
from halos_pl.conformance.witness import listed, pair
from halos_pl.objective.composite import Sum
from halos_pl.objective.feedback import Feedback
from halos_pl.objective.halo import HALO, Objective
from halos_pl.objective.policy_weighted import PolicyWeighted
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import Reward
from value_functions import ValueFunction

PARTS: dict[str, type] = {
    "value_function": ValueFunction,
    "reward": Reward,
    "reference_point": ReferencePoint,
    "feedback": Feedback,
}


def is_halo(objective: Objective) -> TypeGuard[HALO]:
    """Whether the objective consists of the four parts, whatever its class."""
    return hasattr(objective, "reflect_undesirable") and all(
        isinstance(getattr(objective, name, None), kind) for name, kind in PARTS.items()
    )


def terms(objective: Objective, name: str = "") -> list[tuple[str, Objective]]:
    """The terms of an objective by name, nested sums flattened; an objective that is not a sum is its only term.

    A HALO with a policy weight stands for itself without it.
    """
    if isinstance(objective, PolicyWeighted):
        return terms(objective.of, name)
    if not isinstance(objective, Sum):
        return [(name, objective)]
    if len(objective.terms) == 1:
        return terms(objective.terms[0], name)  # type: ignore[arg-type]
    summands: list[tuple[str, Objective]] = []
    for i, term in enumerate(objective.terms):
        summands += terms(term, f"{name}{i}_{type(term).__name__}.")  # type: ignore[arg-type]
    return summands


def own_sums(objective: Objective) -> list[Sum]:
    """All instances of subclasses of ``Sum`` in an objective (itself included), which may add up differently."""
    if not isinstance(objective, Sum):
        return []
    inner = [inner_sum for term in objective.terms for inner_sum in own_sums(term)]  # type: ignore[arg-type]
    return inner if type(objective) is Sum else [objective, *inner]


def sum_of_terms(objective: Sum, examples: int) -> str | None:
    """The loss of a sum is the sum of its terms' losses, with the same gradient."""

    def fault(step: Step) -> str | None:
        both = []
        for of_terms in (False, True):
            leaf, batch = with_leaf(asked(step.rows(), objective.needs), objective.needs)
            parts, seen, by = [objective], [batch], step.cotangent
            if of_terms:
                parts, seen, by = list(objective.terms), objective.seen_by_terms(batch), 1.0  # type: ignore[arg-type]
            losses = [duplicate(part)(rows).loss for part, rows in zip(parts, seen, strict=True)]
            loss = torch.stack(losses).sum()
            both.append((loss.detach().double(), gradient_of(loss, leaf, by)))
        (loss, slope), (right, right_slope) = both
        if not bool((loss - right).abs() <= RELATIVE * right.abs() + 1e-9):
            return "loss {}, the losses of its terms sum to {}".format(*pair(float(loss), float(right)))
        off = (slope - right_slope).abs()
        if bool((~(off <= RELATIVE * right_slope.abs().max() + 1e-12)).any()):
            i = int(off.argmax())
            a, b = pair(float(slope.flatten()[i]), float(right_slope.flatten()[i]))
            return f"slope {a} of the loss in a log-prob, {b} of the losses of its terms"
        return None

    return smallest(fault, objective.needs, examples=max(10, examples // 3))


@explained(
    example="""
        def compute_loss(self, rows, context):
            result = super().compute_loss(rows, context)
            return dataclasses.replace(result, loss=result.loss.square())
        """,
    cure="""Express the change as a part: a transform of the outcome is a value function, a weight is feedback, an
    offset is the reference point. A further term, such as an SFT loss, belongs in model.extra_terms, which makes the
    loss a composite.""",
)
def identity(case: HaloCase) -> str | None:
    """The loss is the sum of w * a * v(r - z0) over the rows, divided by the denominator, up to a constant.

    Changes of the loss and gradients are compared, as training computes them: with prepare and compute_loss. A loss
    that does not consist of the four parts fails too, as does one whose `needs` lack what those of its parts name.
    """
    target = case.target
    for name in ("reward", "reference_point", "feedback"):
        asked_for = getattr(target, name).needs
        for of in fields(asked_for):
            if getattr(target.needs, of.name) < getattr(asked_for, of.name):
                return f"`needs` of the {name} names {of.name}, that of the loss does not: training leaves it out"

    def fault(step: Step) -> str | None:
        if not case.counts(step):
            return None
        rows = case.rows(step)
        loss, gradient, right, slope, expectation = case.slopes(rows, cotangent=step.cotangent)
        if witness := _wrong_slope(rows, case, gradient, slope):
            _, gradient, _, slope, _ = case.slopes(rows)
            scaled = _wrong_slope(rows, case, gradient, slope) is None
            return f"{witness}, if the loss is multiplied by {step.cotangent:g}" if scaled else witness
        at_once = float(case.fresh()(with_leaf(rows, case.needs)[1]).loss.detach())
        if not abs(at_once - float(loss)) <= RELATIVE * expectation.size + 1e-9:
            return "loss {} by compute_loss, which training calls, {} by forward".format(*pair(float(loss), at_once))
        for factor in (0.5,) if step.huge else (0.5, 2.0):
            scalar = None if rows.scalar is None else rows.scalar * factor
            _, moved = with_leaf(replace(rows, policy_logps=rows.policy_logps * factor, scalar=scalar), case.needs)
            there, right_there = case.losses(moved, moved, (case.fresh(), case.fresh()))
            change, right_change = float(there.detach() - loss), float(right_there.loss.detach() - right)
            if not abs(change - right_change) <= RELATIVE * (expectation.size + right_there.size) + 1e-9:
                a, b = pair(change, right_change)
                return f"{_scores(rows, case)} times {factor}: the loss changes by {a}, sum w a v by {b}"
        if step.huge:
            return None
        # As in training, in float32.
        single = case.rows(step, torch.float32)
        _, gradient, _, slope, _ = case.slopes(single, cotangent=step.cotangent)
        if witness := _wrong_slope(single, case, gradient, slope):
            return f"{witness}, in float32"
        # One copy on further steps, and in evaluation; next to one whose parts are called as often.
        copies = case.fresh(), case.fresh()
        for call in range(1, 2 if step.large else 4):
            later = step.later(call) if call < 3 else step
            if case.counts(later):
                further = case.rows(later)
                for copy in copies:
                    copy.train(call < 3)
                _, gradient, _, slope, _ = case.slopes(further, copies, cotangent=step.cotangent)
                witness = _wrong_slope(further, case, gradient, slope)
                if witness:
                    return f"{witness}, on call {call}{'' if call < 3 else ' in evaluation'}"
        return None

    witness = case.smallest(fault)
    return witness or ((elsewhere := case.changes()) and f"loss {elsewhere}") or case.device()


def _scores(rows: LogProbBatch, case: HaloCase) -> str:
    """The policy's outputs that the objective reads, in words."""
    if case.target.needs.scalar and rows.scalar is not None:
        return f"scalars {listed(rows.scalar)}"
    return f"log-probs {listed(rows.policy_logps[rows.mask])}"


def _wrong_slope(rows: LogProbBatch, case: HaloCase, gradient: Tensor, slope: Tensor) -> str | None:
    """Where the gradient of the loss differs from that of sum w * a * v / denominator, in words; else None."""
    wrong = _off(rows, gradient, slope).nonzero()
    if not len(wrong):
        return None
    i, t = wrong[0].tolist()
    a, b = pair(float(gradient[i, t]), float(slope[i, t]))
    kind = "a desirable" if rows.labels.desirable[i] else "an undesirable"
    return f"{_scores(rows, case)}: slope {a} of the loss in {kind} row, {b} by w a v"


def _off(rows: LogProbBatch, gradient: Tensor, slope: Tensor) -> Tensor:
    """Where gradients [n, T or T + 1] with respect to the policy's outputs differ, BoolTensor; never on padding.

    The log-probs of padding are constants, so a gradient with respect to them goes nowhere.
    """
    most = RELATIVE * max(float(slope.abs().max()), float(gradient.abs().max())) + 1e-12
    scalars = gradient.shape[1] - rows.mask.shape[1]
    return ~((gradient - slope).abs() <= most) & F.pad(rows.mask, (0, scalars), value=True)


@explained(
    example="""
        def compute_loss(self, rows, context):
            u = self.reward(rows) - context.reference_point.value
            value = torch.where(context.sign < 0, self.value_function(u), torch.tanh(u))
            loss = (context.weight * context.sign * value).sum() / context.denominator
            return dataclasses.replace(super().compute_loss(rows, context), loss=loss)
        """,
    cure="""Use one value function. Classes differ by their weights (lambda_desirable, lambda_undesirable) and by
    reflect_undesirable; gains and losses differ by the shape of v (LossAverse).""",
)
def one_value_function(case: HaloCase) -> str | None:
    """The objective's value_function acts on both desirable and undesirable rows."""
    if case.witness(identity) is None:
        return None

    def fault(step: Step) -> str | None:
        if not case.counts(step):
            return None
        rows = case.rows(step)
        _, gradient, _, slope, expectation = case.slopes(rows, cotangent=step.cotangent)
        train = rows.labels.train.nonzero().squeeze(1)
        gradient, slope = gradient[train], slope[train]
        off = _off(rows.select(train), gradient, slope)
        wrong = off.any(dim=1)
        sides = {a: (expectation.sign == a) & (expectation.weight > 0) for a in (-1, 1)}
        for a, name in ((-1, "desirable"), (1, "undesirable")):
            here, there = wrong & sides[a], sides[-a]
            if bool(here.any()) and bool(there.any()) and not bool((wrong & there).any()):
                i = int(here.nonzero()[0])
                t = int(off[i].nonzero()[0])
                x, y = pair(float(gradient[i, t]), float(slope[i, t]))
                return f"slope {x} of the loss in a row with a = {a:+d} ({name}), {y} by v; the others are right"
        return None

    return case.smallest(fault)


CLAUSES: tuple[Law, ...] = (identity, one_value_function)
_NO_WEIGHT = "reported only: it acts on no row with a weight above 0"
_MIRRORS = (
    "reported only: the loss equals the one with the weights of a pair on its desirable row, where nothing is reflected"
)


def clauses(case: HaloCase) -> Iterator[Clause]:
    """The clauses of a HALO: those of its parts as they act in it, and those of its loss."""

    def idle(law: Law, definition: Definition) -> str | None:
        """Why v does not matter to this objective, else None."""
        acts = True
        if law in UNDESIRABLE:
            acts = case.acts_mirrored(definition)
        elif law in (non_decreasing, concave_on_gains):
            acts = case.acts_itself(definition)
        return None if acts else _MIRRORS if law in UNDESIRABLE and case.mirrors else _NO_WEIGHT

    for clause in value_function.clauses(case.value_function, not_required=idle):
        if clause.name not in {law.__name__ for law in UNDESIRABLE}:
            yield clause
        elif case.reflects or case.weights[1]:
            yield replace(clause, definitions=tuple(d for d in get_args(Definition) if case.mirrored(d)))
    yield from reward.clauses(case.reward)
    for clause in reference_point.clauses(case.reference_point):
        if clause.name == reference_in_range.__name__:
            clause = replace(clause, note=lambda note=clause.note: joined(note(), sees_more(case)))  # type: ignore[misc]
        if clause.name == reference_split.__name__:
            clause = replace(clause, check=lambda check=clause.check: check() or case.witness(loss_split))  # type: ignore[misc]
        yield clause
    for clause in feedback.clauses(case.feedback):
        own = clause.name == "feedback_weight"
        yield replace(clause, note=lambda note=clause.note: joined(_weights(case), note())) if own else clause  # type: ignore[misc]
    yield from map(case.clause, case.laws)


def _weights(case: HaloCase) -> str | None:
    """A remark if rows have different weights."""
    weights = sorted(case.weights[-1] | case.weights[1])
    if len(weights) < 2:
        return None
    by = f"{weights[0]:g} to {weights[-1]:g}" if len(weights) > 3 else ", ".join(f"{w:g}" for w in weights)
    return f"rows have weights {by}: judged on the data with these weights"


def verdict(case: HaloCase, failed: list[str], definition: Definition) -> str:
    """The verdict on a HALO that fails the clauses ``failed``."""
    reflected = [name for name in failed if name in {law.__name__ for law in UNDESIRABLE}]
    constant = case.reference_point.constant is not None
    # First faults of v itself, its reward or its feedback; then the lack of a reference point; then faults that only
    # the reflection of v has, since against a constant z0 there are no gains and losses to reflect about.
    if failed and (len(failed) > len(reflected) or not constant):
        return halo_shaped(failed)
    if constant:
        return "degenerate reference"
    return "halo (two-sided)" if case.two_sided(definition) else "halo"


def halo_shaped(failed: list[str]) -> str:
    """The verdict on an objective with the parts of a HALO that fails some clauses."""
    other = [name for name in failed if name != reward_of_its_row.__name__]
    faults = ["reward is not a function of (x, y)"] if len(other) < len(failed) else []
    faults += [f"fails {', '.join(other)}"] if other else []
    return f"halo-shaped: {'; '.join(faults)}"
