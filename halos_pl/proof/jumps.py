"""What two expressions differ by, constants that agree to within the tolerance taken as equal."""

from __future__ import annotations

from flint import arb, fmpq_mpoly

from halos_pl.proof.element import TOLERANCE
from halos_pl.proof.field import Field
from halos_pl.proof.interval import whole_power
from halos_pl.proof.signs import Box


def difference(field: Field, before: fmpq_mpoly, after: fmpq_mpoly, box: Box) -> tuple[fmpq_mpoly | None, arb | None]:
    """``after - before`` without coefficients that agree to within the tolerance, constants such as exp(40) evaluated.

    Returns:
        What is left, None if nothing is; and the largest coefficient that was dropped, if any.
    """
    exact = after - before
    if exact.is_zero():
        return None, None
    used = {i for polynomial in (before, after) for i, degree in enumerate(polynomial.degrees()) if degree > 0}
    constant = {i for i in used if not field.base_of(i) or box[i].point is not None}
    sides: list[dict[tuple[int, ...], arb]] = []
    sizes: dict[tuple[int, ...], arb] = {}
    for polynomial in (before, after):
        grouped: dict[tuple[int, ...], arb] = {}
        for exponents, coefficient in polynomial.terms():
            value = arb(coefficient)
            for i in constant:
                if exponents[i]:
                    value *= whole_power(box[i].low.union(box[i].high), int(exponents[i]))
            key = tuple(0 if i in constant else int(e) for i, e in enumerate(exponents))
            grouped[key] = grouped.get(key, arb(0)) + value
            sizes[key] = sizes.get(key, arb(0)) + abs(value)
        sides.append(grouped)
    dropped: arb | None = None
    kept = set()
    for key in sides[0].keys() | sides[1].keys():
        a, b = sides[0].get(key, arb(0)), sides[1].get(key, arb(0))
        if abs(a - b) <= arb(TOLERANCE) * sizes[key]:
            dropped = (b - a).mid() if dropped is None or abs(b - a) > abs(dropped) else dropped
        else:
            kept.add(key)
    if not kept:
        return None, dropped
    left = {
        exponents: coefficient
        for exponents, coefficient in exact.terms()
        if tuple(0 if i in constant else int(e) for i, e in enumerate(exponents)) in kept
    }
    return field.ctx.from_dict(left), dropped
