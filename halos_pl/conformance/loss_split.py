"""Checks that the losses of micro-batches, and of ranks, sum to the loss of the step, with any padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.conformance.halo_case import RELATIVE, HaloCase
from halos_pl.conformance.ranks import Ranks, namespaces
from halos_pl.conformance.step_split import shares
from halos_pl.conformance.steps import Step, gradient_of, padded, paddings, renumbered, with_leaf
from halos_pl.conformance.witness import pair
from halos_pl.objective.halo import HALO


def loss_split(case: HaloCase) -> str | None:
    """The losses of micro-batches, and of ranks, sum to the loss of the step, with any padding."""
    return case.smallest(partial(_micro_batches, case)) or case.smallest(partial(_ranks, case))


def _untied(rows: LogProbBatch) -> LogProbBatch:
    """The rows with all log-probs, margins and scalars made distinct, since ties are broken by order."""

    def moved(logps: Tensor, by: float) -> Tensor:
        off = by * (1 + logps.abs().max()) * (1 + torch.arange(len(logps))).sqrt()
        return torch.cat([logps[:, :1] - off.to(logps)[:, None], logps[:, 1:]], dim=1)

    return replace(
        rows,
        policy_logps=moved(rows.policy_logps, 0.01),
        reference_logps=None if rows.reference_logps is None else moved(rows.reference_logps, 0.017),
        scalar=None if rows.scalar is None else moved(rows.scalar[:, None], 0.013)[:, 0],
    )


def _loss_and_slope(
    case: HaloCase, rows: LogProbBatch, copy: HALO, parts: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    leaf, rows = with_leaf(rows, case.needs)
    loss = case.loss(copy, rows, parts)
    return loss.detach(), gradient_of(loss, leaf)


def _ranks(case: HaloCase, step: Step) -> str | None:
    if not case.counts(step):
        return None
    rows = _untied(case.rows(step))
    loss, slope = _loss_and_slope(case, rows, case.fresh())

    def on_rank(index: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        copy = case.fresh()  # here, since two threads must not copy at once
        return lambda: _loss_and_slope(case, rows.select(index), copy)

    for count in (3,) if step.huge else (2, 3):
        parts = shares(rows, case.needs, step.seed, count)
        jobs: list[Callable[[], Any]] = [on_rank(index) for index in parts]
        ranks = Ranks(count).run(jobs, namespaces(case.target))
        where = f"ranks of {' and '.join(str(len(index)) for index in parts)} rows"
        summed = sum(float(part) for part, _ in ranks)
        size = sum(abs(float(part)) for part, _ in ranks)
        if not abs(summed - float(loss)) <= RELATIVE * size + 1e-9:
            a, b = pair(float(loss), summed)
            return f"loss {a} of the step, {b} summed over {where}"
        most = 10 * RELATIVE * float(slope.abs().max()) + 1e-12  # z0, of far rewards, is summed in float32
        for index, (_, of_rank) in zip(parts, ranks, strict=True):
            off = (~((slope[index][:, : of_rank.shape[1]] - of_rank).abs() <= most)).nonzero()
            if len(off):
                i, t = off[0].tolist()
                a, b = pair(float(slope[index[i], t]), float(of_rank[i, t]))
                return f"slope {a} of the loss of the step, {b} on {where}"
    return None


def _micro_batches(case: HaloCase, step: Step) -> str | None:
    if not case.counts(step):
        return None
    rows = case.rows(step)
    parts = case.micro_batches(rows)
    loss, one = _loss_and_slope(case, rows, case.fresh())
    summed, other = _loss_and_slope(case, rows, case.fresh(), parts)
    if not abs(float(summed - loss)) <= RELATIVE * float(loss.abs() + summed.abs()) + 1e-9:
        a, b = pair(float(loss), float(summed))
        return f"loss {a} of all rows at once, {b} in {len(parts)} micro-batches"
    off = (one - other).abs()
    if not bool((off <= RELATIVE * one.abs().max() + 1e-12).all()):
        i = int(off.argmax())
        a, b = pair(float(one.flatten()[i]), float(other.flatten()[i]))
        return f"slope {a} of the loss of all rows at once, {b} in {len(parts)} micro-batches"
    layouts = [(padded(rows, columns), f"{columns} more columns of padding") for columns in paddings(step)]
    for layout, where in () if step.large else (*layouts, (renumbered(rows, step), "other numbers of the prompts")):
        other_loss = float(case.loss(case.fresh(), with_leaf(layout, case.needs)[1]).detach())
        if not abs(other_loss - float(loss)) <= RELATIVE * (abs(other_loss) + float(loss.abs())) + 1e-9:
            a, b = pair(float(loss), other_loss)
            return f"loss {a}, {b} with {where}"
    return None
