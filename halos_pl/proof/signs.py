"""Signs of exact expressions over a cell: an interval of u and the ranges of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

from flint import arb, fmpq, fmpq_mpoly

from halos_pl.proof.element import Element
from halos_pl.proof.field import Field
from halos_pl.proof.interval import INF, NEGATIVE_INF, ONE, ZERO, Interval, polynomial_range

Function = Callable[[arb], arb]
Known = Sequence[tuple[fmpq_mpoly, int]]  # polynomials and their signs


MOST_STEPS = 2  # from known signs to another


class UndefinedError(ValueError):
    """An expression may be undefined in a cell: a division by 0, or a logarithm or root of what may not be above 0."""


def _monotone(f: Function, x: Interval, at_low: arb, at_high: arb, reaches: bool = False) -> Interval:
    """The range of a rising function with the given limits at -inf and +inf, which it reaches only if ``reaches``."""
    low = f(x.low) if x.low.is_finite() else at_low
    high = f(x.high) if x.high.is_finite() else at_high
    # A value that rounds to the limit is beyond what the precision resolves, but is not the limit.
    low_open = not reaches and not low > at_low
    high_open = not reaches and not high < at_high
    interval = Interval.of(low, high)
    if low_open:
        interval = Interval(at_low, interval.high, True, interval.below_high)
    if high_open:
        interval = Interval(interval.low, at_high, interval.above_low, True)
    if x.above_low and x.low.is_finite() and low.is_exact():
        interval = Interval(interval.low, interval.high, True, interval.below_high)
    if x.below_high and x.high.is_finite() and high.is_exact():
        interval = Interval(interval.low, interval.high, interval.above_low, True)
    return interval


def _log(x: Interval) -> Interval:
    if not x.positive:
        raise UndefinedError("the argument of log may be 0 or below")
    low = x.low.log() if x.low > 0 else NEGATIVE_INF
    high = x.high.log() if x.high.is_finite() else INF
    return Interval.of(low, high)


def _wave(f: Function, x: Interval, peak: arb) -> Interval:
    """sin or cos, whose largest value is at ``peak``."""
    if not (x.low.is_finite() and x.high.is_finite()) or x.high - x.low > 6:
        return Interval(-ONE, ONE)
    values = [f(x.low), f(x.high)]
    pi = arb.pi()
    for shift, value in ((peak, ONE), (peak + pi, -ONE)):  # contains a peak or a trough?
        turns = ((x.low - shift) / (2 * pi)).ceil()
        if not (shift + 2 * pi * turns > x.high):
            values.append(value)
    low, high = values[0], values[0]
    for value in values[1:]:
        low, high = low.min(value), high.max(value)
    return Interval.of(low, high)


def _power(x: Interval, exponent: Interval) -> Interval:
    """x^p for x above 0, by the corners; a rational or interval exponent."""
    if not x.positive:
        raise UndefinedError("the base of a power may be 0 or below")

    def corner(a: arb, p: arb) -> arb | None:
        if a == 0:
            return ZERO if p > 0 else INF if p < 0 else None
        if not a.is_finite():
            return INF if p > 0 else ZERO if p < 0 else None
        if p.is_finite():
            return a**p
        above = (a > 1) == (p > 0)
        return ONE if a == 1 else INF if above else ZERO

    corners = [corner(a, p) for a in (x.low, x.high) for p in (exponent.low, exponent.high)]
    known = [c for c in corners if c is not None]
    if len(known) < len(corners):
        return Interval(ZERO, INF, True, False)
    low = high = known[0]
    for c in known[1:]:
        low, high = low.min(c), high.max(c)
    return Interval.of(low, high, bool(low == 0), False)


def _atan(x: arb) -> arb:
    return x.atan()


def _half_pi() -> arb:
    return arb.pi() / 2


def _sigmoid(x: arb) -> arb:
    return 1 / (1 + (-x).exp())


def _softplus(x: arb) -> arb:
    return x.exp().log1p() if x < 0 else x + (-x).exp().log1p()


def _tail_of_normal(x: arb) -> arb:
    """The probability that a standard normal variable is above x."""
    return (x / arb(2).sqrt()).erfc() / 2


def _hazard(x: arb) -> arb:
    """The density of the normal distribution at x, divided by the probability of more than x."""
    return (-x * x / 2).exp() / (2 * arb.pi()).sqrt() / _tail_of_normal(x)


_RANGES: dict[str, Callable[[Interval], Interval]] = {
    "exp": lambda x: _monotone(lambda y: y.exp(), x, ZERO, INF),
    "sigmoid": lambda x: _monotone(_sigmoid, x, ZERO, ONE),
    "softplus": lambda x: _monotone(_softplus, x, ZERO, INF),
    "softminus": lambda x: _monotone(_softplus, -x, ZERO, INF),  # softplus(-x)
    "log": _log,
    "atan": lambda x: _monotone(_atan, x, (-_half_pi()).lower(), _half_pi().upper(), reaches=True),
    "erf": lambda x: _monotone(lambda y: y.erf(), x, -ONE, ONE),
    "log_ndtr": lambda x: _monotone(lambda y: (_tail_of_normal(-y)).log(), x, NEGATIVE_INF, ZERO),
    "hazard": lambda x: _monotone(_hazard, x, ZERO, INF),
    "gap": lambda x: _monotone(lambda y: y + _hazard(-y), x, ZERO, INF),
    "sin": lambda x: _wave(lambda y: y.sin(), x, _half_pi()),
    "cos": lambda x: _wave(lambda y: y.cos(), x, ZERO),
}


def _independent(polynomial: fmpq_mpoly) -> list[fmpq_mpoly]:
    """Parts of a sum that share no variable; the constant term is in the first of them."""
    parts: list[tuple[set[int], dict[tuple[int, ...], fmpq]]] = []
    constant: dict[tuple[int, ...], fmpq] = {}
    for exponents, coefficient in polynomial.terms():
        used, terms = {i for i, e in enumerate(exponents) if e}, {exponents: fmpq(coefficient)}
        if not used:
            constant = terms
            continue
        for part in [part for part in parts if part[0] & used]:
            parts.remove(part)
            used |= part[0]
            terms |= part[1]
        parts.append((used, terms))
    together = [terms for _, terms in parts] or [{}]
    together[0] |= constant
    return [polynomial.context().from_dict(terms) for terms in together]


def _ratios(f: fmpq_mpoly, g: fmpq_mpoly) -> Iterator[fmpq_mpoly]:
    """The terms of f that are multiples of a term of g, divided by it; for each term of g."""
    seen = set()
    for exponents, coefficient in g.terms():
        ratio = {
            tuple(a - b for a, b in zip(mine, exponents, strict=True)): c / coefficient
            for mine, c in f.terms()
            if all(a >= b for a, b in zip(mine, exponents, strict=True))
        }
        q = f.context().from_dict(ratio)
        if ratio and str(q) not in seen:
            seen.add(str(q))
            yield q


class Box:
    """A cell: the range of u and of each parameter; the ranges of kernels follow.

    Args:
        field: the expressions.
        u: range of u.
        parameters: ranges of the parameters, in the field's order.
        known: signs of polynomials in the cell, none of which is 0 there, beside those that the field assumes.
    """

    def __init__(self, field: Field, u: Interval, parameters: Mapping[str, Interval], known: Known = ()) -> None:
        self.field, self.u, self.parameters = field, u, dict(parameters)
        self._ranges = {0: u} | {1 + i: parameters[name] for i, name in enumerate(field.parameters)}
        self._signs: dict[str, tuple[int | None, bool]] = {}
        self._depth = 0
        self._known = [*field.assumed, *((polynomial, sign, True) for polynomial, sign in known)]

    def __getitem__(self, index: int) -> Interval:
        if index not in self._ranges:
            self._ranges[index] = self._range_of_kernel(index)
        return self._ranges[index]

    def _range_of_kernel(self, index: int) -> Interval:
        kernel = self.field.kernels[index]
        if kernel.kind == "pi":
            return Interval.of(arb.pi(), arb.pi())
        if kernel.kind == "rest":  # of a Taylor sum with terms above 0
            return Interval(ZERO, INF)
        x = self.range(kernel.argument)
        if kernel.kind == "power":
            if not x.positive and self.sign(kernel.argument) == (1, True):
                x = Interval(ZERO, x.high, True, x.below_high)
            if isinstance(kernel.exponent, Element):
                exponent = self.range(kernel.exponent)
            else:
                exponent = Interval.of(kernel.exponent or Fraction(0), kernel.exponent or Fraction(0))
            return _power(x, exponent)
        if kernel.kind == "log" and not x.positive and self.sign(kernel.argument) == (1, True):
            x = Interval(ZERO, x.high, True, x.below_high)
        return _RANGES[kernel.kind](x)

    def range(self, element: Element) -> Interval:
        """Encloses an expression.

        Raises:
            UndefinedError: it may be undefined.
        """
        top = self._polynomial(element.numerator)
        if element.denominator.is_one():
            return top
        bottom = self._polynomial(element.denominator)
        quotient = top / bottom
        if quotient is None and (sign := self._sign_of_polynomial(element.denominator)) and sign[1]:
            quotient = top / (Interval(ZERO, INF, True) if sign[0] == 1 else Interval(NEGATIVE_INF, ZERO, False, True))
        if quotient is None:
            raise UndefinedError("a divisor may be 0")
        return quotient

    def _polynomial(self, polynomial: fmpq_mpoly) -> Interval:
        if polynomial.is_zero():
            return Interval(ZERO, ZERO)
        ranges = [polynomial_range(part, self) for part in _independent(polynomial)]  # type: ignore[arg-type]
        if len(ranges) == 1:
            return ranges[0]
        low, high = ZERO, ZERO
        for each in ranges:
            low, high = low + each.low, high + each.high
        return Interval.of(low, high, any(r.above_low for r in ranges), any(r.below_high for r in ranges))

    def sign(self, element: Element) -> tuple[int | None, bool]:
        """1, -1, 0 (identically) or None (unknown), and whether it is strict: never 0.

        Raises:
            UndefinedError: the expression may be undefined.
        """
        if element.key not in self._signs:
            self._signs[element.key] = self._sign(element)
        return self._signs[element.key]

    def _sign(self, element: Element) -> tuple[int | None, bool]:
        if element.is_zero:
            return 0, False
        bottom, strict = self._sign_of_polynomial(element.denominator)
        if bottom is None or not strict:
            raise UndefinedError("a divisor may be 0")
        top, strict = self._sign_of_polynomial(element.numerator)
        return (None if top is None else top * bottom), strict

    def _sign_of_polynomial(self, polynomial: fmpq_mpoly) -> tuple[int | None, bool]:
        if polynomial.is_zero():
            return 0, False
        if polynomial.is_constant():
            return (1 if polynomial.leading_coefficient() > 0 else -1), True
        sign, factors = self.field.factors(polynomial)
        strict = True
        for factor, times in factors:
            one, one_strict = self._sign_of_factor(factor, times % 2 == 0)
            if one is None:
                return None, False
            sign *= one
            strict &= one_strict
        return sign, strict

    def _sign_of_factor(self, factor: fmpq_mpoly, squared: bool) -> tuple[int | None, bool]:
        """The sign of a factor, or of its square."""
        parts = _independent(factor)
        x = self._polynomial(factor)
        if x.positive or x.negative:
            return (1 if x.positive or squared else -1), True
        found: tuple[int | None, bool] = (1, False) if x.low >= 0 else (-1, False) if x.high <= 0 else (None, False)
        if found[0] is None and len(parts) > 1:
            signs = [self._sign_of_polynomial(part) for part in parts]
            if None not in [s for s, _ in signs] and len({s for s, _ in signs}) == 1:
                found = signs[0][0], any(strict for _, strict in signs)
        if found[0] is None or not found[1]:
            found = (
                self._by_known(factor)
                or self._by_conjugate(factor)
                or self._turned(factor)
                or self._by_growth(factor)
                or found
            )
        if squared:
            return 1, (found[1] and found[0] is not None) or self._by_known(factor * factor) == (1, True)
        return found

    def _by_known(self, factor: fmpq_mpoly) -> tuple[int | None, bool] | None:
        """The sign of q g + r, from that of q, of r and the known one of g."""
        if self._depth == MOST_STEPS:
            return None
        self._depth += 1
        try:
            for g, sign, strict in self._known:
                for q in _ratios(factor, g):
                    r = factor - q * g
                    sign_q, strict_q = self._sign_of_polynomial(q)
                    sign_r, strict_r = self._sign_of_polynomial(r) if sign_q is not None else (None, False)
                    if sign_q is not None and sign_r is not None and sign * sign_q * sign_r >= 0:
                        return sign * sign_q or sign_r, (strict and strict_q) or strict_r
        finally:
            self._depth -= 1
        return None

    def _by_conjugate(self, factor: fmpq_mpoly) -> tuple[int | None, bool] | None:
        """The sign of a + b sqrt(g) with a and b of opposite signs, from that of a^2 - b^2 g."""
        field = self.field
        for i, degree in enumerate(factor.degrees()):
            if degree != 1 or field.root_of(i) != 2:
                continue
            b = factor.derivative(i)
            a = factor - b * field.generators[i]
            (sign_a, strict_a), (sign_b, strict_b) = self._sign_of_polynomial(a), self._sign_of_polynomial(b)
            if sign_a is None or sign_b is None:
                continue
            if sign_a == sign_b:
                return sign_a, strict_a or strict_b
            g = field.kernels[i].argument
            squares = field.quotient(a * a, field.ctx.constant(1)) - field.quotient(b * b, field.ctx.constant(1)) * g
            larger, strict = self.sign(squares)
            if larger is not None and larger != 0:
                return (sign_a if larger > 0 else sign_b), strict
        return None

    def _turned(self, factor: fmpq_mpoly) -> tuple[int | None, bool] | None:
        """The sign where softplus(g) is written as g + softplus(-g), for g above 0, which is near g."""
        field = self.field
        for i in [i for i, degree in enumerate(factor.degrees()) if degree > 0 and i in field.kernels]:
            g = field.kernels[i].argument
            if field.kernels[i].kind == "softplus" and g.denominator.is_one() and self.range(g).low >= 0:
                small = field.variable(field.kernel("softminus", g))
                return self.sign(field.composed(factor, {i: small + g}))
        return None

    def _by_growth(self, factor: fmpq_mpoly) -> tuple[int | None, bool] | None:
        """The sign far out, where powers of u compete with e^g for an affine g: e^g exceeds its Taylor sum."""
        field, degrees = self.field, factor.degrees()
        if self.u.low.is_finite() == self.u.high.is_finite() or not degrees[0]:
            return None
        end, outwards = (self.u.ends[0], 1) if self.u.low.is_finite() else (self.u.ends[1], -1)
        if isinstance(end, arb):
            return None
        start = field.constant(Fraction(int(end.p), int(end.q)))
        values: dict[int, Element] = {}
        for i in [i for i, degree in enumerate(degrees) if degree > 0 and i in field.kernels]:
            g = field.kernels[i].argument
            rate = g.derivative.rational if field.kernels[i].kind == "exp" else None
            if not rate or 0 in g.derivative.depends_on:
                continue
            if rate * outwards < 0:  # e^g falls: multiply by a power of e^-g
                factor = field.ctx.from_dict(
                    {(*e[:i], degrees[i] - e[i], *e[i + 1 :]): coefficient for e, coefficient in factor.terms()}
                )
                g = -g
            x = (field.u - start) * field.constant(abs(rate) * outwards)
            term = total = field.one
            for n in range(1, degrees[0] + 2):
                term = term * x * field.constant(Fraction(1, n))
                total = total + term
            first = field.apply("exp", field.substituted(g, start, {}))
            values[i] = first * total + field.variable(field.kernel("rest", g))
        return self._sign(field.composed(factor, values)) if values else None

    def require_defined(self, element: Element) -> None:
        """Raises UndefinedError unless every logarithm, power and quotient in the expression is defined."""
        self.range(element)
        for i in element.variables:
            if i in self.field.kernels:
                self[i]
                self.require_defined(self.field.kernels[i].argument)
