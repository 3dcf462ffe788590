"""The state that the clauses of a HALO share: the cases of its four parts, and the loss that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.conformance import reference_point, value_function
from halos_pl.conformance.clause import Law
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.feedback import FeedbackCase
from halos_pl.conformance.later import CALLS, EXAMPLES, PartCase, state_of
from halos_pl.conformance.reference_case import ReferencePointCase
from halos_pl.conformance.report import Definition
from halos_pl.conformance.reward import RewardCase
from halos_pl.conformance.smallest import smallest
from halos_pl.conformance.steps import Step, asked, fitted_to, gradient_of, unscored, with_leaf
from halos_pl.conformance.value_case import ValueFunctionCase
from halos_pl.objective.halo import HALO, mean_of_tokens

T = TypeVar("T")
# Float32 inside the loss is no fault.
RELATIVE = 1e-5
# Steps after which a loss is compared again that consists of its parts and has no code of its own.
_STEPS_OF_PARTS = 100


@dataclass(frozen=True)
class Expectation:
    """The loss of some rows by the definition, from the parts alone.

    Attributes:
        loss: sum of w * a * v / denominator, float64 scalar with gradient; w includes each row's own weight.
        size: sum of the terms' absolute values.
        sign, weight: of each row that carries a loss.
    """

    loss: Tensor
    size: float
    sign: Tensor
    weight: Tensor


class HaloCase(PartCase):
    """One HALO under check, apart from its parts, which have their own cases.

    Args:
        objective: the target; copies of it are called.
        laws: its clauses.
        examples: number of steps that each clause is tried on.
        thorough: whether to search its value function thoroughly.
        shared: cases of parts that other terms or objectives share; their clauses run once.
    """

    target: HALO

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
        self.needs = objective.needs
        self.examples, self.thorough = examples, thorough
        self._counts: dict[Step, bool] = {}
        # Each step calls prepare and compute_loss. The parts have been called 5,000 times by their own cases.
        self.steps = CALLS // 2 if self._has_own_code else _STEPS_OF_PARTS
        cases = {} if shared is None else shared

        def shared_case(make: Callable[[], T], *parts: object) -> T:
            # An id is unique only while the part lives, so the entry keeps the part.
            key = (examples, thorough, *map(state_of, parts))
            return cases.setdefault(key, (make(), parts))[0]  # type: ignore[no-any-return]

        v, r, z0, f = objective.value_function, objective.reward, objective.reference_point, objective.feedback
        self.value_function: ValueFunctionCase = shared_case(
            lambda: ValueFunctionCase(v, value_function.CLAUSES, thorough=thorough), v
        )
        given = provided(self.needs)
        of_reward = r.needs | given
        self.reward: RewardCase = shared_case(lambda: RewardCase(r, needs=of_reward, examples=examples), r, of_reward)
        self.reference_point: ReferencePointCase = shared_case(
            lambda: ReferencePointCase(
                z0,
                reference_point.CLAUSES,
                reward=r,
                needs=self.needs,
                examples=examples,
            ),
            z0,
            r,
            self.needs,
        )
        of_feedback = f.needs | given | Needs(undesirable=self.needs.undesirable, step_rewards=self.needs.step_rewards)
        self.feedback: FeedbackCase = shared_case(
            lambda: FeedbackCase(f, needs=of_feedback, examples=examples), f, of_feedback
        )

    def smallest(self, fault: Callable[[Step], str | None]) -> str | None:
        """The witness of the smallest faulty step, else None."""
        # A sixth of the examples: each costs several backward passes.
        return smallest(fault, self.needs, examples=max(10, self.examples // 6))

    def rows(self, step: Step, dtype: torch.dtype = torch.float64) -> LogProbBatch:
        """The rows of a step, with what the objective asks for."""
        return asked(step.rows(dtype), self.needs)

    @property
    def _has_own_code(self) -> bool:
        """Whether the target computes its loss in another way than :class:`HALO`, which has no state of its own."""
        return type(self.target) is not HALO or not vars(HALO).keys().isdisjoint(vars(self.target))

    def drawn(self, number: int) -> LogProbBatch:
        """Rows of a small step, in float32."""
        return self.rows(fitted_to(Step(units=2 + number, tokens=2, seed=number), self.needs, None), torch.float32)

    def called(self, part: nn.Module, rows: LogProbBatch) -> Tensor:
        """The loss of a step, as training computes it; scalar."""
        return self.loss(part, rows)  # type: ignore[arg-type]

    def repeated(self, rows: LogProbBatch) -> Callable[[Any], Tensor]:
        """The loss of the same step, with its rows selected once."""
        index = rows.labels.train_index
        of_step, judged = rows.detach(), rows.select(index)
        return lambda part: part.compute_loss(judged, part.prepare(of_step).select(index)).loss

    def of(self, part: HALO, examples: int) -> HaloCase:  # type: ignore[override]
        """The same case of another objective."""
        return HaloCase(part, self.laws, examples=examples, thorough=self.thorough)

    def lived(self) -> Iterator[tuple[str, PartCase]]:
        """The case of the objective after steps of training, if its feedback remembers them."""
        part = duplicate(self.target)
        for number in range(1, 4):
            part(with_leaf(self.drawn(number), self.needs)[1])
        if state_of(part.feedback) != state_of(duplicate(self.target.feedback)):
            yield "after three steps of training", self.of(part, EXAMPLES)

    def loss(self, objective: HALO, rows: LogProbBatch, parts: list[Tensor] | None = None) -> Tensor:
        """The loss of a step as training computes it: ``prepare``, then ``compute_loss`` for each micro-batch.

        Args:
            objective: the copy to call.
            rows: all rows of the step.
            parts: positions of the rows of each micro-batch; default: all rows that carry a loss at once. With several,
                rows are scored before ``prepare`` only if the objective asks for that.
        """
        early = parts is None or self.needs.step_rewards or self.needs.whole_step
        context = objective.prepare((rows if early else unscored(rows)).detach())
        each = parts or [rows.labels.train_index]
        losses = [objective.compute_loss(rows.select(index), context.select(index)).loss for index in each]
        return torch.stack(losses).sum()

    def micro_batches(self, rows: LogProbBatch) -> list[Tensor]:
        """Positions of the rows of each micro-batch; one that has them all if the objective compares the whole step.

        The last one has none, as on a rank that has fewer micro-batches than another.
        """
        train = rows.labels.train_index
        if self.needs.whole_step:
            return [train]
        return [*(train[unit] for unit in self.reference_point.parts(rows.select(train))), train[:0]]

    def fresh(self) -> HALO:
        """A copy in training mode that has not been called."""
        return duplicate(self.target)

    @cached_property
    def weights(self) -> dict[int, set[float]]:
        """The weights above 0 of desirable (-1) and undesirable (+1) rows."""
        seen: dict[int, set[float]] = {-1: set(), 1: set()}

        def look(step: Step) -> None:
            if step.huge:
                return
            sign, weight, _ = self.feedback.judged(self.feedback.rows(step))
            for s, w in zip(sign.tolist(), weight.tolist(), strict=True):
                if w > 0 and s in seen:
                    seen[int(s)].add(round(w, 6))

        try:
            self.feedback.smallest(look)
        except (Exception, SystemExit):  # the feedback's own clauses report it
            return seen
        return seen

    @property
    def reflects(self) -> bool:
        """Whether the loss of an undesirable row is -v(-u) and not +v(u)."""
        return self.target.reflect_undesirable

    def mirrored(self, definition: Definition) -> bool:
        """Whether undesirable rows are valued by v~(u) = -v(-u) under a version of the definition.

        ICML has a sign a for each row. In v1, each row's loss is a negative affine map of its value, so an undesirable
        row has the reward -r: -v(-u) is then the value v of that row, and +v(u) is its value v~.
        """
        return self.reflects == (definition == "icml")

    def acts_itself(self, definition: Definition) -> bool:
        """Whether v itself is applied to rows that count."""
        return not self.mirrored(definition) or bool(self.weights[-1]) or not self.weights[1]

    def acts_mirrored(self, definition: Definition) -> bool:
        """Whether v~ is applied to rows that count."""
        return self.mirrored(definition) and bool(self.weights[1]) and not self.mirrors

    @cached_property
    def mirrors(self) -> bool:
        """Whether reflecting a row is the same as weighting the other row of its pair, so that nothing is reflected.

        -u of an undesirable row is u of its pair's desirable row if each is the other's reference point. The losses
        are compared, with the weights of both rows on the desirable one.
        """
        if not (self.reflects and self.needs.pairs):
            return False

        def fault(step: Step) -> str | None:
            rows = self.rows(step)
            if step.huge or not self.counts(step):
                return None
            (one, here), (other, there) = (with_leaf(rows, self.needs) for _ in range(2))
            right, mirrored = self.expectation(here), self.expectation(there, mirrored=True)
            losses = right.loss.detach(), mirrored.loss.detach()
            off = (gradient_of(right.loss, one) - gradient_of(mirrored.loss, other)).abs().max()
            alike = abs(float(losses[0] - losses[1])) <= RELATIVE * right.size and off <= RELATIVE * right.size
            return None if alike else "the losses differ"

        return self.smallest(fault) is None

    def two_sided(self, definition: Definition) -> bool:
        """Whether both classes count, and v acts on one and v~ on the other, which is another function."""
        return self.acts_mirrored(definition) and bool(self.weights[-1]) and self.is_asymmetric

    @cached_property
    def is_asymmetric(self) -> bool:
        """Whether v and v~ differ by more than a constant: v' is not symmetric."""
        curve = self.value_function.curve.finite()
        near = curve.part(curve.u.abs() <= 100)
        mirror = self.value_function.curve.reflected.finite()
        inside = slice(1, -1) if len(near.u) > 2 else slice(None)
        u = near.u[inside]
        place = torch.searchsorted(mirror.u, u).clamp(max=len(mirror.u) - 1)
        exact = mirror.u[place] == u  # the grid is symmetric, the points added to it need not be
        off = (near.slope[inside] - mirror.slope[place]).abs()[exact & (u != 0)]
        return bool((off > 1e-9 * near.slope.abs().max()).any())

    def expectation(self, rows: LogProbBatch, parts: HALO | None = None, *, mirrored: bool = False) -> Expectation:
        """The sum of w * a * v over ``rows``, which include mismatched ones, by ``parts`` or a fresh copy.

        With ``mirrored``, the desirable row of each pair carries the weight of both.
        """
        parts = parts or self.fresh()
        detached = rows.detach()
        sign, weight, denominator = parts.feedback(detached)
        weight = weight * detached.labels.weight
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
        if mirrored:
            both = weight + weight[train_rows.labels.pair]
            weight = torch.where(train_rows.labels.desirable, both, 0.0)
            sign = -torch.ones_like(sign)
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
        return self.loss(judging, rows), self.expectation(same, parts)

    def slopes(
        self, rows: LogProbBatch, copies: tuple[HALO, HALO] | None = None, *, cotangent: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Expectation]:
        """Loss and its gradient, of the objective and by the definition, from two copies or fresh ones.

        Gradients are with respect to log-probs, [n, T], and, if the objective needs them, scalars, [n, T + 1]. That of
        the objective is computed from ``cotangent`` * loss.
        """
        (one, batch), (other, same) = (with_leaf(rows, self.needs) for _ in range(2))
        loss, expectation = self.losses(batch, same, copies or (self.fresh(), self.fresh()))
        right = expectation.loss
        return (
            loss.detach().double(),
            gradient_of(loss, one, cotangent),
            right.detach(),
            gradient_of(right, other),
            expectation,
        )

    def counts(self, step: Step) -> bool:
        """Whether any row of the step carries weight, so that the denominator is not 0."""
        if step not in self._counts:
            self._counts[step] = float(self.feedback.judged(self.rows(step)).denominator) > 0
        return self._counts[step]


def provided(needs: Needs) -> Needs:
    """The needs that decide which fields of the rows are there."""
    return Needs(
        reference=needs.reference,
        exact_kl=needs.exact_kl,
        routing=needs.routing,
        scalar=needs.scalar,
        logps=needs.logps,
    )
