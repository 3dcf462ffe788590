"""Splits the real line where the code of v switches branches, and finds the exact expression on each piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial

from flint import fmpq_mpoly

from halos_pl.proof import domain
from halos_pl.proof.element import Element, UndecidedError
from halos_pl.proof.evaluation import Evaluation, Partial, Undecided
from halos_pl.proof.field import Field
from halos_pl.proof.interval import Interval
from halos_pl.proof.program import Node
from halos_pl.proof.roots import Bound, Roots, rounded, span
from halos_pl.proof.signs import Box, Known, UndefinedError

MOST_PIECES = 6000


class Unsettled(Exception):
    """What v is depends on the sign of an expression in the parameters.

    Args:
        polynomial: it.
    """

    def __init__(self, polynomial: fmpq_mpoly) -> None:
        super().__init__()
        self.polynomial = polynomial


@dataclass(frozen=True)
class Seam:
    """Where v switches branches.

    Attributes:
        low, high: rationals around it, equal if it is rational; None if it depends on parameters.
        root: it as an expression, if it is rational or depends on parameters.
        key: the difference that changes sign there.
        sums: long sums as far as they are known around a rational seam.
        top: the difference itself.
    """

    low: Bound
    high: Bound
    root: Element | None
    key: str
    sums: Mapping[int, Partial] = field(default_factory=dict)
    top: Element | None = None

    @property
    def label(self) -> str:
        """For people."""
        return f"u = {float(self.low):.6g}" if self.low is not None else f"u = {self.root}"


@dataclass(frozen=True)
class Piece:
    """An open interval of u on which v is one expression.

    Attributes:
        low, high: its ends; None for infinite ones. Those that depend on parameters are rounded outwards.
        signs: sign of each difference, by key, that the ends do not decide.
        value: v on the piece.
    """

    low: Bound
    high: Bound
    signs: Mapping[str, int] = field(default_factory=dict)
    value: Element | None = None

    @property
    def expression(self) -> Element:
        """v on the piece."""
        assert self.value is not None
        return self.value

    def box(self, field: Field, parameters: Mapping[str, Interval], low: Bound = None, high: Bound = None) -> Box:
        """The piece as a cell, or a part of it."""
        inside = span(self.low if low is None else low, self.high if high is None else high)
        return Box(field, inside, parameters, self.known(field))

    def known(self, field: Field) -> Known:
        """The differences whose signs the ends do not decide, and these signs."""
        return [(field.monic[key], sign) for key, sign in self.signs.items()]

    def __str__(self) -> str:
        low = "-inf" if self.low is None else f"{float(self.low):.6g}"
        return f"u in ({low}, {'inf' if self.high is None else f'{float(self.high):.6g}'})"


def monic(element: Element) -> tuple[Element, int]:
    """The numerator with leading coefficient 1, and the sign by which it was divided."""
    leading = element.numerator.leading_coefficient()
    top = Element(element.field, element.numerator / leading, element.field.ctx.constant(1))
    element.field.monic[top.key] = top.numerator
    return top, (1 if leading > 0 else -1)


class Splitter:
    """Finds the pieces and seams of v.

    Args:
        nodes: the expression of v.
        field: receives its kernels.
        parameters: range of each parameter.
    """

    def __init__(self, nodes: Sequence[Node], field: Field, parameters: Mapping[str, Interval]) -> None:
        self.nodes, self.field, self.parameters = nodes, field, parameters
        self.partial = domain.partial(nodes)
        self.undefined = ""  # where v may be, and why
        self.tables: dict[int, list[Fraction]] = {}  # constants by the node that counts them
        self._isolated = Roots(field, parameters)
        # Roots that depend on parameters, and whether the difference rises (1) or falls (-1) there, by key.
        self.roots: dict[str, tuple[Element, int]] = {}

    def pieces(self) -> tuple[list[Piece], list[Seam]]:
        """All pieces, in ascending order where they have one, and the seams between them.

        Raises:
            UndecidedError: a switching point cannot be found, or there are too many.
        """
        zero, known, tables = Fraction(0), dict[int, Element](), self.tables
        todo: list[tuple[Piece, Mapping[int, Partial]]] = [(Piece(zero, None), {}), (Piece(None, zero), {})]
        pieces: list[Piece] = []
        seams = {"0": Seam(zero, zero, self.field.zero, "")}
        while todo:
            self.field.require_time()
            piece, sums = todo.pop()
            box, known_signs = piece.box(self.field, self.parameters), piece.known(self.field)
            sign = partial(self._sign, piece=piece, box=box)
            evaluation = Evaluation(
                self.nodes, self.field, self.field.u, sign, box.range, known, sums, tables, self.partial
            )
            try:
                pieces.append(replace(piece, value=evaluation.value()))
                for condition in evaluation.conditions().values():
                    if not condition.holds_between(self.field, piece.low, piece.high, self.parameters, known_signs):
                        self.undefined = f"{piece}: v may be undefined: {condition}"
            except Undecided as choice:
                parts, found = self._split(piece, box, choice.difference)
                for seam in found:
                    at = replace(seam, sums=evaluation.sums) if seam.low is not None and seam.root is not None else seam
                    seams[seam.key if seam.low is None else str(seam.low)] = at
                todo += [(part, evaluation.sums) for part in reversed(parts)]
            except (UndefinedError, UndecidedError, ZeroDivisionError) as error:
                raise UndecidedError(f"{piece}: {error}") from error
            if len(pieces) + len(todo) > MOST_PIECES:
                raise UndecidedError(f"v has more than {MOST_PIECES:,} pieces")
        return pieces, list(seams.values())

    def _sign(self, difference: Element, piece: Piece, box: Box) -> int:
        """The sign of a difference in the interior of a piece."""
        value = difference.rational
        if value is not None:
            return (value > 0) - (value < 0)
        if difference.rational_root is not None:
            root, rises = difference.rational_root
            if piece.low is not None and root <= piece.low:
                return rises
            if piece.high is not None and root >= piece.high:
                return -rises
            raise Undecided(difference)
        top, flipped = monic(difference)
        if top.key in piece.signs:
            bottom, strict = box.sign(Element(self.field, difference.denominator, self.field.one.numerator))
            if bottom and strict:
                return piece.signs[top.key] * flipped * bottom
        sign, strict = box.sign(difference)
        if sign == 0 or (sign is not None and strict):
            return sign
        side = self._side(top, piece, box)
        if side is None:
            raise Undecided(difference, None if 0 in difference.depends_on else sign)
        bottom, _ = box.sign(Element(self.field, difference.denominator, self.field.one.numerator))
        return side * flipped * (bottom or 1)

    def _side(self, top: Element, piece: Piece, box: Box) -> int | None:
        """The sign of an affine difference, from those whose roots, which depend on parameters, are on one side."""
        affine = self._affine_root(top, box) if self.roots else None
        if affine is None:
            return None
        root, rises = affine
        for key, sign in piece.signs.items():
            if key in self.roots:
                other, other_rises = self.roots[key]
                apart = box.sign(root - other)[0]
                above = sign == other_rises
                if apart is not None and (apart <= 0 if above else apart >= 0):
                    return rises if above else -rises
        return None

    def _deciding(self, top: Element, box: Box) -> Element:
        """The factor on which the sign of a difference depends, if the parameters decide where it vanishes.

        Raises:
            Unsettled: they also decide whether it does.
        """
        if not top.depends_on - {0}:
            return top
        one = self.field.one.numerator
        for factor, _ in self.field.factors(top.numerator)[1]:
            part, _ = monic(Element(self.field, factor, one))
            if box.sign(part)[1]:
                continue
            require_settled(part, box)
            if 0 not in part.depends_on:
                raise UndecidedError(f"whether {part} < 0 depends on the parameters")
            if self._is_affine(part):
                slope = Element(self.field, part.numerator.derivative(0), one)
                require_settled(slope, box)
                if box.sign(slope)[1]:
                    return part
        return top

    def _is_affine(self, top: Element) -> bool:
        of_u = (0 in self.field.base_of(i) for i in top.variables if i)
        return top.numerator.degrees()[0] == 1 and top.denominator.is_one() and not any(of_u)

    def _affine_root(self, top: Element, box: Box) -> tuple[Element, int] | None:
        """-b / a and the sign of a for a u + b; None for another expression."""
        field = self.field
        one = field.ctx.constant(1)
        if not self._is_affine(top):
            return None
        a = Element(field, top.numerator.derivative(0), one)
        b = top - a * field.u
        sign, strict = box.sign(a)
        if sign is None or not strict or sign == 0:
            return None
        return field.quotient(-b.numerator, a.numerator), sign

    def _split(self, piece: Piece, box: Box, difference: Element) -> tuple[list[Piece], list[Seam]]:
        top = self._deciding(monic(difference)[0], box)
        affine = self._affine_root(top, box)
        if affine is None:
            for factor, _ in self.field.factors(top.numerator)[1]:
                inside = Element(self.field, factor, self.field.one.numerator).rational_root
                at = None if inside is None else inside[0]
                if at is not None and _above(at, piece.low) and (piece.high is None or at < piece.high):
                    parts = [replace(piece, high=at), replace(piece, low=at)]
                    return parts, [Seam(at, at, self.field.constant(at), top.key)]
            if top.depends_on - {0}:
                raise UndecidedError(f"where {top} vanishes depends on the parameters")
            return self._around(piece, top, *self._isolated.places(top, piece.low, piece.high))
        root, rises = affine
        value = root.rational
        if value is not None:
            return [replace(piece, high=value), replace(piece, low=value)], [Seam(value, value, root, top.key)]
        place = box.range(root)
        if not root.depends_on:
            return self._around(piece, top, [(rounded(place.low, -1), rounded(place.high, 1))], -rises)
        self.roots[top.key] = affine
        least_high = piece.high if not place.high.is_finite() else _least(piece.high, rounded(place.high, 1))
        largest_low = piece.low if not place.low.is_finite() else _greatest(piece.low, rounded(place.low, -1))
        below = replace(piece, high=least_high, signs={**piece.signs, top.key: -rises})
        above = replace(piece, low=largest_low, signs={**piece.signs, top.key: rises})
        parts = [part for part in (below, above) if part.low is None or part.high is None or part.low < part.high]
        return parts, [Seam(None, None, root, top.key)]

    def _around(
        self, piece: Piece, top: Element, places: list[tuple[Fraction, Fraction]], first: int
    ) -> tuple[list[Piece], list[Seam]]:
        """Pieces between the roots of a difference, which overlap where the roots are; ``first``: its first sign."""
        parts, low, sign = [], piece.low, first
        for a, b in places:
            if (low is not None and a <= low) or (piece.high is not None and b >= piece.high):
                raise UndecidedError(f"{top} vanishes too close to an end of the piece")
            parts.append(replace(piece, low=low, high=b, signs={**piece.signs, top.key: sign}))
            low, sign = a, -sign
        parts.append(replace(piece, low=low, signs={**piece.signs, top.key: sign}))
        return parts, [Seam(a, b, None, top.key, top=top) for a, b in places]


def require_settled(element: Element, box: Box) -> None:
    """Raises Unsettled if a factor of an expression is a polynomial in the parameters whose sign is not known."""
    for factor, _ in element.field.factors(element.numerator)[1]:
        top, _ = monic(Element(element.field, factor, element.field.one.numerator))
        parameters_only = 0 not in top.variables and not top.variables & element.field.kernels.keys()
        if parameters_only and not box.sign(top)[1] and box.sign(top)[0] != 0:
            raise Unsettled(top.numerator)


def _above(a: Fraction, b: Bound) -> bool:
    return b is None or a > b


def _least(a: Bound, b: Fraction) -> Fraction:
    return b if a is None else min(a, b)


def _greatest(a: Bound, b: Fraction) -> Fraction:
    return b if a is None else max(a, b)
