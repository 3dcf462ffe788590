"""Clauses of a value function: v(u), elementwise, non-decreasing, concave on gains, sound in every dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.search import (
    CELLS,
    EDGE,
    EPS,
    FAR,
    LARGEST_COTANGENT,
    Curve,
    bends_up,
    falls,
    grid,
    operations,
    survey,
    value_and_slope,
)
from halos_pl.conformance.witness import WrongShape, number, pair
from value_functions import ValueFunction

CLAUSES = (
    "shape",
    "elementwise",
    "deterministic",
    "no_in_place_change",
    "finite",
    "precision",
    "non_decreasing",
    "concave_on_gains",
    "gradient",
    "undesirable_non_decreasing",
    "undesirable_concave_on_gains",
)
# How a function acts on reflected rows; of a value function alone it is only reported.
UNDESIRABLE = CLAUSES[-2:]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Outcomes are those of rows, [n], or of tokens, [n, T]. What a person would try first comes first.
SHAPES = ((3,), (2, 3), (1,), (1, 1), (5, 1), (0,), (2, 1, 3))
# Every small batch, and those on either side of the powers of two that code splits batches at.
SIZES = (*range(1, 301), *(2**k + d for k in range(9, 15) for d in (-1, 0, 1)), 1000, 20001)
# What a value function is handed of [12, 10] outcomes: tokens in rows, and views that are not contiguous.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
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


def _outcomes(n: int) -> Tensor:
    """n different outcomes in nats, near and far, of either sign, in no order."""
    steps = torch.arange(n, dtype=torch.float64)
    size = 10 ** ((steps * 0.618034) % 1 * 5 - 3)  # 1e-3 to 100
    return torch.where(steps % 2 == 0, size, -size)


class _Sample(NamedTuple):
    """Outcomes in some dtype, what v and v' are there in that dtype, and what they are in float64."""

    u: Tensor
    value: Tensor
    slope: Tensor
    exact_value: Tensor
    exact_slope: Tensor


class ValueFunctionChecks:
    """The clauses of one value function; each ``None`` where it holds, else a witness.

    Args:
        value_function: the target. Only copies of it are called, a fresh one for each clause, so that one that
            remembers things does not spoil the others.
        thorough: a grid four times as dense.
    """

    def __init__(self, value_function: ValueFunction, *, thorough: bool = False) -> None:
        self.target = value_function
        self.cells = CELLS * (4 if thorough else 1)

    def fresh(self) -> ValueFunction:
        """A copy in training mode that has not been called."""
        return duplicate(self.target)

    def shape(self) -> str | None:
        """Same shape and dtype out."""
        for dtype in DTYPES:
            for shape in SHAPES:
                u = torch.linspace(-2, 2, max(1, torch.Size(shape).numel()), dtype=torch.float64)
                u = u[: torch.Size(shape).numel()].reshape(shape).to(dtype)
                value = self.fresh()(u)
                if not isinstance(value, Tensor):
                    return WrongShape(f"v(u) is of type {type(value).__name__}, not a Tensor")
                if value.shape != u.shape:
                    return WrongShape(f"u of shape {tuple(u.shape)}, v(u) of shape {tuple(value.shape)}")
                if value.dtype != u.dtype:
                    return f"u in {str(dtype)[6:]}, v(u) in {str(value.dtype)[6:]}"
        return None

    # -- calls -------------------------------------------------------------------------------------------

    def _alone(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope of each outcome in a batch of its own."""
        v = self.fresh()
        parts = [value_and_slope(v, row) for row in u.split(1)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    @staticmethod
    def _difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], u: Tensor) -> str | None:
        """Where two answers to the same outcomes differ by more than another order of operations explains, in words."""
        if torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]):  # so in almost every call
            return None
        eps = torch.finfo(u.dtype).eps
        value = 256 * eps * (one[0].abs() + (u * one[1]).abs()).double()
        # Slopes may cancel inside v, so they are held to less: half of the digits.
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

    def elementwise(self) -> str | None:
        """Rows do not mix; batch size, shape and position do not matter."""
        base = torch.cat([torch.zeros(1, dtype=torch.float64), _outcomes(63)])
        for number_, dtype in enumerate(DTYPES[:2]):
            base = base.to(dtype)
            alone = self._alone(base)

            def compare(index: Tensor, view: Callable[[Tensor], Tensor], what: str = "") -> str | None:
                u, expected = view(base[index]), (view(alone[0][index]), view(alone[1][index]))  # noqa: B023
                u, *both = (x.flatten() for x in (u, *expected, *value_and_slope(self.fresh(), base[index], view)))  # noqa: B023
                found = self._difference((both[0], both[1]), (both[2], both[3]), u)
                return found and f"{found}{what}; the first is what it is alone"

            for n in SIZES[number_::2]:  # half of them in either dtype, every size in one
                found = compare((torch.arange(n) * (1 + n % 4) + n) % len(base), lambda u: u)
                if found:
                    return found
            # All alike, as at the start of every run, where every outcome is 0.
            for n, at in ((2, 0), (9, 0), (64, 0), (9, 5)):
                found = compare(torch.full((n,), at), lambda u: u, " that are all alike")
                if found:
                    return found
            for what, view in VIEWS.items():
                found = compare(torch.arange(120).view(12, 10) % len(base), view, f", {what}")
                if found:
                    return found
        # The grid is the largest batch of all.
        curve = self.curve
        few = curve.part(torch.arange(7, len(curve.u), len(curve.u) // 48))
        found = self._difference(self._alone(few.u), (few.value, few.slope), few.u)
        return found and f"{found}; the second is what it is in a batch of {self.cells}"

    def deterministic(self) -> str | None:
        """The same answer on later calls, in training and evaluation, with and without gradient."""
        for n, count in ((1, 120), (64, 14), (257, 4)):
            u, other = _outcomes(n), _outcomes(n) * 0.7 + 0.3
            first = value_and_slope(self.fresh(), u)
            v = self.fresh()

            def compare(when: str, gradient: bool = True) -> str | None:
                if gradient:
                    again = value_and_slope(v, u)  # noqa: B023
                else:
                    with torch.no_grad():
                        again = v(u.clone()), first[1]  # noqa: B023
                found = self._difference(first, again, u)  # noqa: B023
                return found and f"{found}; the second is {when}"

            for call in range(1, count + 1):
                found = compare(f"on call {call}")
                if found:
                    return found
            for training, where in ((False, "in evaluation"), (True, "in training")):
                v.train(training)
                found = (
                    compare(where)
                    or compare(f"{where} without gradient", gradient=False)
                    or compare(f"{where} after a call without gradient")
                )
                if found:
                    return found
            found = self._difference(value_and_slope(self.fresh(), other), value_and_slope(v, other), other)
            if found:
                return f"{found}; the second is after calls with other outcomes"
        return None

    def no_in_place_change(self) -> str | None:
        """The input is left as it was."""
        for dtype in DTYPES:
            far = torch.tensor([0.0, 1e-9, -1e-9, FAR, -FAR])
            batches = [torch.cat([_outcomes(n), far]) for n in (1, 115, 595)]
            views = [(VIEWS[name], batches[1].view(12, 10)) for name in VIEWS]
            for view, u in [(lambda u: u, batches[0]), (lambda u: u, batches[2]), *views]:
                leaf = u.to(dtype, copy=True).requires_grad_()
                for whole in (leaf.detach().clone(), leaf * 1, leaf):
                    given = view(whole)
                    before = given.detach().clone()
                    try:
                        self.fresh()(given)
                    except RuntimeError as error:
                        if "in-place" in str(error):
                            number_ = number(float(before.flatten()[0]))
                            return f"u = {number_} is changed in place: {str(error).splitlines()[0]}"
                        raise
                    changed = (given.detach() != before).nonzero()
                    if len(changed):
                        at = tuple(changed[0].tolist())
                        return f"u = {number(float(before[at]))} is {number(float(given.detach()[at]))} after the call"
        return None

    # -- numbers -------------------------------------------------------------------------------------------

    @cached_property
    def curve(self) -> Curve:
        """v in float64 over |u| <= 1e4."""
        return survey(self.fresh(), self.cells)

    @cached_property
    def reflected(self) -> Curve:
        """-v(-u), as undesirable rows are valued, likewise."""
        return self.curve.reflected()

    @cached_property
    def _grid_points(self) -> Tensor:
        """Outcomes for the other dtypes: round and odd ones, near 0 and far out."""
        size = torch.cat(
            [
                torch.logspace(-38, -9, 30, dtype=torch.float64),
                torch.logspace(-9, 4, 800, dtype=torch.float64),
                torch.linspace(0, 100, 1001, dtype=torch.float64),
                torch.linspace(100, FAR, 1001, dtype=torch.float64),
            ]
        )
        return torch.cat([size, -size])

    @cached_property
    def _sampled(self) -> dict[torch.dtype, _Sample]:
        """v in each dtype and exactly: all numbers that bfloat16 has, and in float32 also every fourth of the grid."""
        steps = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        every = steps[(steps >= 0) & (steps <= FAR)]
        numbers = {
            torch.float64: self._grid_points,
            torch.float32: torch.cat([self._grid_points, grid(self.cells)[::4]]).float(),
            torch.bfloat16: torch.cat([every, -every]),
        }
        return {
            dtype: _Sample(u, *value_and_slope(self.fresh(), u), *value_and_slope(self.fresh(), u.double()))
            for dtype, u in numbers.items()
        }

    def finite(self) -> str | None:
        """Value and gradient are finite for |u| <= 1e4 in float64, and in other dtypes where the exact ones fit."""
        for dtype, it in self._sampled.items():
            most = 0.99 * torch.finfo(dtype).max
            for name, got, right, fit in (
                ("v", it.value, it.exact_value, most),
                ("v'", it.slope, it.exact_slope, most / LARGEST_COTANGENT),
            ):
                fits = torch.ones_like(got, dtype=torch.bool) if dtype == torch.float64 else right.abs() < fit
                bad = (~got.isfinite() & fits).nonzero().squeeze(1)
                if len(bad):
                    at = int(bad[it.u[bad].double().abs().argmin()])
                    shown = "" if dtype == torch.float64 else f", exactly {number(float(right[at]))}"
                    return f"{name}({number(float(it.u[at]))}) = {float(got[at])} in {str(dtype)[6:]}{shown}"
        bad = (~(self.curve.value.isfinite() & self.curve.slope.isfinite())).nonzero().squeeze(1)
        if len(bad):
            at = int(bad[0])
            return (
                f"at u = {float(self.curve.u[at])!r}: v = {float(self.curve.value[at])},"
                f" v' = {float(self.curve.slope[at])} in float64"
            )
        return self._beyond_domain()

    def _beyond_domain(self) -> str | None:
        """A function that declares a ``domain`` has to go on linearly beyond it."""
        domain = getattr(self.target, "domain", None)
        if domain is None:
            return None
        low, high = domain
        for edge, far in ((low, -FAR), (high, FAR)):
            if edge is None or abs(edge) >= FAR:  # None is no bound, as is an infinite one
                continue
            u = edge + (far - edge) * torch.logspace(-6, 0, 4001, dtype=torch.float64)
            slope = value_and_slope(self.fresh(), u)[1]
            off = (slope - slope[0]).abs() > 1e-6 * slope[0].abs()
            if bool(off.any()):
                at = int(off.nonzero()[0])
                a, b = pair(float(slope[0]), float(slope[at]))
                return f"declared domain {low} to {high}, yet v' is {a} at its edge and {b} at u = {float(u[at]):g}"
        return None

    @cached_property
    def single(self) -> str | None:
        """That v rounds what it is given to float32, so that what is looked at closer than that is noise."""
        u = self._grid_points
        value, slope = value_and_slope(self.fresh(), u)
        rounded = value_and_slope(self.fresh(), u.float().double())[0]
        # Where another u has to have another value.
        seen = (u.abs() > 0.1) & (u.abs() < 10) & (slope.abs() > 1e-3) & (u != u.float().double())
        alike = seen & (value == rounded)
        if int(alike.sum()) < 20 or int(alike.sum()) < 0.99 * int(seen.sum()):
            return None
        at = int(alike.nonzero()[0])
        return (
            f"u in float64 is rounded to float32 or less: v({float(u[at])!r}) = v({float(u[at].float())!r}) ="
            f" {float(value[at])!r}; compute in the dtype of u"
        )

    def precision(self) -> str | None:
        """float32 and bfloat16 agree with float64 within rounding, values for |u| <= 1e4, slopes for |u| <= 100.

        The bound is that of the textbook: each of v's k operations rounds once, which is as if u had been off by
        k roundings, and the value by k roundings of its size. Slopes may cancel on the way, so they are held to k
        roundings of the steepest slope.
        """
        if self.single:
            return self.single
        count = operations(self.fresh()) + 2
        for dtype in DTYPES[1:]:
            it, eps, v = self._sampled[dtype], torch.finfo(dtype).eps, self.fresh()
            tiny = torch.finfo(torch.float32).tiny
            fits = (it.exact_value.abs() < 0.99 * torch.finfo(dtype).max) & (it.u.double().abs() > 1e-20)
            value, slope, u = it.value.double(), it.slope.double(), it.u.double()
            # Most are right at first sight; the others are looked at with all that rounding explains.
            rough = count * eps * (it.exact_value.abs() + (u * it.exact_slope).abs()) + tiny
            at = _most_doubtful(torch.where(fits, (value - it.exact_value).abs() / rough, 0.0))
            low, high = self._around(v, u[at], count * eps, 0)
            size = self._size(v, u[at])
            off = torch.maximum(low - value[at], value[at] - high) - count * eps * size - tiny
            if bool((off > 0).any()):
                worst = int(at[(off / (size + 1e-300)).masked_fill(off <= 0, -1).argmax()])
                a, b = pair(float(value[worst]), float(it.exact_value[worst]))
                return f"v({number(float(u[worst]))}) = {a} in {str(dtype)[6:]}, {b} in float64"
            near = fits & (u.abs() <= EDGE)
            slack = 4 * count * eps * float(it.exact_slope[near].abs().nan_to_num().max())
            at = _most_doubtful(torch.where(near, (slope - it.exact_slope).abs() / (slack + tiny), 0.0))
            low, high = self._around(v, u[at], count * eps, 1)
            off = torch.maximum(low - slope[at], slope[at] - high) - slack - tiny
            off = torch.where(it.exact_slope[at].abs() < 0.2 * torch.finfo(dtype).max, off, -torch.inf)
            if bool((off > 0).any()):
                worst = int(at[off.argmax()])
                a, b = pair(float(slope[worst]), float(it.exact_slope[worst]))
                return f"v'({number(float(u[worst]))}) = {a} in {str(dtype)[6:]}, {b} in float64"
        return None

    @staticmethod
    def _around(v: ValueFunction, u: Tensor, relative: float, which: int) -> tuple[Tensor, Tensor]:
        """Lowest and highest value (0) or slope (1) in float64 as far around each outcome as rounding may move it."""
        shares = (-1, -0.6, -0.3, -0.1, 0, 0.1, 0.3, 0.6, 1)
        around = torch.stack([value_and_slope(v, u * (1 + relative * t))[which] for t in shares])
        return around.min(dim=0).values, around.max(dim=0).values

    @staticmethod
    def _size(v: ValueFunction, u: Tensor) -> Tensor:
        """The largest |v| and |u v'| around each outcome and its opposite: what is rounded on the way.

        Within 1 nat and half of it. The opposite, because what v adds up on one side it may cancel on the other.
        """
        near = torch.cat([u + d for d in (-1.0, -0.3, 0.0, 0.3, 1.0)] + [u * f for f in (0.5, 0.8, 1.25, 1.5)])
        near = torch.cat([near, -near]).clamp(-FAR, FAR)
        value, slope = value_and_slope(v, near)
        size = (value.abs() + (near * slope).abs()).nan_to_num(posinf=0.0)
        return size.view(len(near) // max(1, len(u)), len(u)).max(dim=0).values

    # -- shape of the curve --------------------------------------------------------------------------------

    def _witness(self, found: tuple[float, float] | None, kind: str, reflected: bool = False) -> str | None:
        if found is None:
            return None
        v = self.fresh()

        def f(u: Tensor) -> Tensor:
            with torch.no_grad():
                return -v(-u) if reflected else v(u.clone())

        text = (_fall_in_numbers if kind == "fall" else _bend_in_numbers)(f, *found, "v~" if reflected else "v")
        return f"{text}, where v~(u) = -v(-u)" if reflected else text

    def non_decreasing(self) -> str | None:
        """No outcome is valued less than a lower one."""
        return self._witness(falls(self.curve), "fall")

    def concave_on_gains(self) -> str | None:
        """For u > 0 the slope never grows and v never jumps."""
        return self._witness(bends_up(self.curve), "bend")

    def undesirable_non_decreasing(self) -> str | None:
        """-v(-u) never falls."""
        return self._witness(falls(self.reflected), "fall", reflected=True)

    def undesirable_concave_on_gains(self) -> str | None:
        """The slope of -v(-u) never grows on u > 0: v is convex on losses."""
        return self._witness(bends_up(self.reflected), "bend", reflected=True)

    def gradient(self) -> str | None:
        """Autograd agrees with finite differences, also at exactly 0, where every run starts."""
        return self._gradient_at_zero() or self._gradient_elsewhere()

    def _gradient_at_zero(self) -> str | None:
        """At a kink the slope may be anything from that on the left to that on the right."""
        u, v = torch.zeros(2, dtype=torch.float64), self.fresh()  # two, since a batch of one has a cotangent of 1
        value, slope = value_and_slope(v, u)
        if not bool(value.isfinite().all() and slope.isfinite().all()):
            return None  # which is another clause's
        around, against = float(self._size(v, u)[0]), None
        for exponent in range(2, 13):
            step = 10.0**-exponent
            with torch.no_grad():
                sides = (v(u + step) - value) / step, (value - v(u - step)) / step
            right, left = (float(side[0]) for side in sides)
            most, rounding = max(abs(left), abs(right)), 64 * EPS * around / step
            slack = 1e-5 * most + rounding
            inside = (slope >= min(left, right) - slack) & (slope <= max(left, right) + slack)
            if bool(inside.all()) and rounding <= 1e-2 * most:
                return None
            if not bool(inside.all()) and (against is None or exponent == 6):
                wrong = float(slope[~inside][0])
                against = f"v'(0) = {wrong:.6g} by autograd, {left:.6g} on its left and {right:.6g} on its right"
        return against

    def _gradient_elsewhere(self) -> str | None:
        curve = self.curve.finite()
        inside = curve.u.abs() <= 100
        slack, curve = curve.noise.value[inside], curve.part(inside)
        h, rise = curve.u.diff(), curve.value.diff()
        off = (rise - h * (curve.slope[1:] + curve.slope[:-1]) / 2).abs() - h * curve.slope.diff().abs()
        doubt = (off > slack[1:] + slack[:-1]).nonzero().squeeze(1)
        doubt = doubt[:: max(1, len(doubt) // 2000)]
        # Points inside cells that do not fit, and everywhere; none is a kink or a jump, except by bad luck.
        far = torch.logspace(-6, 4, 300, dtype=torch.float64) * 1.0173
        u = torch.cat([curve.u[doubt] + 0.3819 * h[doubt], _outcomes(1000) * 1.0091, far, -far])
        u = u[u != 0]
        v = self.fresh()
        value, slope = value_and_slope(v, u)
        wrong = value.isfinite() & slope.isfinite()
        shown, around = slope, self._size(v, u)
        for size in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
            step = size * u.abs()
            with torch.no_grad():
                right, left = (v(u + step) - value) / step, (value - v(u - step)) / step
            rounding = 64 * EPS * around / step
            center = (right + left) / 2
            slack = 1e-5 * torch.maximum(slope.abs(), center.abs()) + rounding
            between = (slope >= torch.minimum(left, right) - slack) & (slope <= torch.maximum(left, right) + slack)
            shown = torch.where(wrong & (rounding < 1e-3 * (slope - center).abs()), center, shown)
            wrong &= ~between
        if not bool(wrong.any()):
            return None
        worst = ((shown - slope).abs() / (shown.abs() + slope.abs() + 1e-300)).masked_fill(~wrong, -1)
        at = int(worst.argmax())
        a, b = pair(float(slope[at]), float(shown[at]))
        return f"v'({u[at]:.6g}) = {a} by autograd, {b} by finite differences"


def _most_doubtful(ratio: Tensor, most: int = 20_000) -> Tensor:
    """Places where ``ratio`` is above 1, the largest first, and at least one place."""
    ratio = ratio.nan_to_num(posinf=torch.finfo(ratio.dtype).max)
    return ratio.topk(max(1, min(most, int((ratio > 1).sum())))).indices


Batch = Callable[[Tensor], Tensor]


def _rounded(x: float, digits: int) -> list[float]:
    scale = 10.0**digits
    return [math.floor(x * scale) / scale, math.ceil(x * scale) / scale]


def _fall_in_numbers(f: Batch, u1: float, u2: float, name: str) -> str:
    """Text that shows f(u1) > f(u2), with as few digits as do."""
    candidates = [(a, b) for d in range(15) for a in _rounded(u1, d) for b in _rounded(u2, d) if a < b]
    candidates.append((u1, u2))
    values = f(torch.tensor(candidates, dtype=torch.float64).flatten()).view(-1, 2)
    falling = values[:, 0] - values[:, 1] > 4 * EPS * values.abs().sum(dim=1)
    if not bool(falling.any()):
        return f"the slope of {name} is negative at u = {(u1 + u2) / 2!r}"
    at = int(falling.nonzero()[0])
    a, b = pair(*values[at].tolist())
    u1, u2 = candidates[at]
    x, y = (f"{u:.15g}" for u in (u1, u2)) if (u1, u2) != candidates[-1] else (repr(u1), repr(u2))
    return f"{name}({x}) = {a} > {name}({y}) = {b}"


def _bend_in_numbers(f: Batch, u1: float, u2: float, name: str) -> str:
    """Text that shows f(c) below the chord from c - w to c + w, with as few digits as do."""
    c = u1 + (u2 - u1) * torch.linspace(0, 1, 201, dtype=torch.float64)
    w = (u2 - u1 + 1e-9) * 2.0 ** torch.arange(-8, 8, dtype=torch.float64)
    w = torch.cat([w, 10.0 ** torch.arange(-8, 1)])
    centers, widths = (x.flatten() for x in torch.meshgrid(c, w, indexing="ij"))
    inside = centers - widths > 0

    def gap(center: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points = torch.stack([center - width, center, center + width])
        low, middle, high = f(points.flatten()).view(3, -1)
        chord = (low + high) / 2
        return chord - middle - 8 * EPS * (low.abs() + high.abs() + middle.abs()), middle, chord

    depth = gap(centers, widths)[0].masked_fill(~inside, -torch.inf).nan_to_num(nan=-torch.inf)
    at = int(depth.argmax())
    if not depth[at] > 0:
        return f"the slope of {name} is larger at u = {u2!r} than at u = {u1!r}"
    center, width = float(centers[at]), float(widths[at])
    candidates = [(x, y) for d in range(15) for x in _rounded(center, d) for y in _rounded(width, d) if 0 < y < x] + [
        (center, width)
    ]
    tried = torch.tensor(candidates, dtype=torch.float64)
    depth, middle, chord = gap(tried[:, 0], tried[:, 1])
    at = int((depth > 0).nonzero()[0])
    center, width = candidates[at]
    a, b = pair(float(middle[at]), float(chord[at]))
    shown = number if at < len(candidates) - 1 else repr
    x, low, high = map(shown, (center, center - width, center + width))
    return f"{name}({x}) = {a} < {b} = ({name}({low}) + {name}({high})) / 2"
