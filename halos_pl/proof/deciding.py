"""How a claim is decided: signs of derivatives on pieces, jumps at seams, witnesses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property

from flint import arb, fmpq

from halos_pl.proof.claims import Cell, Claim, Decision
from halos_pl.proof.element import Element, TooLargeError, UndecidedError
from halos_pl.proof.exponentials import in_one_exponential
from halos_pl.proof.field import Field
from halos_pl.proof.interval import Interval
from halos_pl.proof.jumps import difference
from halos_pl.proof.pieces import Piece, Seam, Splitter, require_settled
from halos_pl.proof.point import value_at
from halos_pl.proof.program import Node
from halos_pl.proof.roots import Bound, between, rounded, span
from halos_pl.proof.seams import values_at
from halos_pl.proof.signs import Box, UndefinedError
from halos_pl.proof.witness import SHARE, candidates, contradicted

MOST_CELLS, FEW_CELLS = 400, 50
ALL_WIDTHS, FEW_WIDTHS = range(0, 44, 2), (0, 6, 14)  # distances between points, as powers of 1/2
MOST_SAMPLES = 5  # at which all of them are tried everywhere
_SMALL = fmpq(1, 2**32)  # an excused coefficient, as a share of the largest one of v


class Case:
    """Decides the claims about one expression, for parameters in ranges and, it may be, of known signs.

    Args:
        nodes: the expression of v.
        field: has the parameters, and what is assumed about them.
        parameters: ranges of the parameters.
        samples: values of the parameters at which to look for witnesses.

    Raises:
        UndecidedError: v cannot be split into pieces.
        Unsettled: that depends on the parameters.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        field: Field,
        parameters: Mapping[str, Interval],
        samples: Sequence[Mapping[str, Fraction]],
    ) -> None:
        self.nodes, self.field, self.parameters, self.samples = nodes, field, parameters, samples
        self.splitter = Splitter(nodes, self.field, parameters)
        try:
            self.pieces, self.seams = self.splitter.pieces()
        except TooLargeError as error:
            raise UndecidedError(f"{error}") from error

        self._ends: dict[tuple[Bound, bool], list[Piece]] = {}  # by an end, and whether it is the upper one
        for piece in self.pieces:
            self._ends.setdefault((piece.high, True), []).append(piece)
            self._ends.setdefault((piece.low, False), []).append(piece)

    @cached_property
    def _largest(self) -> fmpq:
        """The largest coefficient of v on any piece."""
        terms = [fmpq(c) for piece in self.pieces for _, c in piece.expression.numerator.terms()]
        return max((abs(c) for c in terms), default=fmpq(0))

    def decide(self, claim: Claim) -> Decision:
        """Proves or disproves a claim, or says what stops it.

        Raises:
            Unsettled: it depends on the parameters.
        """
        decision = Decision(claim, "proved")
        try:
            for number, piece in enumerate(self.pieces):
                if claim.side > 0 and piece.high is not None and piece.high <= 0:
                    continue
                if claim.side < 0 and piece.low is not None and piece.low >= 0:
                    continue
                self._on(claim, number, piece, decision)
            for seam in self.seams:
                self._across(claim, seam, decision)
            for size, what in self.field.excused.values():
                if size > _SMALL * self._largest:
                    raise UndecidedError(f"{what} has a coefficient that may be a rounding error of constants, or not")
                decision.notes.append(
                    f"a coefficient {float(Fraction(int(size.p), int(size.q))):.1e} of {what} counts as 0"
                )
            if self.splitter.undefined:
                raise UndecidedError(self.splitter.undefined)
        except (UndecidedError, TooLargeError, UndefinedError, ZeroDivisionError) as error:
            decision.status, decision.reason = "undecided", str(error)
        except _Disproved as found:
            decision.status = "disproved"
            decision.points, decision.values, decision.parameters = found.points, found.values, found.parameters
        return decision

    def _on(self, claim: Claim, number: int, piece: Piece, decision: Decision) -> None:
        """Decides a claim on a piece; if need be, with related exponentials written as powers of one."""
        other = in_one_exponential(self.field, piece.expression)
        for way in [piece] if other is None else [piece, replace(piece, value=other)]:
            try:
                decision.cells[number] = list(self._cells(claim, way, FEW_CELLS))
                decision.forms[number] = way.expression
                return
            except (UndecidedError, UndefinedError):
                continue
        decision.cells[number] = list(self._cells(claim, piece, MOST_CELLS))

    def _cells(self, claim: Claim, piece: Piece, most: int) -> Iterator[Cell]:
        """Cells that cover a piece, on each of which the derivative has its sign."""
        target = _differentiated(piece.expression, claim.order)
        parts = [_differentiated(part, claim.order) for part in piece.expression.addends]
        todo, count, reason = [(piece.low, piece.high)], 0, ""
        while todo:
            low, high = todo.pop()
            count += 1
            box = piece.box(self.field, self.parameters, low, high)
            sign: int | None = None
            try:
                box.require_defined(piece.expression)
                sign, _ = box.sign(target)
                if sign is None and {box.sign(part)[0] for part in parts} <= {0, claim.sign}:
                    sign = claim.sign
                reason = f"the sign of {_short(target)} is not found"
                if sign in (0, claim.sign) or (
                    sign is None and self._from_an_end(target, claim.sign, low, high, piece)
                ):
                    yield Cell(low, high)
                    continue
            except UndefinedError as error:
                reason = str(error)
            self.field.require_time()
            middle = between(low, high)
            if sign == -claim.sign or count % 8 == 1:
                self._witness(claim, middle, FEW_WIDTHS if len(self.samples) > MOST_SAMPLES else ALL_WIDTHS)
                require_settled(target, box)
            if count > most or _narrow(low, high) or (sign == -claim.sign and count > FEW_CELLS // 2):
                self._witness(claim, middle)
                raise UndecidedError(f"{span(low, high)}: {reason}")
            self._require_smooth(piece, middle)
            todo += [(middle, high), (low, middle)]

    def _require_smooth(self, piece: Piece, u: Fraction) -> None:
        """Where two cells meet, v has to be defined as well: 1 / u rises on either side of 0, but not across."""
        try:
            inside = Box(self.field, Interval.of(u, u), self.parameters, piece.known(self.field))
            inside.require_defined(piece.expression)
        except UndefinedError as error:
            raise UndecidedError(f"u = {float(u):.6g}: {error}") from error

    def _from_an_end(self, target: Element, wanted: int, low: Bound, high: Bound, piece: Piece) -> bool:
        """Whether the derivative has its sign at one end of a cell, and moves away from 0 from there."""
        box = Box(self.field, span(low, high), self.parameters)  # for all parameters: the end may be outside the piece
        slope = box.sign(target.derivative)[0]
        end = low if slope == wanted else high
        if slope is None or end is None:
            return False
        there = Box(self.field, Interval.of(end, end), self.parameters)
        found, strict = there.sign(target)
        if not strict and end in (piece.low, piece.high):  # where it may well be exactly 0
            found, _ = there.sign(self.field.substituted(target, self.field.constant(end), {}))
        return found in (0, wanted)

    # -- seams ------------------------------------------------------------------------------------------------

    def _sides(self, seam: Seam) -> tuple[list[Piece], list[Piece]]:
        """The pieces that may end at a seam, and those that may begin there."""
        if seam.low is not None:
            return self._ends.get((seam.high, True), []), self._ends.get((seam.low, False), [])
        rises = self.splitter.roots[seam.key][1]
        left = [p for p in self.pieces if p.signs.get(seam.key) == -rises]
        return left, [p for p in self.pieces if p.signs.get(seam.key) == rises]

    def _across(self, claim: Claim, seam: Seam, decision: Decision) -> None:
        """What is recorded does not jump against the claim at a seam, nor do its derivatives."""
        place = Interval.of(seam.low, seam.high) if seam.low is not None and seam.high is not None else None
        box = Box(self.field, place or Interval.of(0, 0), self.parameters)
        where = place or box.range(seam.root or self.field.zero)
        outside = bool((claim.side > 0 and where.high <= 0) or (claim.side < 0 and where.low >= 0))
        if outside and claim.of == "v":
            return
        for left in (sides := self._sides(seam))[0]:
            for right in sides[1]:
                if not self._adjacent(left, right, seam, box):
                    continue
                try:
                    limits = [self._limit(p.expression, seam, box) for p in (left, right)]
                    if not outside:  # a slope must be bounded there, too: v starts at 0
                        self._between(claim, left, right, limits, seam, box, decision)
                except UndecidedError as error:
                    for each in self._orders(left, right, seam):
                        require_settled(each, box)
                    if isinstance(error, _Jump):
                        require_settled(error.difference, box)
                    raise

    def _orders(self, left: Piece, right: Piece, seam: Seam) -> list[Element]:
        """Expressions whose signs say on which side of a seam other seams and the ends of two pieces are."""
        keys = (left.signs.keys() | right.signs.keys()) & self.splitter.roots.keys() - {seam.key}
        others = [] if seam.root is None else [self.splitter.roots[key][0] - seam.root for key in keys]
        return [*others, *self._beyond(left, seam), *self._beyond(right, seam)]

    def _between(
        self,
        claim: Claim,
        left: Piece,
        right: Piece,
        limits: Sequence[Element],
        seam: Seam,
        box: Box,
        decision: Decision,
    ) -> None:
        """Nothing jumps against the claim between two pieces that may meet at a seam."""
        before, after = limits
        rise = 0 if claim.order == 2 else claim.sign
        if claim.order > 0:
            self._step(claim, before, after, rise, seam, box, decision)
        for at in values_at(self.splitter, seam, (left, right), box):
            if claim.order == 0:
                self._signed(claim, at, limits, seam, box)
                continue
            self._step(claim, before, at, rise, seam, box, decision)
            self._step(claim, at, after, rise, seam, box, decision)
        if claim.order == 2:
            slopes = [self._limit(p.expression.derivative, seam, box) for p in (left, right)]
            self._step(claim, slopes[0], slopes[1], claim.sign, seam, box, decision)

    def _adjacent(self, left: Piece, right: Piece, seam: Seam, box: Box) -> bool:
        """Whether two pieces can meet at a seam: no other difference has opposite signs on them."""
        if seam.root is not None and any(
            not self._reaches(piece, key, sign, seam.root, box)
            for piece in (left, right)
            for key, sign in piece.signs.items()
            if key != seam.key
        ):
            return False
        for key in left.signs.keys() & right.signs.keys() - {seam.key}:
            if left.signs[key] != right.signs[key]:
                if seam.root is None or key not in self.splitter.roots:
                    return False
                apart = box.sign(self.splitter.roots[key][0] - seam.root)
                if apart[0] != 0:
                    return False
        return all(box.sign(each) != (1, True) for p in (left, right) for each in self._beyond(p, seam))

    def _beyond(self, piece: Piece, seam: Seam) -> list[Element]:
        """Expressions one of which is above 0 if a seam that depends on parameters is beyond an end of a piece."""
        if seam.root is None or seam.low is not None:
            return []
        below = [] if piece.low is None else [self.field.constant(piece.low) - seam.root]
        return below if piece.high is None else [*below, seam.root - self.field.constant(piece.high)]

    def _reaches(self, piece: Piece, key: str, sign: int, root: Element, box: Box) -> bool:
        """Whether a seam may be on the piece's side of another root, which depends on parameters."""
        if key not in self.splitter.roots:
            return True
        other, rises = self.splitter.roots[key]
        beyond, strict = box.sign(root - other)
        return not (strict and beyond == (-1 if sign == rises else 1))

    def _limit(self, element: Element, seam: Seam, box: Box) -> Element:
        """An expression at a seam: in the parameters, or of u itself where the seam is only known to be in ``box``."""
        try:
            at = element if seam.root is None else self.field.substituted(element, seam.root, {})
            box.range(at)
        except (UndefinedError, ZeroDivisionError) as error:
            raise UndecidedError(f"{seam.label}: {error}") from error
        return at

    def _signed(self, claim: Claim, at: Element, limits: Sequence[Element], seam: Seam, box: Box) -> None:
        """A slope at a seam alone has its sign or is that on a side: v does not depend on it, but its gradient does."""
        if box.sign(at)[0] in (0, claim.sign):
            return
        for side in limits:
            left, right = side.numerator * at.denominator, at.numerator * side.denominator
            if difference(self.field, left, right, box)[0] is None:
                return
        raise _Jump(f"{seam.label}: {claim.of} is not what it is on either side", at)

    def _step(
        self, claim: Claim, before: Element, after: Element, allowed: int, seam: Seam, box: Box, decision: Decision
    ) -> None:
        """``after - before`` is 0, or has the ``allowed`` sign if that is not 0, within the tolerance."""
        left, right = before.numerator * after.denominator, after.numerator * before.denominator
        kept, jump = difference(self.field, left, right, box)
        if kept is None:
            if jump is not None:
                note = f"{seam.label}: a jump of {float(jump):.1e}, within the tolerance"
                decision.notes += [note] if note not in decision.notes else []
            return
        bottom = Element(self.field, before.denominator * after.denominator, self.field.ctx.constant(1))
        sign = box.sign(Element(self.field, kept, self.field.ctx.constant(1)))[0]
        denominator = box.sign(bottom)[0]
        if sign is not None and denominator and (sign == 0 or sign * denominator == allowed):
            return
        place = seam.low if seam.low is not None else seam.root
        if place is not None:
            self._witness(claim, place)
        what = claim.of if claim.order == 1 else f"{claim.of} or its slope"
        raise _Jump(f"{seam.label}: {what} jumps", Element(self.field, kept, self.field.one.numerator))

    # -- witnesses --------------------------------------------------------------------------------------------

    def _witness(self, claim: Claim, near: Fraction | Element, widths: Sequence[int] = ALL_WIDTHS) -> None:
        """Raises _Disproved if points near a place contradict the claim.

        A slope does so only on an interval around each point: the integral does not depend on it at the point alone.
        """
        share = SHARE if claim.of == "v'" else Fraction(0)
        for parameters in self.samples:
            place = near if isinstance(near, Fraction) else self._at(near, parameters)
            if place is None:
                continue
            for k in widths:
                self.field.require_time()
                width = max(abs(place), Fraction(1, 2**20)) / 2**k
                for points in candidates(claim, place, width):
                    if claim.side and min(claim.side * points[0], claim.side * points[-1]) <= 0:
                        continue
                    try:
                        values = [value_at(self.nodes, u, parameters, share) for u in points]
                        if contradicted(claim, values):
                            exact = [value_at(self.nodes, u, parameters) for u in points] if share else values
                            raise _Disproved(points, exact, dict(parameters))
                    except (ValueError, ZeroDivisionError):
                        continue

    def _at(self, element: Element, parameters: Mapping[str, Fraction]) -> Fraction | None:
        """About the value of an expression in the parameters; None if it is undefined."""
        points = {name: Interval.of(value, value) for name, value in parameters.items()}
        try:
            value = Box(self.field, Interval.of(0, 0), points).range(element)
        except UndefinedError:
            return None
        return rounded(value.low, 1) if value.low.is_finite() else None


class _Jump(UndecidedError):
    def __init__(self, message: str, difference: Element) -> None:
        super().__init__(message)
        self.difference = difference


class _Disproved(Exception):
    def __init__(self, points: list[Fraction], values: list[arb], parameters: dict[str, Fraction]) -> None:
        super().__init__()
        self.points, self.values, self.parameters = points, values, parameters


def _differentiated(element: Element, order: int) -> Element:
    for _ in range(order):
        element = element.derivative
    return element


def _narrow(low: Bound, high: Bound) -> bool:
    return low is not None and high is not None and high - low < max(abs(low), abs(high)) / 2**40


def _short(element: Element) -> str:
    text = str(element)
    return text if len(text) < 80 else text[:77] + "..."
