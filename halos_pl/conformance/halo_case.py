"""The state that the clauses of a HALO share: the cases of its four parts, and the loss that follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.conformance import reference_point, value_function
from halos_pl.conformance.clause import Case, Law
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.feedback import FeedbackCase
from halos_pl.conformance.later import state_of
from halos_pl.conformance.reference_case import ReferencePointCase
from halos_pl.conformance.reward import RewardCase
from halos_pl.conformance.smallest import smallest
from halos_pl.conformance.steps import Step, gradient_of, with_leaf
from halos_pl.conformance.value_case import ValueFunctionCase
from halos_pl.objective.halo import HALO, mean_of_tokens

T = TypeVar("T")
# Float32 inside the loss is no fault.
RELATIVE = 1e-5


@dataclass(frozen=True)
class Expectation:
    """The loss of some rows by the definition, from the parts alone.

    Attributes:
        loss: sum of w * a * v / denominator, float64 scalar with gradient.
        size: sum of the terms' absolute values.
        sign, weight: of each row that carries a loss.
    """

    loss: Tensor
    size: float
    sign: Tensor
    weight: Tensor


class HaloCase(Case):
    """One HALO under check, apart from its parts, which have their own cases.

    Args:
        objective: the target; copies of it are called.
        laws: its clauses.
        examples: number of steps that each clause is tried on.
        thorough: whether to search its value function thoroughly.
        shared: cases of parts that other terms or objectives share; their clauses run once.
    """

    def __init__(
        self,
        objective: HALO,
        laws: tuple[Law, ...],
        *,
        examples: int = 60,
        thorough: bool = False,
        shared: dict[Any, Any] | None = None,
    ) -> None:
        super().__init__(objective, laws)
        self.target = objective
        self.examples = examples
        cases = {} if shared is None else shared

        def shared_case(make: Callable[[], T], *parts: object) -> T:
            # An id is unique only while the part lives, so the entry keeps the part.
            key = (examples, thorough, *map(state_of, parts))
            return cases.setdefault(key, (make(), parts))[0]  # type: ignore[no-any-return]

        v, r, z0, f = objective.value_function, objective.reward, objective.reference_point, objective.feedback
        self.value_function: ValueFunctionCase = shared_case(
            lambda: ValueFunctionCase(v, value_function.CLAUSES, thorough=thorough), v
        )
        self.reward: RewardCase = shared_case(lambda: RewardCase(r, examples=examples), r)
        self.reference_point: ReferencePointCase = shared_case(
            lambda: ReferencePointCase(
                z0,
                reference_point.CLAUSES,
                reward=r,
                needs=objective.needs,
                examples=examples,
            ),
            z0,
            r,
            objective.needs,
        )
        self.feedback: FeedbackCase = shared_case(lambda: FeedbackCase(f, examples=examples), f)

    def smallest(self, fault: Callable[[Step], str | None]) -> str | None:
        """The witness of the smallest faulty step, else None."""
        # A sixth of the examples: each costs several backward passes.
        return smallest(fault, self.target.needs, examples=max(10, self.examples // 6))

    def fresh(self) -> HALO:
        """A copy in training mode that has not been called."""
        return duplicate(self.target)

    @cached_property
    def weights(self) -> dict[int, set[float]]:
        """The weights above 0 of desirable (-1) and undesirable (+1) rows."""
        seen: dict[int, set[float]] = {-1: set(), 1: set()}

        def look(step: Step) -> None:
            sign, weight, _ = self.feedback.judged(step.rows())
            for s, w in zip(sign.tolist(), weight.tolist(), strict=True):
                if w > 0 and s in seen:
                    seen[int(s)].add(round(w, 6))

        try:
            smallest(look, self.feedback.target.needs, mismatched=True, examples=self.examples)
        except Exception:  # the feedback's own clauses report it
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

    def expectation(self, rows: LogProbBatch, parts: HALO | None = None) -> Expectation:
        """The sum of w * a * v over ``rows``, which include mismatched ones, by ``parts`` or a fresh copy."""
        parts = parts or self.fresh()
        detached = rows.detach()
        sign, weight, denominator = parts.feedback(detached)
        train = rows.labels.train.nonzero().squeeze(1)
        train_rows = rows.select(train)
        reward = parts.reward(train_rows)
        if parts.reference_point.scope == "step":
            with torch.no_grad():
                z0 = (
                    parts.reference_point(mean_of_tokens(parts.reward(detached), detached.mask), detached)
                    .select(train)
                    .value
                )
        else:
            z0 = parts.reference_point(mean_of_tokens(reward, train_rows.mask), train_rows).value
        sign, weight = sign[train], weight[train]
        a, w = sign, weight
        if reward.dim() == 2:
            a, w = a[:, None].expand_as(reward), w[:, None] * train_rows.mask
            z0 = z0[:, None] if z0.dim() else z0
        u = reward - z0
        undesirable = a > 0
        value = parts.value_function(torch.where(undesirable & self.reflects, -u, u))
        judged = torch.where(undesirable & (not self.reflects), value, -value)
        summed = (w * judged).sum() / denominator
        return Expectation(summed, float(((w * judged).abs().sum() / denominator).detach()), sign, weight)

    def losses(self, rows: LogProbBatch, same: LogProbBatch, copies: tuple[HALO, HALO]) -> tuple[Tensor, Expectation]:
        """The loss of ``rows`` by the first copy, and that of ``same`` by the definition and the second copy."""
        judging, parts = copies
        return judging(rows).loss, self.expectation(same, parts)

    def slopes(
        self, rows: LogProbBatch, copies: tuple[HALO, HALO] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Expectation]:
        """Loss and its gradient, of the objective and by the definition, from two copies or fresh ones.

        Gradients are with respect to log-probs, [n, T], and, if the objective needs them, scalars, [n, T + 1].
        """
        (one, batch), (other, same) = (with_leaf(rows, self.target.needs) for _ in range(2))
        loss, expectation = self.losses(batch, same, copies or (self.fresh(), self.fresh()))
        right = expectation.loss
        return loss.detach().double(), gradient_of(loss, one), right.detach(), gradient_of(right, other), expectation

    def counts(self, rows: LogProbBatch) -> bool:
        """Whether any row of the step carries weight, so that the denominator is not 0."""
        return float(self.feedback.judged(rows).denominator) > 0
