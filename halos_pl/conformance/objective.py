"""Clauses of an objective: those of its four parts, and that its loss is what the definition says of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.feedback import FeedbackChecks
from halos_pl.conformance.ranks import Ranks, namespaces
from halos_pl.conformance.reference_point import ReferencePointChecks
from halos_pl.conformance.reward import RewardChecks
from halos_pl.conformance.steps import Step, smallest, two_ranks
from halos_pl.conformance.value_function import ValueFunctionChecks
from halos_pl.conformance.witness import listed, pair
from halos_pl.objective.feedback import Feedback
from halos_pl.objective.halo import HALO, Objective, Sum, mean_of_tokens
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import Reward
from value_functions import ValueFunction

T = TypeVar("T")
CLAUSES = ("identity", "one_value_function")
PARTS: dict[str, type] = {
    "value_function": ValueFunction,
    "reward": Reward,
    "reference_point": ReferencePoint,
    "feedback": Feedback,
}
# A float32 in the loss is no fault.
RELATIVE = 1e-5


def is_halo(objective: Objective) -> TypeGuard[HALO]:
    """Whether the objective is put together from the four parts, whatever its class is."""
    return hasattr(objective, "reflect_undesirable") and all(
        isinstance(getattr(objective, name, None), kind) for name, kind in PARTS.items()
    )


def _state(part: object) -> object:
    """What two parts have in common exactly where they are the same function: their class and all that they hold."""
    try:
        return pickle.dumps(part)
    except Exception:  # a lambda, say: the same only as itself
        return id(part)


def terms(objective: Objective, name: str = "") -> list[tuple[str, Objective]]:
    """The summands of an objective by name, sums of sums taken apart; one without a name for what is no sum."""
    if not isinstance(objective, Sum):
        return [(name, objective)]
    if len(objective.terms) == 1:
        return terms(objective.terms[0], name)  # type: ignore[arg-type]
    found: list[tuple[str, Objective]] = []
    for i, term in enumerate(objective.terms):
        found += terms(term, f"{name}{i}_{type(term).__name__}.")  # type: ignore[arg-type]
    return found


def own_sums(objective: Objective) -> list[Sum]:
    """The sums within it, itself included, that are of another class than ``Sum`` and may add up otherwise."""
    if not isinstance(objective, Sum):
        return []
    inner = [found for term in objective.terms for found in own_sums(term)]  # type: ignore[arg-type]
    return inner if type(objective) is Sum else [objective, *inner]


def sum_of_terms(objective: Sum, examples: int) -> str | None:
    """The loss of a sum is the sum of its terms' losses, with the same gradient."""

    def fault(step: Step) -> str | None:
        both = []
        for parts in ([duplicate(objective)], [duplicate(term) for term in objective.terms]):
            leaf = step.rows().policy_logps.requires_grad_()
            given = replace(step.rows(), policy_logps=leaf)
            loss = torch.stack([part(given).loss for part in parts]).sum()
            both.append((loss.detach().double(), _gradient(loss, leaf)))
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


def _untied(rows: LogProbBatch) -> LogProbBatch:
    """Every row, and every pair, with a log-prob and a margin of its own: which of two equal ones is first is order."""

    def moved(logps: Tensor, by: float) -> Tensor:
        off = by * (1 + logps.abs().max()) * (1 + torch.arange(len(logps))).sqrt()
        return torch.cat([logps[:, :1] - off.to(logps)[:, None], logps[:, 1:]], dim=1)

    reference = None if rows.reference_logps is None else moved(rows.reference_logps, 0.017)
    return replace(rows, policy_logps=moved(rows.policy_logps, 0.01), reference_logps=reference)


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    return torch.zeros_like(leaf) if gradient is None else gradient


@dataclass(frozen=True)
class Expectation:
    """What the definition says of some rows, from the parts alone.

    Attributes:
        loss: sum of w * a * v / denominator, float64 scalar with gradient.
        size: sum of the same terms' sizes.
        sign, weight: of each row that carries a loss.
    """

    loss: Tensor
    size: float
    sign: Tensor
    weight: Tensor


class ObjectiveChecks:
    """The clauses of one HALO beyond those of its parts; each ``None`` where it holds, else a witness.

    Args:
        objective: the target; copies of it are called.
        examples: how many steps each clause is tried on.
        thorough: for its value function.
        shared: checks of parts that other terms or objectives have as well, which are held to their clauses once.
    """

    def __init__(
        self, objective: HALO, *, examples: int = 60, thorough: bool = False, shared: dict[Any, Any] | None = None
    ) -> None:
        self.target = objective
        self.examples = examples
        known = {} if shared is None else shared

        def of(kind: Callable[..., T], part: nn.Module, *others: object, **arguments: Any) -> T:
            key = (kind, examples, thorough, *map(_state, (part, *others)))
            return known.setdefault(key, kind(part, **arguments))  # type: ignore[no-any-return]

        self.value_function = of(ValueFunctionChecks, objective.value_function, thorough=thorough)
        self.reward = of(RewardChecks, objective.reward, examples=examples)
        self.reference_point = of(
            ReferencePointChecks,
            objective.reference_point,
            objective.reward,
            objective.needs,
            reward=objective.reward,
            needs=objective.needs,
            examples=examples,
        )
        self.feedback = of(FeedbackChecks, objective.feedback, examples=examples)

    def _smallest(self, fault: object) -> str | None:
        # A sixth: an example costs several backward passes.
        return smallest(fault, self.target.needs, examples=max(10, self.examples // 6))  # type: ignore[arg-type]

    def fresh(self) -> HALO:
        """A copy in training mode that has not been called."""
        return duplicate(self.target)

    # -- what carries weight ---------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> dict[int, set[float]]:
        """The weights above 0 that desirable (-1) and undesirable (+1) rows were seen with."""
        seen: dict[int, set[float]] = {-1: set(), 1: set()}

        def look(step: Step) -> None:
            sign, weight, _ = self.feedback.judged(step.rows())
            for s, w in zip(sign.tolist(), weight.tolist(), strict=True):
                if w > 0 and s in seen:
                    seen[int(s)].add(round(w, 6))

        try:
            smallest(look, self.feedback.target.needs, mismatched=True, examples=self.examples)
        except Exception:  # what is wrong with it is said by the feedback's own clauses
            return seen
        return seen

    @property
    def reflects(self) -> bool:
        """Whether undesirable rows are valued by v~(u) = -v(-u)."""
        return self.target.reflect_undesirable

    @property
    def acts_on_desirable(self) -> bool:
        """Whether v itself is applied to rows that count."""
        return not self.reflects or bool(self.weights[-1]) or not self.weights[1]

    @property
    def acts_reflected(self) -> bool:
        """Whether v~ is applied to rows that count."""
        return self.reflects and bool(self.weights[1])

    @cached_property
    def two_sided(self) -> bool:
        """Whether both classes count and v and v~ differ by more than a constant: v' is not symmetric."""
        if not (self.acts_reflected and self.weights[-1]):
            return False
        curve = self.value_function.curve.finite()
        near = curve.part(curve.u.abs() <= 100)
        mirror = self.value_function.reflected.finite()
        inside = slice(1, -1) if len(near.u) > 2 else slice(None)
        u = near.u[inside]
        place = torch.searchsorted(mirror.u, u).clamp(max=len(mirror.u) - 1)
        exact = mirror.u[place] == u  # the grid is symmetric, the points added to it need not be
        off = (near.slope[inside] - mirror.slope[place]).abs()[exact & (u != 0)]
        return bool((off > 1e-9 * near.slope.abs().max()).any())

    # -- the loss ----------------------------------------------------------------------------------------------

    def expectation(self, rows: LogProbBatch, parts: HALO | None = None) -> Expectation:
        """The sum of w * a * v over ``rows``, mismatched rows included, by ``parts`` or fresh ones."""
        parts = parts or self.fresh()
        known = rows.detach()
        sign, weight, denominator = parts.feedback(known)
        train = rows.labels.train.nonzero().squeeze(1)
        own = rows.select(train)
        reward = parts.reward(own)
        if parts.reference_point.scope == "step":
            with torch.no_grad():
                z0 = parts.reference_point(mean_of_tokens(parts.reward(known), known.mask), known).select(train).value
        else:
            z0 = parts.reference_point(mean_of_tokens(reward, own.mask), own).value
        sign, weight = sign[train], weight[train]
        a, w = sign, weight
        if reward.dim() == 2:
            a, w = a[:, None].expand_as(reward), w[:, None] * own.mask
            z0 = z0[:, None] if z0.dim() else z0
        u = reward - z0
        undesirable = a > 0
        value = parts.value_function(torch.where(undesirable & self.reflects, -u, u))
        judged = torch.where(undesirable & (not self.reflects), value, -value)
        summed = (w * judged).sum() / denominator
        return Expectation(summed, float(((w * judged).abs().sum() / denominator).detach()), sign, weight)

    def _losses(self, rows: LogProbBatch, same: LogProbBatch, copies: tuple[HALO, HALO]) -> tuple[Tensor, Expectation]:
        """The loss as judged by the first copy, and what the definition says of ``same`` by the second."""
        judging, parts = copies
        return judging(rows).loss, self.expectation(same, parts)

    def _slopes(
        self, rows: LogProbBatch, copies: tuple[HALO, HALO] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Expectation]:
        """Loss and its gradient [n, T], as judged and as the definition says, by two copies or by fresh ones."""
        one, other = (rows.policy_logps.clone().requires_grad_() for _ in range(2))
        given = replace(rows, policy_logps=one), replace(rows, policy_logps=other)
        loss, expectation = self._losses(*given, copies or (self.fresh(), self.fresh()))
        right = expectation.loss
        return loss.detach().double(), _gradient(loss, one), right.detach(), _gradient(right, other), expectation

    def _counts(self, rows: LogProbBatch) -> bool:
        """Whether any row of the step carries weight, so that there is something to divide by."""
        return float(self.feedback.judged(rows).denominator) > 0

    def identity(self) -> str | None:
        """See below; found once, because the next clause asks as well."""
        return self._identity

    @cached_property
    def _identity(self) -> str | None:
        """The loss less sum w * a * v / denominator does not depend on theta: one constant, and the same gradient."""

        def fault(step: Step) -> str | None:
            rows = step.rows()
            if not self._counts(rows):
                return None
            loss, gradient, right, slope, expectation = self._slopes(rows)
            found = self._wrong_slope(rows, gradient, slope)
            if found:
                return found
            for factor in (0.5, 2.0):
                moved = replace(rows, policy_logps=rows.policy_logps * factor)
                there, right_there = self._losses(moved, moved, (self.fresh(), self.fresh()))
                change, right_change = float(there - loss), float(right_there.loss - right)
                if not abs(change - right_change) <= RELATIVE * (expectation.size + right_there.size) + 1e-9:
                    a, b = pair(change, right_change)
                    return (
                        f"log-probs {listed(rows.policy_logps[rows.mask])} times {factor}: the loss changes by {a},"
                        f" sum w a v by {b}"
                    )
            # One copy on further steps, and in evaluation; beside it one whose parts are called as often.
            copies = self.fresh(), self.fresh()
            for call in range(1, 2 if step.large else 4):
                later = step.later(call).rows() if call < 3 else rows
                if self._counts(later):
                    for copy in copies:
                        copy.train(call < 3)
                    _, gradient, _, slope, _ = self._slopes(later, copies)
                    found = self._wrong_slope(later, gradient, slope)
                    if found:
                        return f"{found}, on call {call}{'' if call < 3 else ' in evaluation'}"
            return None

        return self._smallest(fault)

    @staticmethod
    def _wrong_slope(rows: LogProbBatch, gradient: Tensor, slope: Tensor) -> str | None:
        """Where the gradient of the loss is another one than that of sum w * a * v / denominator, in words."""
        off = (gradient - slope).abs()
        most = RELATIVE * max(float(slope.abs().max()), float(gradient.abs().max())) + 1e-12
        if bool((off <= most).all()):
            return None
        i, t = (~(off <= most)).nonzero()[0].tolist()
        a, b = pair(float(gradient[i, t]), float(slope[i, t]))
        kind = "desirable" if rows.labels.desirable[i] else "undesirable"
        logps = f"policy {listed(rows.policy_logps[rows.mask])}"
        return f"{logps}: slope {a} of the loss in a {kind} row, {b} by w a v"

    def one_value_function(self) -> str | None:
        """The value function that the objective shows acts on the rows of either sign."""
        if self._identity is None:
            return None

        def fault(step: Step) -> str | None:
            rows = step.rows()
            if not self._counts(rows):
                return None
            _, gradient, _, slope, expectation = self._slopes(rows)
            train = rows.labels.train.nonzero().squeeze(1)
            gradient, slope = gradient[train], slope[train]
            most = RELATIVE * max(float(slope.abs().max()), float(gradient.abs().max())) + 1e-12
            wrong = ~((gradient - slope).abs() <= most).all(dim=1)
            sides = {a: (expectation.sign == a) & (expectation.weight > 0) for a in (-1, 1)}
            for a, name in ((-1, "desirable"), (1, "undesirable")):
                own, other = wrong & sides[a], sides[-a]
                if bool(own.any()) and bool(other.any()) and not bool((wrong & other).any()):
                    i = int(own.nonzero()[0])
                    t = int((gradient - slope)[i].abs().argmax())
                    x, y = pair(float(gradient[i, t]), float(slope[i, t]))
                    return f"slope {x} of the loss in a row with a = {a:+d} ({name}), {y} by v; the others are right"
            return None

        return self._smallest(fault)

    def loss_split(self) -> str | None:
        """The losses of micro-batches, and of ranks, sum to the loss of the step."""
        micro = None if self.target.needs.whole_step else self._micro_batches()
        return micro or self._smallest(self._two_ranks)

    def _two_ranks(self, step: Step) -> str | None:
        rows = _untied(step.rows())
        parts = two_ranks(rows, self.target.needs, step.seed)
        if not parts or not self._counts(rows):
            return None

        def outcome_and_loss(rows: LogProbBatch, copy: HALO) -> tuple[Tensor, Tensor]:
            leaf = rows.policy_logps.clone().requires_grad_()
            loss = copy(replace(rows, policy_logps=leaf)).loss
            return loss.detach(), _gradient(loss, leaf)

        def on_rank(index: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
            copy = self.fresh()  # here, for duplicating is nothing that two threads should do at once
            return lambda: outcome_and_loss(rows.select(index), copy)

        loss, slope = outcome_and_loss(rows, self.fresh())
        jobs: list[Callable[[], Any]] = [on_rank(index) for index in parts]
        ranks = Ranks().run(jobs, namespaces(self.target))
        where = f"ranks of {len(parts[0])} and {len(parts[1])} rows"
        summed = sum(float(part) for part, _ in ranks)
        size = sum(abs(float(part)) for part, _ in ranks)
        if not abs(summed - float(loss)) <= RELATIVE * size + 1e-9:
            a, b = pair(float(loss), summed)
            return f"loss {a} of the step, {b} summed over {where}"
        most = RELATIVE * float(slope.abs().max()) + 1e-12
        for index, (_, own) in zip(parts, ranks, strict=True):
            off = (~((slope[index][:, : own.shape[1]] - own).abs() <= most)).nonzero()
            if len(off):
                i, t = off[0].tolist()
                a, b = pair(float(slope[index[i], t]), float(own[i, t]))
                return f"slope {a} of the loss of the step, {b} on {where}"
        return None

    def _micro_batches(self) -> str | None:
        def fault(step: Step) -> str | None:
            rows = step.rows()
            if not self._counts(rows):
                return None
            leaf = rows.policy_logps.clone().requires_grad_()
            given = replace(rows, policy_logps=leaf)
            whole, parts = self.fresh(), self.fresh()
            loss = whole(given).loss
            context = parts.prepare(given.detach())
            train = rows.labels.train.nonzero().squeeze(1)
            units = self.reference_point.parts(rows.select(train))
            losses = []
            for unit in units:
                index = train[unit]
                losses.append(parts.compute_loss(given.select(index), context.select(index)).loss)
            summed = torch.stack(losses).sum()
            size = sum(abs(part.item()) for part in losses)
            if not abs((summed - loss).item()) <= RELATIVE * size + 1e-9:
                a, b = pair(loss.item(), summed.item())
                return f"loss {a} of {len(train)} rows at once, {b} in {len(units)} micro-batches"
            one, other = _gradient(loss, leaf), _gradient(summed, leaf)
            off = (one - other).abs()
            if not bool((off <= RELATIVE * one.abs().max() + 1e-12).all()):
                i = int(off.argmax())
                a, b = pair(float(one.flatten()[i]), float(other.flatten()[i]))
                return f"slope {a} of the loss of {len(train)} rows at once, {b} in {len(units)} micro-batches"
            return None

        return self._smallest(fault)

    def reference_split(self) -> str | None:
        """The reference point's own clause, and that of the loss."""
        return self.reference_point.reference_split() or self.loss_split()
