"""The expression of a value function: a small graph of scalar operations on u, parameters and rational constants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

# Number of operands of each operation; None: any number. ``lookup`` takes an index and the entries of a table;
# ``less``, ``at_most`` and ``equal`` take d, a, b and give a where d < 0, d <= 0 or d = 0, else b. ``below`` and
# ``up_to`` take x and ascending constants, and count those below x or at most x. ``within`` is x, which must be between
# -2^31 and 2^31. ``hazard`` is the normal distribution's density over its upper tail.
OPERATIONS: dict[str, int | None] = {
    "add": None,
    "mul": 2,
    "div": 2,
    "pow": 2,
    "exp": 1,
    "log": 1,
    "sigmoid": 1,
    "softplus": 1,
    "atan": 1,
    "erf": 1,
    "sin": 1,
    "cos": 1,
    "less": 3,
    "at_most": 3,
    "equal": 3,
    "lookup": None,
    "floor": 1,
    "below": None,
    "up_to": None,
    "log_ndtr": 1,
    "hazard": 1,
    "within": 1,
}
PARTIAL = ("div", "log", "pow", "within")  # those that may be undefined
CHOICES, COUNTS = ("less", "at_most", "equal"), ("below", "up_to")
Node = tuple[str, *tuple[int | str, ...]]


def rational(number: float | int) -> Fraction:
    """The shortest decimal that rounds to a float: 0.1 stands for 1/10, as its author wrote it."""
    return Fraction(number) if isinstance(number, int) else Fraction(repr(float(number)))


@dataclass
class Program:
    """Nodes in an order in which operands come first; equal nodes are one.

    A node is ``("u", row)``, ``("parameter", name)``, ``("constant", "p/q")`` or an operation of ``OPERATIONS`` and the
    indices of its operands.
    """

    nodes: list[Node] = field(default_factory=list)
    _index: dict[Node, int] = field(default_factory=dict, repr=False)
    _partial: list[bool] = field(default_factory=list, repr=False)  # whether a node, or one that it needs, is PARTIAL

    def node(self, name: str, *operands: int | str) -> int:
        """The index of a node, which is added if it is new."""
        key: Node = (name, *operands)
        if key not in self._index:
            self._index[key] = len(self.nodes)
            self.nodes.append(key)
            self._partial.append(name in PARTIAL or any(self._partial[x] for x in operands if isinstance(x, int)))
        return self._index[key]

    def constant(self, value: Fraction | float | int) -> int:
        """The index of a constant."""
        return self.node("constant", str(value if isinstance(value, Fraction) else rational(value)))

    def value(self, index: int) -> Fraction | None:
        """The value of a constant; None for other nodes."""
        name, *operands = self.nodes[index]
        return Fraction(str(operands[0])) if name == "constant" else None

    def add(self, *operands: int) -> int:
        """The sum; constants are added up."""
        values = [self.value(operand) for operand in operands]
        total = sum((value for value in values if value is not None), Fraction(0))
        terms = [operand for operand, value in zip(operands, values, strict=True) if value is None]
        if total or not terms:
            terms.append(self.constant(total))
        return terms[0] if len(terms) == 1 else self.node("add", *terms)

    def mul(self, a: int, b: int) -> int:
        """The product; 0 times anything is 0 where that is defined."""
        x, y = self.value(a), self.value(b)
        if x is not None and y is not None:
            return self.constant(x * y)
        if (x == 0 and not self._partial[b]) or (y == 0 and not self._partial[a]):
            return self.constant(0)
        return b if x == 1 else a if y == 1 else self.node("mul", a, b)

    def negative(self, a: int) -> int:
        """-a."""
        return self.mul(self.constant(-1), a)

    def sub(self, a: int, b: int) -> int:
        """a - b."""
        return self.constant(0) if a == b and not self._partial[a] else self.add(a, self.negative(b))

    def div(self, a: int, b: int) -> int:
        """a / b."""
        y = self.value(b)
        return self.mul(a, self.constant(1 / y)) if y else self.node("div", a, b)

    def pow(self, a: int, b: int) -> int:
        """a^b; a whole exponent of a constant is computed."""
        x, y = self.value(a), self.value(b)
        if y is not None and y.denominator == 1 and (y == 0 or y == 1 or (x is not None and (x or y > 0))):
            return self.constant(1) if y == 0 else a if y == 1 else self.constant(Fraction(x or 0) ** int(y))
        return self.node("pow", a, b)

    def is_small(self, index: int) -> bool:
        """Whether it is a count, or one of some constants, and so between -2^31 and 2^31."""
        todo = [index]
        while todo:
            name, *operands = self.nodes[todo.pop()]
            if name in CHOICES:
                todo += [int(x) for x in operands[1:]]
            elif name not in COUNTS and not (name == "constant" and abs(Fraction(str(operands[0]))) < 2**31):
                return False
        return True

    def choose(self, relation: str, d: int, a: int, b: int) -> int:
        """a where d < 0 (``less``), d <= 0 (``at_most``) or d = 0 (``equal``), else b."""
        value = self.value(d)
        if value is not None:
            return a if {"less": value < 0, "at_most": value <= 0, "equal": value == 0}[relation] else b
        return a if a == b else self.node(relation, d, a, b)

    def of_row(self, output: int, row: int) -> tuple[Node, ...]:
        """The nodes that ``output`` needs, renumbered, with u for that row; a sum of sums is one sum.

        Raises:
            ValueError: the output depends on another row.
        """
        order: dict[int, int] = {}
        nodes: list[Node] = []
        uses = self._uses(output)
        todo = [(output, False)]
        while todo:
            old, expanded = todo.pop()
            if old in order:
                continue
            name, *operands = self.nodes[old]
            if name == "add":
                operands = list(self._terms(operands, uses))
            if not expanded:
                todo.append((old, True))
                todo += [(x, False) for x in reversed(operands) if isinstance(x, int)]
                continue
            if name == "unwritten":
                raise ValueError("it reads a tensor before it writes it")
            if name == "u":
                if operands != [str(row)]:
                    raise ValueError("rows influence each other")
                operands = []
            order[old] = len(nodes)
            nodes.append((name, *(order[x] if isinstance(x, int) else x for x in operands)))
        return tuple(nodes)

    def _uses(self, output: int) -> dict[int, int]:
        """How often each node that ``output`` needs is an operand."""
        uses, todo = {output: 1}, [output]
        while todo:
            for x in self.nodes[todo.pop()][1:]:
                if isinstance(x, int):
                    if x not in uses:
                        todo.append(x)
                    uses[x] = uses.get(x, 0) + 1
        return uses

    def _terms(self, operands: list[int | str], uses: dict[int, int]) -> Iterator[int]:
        """The terms of a sum, with those of sums that are used nowhere else."""
        todo = list(reversed(operands))
        while todo:
            x = int(todo.pop())
            if self.nodes[x][0] == "add" and uses[x] == 1:
                todo += reversed(self.nodes[x][1:])
            else:
                yield x
