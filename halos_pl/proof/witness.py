"""Outcomes that contradict a claim."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from flint import arb

from halos_pl.proof.claims import Claim
from halos_pl.proof.element import TOLERANCE
from halos_pl.proof.point import ordered

SHARE = Fraction(int(TOLERANCE.p), int(TOLERANCE.q))


def contradicted(claim: Claim, values: Sequence[arb]) -> bool:
    """Whether values at ascending points contradict a claim, by more than the tolerance."""
    if claim.order == 0:
        before, after = arb(0), values[0]
    elif claim.order == 1:
        before, after = values
    else:
        before, after = values[1], (values[0] + values[2]) / 2
    return ordered(before, after, SHARE) if claim.sign > 0 else ordered(after, before, SHARE)


def candidates(claim: Claim, place: Fraction, width: Fraction) -> Iterator[list[Fraction]]:
    """Outcomes near ``place`` to compare, as short decimals and as they are."""
    digits = 2 - math.floor(math.log10(width))
    if claim.order == 0:
        for u in (place, place - width, place + width):
            yield from ([round(u, digits)], [u])
        return
    if claim.order == 1:
        for points in ([place - width, place + width], [place - width, place], [place, place + width]):
            yield from ([round(u, digits) for u in points], points)
        return
    for middle in (place, place - width / 4, place + width / 4):
        for m, w in ((round(middle, digits), round(width, digits)), (middle, width)):
            yield [m - w, m, m + w]
