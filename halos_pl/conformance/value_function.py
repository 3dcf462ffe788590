"""Clauses of a value function: v(u), elementwise, non-decreasing, concave on gains, sound in every dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.search import (
    CELLS,
    EPS,
    FAR,
    Curve,
    bends_up,
    falls,
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
SHAPES = ((), (0,), (1,), (3,), (1, 1), (2, 3), (5, 1), (2, 1, 3))
SIZES = (1, 2, 3, 7, 64, 65, 100, 255, 257, 1000, 1025, 4097, 20001)


def _outcomes(n: int) -> Tensor:
    """n different outcomes in nats, near and far, of either sign, in no order."""
    steps = torch.arange(n, dtype=torch.float64)
    size = 10 ** ((steps * 0.618034) % 1 * 5 - 3)  # 1e-3 to 100
    return torch.where(steps % 2 == 0, size, -size)


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
        """Rows do not mix; batch size and position do not matter."""
        for dtype in DTYPES[:2]:
            base = _outcomes(64).to(dtype)
            alone = self._alone(base)
            for n in SIZES:
                for shift in (0, 1):
                    index = (torch.arange(n) * (1 + 2 * shift) + shift) % len(base)
                    u = base[index]
                    expected = (alone[0][index], alone[1][index])
                    found = self._difference(expected, value_and_slope(self.fresh(), u), u)
                    if found:
                        return f"{found}; the first is what it is alone"
        # The grid is the largest batch of all.
        curve = self.curve
        few = curve.part(torch.arange(7, len(curve.u), len(curve.u) // 97))
        found = self._difference(self._alone(few.u), (few.value, few.slope), few.u)
        return found and f"{found}; the second is what it is in a batch of {self.cells}"

    def deterministic(self) -> str | None:
        """The same answer on later calls, in training and evaluation, with and without gradient."""
        for n in (1, 64, 257):
            u, other = _outcomes(n), _outcomes(n) * 0.7 + 0.3
            first = value_and_slope(self.fresh(), u)
            v = self.fresh()
            calls = [(f"on call {i}", True) for i in range(1, 13)] + [("in evaluation", False), ("in training", True)]
            for when, training in calls:
                found = self._difference(first, value_and_slope(v.train(training), u), u)
                if found:
                    return f"{found}; the second is {when}"
            found = self._difference(first, (v(u.clone()).detach(), first[1]), u)
            if found:
                return f"{found}; the second is without gradient"
            found = self._difference(value_and_slope(self.fresh(), other), value_and_slope(v, other), other)
            if found:
                return f"{found}; the second is after calls with other outcomes"
        return None

    def no_in_place_change(self) -> str | None:
        """The input is left as it was."""
        for dtype in DTYPES:
            for n in (1, 100):
                u = torch.cat([_outcomes(n), torch.tensor([0.0, 1e-9, -1e-9, FAR, -FAR])]).to(dtype)
                leaf = u.clone().requires_grad_()
                for given in (u.clone(), leaf * 1, leaf):
                    before = given.detach().clone()
                    try:
                        self.fresh()(given)
                    except RuntimeError as error:
                        if "in-place" in str(error):
                            return f"u = {number(float(u[0]))} is changed in place: {str(error).splitlines()[0]}"
                        raise
                    changed = (given.detach() != before).nonzero()
                    if len(changed):
                        at = int(changed[0])
                        return f"u = {number(float(before[at]))} is {number(float(given.detach()[at]))} after the call"
        return None

    # -- numbers -------------------------------------------------------------------------------------------

    @cached_property
    def curve(self) -> Curve:
        """v in float64 over |u| <= 1e4."""
        return survey(self.fresh(), self.cells)

    @cached_property
    def _probes(self) -> Tensor:
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

    def finite(self) -> str | None:
        """Value and gradient are finite for |u| <= 1e4 in float64, and in other dtypes where the exact ones fit."""
        for dtype in DTYPES:
            u = self._probes.to(dtype)
            exact = value_and_slope(self.fresh(), u.double())
            value, slope = value_and_slope(self.fresh(), u)
            for name, got, right in (("v", value, exact[0]), ("v'", slope, exact[1])):
                fits = ~right.isfinite() if dtype == torch.float64 else right.abs() < 0.99 * torch.finfo(dtype).max
                bad = (~got.isfinite() & fits).nonzero().squeeze(1)
                if len(bad):
                    at = int(bad[u[bad].double().abs().argmin()])
                    shown = "" if dtype == torch.float64 else f", exactly {number(float(right[at]))}"
                    return f"{name}({number(float(u[at]))}) = {float(got[at])} in {str(dtype)[6:]}{shown}"
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
            if abs(edge) >= FAR:
                continue
            u = torch.linspace(edge + (far - edge) * 1e-6, far, 101, dtype=torch.float64)
            slope = value_and_slope(self.fresh(), u)[1]
            off = (slope - slope[0]).abs() > 1e-6 * slope[0].abs()
            if bool(off.any()):
                at = int(off.nonzero()[0])
                a, b = pair(float(slope[0]), float(slope[at]))
                return f"declared domain {low} to {high}, yet v' is {a} at its edge and {b} at u = {float(u[at]):g}"
        return None

    def precision(self) -> str | None:
        """float32 and bfloat16 agree with float64 within rounding.

        The bound is that of the textbook: each of v's k operations rounds once, which is as if u had been off by
        k roundings, and the value by k roundings of its size.
        """
        count = operations(self.fresh()) + 2
        for dtype in DTYPES[1:]:
            eps, u = torch.finfo(dtype).eps, self._probes.to(dtype)
            u = u[u.double().abs() > 1e-20] if dtype is torch.bfloat16 else u
            v, value = self.fresh(), value_and_slope(self.fresh(), u)[0].double()
            exact, _ = value_and_slope(v, u.double())
            around = torch.stack(
                [v(u.double() * (1 + count * eps * t)).detach() for t in (-1, -0.6, -0.3, -0.1, 0.1, 0.3, 0.6, 1)]
            )
            low = torch.minimum(around.min(dim=0).values, exact)
            high = torch.maximum(around.max(dim=0).values, exact)
            size = self._size(v, u.double())
            off = torch.maximum(low - value, value - high) - count * eps * size - torch.finfo(torch.float32).tiny
            off = torch.where(exact.abs() < 0.99 * torch.finfo(dtype).max, off, -torch.inf)
            wrong = (off > 0).nonzero().squeeze(1)
            if len(wrong):
                at = int(wrong[(off[wrong] / (size[wrong] + 1e-300)).argmax()])
                a, b = pair(float(value[at]), float(exact[at]))
                return f"v({number(float(u[at]))}) = {a} in {str(dtype)[6:]}, {b} in float64"
        return None

    @staticmethod
    def _size(v: ValueFunction, u: Tensor) -> Tensor:
        """The largest |v| and |u v'| around each outcome, within 1 nat and half of it: what is rounded on the way."""
        near = torch.cat([u + d for d in (-1.0, -0.3, 0.0, 0.3, 1.0)] + [u * f for f in (0.5, 0.8, 1.25, 1.5)])
        value, slope = value_and_slope(v, near.clamp(-FAR, FAR))
        size = (value.abs() + (near * slope).abs()).nan_to_num(posinf=0.0)
        return size.view(-1, len(u)).max(dim=0).values

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
        return self._witness(falls(self.curve.reflected()), "fall", reflected=True)

    def undesirable_concave_on_gains(self) -> str | None:
        """The slope of -v(-u) never grows on u > 0: v is convex on losses."""
        return self._witness(bends_up(self.curve.reflected()), "bend", reflected=True)

    def gradient(self) -> str | None:
        """Autograd agrees with finite differences."""
        curve = self.curve.finite()
        inside = curve.u.abs() <= 100
        curve = curve.part(inside)
        h, rise = curve.u.diff(), curve.value.diff()
        slack = curve.noise.value
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
        for size in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
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
    candidates = [
        (x, y) for d in range(15) for x in _rounded(center, d) for y in _rounded(width, d) if 0 < y < x
    ] + [(center, width)]
    tried = torch.tensor(candidates, dtype=torch.float64)
    depth, middle, chord = gap(tried[:, 0], tried[:, 1])
    at = int((depth > 0).nonzero()[0])
    center, width = candidates[at]
    a, b = pair(float(middle[at]), float(chord[at]))
    shown = number if at < len(candidates) - 1 else repr
    x, low, high = map(shown, (center, center - width, center + width))
    return f"{name}({x}) = {a} < {b} = ({name}({low}) + {name}({high})) / 2"
