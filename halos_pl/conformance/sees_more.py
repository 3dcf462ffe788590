"""Remarks on what Q(Y'|x) of an objective depends on, beside the prompt x."""

from __future__ import annotations

from dataclasses import replace

import torch

from halos_pl.conformance.halo_case import HaloCase
from halos_pl.conformance.steps import Step, fitted_to

_OTHER_PROMPTS = "Q(.|x) uses rewards of other prompts as well"
_COMPLETION = "Q(.|x) depends on y as well: rows of one prompt that carry a loss have different z0"
_PAIR = "Q(.|x) depends on the pair where a prompt has several"
_OTHER_STEPS = "z0 averages rewards of earlier steps, which are those of earlier policies"


def joined(*notes: str | None) -> str | None:
    """The notes in one line; None if there are none."""
    return "; ".join(note for note in notes if note) or None


def sees_more(case: HaloCase) -> str | None:
    """What Q depends on beside x, by changing one reward at a time; None if on nothing, or if that cannot be found."""
    try:
        return _sees_more(case)
    except Exception:  # the clauses of the reference point report it
        return None


def _sees_more(case: HaloCase) -> str | None:
    z0 = case.reference_point
    step = fitted_to(Step(units=3, tokens=2, seed=4, grouped=True), case.needs, None)
    rows = z0.rows(step)
    rewards = z0.rewards(rows)
    n, labels = len(rows), rows.labels
    counts = rows_that_count(case, step)
    reads = z0.reads(rewards, rows)[counts][:, :n]
    same_prompt = labels.group[counts][:, None] == labels.group[None]
    values = z0.estimate(rewards, rows)[counts]
    apart = (values[:, None] != values[None]) & (labels.group[counts][:, None] == labels.group[counts][None])
    one_prompt = replace(rows, labels=replace(labels, group=torch.zeros_like(labels.group)))
    among_all = z0.estimate(rewards, one_prompt)[counts]
    of_one_prompt = bool((among_all[:, None] != among_all[None]).any())
    by_completion = bool(apart.any()) or (of_one_prompt and not case.needs.pairs)
    used = z0.fresh()
    z0.estimate(rewards + 5, rows, used)
    remembers = bool((z0.estimate(rewards, rows, used)[counts] != values).any())
    return joined(
        _OTHER_PROMPTS if bool((reads & ~same_prompt).any()) else None,
        _COMPLETION if by_completion else _PAIR if of_one_prompt else None,
        _OTHER_STEPS if remembers else None,
    )


def rows_that_count(case: HaloCase, step: Step) -> torch.Tensor:
    """Positions of the rows with a weight above 0 among those that the reference point is called with."""
    rows = case.feedback.rows(step)
    weight = case.feedback.judged(rows).weight
    if case.mirrors:
        weight = torch.where(rows.labels.desirable, weight, 0.0)
    if case.target.reference_point.scope != "step":
        weight = weight[rows.labels.train]
    return (weight > 0).nonzero().squeeze(1)
