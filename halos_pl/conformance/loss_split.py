"""Checks that the losses of micro-batches, and of ranks, sum to the loss of the step."""

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
from halos_pl.conformance.steps import Step, gradient_of, shares, with_leaf
from halos_pl.conformance.witness import pair
from halos_pl.objective.halo import HALO


def loss_split(case: HaloCase) -> str | None:
    """The losses of micro-batches, and of ranks, sum to the loss of the step."""
    micro = None if case.target.needs.whole_step else _micro_batches(case)
    return micro or case.smallest(partial(_two_ranks, case))


def _untied(rows: LogProbBatch) -> LogProbBatch:
    """The rows with all log-probs, margins and scalars made distinct, since ties are broken by order."""

    def moved(logps: Tensor, by: float) -> Tensor:
        off = by * (1 + logps.abs().max()) * (1 + torch.arange(len(logps))).sqrt()
        return torch.cat([logps[:, :1] - off.to(logps)[:, None], logps[:, 1:]], dim=1)

    reference = None if rows.reference_logps is None else moved(rows.reference_logps, 0.017)
    assert rows.scalar is not None
    scalar = moved(rows.scalar[:, None], 0.013)[:, 0]
    return replace(rows, policy_logps=moved(rows.policy_logps, 0.01), reference_logps=reference, scalar=scalar)


def _two_ranks(case: HaloCase, step: Step) -> str | None:
    rows = _untied(step.rows())
    parts = shares(rows, case.target.needs, step.seed, 2)
    if not parts or not case.counts(rows):
        return None

    def outcome_and_loss(rows: LogProbBatch, copy: HALO) -> tuple[Tensor, Tensor]:
        leaf, rows = with_leaf(rows, case.target.needs)
        loss = copy(rows).loss
        return loss.detach(), gradient_of(loss, leaf)

    def on_rank(index: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        copy = case.fresh()  # here, since two threads must not copy at once
        return lambda: outcome_and_loss(rows.select(index), copy)

    loss, slope = outcome_and_loss(rows, case.fresh())
    jobs: list[Callable[[], Any]] = [on_rank(index) for index in parts]
    ranks = Ranks().run(jobs, namespaces(case.target))
    where = f"ranks of {len(parts[0])} and {len(parts[1])} rows"
    summed = sum(float(part) for part, _ in ranks)
    size = sum(abs(float(part)) for part, _ in ranks)
    if not abs(summed - float(loss)) <= RELATIVE * size + 1e-9:
        a, b = pair(float(loss), summed)
        return f"loss {a} of the step, {b} summed over {where}"
    most = RELATIVE * float(slope.abs().max()) + 1e-12
    for index, (_, of_rank) in zip(parts, ranks, strict=True):
        off = (~((slope[index][:, : of_rank.shape[1]] - of_rank).abs() <= most)).nonzero()
        if len(off):
            i, t = off[0].tolist()
            a, b = pair(float(slope[index[i], t]), float(of_rank[i, t]))
            return f"slope {a} of the loss of the step, {b} on {where}"
    return None


def _micro_batches(case: HaloCase) -> str | None:
    def fault(step: Step) -> str | None:
        rows = step.rows()
        if not case.counts(rows):
            return None
        leaf, batch = with_leaf(rows, case.target.needs)
        whole, parts = case.fresh(), case.fresh()
        loss = whole(batch).loss
        context = parts.prepare(batch.detach())
        train = rows.labels.train.nonzero().squeeze(1)
        units = case.reference_point.parts(rows.select(train))
        losses = []
        for unit in units:
            index = train[unit]
            losses.append(parts.compute_loss(batch.select(index), context.select(index)).loss)
        summed = torch.stack(losses).sum()
        size = sum(abs(part.item()) for part in losses)
        if not abs((summed - loss).item()) <= RELATIVE * size + 1e-9:
            a, b = pair(loss.item(), summed.item())
            return f"loss {a} of {len(train)} rows at once, {b} in {len(units)} micro-batches"
        one, other = gradient_of(loss, leaf), gradient_of(summed, leaf)
        off = (one - other).abs()
        if not bool((off <= RELATIVE * one.abs().max() + 1e-12).all()):
            i = int(off.argmax())
            a, b = pair(float(one.flatten()[i]), float(other.flatten()[i]))
            return f"slope {a} of the loss of {len(train)} rows at once, {b} in {len(units)} micro-batches"
        return None

    return case.smallest(fault)
