"""Finds where an expression vanishes, by bisection with enclosures."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from flint import arb

from halos_pl.proof.element import Element, UndecidedError
from halos_pl.proof.exponentials import in_one_exponential
from halos_pl.proof.field import Field
from halos_pl.proof.interval import INF, NEGATIVE_INF, Interval, ball
from halos_pl.proof.signs import Box, UndefinedError

Bound = Fraction | None  # None: infinite
_BITS = 100  # accuracy of a switching point that is no rational number


class Roots:
    """The roots of expressions of u.

    Args:
        field: the expressions.
        parameters: range of each parameter.
    """

    def __init__(self, field: Field, parameters: Mapping[str, Interval]) -> None:
        self.field, self.parameters = field, parameters

    def places(self, top: Element, start: Bound, stop: Bound) -> tuple[list[tuple[Fraction, Fraction]], int]:
        """Rationals around each root of ``top`` between two places, and its sign before the first.

        Raises:
            UndecidedError: the roots cannot be told apart.
        """
        top = in_one_exponential(self.field, top) or top
        found: list[tuple[Fraction, Fraction]] = []
        first = 0
        todo: list[tuple[Bound, Bound, int]] = [(start, stop, 0)]
        while todo:
            self.field.require_time()
            low, high, depth = todo.pop()
            try:
                box = Box(self.field, span(low, high), self.parameters)
                sign, strict = box.sign(top)
                slope, monotone = (None, False) if strict else box.sign(top.derivative)
            except UndefinedError:
                sign = slope = None
                strict = monotone = False
            if strict:
                first = first or (sign or 0)
            elif slope and monotone:
                if self._at(top, low) == slope or self._at(top, high) == -slope:
                    first = first or (slope if self._at(top, low) == slope else -slope)  # it moves away from 0
                    continue
                end = low if self._vanishes(top, low) else high if self._vanishes(top, high) else None
                if end is not None:  # it is 0 at an end, and nowhere inside
                    first = first or (slope if end is low else -slope)
                    continue
                place = self._bisected(top, low, high, slope)
                if place is not None:
                    first = first or -slope
                    found.append(place)
                elif depth > 30:
                    raise UndecidedError(f"{top} may vanish near an end of {span(low, high)}")
                else:
                    middle = between(low, high)
                    todo += [(middle, high, depth + 1), (low, middle, depth + 1)]
            elif depth > 30:
                raise UndecidedError(f"{top} may vanish more than once near u in {span(low, high)}")
            else:
                middle = between(low, high)
                while self._at(top, middle) is None:  # a root of its own: split elsewhere
                    if depth > 40:
                        raise UndecidedError(f"the sign of {top} near u = {float(middle):g} is not found")
                    middle, depth = between(low, middle), depth + 1
                todo += [(middle, high, depth + 1), (low, middle, depth + 1)]
        return found, first

    def _bisected(self, top: Element, low: Bound, high: Bound, slope: int) -> tuple[Fraction, Fraction] | None:
        """The root of a monotone difference in a cell; None if it does not change sign inside."""
        base = high if low is None else low
        assert base is not None
        below = [low] if low is not None else (base - Fraction(2) ** k for k in range(-20, 65))
        above = [high] if high is not None else (base + Fraction(2) ** k for k in range(-20, 65))
        a = next((x for x in below if self._at(top, x) == -slope), None)
        b = next((x for x in above if self._at(top, x) == slope), None)
        if a is None or b is None:
            return None
        while b - a > max(abs(a), Fraction(1, 2**20)) / 2**_BITS:
            middle = rounded(ball((a + b) / 2), 1, 2 * _BITS)
            sign = self._at(top, middle)
            if sign is None:  # the root itself, or too close to it to tell
                width = max(abs(middle), Fraction(1, 2**20)) / 2 ** (_BITS - 10)
                a, b = max(a, middle - width), min(b, middle + width)
                return (a, b) if self._at(top, a) == -slope and self._at(top, b) == slope else None
            a, b = (a, middle) if sign == slope else (middle, b)
        return a, b

    def _vanishes(self, top: Element, u: Bound) -> bool:
        if u is None or self._at(top, u) is not None:  # each expression at a number takes room for its functions
            return False
        return self.field.substituted(top, self.field.constant(u), {}).is_zero

    def _at(self, top: Element, u: Fraction | None) -> int | None:
        if u is None:
            return None
        sign, strict = Box(self.field, Interval.of(u, u), self.parameters).sign(top)
        return sign if strict else None


def span(low: Bound, high: Bound) -> Interval:
    """An open interval of u."""
    return Interval.of(NEGATIVE_INF if low is None else low, INF if high is None else high, True, True)


def between(low: Bound, high: Bound) -> Fraction:
    """A place inside a cell at which to split it; twice as far out where the cell is infinite."""
    if low is None:
        return Fraction(0) if high is None else -between(-high, None)
    if high is None:
        return max(Fraction(1), 2 * low) if low >= 0 else low / 2
    if low > 0 and high > 16 * low:  # many orders of magnitude
        return low * 4
    return -between(-high, -low) if high < 0 and low < 16 * high else (low + high) / 2


def rounded(x: arb, direction: int, bits: int = _BITS) -> Fraction:
    """A rational with a short binary expansion below (-1) or above (1) a number."""
    mantissa, exponent = (x.lower() if direction < 0 else x.upper()).man_exp()
    value = Fraction(int(mantissa)) * Fraction(2) ** int(exponent)
    size = abs(value)
    if size == 0:
        return value
    shift = bits - (size.numerator.bit_length() - size.denominator.bit_length())
    scaled = value * Fraction(2) ** shift
    whole = scaled.numerator // scaled.denominator
    return Fraction(whole + (1 if direction > 0 and whole != scaled else 0)) / Fraction(2) ** shift
