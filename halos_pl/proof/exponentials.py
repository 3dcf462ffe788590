"""Rewrites related exponentials as powers of one, so that what cancels between them does so exactly."""

from __future__ import annotations

from fractions import Fraction
from math import gcd, lcm

from flint import fmpq

from halos_pl.proof.element import LARGEST_POWER, Element
from halos_pl.proof.field import Field

_KINDS = ("exp", "sigmoid", "softplus")


def in_one_exponential(field: Field, element: Element) -> Element | None:
    """The expression with exp, sigmoid and softplus of q g + c, for rational q and c, as quotients of powers of e^g.

    Returns:
        An equal expression; None if it has no such exponential, or only with too large a power.
    """
    groups: list[tuple[Element, list[tuple[int, Fraction, Fraction]]]] = []  # g, and each kernel with its q and c
    for i in sorted(element.variables):
        if i not in field.kernels or field.kernels[i].kind not in _KINDS:
            continue
        argument = field.kernels[i].argument
        shift = _constant(argument)
        g = argument - field.constant(shift)
        if g.is_zero:
            continue
        for base, members in groups:
            ratio = (g / base).rational
            if ratio is not None:
                members.append((i, ratio, shift))
                break
        else:
            groups.append((g, [(i, Fraction(1), shift)]))
    values: dict[int, Element] = {}
    for base, members in groups:
        unit = Fraction(gcd(*(q.numerator for _, q, _ in members)), lcm(*(q.denominator for _, q, _ in members)))
        if any(abs(q / unit) > LARGEST_POWER for _, q, _ in members):
            continue
        one = field.variable(field.kernel("exp", base * field.constant(unit)))
        for i, q, shift in members:
            factor = field.apply("exp", field.constant(shift))
            x, kind = factor * one.power(int(q / unit)), field.kernels[i].kind
            if kind == "softplus":
                values[i] = field.variable(field.kernel("log", field.one + x))
            else:
                values[i] = x if kind == "exp" else x / (field.one + x)
    if not values:
        return None
    return field.composed(element.numerator, values) / field.composed(element.denominator, values)


def _constant(element: Element) -> Fraction:
    """The rational term of a polynomial; 0 for a quotient."""
    if not element.denominator.is_one():
        return Fraction(0)
    for exponents, coefficient in element.numerator.terms():
        if not any(exponents):
            value = fmpq(coefficient)
            return Fraction(int(value.p), int(value.q))
    return Fraction(0)
