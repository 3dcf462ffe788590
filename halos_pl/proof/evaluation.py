"""v as one expression: on a piece, where each choice goes one way, or at a seam."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf, nextafter
from typing import cast

from flint import fmpq_mpoly

from halos_pl.proof import domain
from halos_pl.proof.domain import Condition
from halos_pl.proof.element import Element, UndecidedError
from halos_pl.proof.field import Field
from halos_pl.proof.interval import Interval
from halos_pl.proof.program import CHOICES, COUNTS, PARTIAL, Node

# Sums of more terms are added up bit by bit, as pieces get smaller.
_LONG_SUM = 8
_BRANCHING = (*CHOICES, "lookup")


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
class Partial:
    """The part of a long sum that is known on a piece, and so on all parts of it.

    Attributes:
        whole: sum of the terms that are polynomials.
        sizes: sum of the absolute values of their coefficients.
        quotients: the terms that are not.
        rest: nodes of the terms that contain a choice that is not made yet.
        conditions: what the terms that are known need in order to be defined.
    """

    whole: fmpq_mpoly
    sizes: fmpq_mpoly
    quotients: tuple[Element, ...] = ()
    rest: tuple[int, ...] = ()
    conditions: Mapping[str, Condition] = dataclasses.field(default_factory=dict)


@dataclass
class Evaluation:
    """Computes v with each choice made by the sign of its difference. Unused branches are not computed.

    Attributes:
        nodes: the expression of v.
        field: receives the kernels.
        u: what stands for u.
        sign: the sign of a difference; raises :class:`Undecided`.
        around: the range of an expression.
        known: values of nodes that contain no choice; more are added.
        sums: long sums by node, as far as they are known; replaced as more is known.
        tables: constants by the node that counts them; more are added.
        partial: whether each node may be undefined.
    """

    nodes: Sequence[Node]
    field: Field
    u: Element
    sign: Callable[[Element], int]
    around: Callable[[Element], Interval]
    known: dict[int, Element] = dataclasses.field(default_factory=dict)
    sums: Mapping[int, Partial] = dataclasses.field(default_factory=dict)
    tables: dict[int, list[Fraction]] = dataclasses.field(default_factory=dict)
    partial: Sequence[bool] = ()

    def __post_init__(self) -> None:
        self._values: dict[int, Element] = dict(self.known)
        self._taken: dict[int, int] = {}  # choice to the branch taken
        self._of_sums: dict[int, Mapping[str, Condition]] = {}

    def value(self) -> Element:
        """v.

        Raises:
            Undecided: a choice depends on where u is.
            UndecidedError: a choice cannot be made at all.
        """
        return self._of(len(self.nodes) - 1)

    def conditions(self, roots: Sequence[int] = ()) -> dict[str, Condition]:
        """What v, or some nodes, need in order to be defined, after they are computed."""
        found: dict[str, Condition] = {}
        seen, todo = set[int](), list(roots) or [len(self.nodes) - 1]
        while todo:
            index = todo.pop()
            if index in seen or not self.partial[index]:
                continue
            seen.add(index)
            name, *operands = self.nodes[index]
            wanted = [x for x in operands if isinstance(x, int)]
            if index in self._of_sums:
                found |= self._of_sums[index]
                continue
            if name in _BRANCHING:
                wanted = [wanted[0], self._taken[index]]
            elif name in COUNTS:
                wanted = wanted[:1]
            elif name in PARTIAL:
                for each in domain.conditions(name, [self._values[x] for x in wanted]):
                    found[f"{each.kind} {each.element.key}"] = each
            todo += wanted
        return found

    def _of(self, root: int) -> Element:
        values, todo = self._values, [root]
        while todo:
            index = todo[-1]
            if index in values:
                todo.pop()
                continue
            name, *operands = self.nodes[index]
            wanted = cast("list[int]", [] if name in ("constant", "parameter") else operands)
            if name == "add" and len(wanted) > _LONG_SUM:
                values[index] = self._sum(index, wanted)
                continue
            if name in COUNTS:
                wanted = wanted[:1]  # the others are constants
            if name in _BRANCHING:
                needed = self._needed(index, name, wanted)
                if needed:
                    todo += needed
                    continue
                wanted = [self._taken[index]]
            missing = [x for x in wanted if x not in values]
            if missing:
                todo += missing
                continue
            values[index] = self._computed(index, [values[x] for x in wanted])
            if name not in (*_BRANCHING, *COUNTS, "floor") and all(x in self.known for x in wanted):
                self.known[index] = values[index]
            todo.pop()
        return values[root]

    def _needed(self, index: int, name: str, wanted: list[int]) -> list[int]:
        """Nodes that must be known before a choice is made; none if it is made."""
        if wanted[0] not in self._values:
            return wanted[:1]
        if index in self._taken:
            return []
        try:
            self._taken[index] = self._branch(name, self._values[wanted[0]], wanted[1:])
        except Undecided as choice:
            missing = [x for x in wanted if x not in self._values]
            if choice.loose is None or (not missing and not _continuous([self._values[x] for x in wanted])):
                raise
            if missing:
                return missing
            self._taken[index] = wanted[1 if choice.loose < 0 else 2]
        return []

    def _branch(self, name: str, condition: Element, branches: list[int]) -> int:
        if name == "lookup":
            at = condition.rational
            if at is None or at.denominator != 1 or not -len(branches) <= at < len(branches):
                raise UndecidedError(f"the index of a table is {condition}")
            return branches[int(at)]
        s = self.sign(condition)
        return branches[0 if {"less": s < 0, "at_most": s <= 0, "equal": s == 0}[name] else 1]

    def _sum(self, index: int, operands: list[int]) -> Element:
        """A long sum, whose terms without a choice to make are added up once for all parts of a piece."""
        zero = self.field.zero.numerator
        before = self.sums.get(index, Partial(zero, zero, (), tuple(operands)))
        if before.rest == tuple(operands) or self.u is self.field.u:
            whole, quotients = before.whole, list(before.quotients)
        else:  # what was added up on a piece, at a seam inside it
            memo: dict[int, Element] = {}
            one = self.field.one.numerator
            at = self.field.substituted(Element(self.field, before.whole, one), self.u, memo)
            quotients = [at, *(self.field.substituted(x, self.u, memo) for x in before.quotients)]
            whole = zero
        known = before.conditions if self.u is self.field.u else domain.at(before.conditions, self.field, self.u)
        sizes, rest, choices = before.sizes, list[int](), list[Undecided]()
        for x in before.rest:
            try:
                term = self._of(x)
            except Undecided as choice:
                rest.append(x)
                choices.append(choice)
                continue
            known = {**known, **self.conditions([x])}
            if term.denominator.is_one():
                whole += term.numerator
                sizes += self.field.ctx.from_dict({e: abs(c) for e, c in term.numerator.terms()})
            else:
                quotients.append(term)
        if self.u is self.field.u:
            self.sums = {**self.sums, index: Partial(whole, sizes, tuple(quotients), tuple(rest), known)}
        if choices:
            raise _middle(choices)
        self._of_sums[index] = known
        return self.field.total([self.field.settled(whole, sizes), *quotients])

    def _computed(self, index: int, xs: list[Element]) -> Element:
        name, *operands = self.nodes[index]
        if name == "u":
            return self.u
        if name == "parameter":
            return self.field.parameter(str(operands[0]))
        if name == "constant":
            return self.field.constant(Fraction(str(operands[0])))
        if name == "add":
            return self.field.total(xs)
        if name in (*_BRANCHING, "within"):
            return xs[0]
        if name == "mul":
            return xs[0] * xs[1]
        if name == "div":
            return xs[0] / xs[1]
        if name == "pow":
            return self.field.raised(xs[0], xs[1])
        if name == "floor":
            return self.field.constant(self._floor(xs[0]))
        if name in COUNTS:
            return self.field.constant(self._count(index, xs[0]))
        return self.field.apply(name, xs[0])

    def _floor(self, x: Element) -> int:
        """The largest whole number at or below x, by bisection."""
        value = x.rational
        if value is not None:
            return value.__floor__()
        place = self.around(x)
        if not (place.low.is_finite() and place.high.is_finite()):
            raise UndecidedError(f"floor({x}) has infinitely many steps")
        ends = [end.floor().unique_fmpz() for end in (place.low, place.high)]
        if ends[0] is None or ends[1] is None:
            raise UndecidedError(f"floor({x}) is not found")
        low, high = int(ends[0]), int(ends[1])
        while low < high:
            middle = (low + high + 1) // 2
            if self.sign(x - self.field.constant(middle)) >= 0:
                low = middle
            else:
                high = middle - 1
        return low

    def _count(self, index: int, x: Element) -> int:
        """How many of some ascending constants are below x, or at most x, by bisection where the range of x ends."""
        name, *operands = self.nodes[index]
        if index not in self.tables:
            self.tables[index] = [Fraction(str(self.nodes[int(k)][1:][0])) for k in operands[1:]]
        table, place = self.tables[index], self.around(x)
        low, high = 0, len(table)
        if place.low.is_finite():
            low = bisect_left(table, Fraction(nextafter(float(place.low), -inf)))
        if place.high.is_finite():
            high = bisect_right(table, Fraction(nextafter(float(place.high), inf)))
        while low < high:
            middle = (low + high) // 2
            s = self.sign(x - self.field.constant(table[middle]))
            if s > 0 or (s == 0 and name == "up_to"):
                low = middle + 1
            else:
                high = middle
        return low


def _continuous(choice: list[Element]) -> bool:
    """Whether a choice is a minimum or maximum, whose branches agree where its difference is 0."""
    d, a, b = choice
    return (a - b - d).is_zero or (a - b + d).is_zero


def _middle(choices: list[Undecided]) -> Undecided:
    """The choice in the middle, so that each half of a piece has half of the choices."""
    rational = [choice for choice in choices if choice.difference.rational_root is not None]
    if not rational:
        return choices[0]
    rational.sort(key=lambda choice: (choice.difference.rational_root or (Fraction(0), 0))[0])
    return rational[len(rational) // 2]
