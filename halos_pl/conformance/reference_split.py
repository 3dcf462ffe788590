"""The clause that a reference point does not depend on the split of a step over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from halos_pl.conformance.clause import explained
from halos_pl.conformance.ranks import Ranks, namespaces
from halos_pl.conformance.reference_case import RELATIVE, ReferencePointCase, first_difference, untied
from halos_pl.conformance.step_split import shares
from halos_pl.conformance.steps import Step, padded, paddings, renumbered, unscored
from halos_pl.conformance.witness import listed, pair


@explained(
    example="""
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(rewards[rows.labels.train].detach().mean())
        """,
    cure="""Reduce over ranks before dividing: MeanOverRanks(values).estimate() (halos_pl.objective.reference_points),
    or sum_over_ranks for sums and counts. A median, trimmed mean or rank needs all values:
    gather_over_ranks(values)[0]. Both are in halos_pl.distributed; every rank, even one without rows, must call them
    equally often. Name what you read in needs: mismatched=True for mismatched rows, step_rewards=True for the rewards
    of the step, whole_step=True where these carry a gradient.""",
)
def reference_split(case: ReferencePointCase) -> str | None:
    """z0 is the same on two or three ranks as on one, in micro-batches as in one batch, with any padding, in any mode.

    It reads only the rows that `needs` names, and no number of a prompt. In an objective, the losses of the parts also
    sum to the loss of the step.
    """
    return (
        case.smallest(partial(_unscored_rows, case))
        or case.smallest(partial(_micro_batches, case), max(10, case.examples // 2))
        or case.smallest(partial(_layouts, case), max(10, case.examples // 4))
        or case.smallest(partial(_ranks, case), max(10, case.examples // 6))
        or ((elsewhere := case.changes()) and f"z0 = {elsewhere}")
    )


def _unscored_rows(case: ReferencePointCase, step: Step) -> str | None:
    needs = case.target.needs
    if case.target.scope != "step" or needs.step_rewards or needs.whole_step:
        return None
    rows = case.rows(step)
    z0 = case.estimate(case.rewards(rows), rows)
    blank = unscored(rows)
    other = case.estimate(case.rewards(blank), blank)
    wrong = ~((z0 - other).abs() <= RELATIVE * z0.abs().max()) & rows.labels.train
    if not bool(wrong.any()):
        return None
    i = int(wrong.nonzero()[0])
    a, b = pair(float(z0[i]), float(other[i]))
    return f"z0 = {a}, {b} before rows that `needs` does not name (step_rewards) are scored"


def _micro_batches(case: ReferencePointCase, step: Step) -> str | None:
    if case.target.scope == "step" or case.target.needs.whole_step:
        return None
    rows = case.rows(step)
    rewards = case.rewards(rows)
    z0 = case.estimates(rewards, rows, once=step.huge)
    none = torch.tensor([], dtype=torch.long)  # of a rank that has fewer micro-batches than another
    for index in (*case.parts(rows), none):
        part = case.estimates(rewards[index], rows.select(index), once=step.huge)
        wrong = first_difference(z0[:, index], part, rewards, rows.select(index))
        if wrong:
            shown = f"rewards {listed(rewards)}: z0 = {wrong[0]} of one of rows {listed(index + 1)}"
            return f"{shown}; in a micro-batch of these {len(index)}: {wrong[1]}"
    return None


def _layouts(case: ReferencePointCase, step: Step) -> str | None:
    rows = case.rows(step)
    rewards = untied(case.rewards(rows))
    z0 = case.estimates(rewards, rows, once=step.huge)
    for layout, where in (
        *((padded(rows, n), f"with {n} more columns of padding") for n in paddings(step)),
        (renumbered(rows, step), "with other numbers of the prompts"),
    )[: 1 if step.huge else None]:
        wrong = first_difference(z0, case.estimates(rewards, layout, once=step.huge), rewards, rows)
        if wrong:
            return f"rewards {listed(rewards)}: z0 = {wrong[0]}; {where}: {wrong[1]}"
    return None


def _ranks(case: ReferencePointCase, step: Step) -> str | None:
    rows = case.rows(step)
    rewards = untied(case.rewards(rows))
    z0 = case.estimates(rewards, rows, once=step.huge)
    for count in (3,) if step.huge else (2, 3):
        parts = shares(rows, case.needs, step.seed, count)
        jobs: list[Callable[[], Tensor]] = [
            lambda index=index: case.estimates(rewards[index], rows.select(index), once=step.huge)  # type: ignore[misc]
            for index in parts
        ]
        for index, part in zip(parts, Ranks(count).run(jobs, namespaces(case.target)), strict=True):
            wrong = first_difference(z0[:, index], part, rewards, rows.select(index))
            if wrong:
                sizes = " and ".join(str(len(i)) for i in parts)
                return f"rewards {listed(rewards)}: z0 = {wrong[0]}; on ranks of {sizes} rows: {wrong[1]}"
    return None
