"""Compares the gradient of a reference point of scope "row" with its values."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.conformance.reference_case import ReferencePointCase, untied
from halos_pl.conformance.steps import Step, gradient_of, with_leaf
from halos_pl.conformance.witness import listed, pair


def other_slope(case: ReferencePointCase, step: Step) -> str | None:
    """Where autograd's gradient of z0 in the rewards, or directly in the log-probs, is not that of its values."""
    draw = torch.Generator().manual_seed(step.seed)
    for dtype in (torch.float64, torch.float32):
        rows = case.rows(step, dtype)
        policy, batch = with_leaf(rows, case.needs)
        rewards = untied(case.rewards(rows)).requires_grad_()
        z0 = case.fresh()(rewards, case.shown(batch)).value.expand(len(rows))[rows.labels.train]
        weights = torch.rand(z0.shape, generator=draw, dtype=torch.float64) + 0.5
        ways = [torch.rand(leaf.shape, generator=draw, dtype=torch.float64) for leaf in (rewards, policy)]
        h = 1e-7 * (1 + float(rewards.detach().abs().max()))
        for k, (what, leaf) in enumerate((("rewards", rewards), ("policy's log-probs", policy))):
            slope = float((gradient_of((weights * z0).sum(), leaf, step.cotangent).double() * ways[k]).sum())
            right = _rise(case, rows, rewards.detach(), weights, [ways[0], None] if k == 0 else [None, ways[1]], h)
            if not abs(slope - right) <= 1e-3 * float(weights.sum() + abs(right)):
                a, b = pair(slope, right)
                by = "by autograd in float32" if dtype == torch.float32 else "by autograd"
                return f"rewards {listed(rewards)}: slope {a} of z0 in the {what} {by}, {b} by its values"
    return None


def other_slope_at_ties(case: ReferencePointCase, step: Step) -> str | None:
    """Where z0 has the same slope on both sides of equal rewards, but another one, or none, at these."""
    rows = case.rows(step)
    n = len(rows)
    draw = torch.Generator().manual_seed(step.seed)
    weights, way = torch.rand(2, n, generator=draw, dtype=torch.float64) + 0.5
    for level in (0.0, 1.3):
        tied = torch.full((n,), level, dtype=rows.policy_logps.dtype)
        apart = untied(tied) - tied
        gradients = []
        for rewards in (tied, tied + apart, tied - apart):
            leaf = rewards.clone().requires_grad_()
            z0 = case.fresh()(leaf, case.shown(rows)).value.expand(n)
            gradients.append(gradient_of((weights * z0).sum(), leaf).double())
        for direction in (way, torch.ones_like(way)):  # a maximum has a kink in the first, and none in the second
            at, above, below = (float((gradient * direction).sum()) for gradient in gradients)
            most = 1e-2 * float(weights.sum())
            if not isfinite(at) or (abs(above - below) <= most and not abs(at - above) <= 2 * most):
                a, b = pair(at, above)
                return f"rewards {listed(tied)}: slope {a} of z0 in the rewards by autograd, {b} next to them"
    return None


def _rise(
    case: ReferencePointCase,
    rows: LogProbBatch,
    rewards: Tensor,
    weights: Tensor,
    ways: list[Tensor | None],
    h: float,
) -> float:
    """The slope of the weighted sum of z0 if rewards, and the policy's outputs, move in the given directions."""
    ends = []
    for by in (h, -h):
        on_way, outputs = ways
        there = with_leaf(rows, case.needs)[1].detach()
        if outputs is not None:
            there = replace(there, policy_logps=there.policy_logps + by * outputs[:, : rows.mask.shape[1]])
        z0 = case.estimate(rewards.double() if on_way is None else rewards.double() + by * on_way, there)
        ends.append(float((weights * z0[rows.labels.train]).sum()))
    return (ends[0] - ends[1]) / (2 * h)
