"""Where v is defined: what its divisors, logarithms and powers need, also where they cancel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from halos_pl.proof.element import Element
from halos_pl.proof.field import Field
from halos_pl.proof.interval import Interval
from halos_pl.proof.program import PARTIAL, Node
from halos_pl.proof.roots import Bound, between, span
from halos_pl.proof.signs import Box, Known, UndefinedError

MOST_PARTS = 60


@dataclass(frozen=True, eq=False)
class Condition:
    """An expression must have a sign.

    Attributes:
        kind: the sign.
        element: the expression.
    """

    kind: Literal["not 0", "above 0", "at least 0"]
    element: Element

    def holds(self, box: Box) -> bool:
        """Whether it is known to hold in a cell."""
        try:
            sign, strict = box.sign(self.element)
        except UndefinedError:
            return False
        if self.kind == "at least 0":
            return sign in (0, 1)
        return strict and sign in ((1,) if self.kind == "above 0" else (1, -1))

    def holds_between(
        self, field: Field, low: Bound, high: Bound, parameters: Mapping[str, Interval], known: Known
    ) -> bool:
        """Whether it is known to hold on an open interval of u, which is cut into parts if need be."""
        todo = [(low, high)]
        for _ in range(MOST_PARTS):
            if not todo:
                return True
            field.require_time()
            low, high = todo.pop()
            if self.holds(Box(field, span(low, high), parameters, known)):
                continue
            middle = between(low, high)
            if 0 not in self.element.depends_on:
                return False
            if not self.holds(Box(field, Interval.of(middle, middle), parameters, known)):
                return False
            todo += [(middle, high), (low, middle)]
        return False

    def __str__(self) -> str:
        return f"{self.element} is not known to be {self.kind}"


def partial(nodes: Sequence[Node]) -> list[bool]:
    """Whether each node, or one that it needs, may be undefined."""
    found: list[bool] = []
    for name, *operands in nodes:
        found.append(name in PARTIAL or any(found[x] for x in operands if isinstance(x, int)))
    return found


def conditions(name: str, operands: Sequence[Element]) -> list[Condition]:
    """What an operation needs of its operands in order to be defined."""
    x, last = operands[0], operands[-1]
    if name == "div":
        return [Condition("not 0", last)]
    if name == "log":
        return [Condition("above 0", x)]
    if name == "within":
        limit = x.field.constant(2**31)
        return [Condition("above 0", limit - x), Condition("above 0", limit + x)]
    if name != "pow":
        return []
    exponent = last.rational
    if exponent is None:
        return [Condition("above 0", last if x.is_zero else x)]
    if exponent.denominator == 1:
        return [Condition("not 0", x)] if exponent < 0 else []
    return [Condition("above 0" if exponent < 0 else "at least 0", x)]


def at(found: Mapping[str, Condition], field: Field, u: Element) -> dict[str, Condition]:
    """Conditions at one place."""
    memo: dict[int, Element] = {}
    moved = (Condition(each.kind, field.substituted(each.element, u, memo)) for each in found.values())
    return {f"{each.kind} {each.element.key}": each for each in moved}
