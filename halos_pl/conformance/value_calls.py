"""Clauses on a value function's calls: shape, elementwise, deterministic, no change in place."""

from __future__ import annotations

import torch
from torch import Tensor

from halos_pl.conformance.clause import explained
from halos_pl.conformance.curve import FAR, Function, value_and_slope
from halos_pl.conformance.value_case import DTYPES, ValueFunctionCase, varied_outcomes
from halos_pl.conformance.witness import WrongShape, number, pair

# Outcomes are those of rows, [n], or of tokens, [n, T]. The most obvious ones come first.
SHAPES = ((3,), (2, 3), (1,), (1, 1), (5, 1), (0,), (2, 1, 3))
# Every small batch, and sizes around the powers of two at which code splits batches.
SIZES = (*range(1, 301), *(2**k + d for k in range(9, 15) for d in (-1, 0, 1)), 1000, 20001)
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
    keep the dtype of u.""",
)
def shape(case: ValueFunctionCase) -> str | None:
    """v returns a value for each outcome: a tensor of the shape and dtype of u."""
    for dtype in DTYPES:
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
    return None


def _alone(case: ValueFunctionCase, u: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope of each outcome in a batch of one."""
    v = case.fresh()
    parts = [value_and_slope(v, row) for row in u[:, None]]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], u: Tensor) -> str | None:
    """Where two results for the same outcomes differ by more than the order of operations explains; else None."""
    if torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]):  # almost every call
        return None
    eps = torch.finfo(u.dtype).eps
    value = 256 * eps * (one[0].abs() + (u * one[1]).abs()).double()
    # Slopes may cancel inside v, so they only have to agree in half of their digits.
    slope = eps**0.5 * (one[1].abs().double() + one[1][one[1].isfinite()].abs().double().sum() / max(len(u), 1))
    for name, a, b, most in (("v", one[0], other[0], value), ("v'", one[1], other[1], slope)):
        wrong = ~((a - b).abs() <= most + torch.finfo(torch.float32).tiny)
        wrong &= (a != b) & ~(a.isnan() & b.isnan())
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            return f"{name}({number(float(u[at]))}) = {{}}, {{}} as row {at + 1} of {len(u)}".format(
                *pair(float(a[at]), float(b[at]))
            )
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
    for number_, dtype in enumerate(DTYPES[:2]):
        base = base.to(dtype)
        alone = _alone(case, base)

        def compare(index: Tensor, view: Function, batch: str = "") -> str | None:
            u, expected = view(base[index]), (view(alone[0][index]), view(alone[1][index]))  # noqa: B023
            u, *both = (x.flatten() for x in (u, *expected, *value_and_slope(case.fresh(), base[index], view)))  # noqa: B023
            difference = _difference((both[0], both[1]), (both[2], both[3]), u)
            return difference and f"{difference}{batch}; the first is its value in a batch of one"

        for n in SIZES[number_::2]:  # half of the sizes in each dtype
            if difference := compare((torch.arange(n) * (1 + n % 4) + n) % len(base), lambda u: u):
                return difference
        # All equal, as at the start of every run, where every outcome is 0.
        for n, at in ((2, 0), (9, 0), (64, 0), (9, 5)):
            if difference := compare(torch.full((n,), at), lambda u: u, " that are all alike"):
                return difference
        for name, view in VIEWS.items():
            if difference := compare(torch.arange(120).view(12, 10) % len(base), view, f", {name}"):
                return difference
    # The grid is the largest batch of all.
    curve = case.curve
    few = curve.part(torch.arange(7, len(curve.u), len(curve.u) // 48))
    difference = _difference(_alone(case, few.u), (few.value, few.slope), few.u)
    return difference and f"{difference}; the second is its value in a batch of {case.cells}"


@explained(
    example="""
        def forward(self, u):
            return torch.sigmoid(u + 0.01 * torch.randn_like(u))
        """,
    cure="""Remove random draws, counters, running statistics, and branches on self.training or
    torch.is_grad_enabled().""",
)
def deterministic(case: ValueFunctionCase) -> str | None:
    """The same outcome has the same value on every call, in training and evaluation, with and without gradient."""
    for n, count in ((1, 120), (64, 14), (257, 4)):
        u, other = varied_outcomes(n), varied_outcomes(n) * 0.7 + 0.3
        first = value_and_slope(case.fresh(), u)
        v = case.fresh()

        def compare(when: str, gradient: bool = True) -> str | None:
            if gradient:
                again = value_and_slope(v, u)  # noqa: B023
            else:
                with torch.no_grad():
                    again = v(u.clone()), first[1]  # noqa: B023
            difference = _difference(first, again, u)  # noqa: B023
            return difference and f"{difference}; the second is {when}"

        for call in range(1, count + 1):
            if difference := compare(f"on call {call}"):
                return difference
        for training, where in ((False, "in evaluation"), (True, "in training")):
            v.train(training)
            difference = (
                compare(where)
                or compare(f"{where} without gradient", gradient=False)
                or compare(f"{where} after a call without gradient")
            )
            if difference:
                return difference
        if difference := _difference(value_and_slope(case.fresh(), other), value_and_slope(v, other), other):
            return f"{difference}; the second is after calls with other outcomes"
    return None


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
    for dtype in DTYPES:
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
