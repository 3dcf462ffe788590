"""The claims about v, and what is known about one of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from flint import arb

from halos_pl.proof.element import Element
from halos_pl.proof.roots import Bound

Status = Literal["proved", "disproved", "undecided"]


@dataclass(frozen=True)
class Claim:
    """A property of v.

    Attributes:
        name: the clause of ``halos check`` that it proves.
        order: of the derivative whose sign it is about, counted from what is recorded.
        sign: the sign that the derivative must have, or 0.
        side: 1 for gains only, -1 for losses only, 0 for all outcomes.
        of: what is recorded: v, or v' if v is given by its slope.
    """

    name: str
    order: int
    sign: int
    side: int
    of: Literal["v", "v'"] = "v"


# -v(-u) never falls iff v never does, and is concave on gains iff v is convex on losses.
CLAIMS = (
    Claim("non_decreasing", 1, 1, 0),
    Claim("concave_on_gains", 2, -1, 1),
    Claim("undesirable_concave_on_gains", 2, 1, -1),
)
# The same of v as the integral of v': it never jumps, and v' may jump where that does not contradict the claim.
CLAIMS_ON_SLOPES = tuple(replace(claim, order=claim.order - 1, of="v'") for claim in CLAIMS)


@dataclass(frozen=True)
class Cell:
    """A part of a piece on which a derivative has its sign."""

    low: Bound
    high: Bound


@dataclass
class Decision:
    """Whether a claim holds.

    Attributes:
        status: proved, disproved or undecided.
        reason: why it is undecided.
        points: outcomes that disprove it, ascending.
        values: v there, or v' if that is recorded; enclosed.
        parameters: values of the parameters that the points are for.
        cells: by piece, the cells on which the sign was found.
        forms: by piece, the expression whose derivative it was found for, if it is not that of the piece.
        notes: jumps within the tolerance.
    """

    claim: Claim
    status: Status
    reason: str = ""
    points: list[Fraction] = field(default_factory=list)
    values: list[arb] = field(default_factory=list)
    parameters: dict[str, Fraction] = field(default_factory=dict)
    cells: dict[int, list[Cell]] = field(default_factory=dict)
    forms: dict[int, Element] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
