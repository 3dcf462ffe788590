"""Closed intervals of the extended real line, rounded outwards, and the range of a polynomial over a box."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import comb, prod
from typing import Any

from flint import arb, ctx, fmpq, fmpq_mpoly

PRECISION = 128  # bits
ctx.prec = PRECISION
INF, NEGATIVE_INF, ZERO, ONE = arb("inf"), arb("-inf"), arb(0), arb(1)
# Above this many coefficients a polynomial is not expanded on a box.
LARGEST_TENSOR = 4096


def ball(value: Any) -> arb:
    """An enclosure of a rational."""
    return value if isinstance(value, arb) else arb(fmpq(value.numerator, value.denominator))


def whole_power(x: arb, exponent: int) -> arb:
    """x multiplied by itself; python-flint has no powers of a ball around 0."""
    return prod([x] * exponent, start=ONE)


def least(a: arb, b: arb) -> arb:
    """The smaller of two exact numbers, either of which may be infinite."""
    return a if a <= b else b


def greatest(a: arb, b: arb) -> arb:
    """The larger of two exact numbers."""
    return a if a >= b else b


@dataclass(frozen=True)
class Interval:
    """Numbers between ``low`` and ``high``.

    Attributes:
        low, high: exact, or infinite.
        above_low, below_high: whether ``low`` and ``high`` themselves are known not to be reached.
        exact_low, exact_high: the ends without rounding, if they are known as rationals.
    """

    low: arb
    high: arb
    above_low: bool = False
    below_high: bool = False
    exact_low: fmpq | None = None
    exact_high: fmpq | None = None

    @classmethod
    def of(cls, low: Any, high: Any, above_low: bool = False, below_high: bool = False) -> Interval:
        """From balls or rationals, rounded outwards."""
        a, b = ball(low), ball(high)
        if a.is_nan() or b.is_nan():
            return REALS
        exact = [None if isinstance(end, arb) else fmpq(end.numerator, end.denominator) for end in (low, high)]
        outwards = a.lower() if a.is_finite() else a, b.upper() if b.is_finite() else b
        return cls(*outwards, above_low, below_high, *exact)

    @property
    def ends(self) -> tuple[Any, Any]:
        """The ends as exactly as they are known."""
        low = self.low if self.exact_low is None else self.exact_low
        return low, self.high if self.exact_high is None else self.exact_high

    def contains(self, value: Any) -> bool:
        """Whether a rational is one of the numbers."""
        low, high = self.ends
        x = fmpq(value.numerator, value.denominator)
        beyond_low = x >= low if not self.above_low else x > low
        return bool(beyond_low and (x <= high if not self.below_high else x < high))

    @property
    def positive(self) -> bool:
        """Whether all numbers are above 0."""
        return bool(self.low > 0 or (self.low == 0 and self.above_low))

    @property
    def negative(self) -> bool:
        """Whether all numbers are below 0."""
        return bool(self.high < 0 or (self.high == 0 and self.below_high))

    @cached_property
    def point(self) -> arb | None:
        """A ball around all numbers if they are nearly the same, else None."""
        if not (self.low.is_finite() and self.high.is_finite()):
            return None
        width, middle = self.high - self.low, self.low.union(self.high)
        if self.exact_low is not None and self.exact_low == self.exact_high:
            return middle
        if self.above_low or self.below_high:  # that an end is not reached may matter more than its digits
            return None
        return middle if width <= abs(self.low) * arb(2) ** -60 else None

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low, self.below_high, self.above_low)

    def __truediv__(self, other: Interval) -> Interval | None:
        """The quotient; None if the divisor may be 0."""
        if other.negative:
            return -self / -other
        if not other.positive:
            return None
        least_inverse = ZERO if not other.high.is_finite() else (1 / other.high)
        largest_inverse = INF if other.low == 0 else (1 / other.low)
        corners = [
            ZERO if a == 0 or b == 0 else a * b for a in (self.low, self.high) for b in (least_inverse, largest_inverse)
        ]
        low, high = corners[0], corners[0]
        for corner in corners[1:]:
            low, high = low.min(corner), high.max(corner)
        return Interval.of(low, high, bool(self.low == 0 and self.above_low), bool(self.high == 0 and self.below_high))

    def __str__(self) -> str:
        return f"[{float(self.low):.6g}, {float(self.high):.6g}]"


REALS = Interval(NEGATIVE_INF, INF)
ZERO_TO_ONE = (ZERO, ONE)


def _expanded(terms: dict[tuple[int, ...], Any], place: int, rows: list[list[Any]]) -> dict[tuple[int, ...], Any]:
    """Replaces each power of one variable by a polynomial, whose coefficients are ``rows[power]``."""
    out: dict[tuple[int, ...], Any] = {}
    for exponents, coefficient in terms.items():
        for power, factor in enumerate(rows[exponents[place]]):
            if factor == 0:
                continue
            key = (*exponents[:place], power, *exponents[place + 1 :])
            out[key] = out[key] + coefficient * factor if key in out else coefficient * factor
    return out


def _bernstein(x: Interval, degree: int) -> list[list[Any]]:
    """Coefficients of x^0 .. x^degree in the Bernstein basis on [low, high]."""
    low, high = x.ends
    width = high - low
    rows = []
    for power in range(degree + 1):
        plain = [comb(power, k) * low ** (power - k) * width**k for k in range(power + 1)]
        rows.append(
            [
                sum((plain[i] * comb(j, i) / comb(degree, i) for i in range(min(j, power) + 1)), fmpq(0))
                for j in range(degree + 1)
            ]
        )
    return rows


def _tail(x: Interval, degree: int) -> list[list[Any]]:
    """Coefficients of x^0 .. x^degree in t >= 0, where x = low + t or x = high - t."""
    end, sign = (x.ends[0], 1) if x.low.is_finite() else (x.ends[1], -1)
    return [[comb(n, k) * end ** (n - k) * sign**k for k in range(n + 1)] for n in range(degree + 1)]


def polynomial_range(polynomial: fmpq_mpoly, box: Mapping[int, Interval]) -> Interval:
    """Encloses a polynomial whose variables lie in intervals, each independent of the others.

    Bounded variables are expanded in the Bernstein basis, whose coefficients bound a polynomial; unbounded ones around
    their finite end, where only the signs of the coefficients matter.
    """
    terms: dict[tuple[int, ...], Any] = {}
    degrees = polynomial.degrees()
    used = [i for i, degree in enumerate(degrees) if degree]
    free: list[int] = []  # variables with a box; the others are points
    points: dict[int, arb] = {}
    for i in used:
        point = box[i].point
        if point is None:
            free.append(i)
        else:
            points[i] = point
    size = 1
    for i in free:
        size *= degrees[i] + 1
    if size > LARGEST_TENSOR:
        return REALS
    for exponents, coefficient in polynomial.terms():
        value: Any = coefficient
        for i, point in points.items():
            if exponents[i]:
                value *= whole_power(point, int(exponents[i]))
        key = tuple(int(exponents[i]) for i in free)
        terms[key] = terms[key] + value if key in terms else value
    bounded = []
    for place, i in enumerate(free):
        x, degree = box[i], degrees[i]
        finite = x.low.is_finite() and x.high.is_finite()
        bounded.append(finite)
        if finite:
            terms = _expanded(terms, place, _bernstein(x, degree))
        elif x.low.is_finite() or x.high.is_finite():
            terms = _expanded(terms, place, _tail(x, degree))
    terms = {
        index: coefficient if isinstance(coefficient, arb) else arb(coefficient) for index, coefficient in terms.items()
    }
    return _enclosed(terms, [box[i] for i in free], [degrees[i] for i in free], bounded)


def _enclosed(
    terms: dict[tuple[int, ...], arb], box: list[Interval], degrees: list[int], bounded: list[bool]
) -> Interval:
    """The range of a polynomial from its coefficients in the bases of :func:`polynomial_range`."""
    if any(coefficient.is_nan() for coefficient in terms.values()):
        return REALS
    low, high = INF, NEGATIVE_INF
    lowest_tail = highest_tail = ZERO
    rises = falls = False
    for index in product(*(range(d + 1) if finite else (0,) for d, finite in zip(degrees, bounded, strict=True))):
        coefficient = terms.get(index, ZERO)
        low, high = least(low, coefficient.lower()), greatest(high, coefficient.upper())
    for index, coefficient in terms.items():
        even = True
        infinite = False
        open_ = True  # whether the basis function is above 0 everywhere
        for power, x, degree, finite in zip(index, box, degrees, bounded, strict=True):
            if finite:
                open_ &= (power == degree or x.below_high) and (power == 0 or x.above_low)
            else:
                infinite |= power > 0
                two_sided = not (x.low.is_finite() or x.high.is_finite())
                even &= not (two_sided and power % 2)
                reached = x.above_low if x.low.is_finite() else x.below_high
                open_ &= power == 0 or (reached and not two_sided)
        if infinite:
            sure_low, sure_high = (coefficient.lower(), coefficient.upper()) if even else (NEGATIVE_INF, INF)
            if even or not coefficient.is_zero():
                lowest_tail, highest_tail = least(lowest_tail, sure_low), greatest(highest_tail, sure_high)
        rises |= open_ and bool(coefficient > 0)
        falls |= open_ and bool(coefficient < 0)
    low = low if lowest_tail >= 0 else NEGATIVE_INF
    high = high if highest_tail <= 0 else INF
    return Interval(low, high, bool(low == 0 and rises), bool(high == 0 and falls))
