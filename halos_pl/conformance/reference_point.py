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
from halos_pl.conformance.reference_split import reference_split
from halos_pl.conformance.steps import Step, with_leaf
from halos_pl.conformance.witness import WrongShape, listed, number
from halos_pl.objective.halo import mean_of_tokens
from halos_pl.objective.reference_points import Estimate


@explained(
    example="""
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(2 * MeanOverRanks(rewards[rows.labels.train]).mean)
        """,
    cure="""Average rewards with weights of at least 0 that sum to 1, without factor or offset. A clamp such as KTO's
    max(0, z0) fails by design: state that reason in `excused` of your class.""",
)
def reference_in_range(case: ReferencePointCase) -> str | None:
    """z0 is a mean of rewards, E_Q[r]: between the smallest and the largest reward that it depends on.

    It must not always be the row's own reward.
    """
    compared = False

    def fault(step: Step) -> str | None:
        nonlocal compared
        rows = case.rows(step)
        drawn = case.rewards(rows)
        if int(rows.labels.train.sum()) > 1:
            off = (case.estimate(drawn, rows) - drawn).abs()[rows.labels.train]
            compared |= bool((off > RELATIVE * drawn.abs().max()).any())
        after = drawn.clone()
        with torch.no_grad():
            case.fresh()(after, rows)
        if not torch.equal(after, drawn):
            return f"rewards {listed(drawn)} are {listed(after)} after the call: changed in place"
        everyone = torch.ones(len(rows), len(rows), dtype=torch.bool)
        depends = everyone if step.large else case.reads(drawn, rows)
        depends[~depends.any(dim=1)] = True
        same = case.fresh()
        seen: list[Tensor] = []
        # Close together, away from 0, far out, all the same: an estimate that is off by a little is out of range.
        for rewards in (
            drawn,
            0.1 * drawn + 5,
            0.1 * drawn - 5,
            torch.full_like(drawn, 1.5),
            torch.full_like(drawn, 7e3),
            torch.full_like(drawn, -7e3),
        ):
            witness = _outside(case.estimate(rewards, rows), rewards, rows, depends)
            if witness:
                return witness
            seen.append(rewards)
            witness = _outside(case.estimate(rewards, rows, same), torch.cat(seen), rows)
            if witness:
                return f"{witness}, on call {len(seen)}"
        witness = _outside(case.estimate(drawn, rows, same.eval()), torch.cat(seen), rows)
        return witness and f"{witness}, in evaluation after {len(seen)} calls"

    witness = case.constant_witness() or case.smallest(fault, examples=max(10, case.examples // 8))
    return witness or (None if compared else "z0 is each row's own reward, so that every outcome is 0")


def _outside(z0: Tensor, rewards: Tensor, rows: LogProbBatch, depends: Tensor | None = None) -> str | None:
    """A row with a loss whose z0 is outside the range of ``rewards``, or of those it ``depends`` on (bool [n, n])."""
    slack = RELATIVE * (rewards.abs().max() + 1e-30)
    low, high = rewards.min(), rewards.max()
    if depends is not None:
        low = torch.where(depends, rewards, torch.inf).min(dim=1).values
        high = torch.where(depends, rewards, -torch.inf).max(dim=1).values
    wrong = (~((low - slack <= z0) & (z0 <= high + slack)) & rows.labels.train).nonzero()
    if not len(wrong):
        return None
    i = int(wrong[0])
    return f"rewards {listed(rewards if depends is None else rewards[depends[i]])}, z0 = {number(float(z0[i]))}"


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
    """If all rewards rise by c nats, z0 rises by c nats, so that outcomes stay the same."""

    def fault(step: Step) -> str | None:
        rows = case.rows(step)
        rewards = untied(case.rewards(rows))
        for c in (1.0, -3.5, 10.0):
            before, after = case.fresh(), case.fresh()
            for later in (0.0, 0.7, -0.4, 0.2):
                scaled = rewards * (1 + later)
                if later == 0.2:
                    before.eval()
                    after.eval()
                a, b = case.estimate(scaled, rows, before), case.estimate(scaled + c, rows, after)
                wrong = ~((b - a - c).abs() <= RELATIVE * (scaled.abs().max() + abs(c))) & rows.labels.train
                if bool(wrong.any()):
                    i = int(wrong.nonzero()[0])
                    return (
                        f"rewards {listed(scaled)}: z0 = {number(float(a[i]))}; all {c:+g}: z0 = {number(float(b[i]))}"
                    )
        return None

    return case.constant_witness() or case.smallest(fault, max(10, case.examples // 3))


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
        z0 = case.estimates(rewards, rows)
        orders = [torch.arange(len(rows)).flip(0)]
        orders.append(torch.randperm(len(rows), generator=torch.Generator().manual_seed(step.seed)))
        for order in orders:
            permuted = rows.select(order)
            wrong = first_difference(z0[:, order], case.estimates(rewards[order], permuted), rewards, permuted)
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
    themselves. If z0 is meant to carry a gradient, as in DPO, compute it per row: scope = "row".""",
)
def reference_detached(case: ReferencePointCase) -> str | None:
    """A reference point of scope "step" passes no gradient to the rewards or the policy."""
    if case.target.scope != "step":
        return None

    def fault(step: Step) -> str | None:
        same = case.fresh()
        for call in range(4):
            rows = step.rows()
            policy, rows = with_leaf(replace(rows, policy_logps=rows.policy_logps * (1 + call)), case.needs)
            with torch.enable_grad():
                rewards = mean_of_tokens(duplicate(case.reward)(rows), rows.mask)
                rewards = rewards if rewards.requires_grad else rewards.clone().requires_grad_()
                z0 = same.train(call < 3)(rewards, rows).value
                if not z0.requires_grad:
                    continue
                into = torch.autograd.grad(z0.sum(), [rewards, policy], allow_unused=True)
            for what, gradient in zip(("rewards", "policy's log-probs"), into, strict=True):
                if gradient is not None:
                    shown = f"rewards {listed(rewards)}: dz0 / d{what} = {listed(gradient)}, scope is step"
                    return f"{shown}, on call {call + 1}" if call else shown
        return None

    return case.smallest(fault, max(10, case.examples // 2))


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
    """z0 is an Estimate of a finite number for every row, from a step of one row to rewards of 10,000 nats."""

    def fault(step: Step) -> str | None:
        rows = case.rows(replace(step, alone=case.needs.groups))
        drawn = case.rewards(rows)
        size = drawn.abs().max() + 1e-9
        for rewards in (drawn, -drawn, drawn / size * 1e4, torch.zeros_like(drawn), drawn * 0 - 1e4):
            estimate = case.fresh()(rewards.clone(), rows)
            if not isinstance(estimate, Estimate):
                return WrongShape(f"it returns a {type(estimate).__name__}, not an Estimate")
            shape = estimate.value.shape
            if tuple(shape) not in ((), (len(rows),)):
                return WrongShape(f"{len(rows)} rows, z0 of shape {tuple(shape)}")
            z0 = case.estimates(rewards, rows)
            if not bool(z0[:, rows.labels.train].isfinite().all()):
                call = int((~z0[:, rows.labels.train].isfinite()).any(dim=1).nonzero()[0])
                when = ("", ", on call 2", ", in evaluation after 2 calls")[call]
                return f"rewards {listed(rewards)}: z0 = {listed(z0[call])}{when}"
        return None

    return case.smallest(fault, max(10, case.examples // 4))


CLAUSES: tuple[Law, ...] = (
    reference_in_range,
    reference_shift_equivariant,
    reference_permutation_equivariant,
    reference_detached,
    reference_split,
    reference_finite,
)
# Clauses that an estimate of E_Q[r] may fail for a stated reason; see ``ReferencePoint.excused``.
EXCUSABLE: tuple[Law, ...] = (reference_in_range, reference_shift_equivariant)
CONSTANT = "a degenerate reference: z0 averages no rewards"


def clauses(case: ReferencePointCase) -> Iterator[Clause]:
    """The clauses of a reference point."""

    def excused(law: Law) -> str | None:
        # A constant reference point gets a verdict that covers these clauses.
        return case.excused.get(law.__name__) or (CONSTANT if law in EXCUSABLE and case.constant is not None else None)

    for law in case.laws:
        yield case.clause(law, excused=partial(excused, law))
