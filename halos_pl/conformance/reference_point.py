"""The clauses of a reference point: a mean of rewards that does not depend on how a step is split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.conformance.clause import Clause, Law, explained
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.reference_case import RELATIVE, ReferencePointCase, first_difference, untied
from halos_pl.conformance.reference_slope import other_slope, other_slope_at_ties
from halos_pl.conformance.reference_split import reference_split
from halos_pl.conformance.steps import Step, with_leaf
from halos_pl.conformance.witness import WrongShape, listed, number
from halos_pl.objective.halo import mean_of_tokens
from halos_pl.objective.reference_points import Estimate, ReferencePoint


@explained(
    example="""
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(2 * MeanOverRanks(rewards[rows.labels.train]).mean)
        """,
    cure="""Average rewards with weights of at least 0 that sum to 1, without factor or offset, over the rows of this
    step. A clamp from below at 0 is allowed where r is a log-ratio: policy and reference both sum to 1, so z0 = 0 is a
    mean of rewards. An exact KL divergence belongs to a reward in nats per completion.""",
)
def reference_in_range(case: ReferencePointCase) -> str | None:
    """z0 is a mean of rewards of this step, E_Q[r]: between the smallest and the largest reward that it depends on.

    It must not always be the row's own reward. An exact KL divergence is an expected reward. 0 is a mean of rewards if
    all observed ones are negative and the reward is a log-ratio, since policy and reference both sum to 1.
    """
    compared = False

    def fault(step: Step) -> str | None:
        nonlocal compared
        rows = case.rows(step)
        drawn = case.rewards(rows)
        if int(rows.labels.train.sum()) > 1 and not step.huge:
            off = (case.estimate(drawn, rows) - drawn).abs()[rows.labels.train]
            compared |= bool((off > RELATIVE * drawn.abs().max()).any())
        expected = case.expected(rows)
        same = case.fresh()
        seen = [expected]
        if step.huge:
            levels = (drawn, next(_levels(drawn, rows)))
            outside = (_outside(case, case.estimate(r, rows), torch.cat([r.double(), expected]), rows) for r in levels)
            return next((witness for witness in outside if witness), None)
        after = drawn.clone()
        with torch.no_grad():
            case.fresh()(after, case.shown(rows))
        if not torch.equal(after, drawn):
            return f"rewards {listed(drawn)} are {listed(after)} after the call: changed in place"
        depends = None if step.large else case.reads(drawn, rows)
        for rewards in (drawn, *_levels(drawn, rows)):
            numbers = torch.cat([rewards.double(), expected])
            witness = _outside(case, case.estimate(rewards, rows), numbers, rows, depends)
            if witness:
                return witness
            seen.append(rewards.double())
            witness = _outside(case, case.estimate(rewards, rows, same), torch.cat(seen), rows)
            if witness:
                return f"{witness}, on call {len(seen) - 1}"
        if _moves(case, case.fresh(), rows) and not _moves(case, same, rows):
            return f"z0 no longer depends on the rewards of the step after {len(seen) - 1} calls"
        witness = _outside(case, case.estimate(drawn, rows, same.eval()), torch.cat(seen), rows)
        return witness and f"{witness}, in evaluation after {len(seen) - 1} calls"

    witness = case.constant_witness() or case.smallest(fault, examples=max(12, case.examples // 8))
    if witness is None and not compared:
        return "z0 is each row's own reward, so that every outcome is 0"
    worn = case.worn[1]
    if witness is None and _moves(case, case.fresh(), case.small) and not _moves(case, worn, case.small):  # type: ignore[arg-type]
        return f"z0 no longer depends on the rewards of the step after {case.steps:,} calls"
    return witness


def _levels(drawn: Tensor, rows: LogProbBatch) -> Iterator[Tensor]:
    """Rewards close together, away from 0, all the same, far out, and one far from all others."""
    yield torch.full_like(drawn, 1.3)  # which no binary number is equal to
    one = torch.where(torch.arange(len(rows)) == len(rows) // 2, -50.0, 1.0).to(drawn)
    yield one
    yield -one
    yield 0.1 * drawn + 5
    yield 0.1 * drawn - 5
    yield torch.full_like(drawn, 7e3)
    yield torch.full_like(drawn, -7e3)


def _moves(case: ReferencePointCase, copy: ReferencePoint, rows: LogProbBatch) -> bool:
    """Whether z0 of the next step depends on the rewards of that step."""
    one, other = (
        case.estimate(torch.full((len(rows),), level, dtype=rows.policy_logps.dtype), rows, duplicate(copy))
        for level in (100.0, 300.0)
    )
    return bool((one != other)[rows.labels.train].any())


def _outside(
    case: ReferencePointCase, z0: Tensor, numbers: Tensor, rows: LogProbBatch, depends: Tensor | None = None
) -> str | None:
    """A row with a loss whose z0 is outside the range of ``numbers``, or of those it ``depends`` on; in words, or None.

    Args:
        case, z0, rows: n estimates for the rows.
        numbers: float64 [m], rewards and expected rewards; NaN for none.
        depends: bool [n, m]; None for all.
    """
    known = ~numbers.isnan()
    slack = RELATIVE * (numbers[known].abs().max() + 0.1)
    if depends is None:
        low, high = numbers[known].aminmax()
    else:
        depends = depends & known
        depends = torch.where(depends.any(dim=1, keepdim=True), depends, known)
        low = torch.where(depends, numbers, torch.inf).min(dim=1).values
        high = torch.where(depends, numbers, -torch.inf).max(dim=1).values
    wrong = ~((low - slack <= z0) & (z0 <= high + slack)) & rows.labels.train
    at_zero = wrong & (z0 == 0) & (high < 0)
    if bool(at_zero.any()) and case.attains_zero:
        case.clamped = True
        wrong &= ~at_zero
    if not bool(wrong.any()):
        return None
    i = int(wrong.nonzero()[0])
    return f"rewards {listed(numbers[known if depends is None else depends[i]])}, z0 = {number(float(z0[i]))}"


@explained(
    example="""
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(MeanOverRanks(rewards[rows.labels.train]).mean.clamp(min=0))
        """,
    cure="""Use a location of the rewards (mean, median, quantile, trimmed mean) without clamp, factor or non-linear
    function. A running mean must start from the first estimate, not from 0.""",
)
def reference_shift_equivariant(case: ReferencePointCase) -> str | None:
    """If all rewards rise by c nats, z0 rises by c nats, so that outcomes stay the same.

    Where the reward is a log-ratio, a z0 that would be negative may be 0.
    """

    def fault(step: Step) -> str | None:
        rows = case.rows(step)
        rewards = untied(case.rewards(rows))
        base = 2 * float(rewards.abs().max()) + 1
        for c in (1.0,) if step.huge else (1.0, 10.0, 3.5 - base, -base, -2 * base):
            before, after = case.fresh(), case.fresh()
            low, high = torch.inf, -torch.inf
            for call, share in enumerate((1.0, 1.7, 0.6, 1.2)[: 1 if step.huge else None]):
                if call == 3:
                    before.eval()
                    after.eval()
                scaled = rewards * share
                low, high = (
                    f(bound, float((scaled + base + c).aminmax()[k]))
                    for k, (f, bound) in enumerate(((min, low), (max, high)))
                )
                a = case.estimate(scaled + base, case.raised(rows, base), before)
                b = case.estimate(scaled + base + c, case.raised(rows, base + c), after)
                most = RELATIVE * (scaled.abs().max() + base + abs(c))
                wrong = ~((b - a - c).abs() <= most) & rows.labels.train
                if bool(wrong.any()) and case.attains_zero:
                    wrong &= ~_clamped(a + c, b, low, high, first=call == 0, most=float(most))
                    case.clamped = True
                if bool(wrong.any()):
                    i = int(wrong.nonzero()[0])
                    x, y = number(float(a[i])), number(float(b[i]))
                    return f"rewards {listed(scaled + base)}: z0 = {x}; all {c:+g}: z0 = {y}"
        return None

    return case.constant_witness() or case.smallest(fault, max(12, case.examples // 3))


def _clamped(free: Tensor, z0: Tensor, low: float, high: float, *, first: bool, most: float) -> Tensor:
    """Whether z0 is what a clamp from below at 0 makes of the estimate ``free``, BoolTensor [n].

    Args:
        free, z0: float64 [n], the estimate without and with the clamp.
        low, high: the smallest and the largest reward of all calls so far.
        first: whether this is the first call. A mean over calls, some of them clamped, is only bounded.
        most: allowed difference, nats.
    """
    if first:
        return (z0 - free.clamp(min=0)).abs() <= most
    if high <= 0:
        return z0 == 0
    return (low < 0) & (free - most <= z0) & (z0 <= high + most)


@explained(
    example="""
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(rewards[rows.labels.train][0].detach())
        """,
    cure="""Do not match rows by position: rows.labels.pair gives a pair's other row, rows.labels.group the rows of a
    prompt, and rows.labels.mismatched the mismatched rows.""",
)
def reference_permutation_equivariant(case: ReferencePointCase) -> str | None:
    """The order of the rows does not matter: each row's z0 is the same in any order."""

    def fault(step: Step) -> str | None:
        rows = case.rows(step)
        rewards = untied(case.rewards(rows))
        z0 = case.estimates(rewards, rows, once=step.huge)
        orders = [torch.arange(len(rows)).flip(0)]
        if not step.huge:
            orders.append(torch.randperm(len(rows), generator=torch.Generator().manual_seed(step.seed)))
        for order in orders:
            permuted = rows.select(order)
            wrong = first_difference(
                z0[:, order], case.estimates(rewards[order], permuted, once=step.huge), rewards, permuted
            )
            if wrong:
                return f"rewards {listed(rewards)}: z0 = {wrong[0]}; in the order {order.tolist()[:12]}: {wrong[1]}"
        return None

    return case.smallest(fault, max(10, case.examples // 4))


@explained(
    example="""
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(rewards[rows.labels.train].mean())
        """,
    cure="""Detach the values that you average, as in rewards.detach(). In training, the rewards have no gradient, but
    rows.policy_logps may have one; the clause gives both a gradient. MeanOverRanks and sum_over_ranks detach by
    themselves. If z0 is meant to carry a gradient, as in DPO, compute it per row: scope = "row", and detach nothing. A
    number for each row without gradient has scope = "step" and per_row = True.""",
)
def reference_detached(case: ReferencePointCase) -> str | None:
    """A reference point of scope "step" passes no gradient to the rewards or the policy, one of scope "row" all of it.

    The gradient of scope "row" is that of z0 as a function of the rewards, by finite differences; also where all
    rewards are equal, as in the first step of a run.
    """
    if case.target.scope != "step":
        slopes = case.smallest(partial(other_slope, case), max(12, case.examples // 3))
        return slopes or case.smallest(partial(other_slope_at_ties, case), max(12, case.examples // 3))

    def fault(step: Step) -> str | None:
        same = case.fresh()
        for call in range(1 if step.huge else 4):
            rows = case.rows(step)
            policy, rows = with_leaf(replace(rows, policy_logps=rows.policy_logps * (1 + call)), case.needs)
            with torch.enable_grad():
                rewards = mean_of_tokens(duplicate(case.reward)(rows), rows.mask)
                rewards = rewards if rewards.requires_grad else rewards.clone().requires_grad_()
                z0 = same.train(call < 3)(rewards, case.shown(rows)).value
                if not z0.requires_grad:
                    continue
                into = torch.autograd.grad(z0.sum(), [rewards, policy], allow_unused=True)
            for what, gradient in zip(("rewards", "policy's log-probs"), into, strict=True):
                if gradient is not None:
                    shown = f"rewards {listed(rewards)}: dz0 / d{what} = {listed(gradient)}, scope is step"
                    return f"{shown}, on call {call + 1}" if call else shown
        return None

    return case.smallest(fault, max(12, case.examples // 2))


@explained(
    example="""
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(rewards[rows.labels.train].detach().exp().mean().log())
        """,
    cure="""Beware of empty selections (count.clamp(min=1)), of the standard deviation of a single row, and of exp:
    torch.logsumexp does not overflow.""",
)
def reference_finite(case: ReferencePointCase) -> str | None:
    """z0 is an Estimate of a finite number for every row, from a step of one row to rewards of 10,000 nats.

    In float32, as in training.
    """

    def fault(step: Step) -> str | None:
        rows = case.rows(step, torch.float32)
        drawn = case.rewards(rows)
        far = 1e4 * drawn / (drawn.abs().max() + 1e-9)
        flat = [torch.full_like(drawn, level) for level in (0.0, -1e4, 1e4)]
        for rewards in [far] if step.huge else [drawn, far, -far, *flat]:
            estimate = case.fresh()(rewards.clone(), case.shown(rows))
            if not isinstance(estimate, Estimate):
                return WrongShape(f"it returns a {type(estimate).__name__}, not an Estimate")
            shape = estimate.value.shape
            if tuple(shape) not in ((), (len(rows),)):
                return WrongShape(f"{len(rows)} rows, z0 of shape {tuple(shape)}")
            z0 = case.estimates(rewards, rows, once=step.huge)
            if not bool(z0[:, rows.labels.train].isfinite().all()):
                call = int((~z0[:, rows.labels.train].isfinite()).any(dim=1).nonzero()[0])
                when = ("", ", on call 2", ", in evaluation after 2 calls")[call]
                return f"rewards {listed(rewards)}: z0 = {listed(z0[call])}{when}"
        return None

    return case.smallest(fault, max(12, case.examples // 4)) or case.device()


CLAUSES: tuple[Law, ...] = (
    reference_in_range,
    reference_shift_equivariant,
    reference_permutation_equivariant,
    reference_detached,
    reference_split,
    reference_finite,
)
# Clauses on the rewards that z0 averages; a constant averages none.
ON_REWARDS: tuple[Law, ...] = (reference_in_range, reference_shift_equivariant)
_CLAMPED = (
    "z0 is clamped from below at 0, a mean of rewards too: policy and reference both sum to 1, so some completion has"
    " r >= 0 and some r <= 0"
)


def constant(case: ReferencePointCase) -> str | None:
    """The reason why the clauses on rewards do not apply to a constant z0, else None."""
    if case.constant is None:
        return None
    at_start = (
        "" if case.constant == 0 else "; where policy = reference, every reward is 0, and no mean of rewards is not"
    )
    return f"a degenerate reference: z0 averages no rewards{at_start}"


def clauses(case: ReferencePointCase) -> Iterator[Clause]:
    """The clauses of a reference point."""

    def excused(law: Law) -> str | None:
        # A constant reference point gets a verdict that covers these clauses.
        return constant(case) if law in ON_REWARDS else None

    def note(law: Law) -> str | None:
        return _CLAMPED if law in ON_REWARDS and case.clamped and case.witness(law) is None else case.note(law)

    for law in case.laws:
        yield case.clause(law, excused=partial(excused, law), note=partial(note, law))
