"""Rewards in float32, as in training, compared with float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.conformance.steps import with_leaf
from halos_pl.conformance.witness import pair
from halos_pl.objective.rewards import Reward

# How many roundings of float32 a reward may be off by. A half-precision float has 2**13 times the rounding error.
_ROUNDINGS = 64 * torch.finfo(torch.float32).eps


def off_in_single_precision(fresh: Callable[[], Reward], rows: LogProbBatch, needs: Needs) -> str | None:
    """Where the reward of float32 rows, or its slope, is off by more than rounding of log-probs explains; else None.

    Args:
        fresh: returns a new copy of the reward.
        rows: float32.
        needs: the needs that ``rows`` meet.
    """
    exact = _converted(rows, torch.float64)
    # All rows as if rounded alike, and each in its own way, as rewards of several rows may cancel.
    each_row = 2 * torch.rand(2, len(rows), generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    ways = [torch.ones_like(each_row[0]), *each_row]
    off = [(1 + sign * _ROUNDINGS * way, torch.ones_like(way)) for way in ways for sign in (1, -1)]
    shifts = [(ways[0], ways[0]), *off, *((reference, policy) for policy, reference in off[:2])]
    around = [_value_and_slope(fresh(), _scaled(exact, *shift), needs) for shift in shifts]
    for what, single, each in zip(
        ("reward", "slope"), _value_and_slope(fresh(), rows, needs), zip(*around, strict=True), strict=True
    ):
        low, high = torch.stack(each).aminmax(dim=0)
        slack = 2 * (high - low) + _ROUNDINGS * each[0].abs() + 1e-30
        wrong = ~((single >= low - slack) & (single <= high + slack)) & each[0].isfinite()
        if bool(wrong.any()):
            place = tuple(wrong.nonzero()[0].tolist())
            a, b = pair(float(each[0][place]), float(single[place]))
            return f"{what} {a} in float64, {b} in float32"
    return None


def _converted(rows: LogProbBatch, dtype: torch.dtype) -> LogProbBatch:
    values: dict[str, Any] = {
        name: value.to(dtype)
        for name in ("policy_logps", "reference_logps", "kl", "scalar")
        if (value := getattr(rows, name)) is not None
    }
    return replace(rows, **values)


def _scaled(rows: LogProbBatch, policy: Tensor, reference: Tensor) -> LogProbBatch:
    """The rows with the outputs of the policy, and of the reference, multiplied by a number for each row."""
    return replace(
        rows,
        policy_logps=rows.policy_logps * policy[:, None],
        scalar=None if rows.scalar is None else rows.scalar * policy,
        reference_logps=None if rows.reference_logps is None else rows.reference_logps * reference[:, None],
    )


def _value_and_slope(reward: Reward, rows: LogProbBatch, needs: Needs) -> tuple[Tensor, Tensor]:
    """The reward, 0 on padding, and the slope of its sum in the policy's outputs, both float64."""
    leaf, rows = with_leaf(rows, needs)
    r = reward(rows)
    r = torch.where(rows.mask, r, 0.0) if r.dim() == 2 else r
    slope = torch.autograd.grad(r.sum(), leaf, allow_unused=True)[0] if r.requires_grad else None
    slope = torch.zeros_like(leaf) if slope is None else slope
    return r.detach().double(), slope.double()
