"""Clauses on a value function's calls: shape, elementwise, no change in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from halos_pl.conformance.clause import explained
from halos_pl.conformance.curve import FAR, value_and_slope
from halos_pl.conformance.devices import DEVICE, on_another_device
from halos_pl.conformance.rounding import Function
from halos_pl.conformance.value_case import ValueFunctionCase, varied_outcomes
from halos_pl.conformance.value_states import difference_of
from halos_pl.conformance.witness import WrongShape, number

T = TypeVar("T")
# Outcomes are those of rows, [n], or of tokens, [n, T]. The most obvious ones come first.
SHAPES = ((3,), (2, 3), (1,), (1, 1), (5, 1), (0,), (0, 4), (4, 0), (2, 1, 3))
# One more than numbers with many divisors: code that works in blocks of 320 or 384, say, has a last block of one.
BLOCKS = tuple(n + 1 for n in (6000, 7200, 7680, 8000, 8064))
# Every small batch, sizes around the powers of two at which code splits batches, and such blocks.
SIZES = (*range(1, 301), *(2**k + d for k in range(9, 15) for d in (-1, 0, 1)), 1000, *BLOCKS, 20001)
# Rows and tokens of a batch: many of either, never of both.
ROWS_AND_TOKENS = (
    *((rows, 2**k + d) for rows, k in ((1, 13), (2, 12), (3, 11), (7, 10), (2, 9)) for d in (-1, 0)),
    *((1, 2**k + 1) for k in range(9, 13)),
    *((2**k + d, tokens) for k, tokens in ((12, 1), (11, 5), (10, 3), (9, 11)) for d in (-1, 0)),
    *zip((5, 6, 3, 2, 4), BLOCKS, strict=True),
    *((n + 1, tokens) for n, tokens in ((3360, 2), (3600, 1), (3840, 3), (4000, 2), (4032, 5))),
    (113, 127),
    (64, 300),
    (4095, 65),
)
LARGEST = (127, 8191)  # of many rows and many tokens


def drawn_sizes(count: int) -> list[tuple[int, int]]:
    """Rows (1 to 4,096) and tokens (1 to 8,192) of random batches of at most 2^16 tokens; the same on every call."""
    draw = torch.Generator().manual_seed(0)
    sizes = []
    for share, of_rows in torch.rand(count, 2, generator=draw, dtype=torch.float64).tolist():
        rows = int(4096**of_rows)
        sizes.append((rows, max(1, int(min(8192, 2**16 / rows) ** share))))
    return sizes


# Inputs of a value function other than [12, 10] outcomes: other shapes, and views with strides.
VIEWS: dict[str, Function] = {
    "of shape (12, 10)": lambda u: u,
    "of shape (1, 120)": lambda u: u.reshape(1, -1),
    "of shape (120, 1)": lambda u: u.reshape(-1, 1),
    "of shape (3, 4, 10)": lambda u: u.reshape(3, 4, 10),
    "transposed, of shape (10, 12)": lambda u: u.t(),
    "every second row of (12, 10)": lambda u: u[::2],
    "every third column of (12, 10)": lambda u: u[:, ::3],
    "a column of (12, 10)": lambda u: u[:, 1],
    "all but the edges of (12, 10)": lambda u: u[1:-1, 1:-1],
}


@explained(
    example="""
        def forward(self, u):
            return torch.sigmoid(u).mean()
        """,
    cure="""Work elementwise: no sum, mean, squeeze or reshape. Make constants with u.new_tensor(...), so that they
    have the dtype and device of u; keep tensors with register_buffer, so that they move with v.""",
)
def shape(case: ValueFunctionCase) -> str | None:
    """v returns a value for each outcome: a tensor of the shape, dtype and device of u.

    On another device (``meta`` stands in for it), v may use no tensor of its own that stays on the CPU.
    """
    for dtype in case.dtypes:
        for size in SHAPES:
            u = torch.linspace(-2, 2, max(1, torch.Size(size).numel()), dtype=torch.float64)
            u = u[: torch.Size(size).numel()].reshape(size).to(dtype)
            value = case.fresh()(u)
            if not isinstance(value, Tensor):
                return WrongShape(f"v(u) is of type {type(value).__name__}, not a Tensor")
            if value.shape != u.shape:
                return WrongShape(f"u of shape {tuple(u.shape)}, v(u) of shape {tuple(value.shape)}")
            if value.dtype != u.dtype:
                return f"u in {str(dtype)[6:]}, v(u) in {str(value.dtype)[6:]}"
    u = torch.ones(3, 5)
    mixed = on_another_device(case.fresh(), lambda v: v(u.to(DEVICE)))
    return mixed and f"u on another device than the CPU: {mixed}"


def _alone(case: ValueFunctionCase, u: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope of each outcome in a batch of one."""
    v = case.fresh()
    parts = [value_and_slope(v, row) for row in u[:, None]]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _within(case: ValueFunctionCase, sizes: Sequence[T], outcomes: Callable[[T], int]) -> Sequence[T]:
    """The sizes that v can be handed in one call; every second or third, say, if all would take too long."""
    small = [size for size in sizes if outcomes(size) <= case.largest_batch]
    return small[:: 1 + 2 * sum(map(outcomes, small)) // max(1, case.affordable)]


def _beside_no_number(case: ValueFunctionCase, u: Tensor, alone: tuple[Tensor, Tensor]) -> str | None:
    """One outcome is NaN or infinite, as with a missing score; the others must not change, unless v refuses all."""
    others = torch.arange(len(u)) != 5
    for odd in (torch.nan, torch.inf, -torch.inf):
        try:
            value, slope = value_and_slope(case.fresh(), torch.where(others, u, odd))
        except Exception:  # an error cannot be overlooked
            continue
        expected = alone[0][others], alone[1][others]
        if difference := difference_of(case, expected, (value[others], slope[others]), u[others]):
            return f"{difference}, beside an outcome of {odd}; the first is its value in a batch of one"
    return None


@explained(
    example="""
        def forward(self, u):
            return torch.sigmoid(u - u.mean())
        """,
    cure="""Remove statistics of the batch such as u.mean(), u.max() or softmax. Comparisons are the job of the
    reference point; a scale is a constant.""",
)
def elementwise(case: ValueFunctionCase) -> str | None:
    """The value of an outcome depends on that outcome alone, not on the other rows, the batch size or the position."""
    base = torch.cat([torch.zeros(1, dtype=torch.float64), varied_outcomes(63)])
    every = torch.arange(len(base))
    for number_, dtype in enumerate((torch.float64, torch.float32)):
        base = base.to(dtype)
        alone = _alone(case, base)

        def compare(places: Tensor, size: tuple[int, ...], view: Function, batch: str = "") -> str | None:
            """v of a batch of that size, filled with the outcomes at ``places`` again and again."""
            n = math.prod(size)
            u, *expected = (x[places].repeat(-(-n // len(places)))[:n].view(size) for x in (base, *alone))  # noqa: B023
            both = value_and_slope(case.fresh(), u, view)
            u, *flat = (x.flatten() for x in (view(u), *map(view, expected), *both))
            difference = difference_of(case, (flat[0], flat[1]), (flat[2], flat[3]), u)
            return difference and f"{difference}{batch}; the first is its value in a batch of one"

        # Half of the sizes in each dtype.
        for n in _within(case, SIZES[number_::2], lambda n: n):
            if difference := compare((every * (1 + n % 4) + n) % len(base), (n,), lambda u: u):
                return difference
        # All equal, as at the start of every run, where every outcome is 0.
        for n, at in ((2, 0), (9, 0), (64, 0), (9, 5)):
            if difference := compare(every[at : at + 1], (n,), lambda u: u, " that are all alike"):
                return difference
        drawn = drawn_sizes(240 if case.thorough else 24)
        wide = (*ROWS_AND_TOKENS[number_::2], *drawn[number_::2], *[LARGEST][1 - number_ :])
        for rows, tokens in _within(case, wide, lambda size: size[0] * size[1]):
            places = (every * (1 + tokens % 4) + rows) % len(base)
            if difference := compare(places, (rows, tokens), lambda u: u, f", of shape ({rows}, {tokens})"):
                return difference
        for name, view in VIEWS.items():
            if difference := compare(every, (12, 10), view, f", {name}"):
                return difference
        if difference := _beside_no_number(case, base, alone):
            return difference
    # The grid is the largest batch of all.
    curve = case.curve
    few = curve.part(torch.arange(7, len(curve.u), len(curve.u) // 48))
    difference = difference_of(case, _alone(case, few.u), (few.value, few.slope), few.u)
    return difference and f"{difference}; the second is its value in a batch of {case.cells}"


@explained(
    example="""
        def forward(self, u):
            u.detach().clamp_(-1, 1)
            return torch.sigmoid(u)
        """,
    cure="Use the operation without the trailing underscore (clamp, not clamp_), or work on u.clone().",
)
def no_in_place_change(case: ValueFunctionCase) -> str | None:
    """v does not change its input: the objective needs u afterwards."""
    for dtype in case.dtypes:
        far = torch.tensor([0.0, 1e-9, -1e-9, FAR, -FAR])
        batches = [torch.cat([varied_outcomes(n), far]) for n in (1, 115, 595)]
        whole_batches: list[tuple[Function, Tensor]] = [(lambda u: u, batches[0]), (lambda u: u, batches[2])]
        for view, u in [*whole_batches, *((view, batches[1].view(12, 10)) for view in VIEWS.values())]:
            leaf = u.to(dtype, copy=True).requires_grad_()
            for whole in (leaf.detach().clone(), leaf * 1, leaf):
                outcomes = view(whole)
                before = outcomes.detach().clone()
                try:
                    case.fresh()(outcomes)
                except RuntimeError as error:
                    if "in-place" in str(error):
                        first = number(float(before.flatten()[0]))
                        return f"u = {first} is changed in place: {str(error).splitlines()[0]}"
                    raise
                changed = (outcomes.detach() != before).nonzero()
                if len(changed):
                    at = tuple(changed[0].tolist())
                    return f"u = {number(float(before[at]))} is {number(float(outcomes.detach()[at]))} after the call"
    return None
