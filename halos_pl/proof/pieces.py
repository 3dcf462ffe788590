"""Splits the real line where the code of v switches branches, and finds the exact expression on each piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial

from flint import arb

from halos_pl.proof.element import Element
from halos_pl.proof.field import Field
from halos_pl.proof.interval import INF, NEGATIVE_INF, Interval, ball
from halos_pl.proof.program import CHOICES, Node
from halos_pl.proof.signs import Box, UndefinedError

MOST_PIECES, SECONDS = 600, 10.0
Bound = Fraction | None  # None: infinite
_BITS = 100  # accuracy of a switching point that is no rational number


class UndecidedError(ValueError):
    """The proof cannot be completed; the message says where and why."""


class Undecided(Exception):
    """A choice depends on where u is in the cell: there v switches branches.

    Args:
        difference: what is compared with 0.
        loose: its sign, if it is 0 or of that sign everywhere.
    """

    def __init__(self, difference: Element, loose: int | None = None) -> None:
        super().__init__()
        self.difference, self.loose = difference, loose


@dataclass(frozen=True)
class Seam:
    """Where v switches branches.

    Attributes:
        low, high: rationals around it, equal if it is rational; None if it depends on parameters.
        root: it as an expression, if it is rational or depends on parameters.
        key: the difference that changes sign there.
    """

    low: Bound
    high: Bound
    root: Element | None
    key: str

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
        return Box(field, span(self.low if low is None else low, self.high if high is None else high), parameters)

    def __str__(self) -> str:
        low = "-inf" if self.low is None else f"{float(self.low):.6g}"
        return f"u in ({low}, {'inf' if self.high is None else f'{float(self.high):.6g}'})"


def span(low: Bound, high: Bound) -> Interval:
    """An open interval of u."""
    return Interval.of(NEGATIVE_INF if low is None else low, INF if high is None else high, True, True)


def monic(element: Element) -> tuple[Element, int]:
    """The numerator with leading coefficient 1, and the sign by which it was divided."""
    leading = element.numerator.leading_coefficient()
    one = element.field.ctx.constant(1)
    return Element(element.field, element.numerator / leading, one), (1 if leading > 0 else -1)


def evaluate(
    nodes: Sequence[Node],
    field: Field,
    u: Element,
    sign: Callable[[Element], int],
    known: dict[int, Element] | None = None,
) -> Element:
    """v as one expression, with each choice made by the sign of its difference. Unused branches are not computed.

    Args:
        nodes: the expression of v.
        field: receives the kernels.
        u: what stands for u.
        sign: the sign of a difference.
        known: values of nodes that contain no choice; more are added.
    """
    known = {} if known is None else known
    values: dict[int, Element] = dict(known)
    done: dict[int, int] = {}  # choice to the branch taken
    todo = [len(nodes) - 1]
    while todo:
        index = todo[-1]
        if index in values:
            todo.pop()
            continue
        name, *operands = nodes[index]
        wanted = [x for x in operands if isinstance(x, int)]
        if name in CHOICES or name == "lookup":
            if wanted[0] not in values:
                todo.append(wanted[0])
                continue
            if index not in done:
                try:
                    done[index] = _branch(name, values[wanted[0]], wanted[1:], sign)
                except Undecided as choice:
                    missing = [x for x in wanted if x not in values]
                    if choice.loose is None or (not missing and not _continuous([values[x] for x in wanted])):
                        raise
                    if missing:
                        todo += missing
                        continue
                    done[index] = wanted[1 if choice.loose < 0 else 2]
            wanted = [done[index]]
        missing = [x for x in wanted if x not in values]
        if missing:
            todo += missing
            continue
        values[index] = _computed(name, operands, [values[x] for x in wanted], field, u)
        if name not in (*CHOICES, "lookup") and all(x in known for x in wanted):
            known[index] = values[index]
        todo.pop()
    return values[len(nodes) - 1]


def _continuous(choice: list[Element]) -> bool:
    """Whether a choice is a minimum or maximum, whose branches agree where its difference is 0."""
    d, a, b = choice
    return (a - b - d).is_zero or (a - b + d).is_zero


def _branch(name: str, condition: Element, branches: list[int], sign: Callable[[Element], int]) -> int:
    if name == "lookup":
        at = condition.rational
        if at is None or at.denominator != 1 or not -len(branches) <= at < len(branches):
            raise UndecidedError(f"the index of a table is {condition}")
        return branches[int(at)]
    s = sign(condition)
    return branches[0 if {"less": s < 0, "at_most": s <= 0, "equal": s == 0}[name] else 1]


def _computed(name: str, operands: list[int | str], xs: list[Element], field: Field, u: Element) -> Element:
    if name == "u":
        return u
    if name == "parameter":
        return field.variable(1 + field.parameters.index(str(operands[0])))
    if name == "constant":
        return field.constant(Fraction(str(operands[0])))
    if name == "add":
        return field.total(xs)
    if name in (*CHOICES, "lookup"):
        return xs[0]
    if name == "mul":
        return xs[0] * xs[1]
    if name == "div":
        return xs[0] / xs[1]
    if name == "pow":
        return field.raised(xs[0], xs[1])
    return field.apply(name, xs[0])


class Splitter:
    """Finds the pieces and seams of v.

    Args:
        nodes: the expression of v.
        field: receives its kernels.
        parameters: range of each parameter.
    """

    def __init__(self, nodes: Sequence[Node], field: Field, parameters: Mapping[str, Interval]) -> None:
        self.nodes, self.field, self.parameters = nodes, field, parameters
        # Roots that depend on parameters, and whether the difference rises (1) or falls (-1) there, by key.
        self.roots: dict[str, tuple[Element, int]] = {}

    def pieces(self) -> tuple[list[Piece], list[Seam]]:
        """All pieces, in ascending order where they have one, and the seams between them.

        Raises:
            UndecidedError: a switching point cannot be found, or there are too many.
        """
        deadline = time.process_time() + SECONDS
        zero, known = Fraction(0), dict[int, Element]()
        todo, pieces = [Piece(zero, None), Piece(None, zero)], []
        seams = {"0": Seam(zero, zero, self.field.zero, "")}
        while todo:
            piece = todo.pop()
            box = piece.box(self.field, self.parameters)
            try:
                sign = partial(self._sign, piece=piece, box=box)
                value = evaluate(self.nodes, self.field, self.field.u, sign, known)
                pieces.append(replace(piece, value=value))
            except Undecided as choice:
                parts, found = self._split(piece, box, choice.difference)
                seams |= {seam.key if seam.low is None else str(seam.low): seam for seam in found}
                todo += reversed(parts)
            except UndefinedError as error:
                raise UndecidedError(f"{piece}: {error}") from error
            except ZeroDivisionError as error:
                raise UndecidedError(f"{piece}: {error}") from error
            if len(pieces) + len(todo) > MOST_PIECES or time.process_time() > deadline:
                raise UndecidedError(f"v has more than {MOST_PIECES} pieces, or takes more than {SECONDS:g} s to split")
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
        if sign is not None and strict:
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

    def _affine_root(self, top: Element, box: Box) -> tuple[Element, int] | None:
        """-b / a and the sign of a for a u + b; None for another expression."""
        field = self.field
        one = field.ctx.constant(1)
        if top.numerator.degrees()[0] != 1 or any(0 in field.base_of(i) for i in top.variables if i):
            return None
        a = Element(field, top.numerator.derivative(0), one)
        b = top - a * field.u
        sign, strict = box.sign(a)
        if sign is None or not strict or sign == 0:
            return None
        return field.quotient(-b.numerator, a.numerator), sign

    def _split(self, piece: Piece, box: Box, difference: Element) -> tuple[list[Piece], list[Seam]]:
        top, _ = monic(difference)
        if 0 not in top.depends_on:
            raise UndecidedError(f"{piece}: whether {top} < 0 depends on the parameters")
        affine = self._affine_root(top, box)
        if affine is None:
            return self._split_at_isolated(piece, top)
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
                raise UndecidedError(f"{piece}: {top} vanishes too close to an end of the piece")
            parts.append(replace(piece, low=low, high=b, signs={**piece.signs, top.key: sign}))
            low, sign = a, -sign
        parts.append(replace(piece, low=low, signs={**piece.signs, top.key: sign}))
        return parts, [Seam(a, b, None, top.key) for a, b in places]

    def _split_at_isolated(self, piece: Piece, top: Element) -> tuple[list[Piece], list[Seam]]:
        """At the roots of a difference in a piece, found by bisection."""
        if top.depends_on - {0}:
            raise UndecidedError(f"{piece}: where {top} vanishes depends on the parameters")
        places: list[tuple[Fraction, Fraction]] = []
        first = 0
        todo: list[tuple[Bound, Bound, int]] = [(piece.low, piece.high, 0)]
        while todo:
            low, high, depth = todo.pop()
            try:
                box = piece.box(self.field, self.parameters, low, high)
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
                    places.append(place)
                elif depth > 30:
                    raise UndecidedError(f"{piece}: {top} may vanish near an end of {span(low, high)}")
                else:
                    middle = between(low, high)
                    todo += [(middle, high, depth + 1), (low, middle, depth + 1)]
            elif depth > 30:
                raise UndecidedError(f"{piece}: {top} may vanish more than once near u in {span(low, high)}")
            else:
                middle = between(low, high)
                while self._at(top, middle) is None and depth < 40:  # a root of its own: split elsewhere
                    middle, depth = between(low, middle), depth + 1
                todo += [(middle, high, depth + 1), (low, middle, depth + 1)]
        return self._around(piece, top, places, first)

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
        return u is not None and self.field.substituted(top, self.field.constant(u), {}).is_zero

    def _at(self, top: Element, u: Fraction | None) -> int | None:
        if u is None:
            return None
        sign, strict = Box(self.field, Interval.of(u, u), self.parameters).sign(top)
        return sign if strict else None


def between(low: Bound, high: Bound) -> Fraction:
    """A place inside a cell at which to split it; twice as far out where the cell is infinite."""
    if low is None:
        return Fraction(0) if high is None else -between(-high, None)
    if high is None:
        return max(Fraction(1), 2 * low) if low >= 0 else low / 2
    if low > 0 and high > 16 * low:  # many orders of magnitude
        return low * 4
    return -between(-high, -low) if high < 0 and low < 16 * high else (low + high) / 2


def _least(a: Bound, b: Fraction) -> Fraction:
    return b if a is None else min(a, b)


def _greatest(a: Bound, b: Fraction) -> Fraction:
    return b if a is None else max(a, b)


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
