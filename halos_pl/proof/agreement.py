"""Compares a value function with the chain of a certificate, so that one of another function is refused.

What is left to trust is that v is, between the points that are compared, the function that was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from flint import arb, fmpq

from halos_pl.proof.verify import INF, Chain, RefusedError, greatest, number

POINTS, AGREEMENT = 10_000, 1e-8  # of the largest |v| nearer to 0, which torch's softplus needs


def compare(graph: dict[str, Any], v: Callable[[list[float]], list[float]]) -> None:
    """Raises RefusedError unless v agrees with the chain at points of all pieces, in both tails and near the seams."""
    chain = Chain(graph)
    seams = {float(arb(end)) for low, high, _ in chain.pieces for end in (low, high) if abs(arb(end)) < INF} | {0.0}
    points = {s + w * 10.0**k for s in seams for w in (-1, 0, 1, 3) for k in range(-9, 1)}
    us = sorted(points | {s * 10 ** (16 * i / POINTS - 4) for i in range(POINTS // 2) for s in (-1, 1)}, key=abs)
    parameters, expected = {i: arb(number(p["value"])) for i, p in chain.parameters.items()}, []
    for u in us:
        exact = number(str(Fraction(u)))
        near = abs(exact) * fmpq(1, 10**9)  # within rounding of a seam, either side
        values = [x for low, high, x in chain.pieces if low - near <= exact <= high + near]
        expected.append([chain.at(value, parameters | {0: arb(exact)}) for value in values])
    largest = max(float(abs(x)) for u, found in zip(us, expected, strict=True) if abs(u) <= 1 for x in found)
    for u, found, value in zip(us, expected, v(us), strict=True):
        low, high = -float(greatest([-x for x in found])), float(greatest(found))
        largest = max(largest, abs(low), abs(high))
        if not low - AGREEMENT * largest <= value <= high + AGREEMENT * largest:
            raise RefusedError(f"v({u:.17g}) is {value:.17g}, and {low:.17g} in the certificate of another function")
