"""The value of an expression at one rational outcome, enclosed: what a witness is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from flint import arb, fmpq

from halos_pl.proof.interval import ball
from halos_pl.proof.program import CHOICES, COUNTS, Node

Number = fmpq | arb
_LARGE = 2**16  # a whole number from there on may be a rounded constant
_FUNCTIONS = {
    "exp": lambda x: x.exp(),
    "log": lambda x: x.log(),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "softplus": lambda x: x.exp().log1p() if x < 0 else x + (-x).exp().log1p(),
    "atan": lambda x: x.atan(),
    "erf": lambda x: x.erf(),
    "sin": lambda x: x.sin(),
    "cos": lambda x: x.cos(),
    "hazard": lambda x: (2 / arb.pi()).sqrt() * (-x * x / 2).exp() / (x / arb(2).sqrt()).erfc(),
    "log_ndtr": lambda x: ((-x / arb(2).sqrt()).erfc() / 2).log(),
}


def value_at(
    nodes: Sequence[Node], u: Fraction, parameters: Mapping[str, Fraction], share: Fraction = Fraction(0)
) -> arb:
    """Encloses v(u). Rationals are kept exact, so that choices are too where they compare rationals.

    Args:
        nodes: the expression of v.
        u: the outcome.
        parameters: the value of each unknown in it.
        share: if above 0, the result contains v at all outcomes within this share of |u| + 2^-20, and with constants
            that differ by this share.

    Raises:
        ValueError: a choice cannot be decided, or v is undefined there.
    """
    values: dict[int, Number] = {}
    todo = [len(nodes) - 1]
    while todo:
        index = todo[-1]
        name, *operands = nodes[index]
        wanted = [x for x in operands if isinstance(x, int)]
        if name in (*CHOICES, "lookup"):
            wanted = wanted[:1] if wanted[0] not in values else [_chosen(name, values[wanted[0]], wanted[1:])]
        missing = [x for x in wanted if x not in values]
        if missing:
            todo += missing
            continue
        xs = [values[x] for x in wanted]
        if name == "u":
            values[index] = _about(u, share * (abs(u) + Fraction(1, 2**20)))
        elif name == "parameter":
            values[index] = fmpq(parameters[str(operands[0])].numerator, parameters[str(operands[0])].denominator)
        elif name == "constant":
            constant = Fraction(str(operands[0]))
            exact = constant.denominator == 1 and abs(constant) < _LARGE
            values[index] = _about(constant, 0 if exact else share * abs(constant))
        else:
            values[index] = _computed(name, xs)
        todo.pop()
    result = values[len(nodes) - 1]
    result = result if isinstance(result, arb) else arb(result)
    if not result.is_finite():
        raise ValueError(f"v({float(u):g}) is undefined")
    return result


def _about(x: Fraction, radius: Fraction | int) -> Number:
    return ball(x - radius).union(ball(x + radius)) if radius else fmpq(x.numerator, x.denominator)


def _chosen(name: str, condition: Number, branches: list[int]) -> int:
    if name == "lookup":
        if isinstance(condition, arb) or condition.q != 1:
            raise ValueError("the index of a table is not a whole number")
        return branches[int(condition.p)]
    if not (condition > 0 or condition < 0 or isinstance(condition, fmpq) or condition == 0):
        raise ValueError("a choice cannot be decided")
    taken = {"less": condition < 0, "at_most": condition <= 0, "equal": condition == 0}[name]
    return branches[0 if taken else 1]


def _computed(name: str, xs: list[Number]) -> Number:
    if name == "add":
        total = xs[0]
        for x in xs[1:]:
            total = total + x
        return total
    if name == "within" and not abs(arb(xs[0])) < 2**31:
        raise ValueError("a whole number is out of range")
    if name in (*CHOICES, "lookup", "within"):
        return xs[0]
    if name == "mul":
        return xs[0] * xs[1]
    if name == "div":
        if isinstance(xs[1], fmpq) and xs[1] == 0:
            raise ValueError("v divides by 0")
        return xs[0] / xs[1]
    if name == "pow":
        return _power(xs[0], xs[1])
    if name == "floor":
        return _floor(xs[0])
    if name in COUNTS:
        relation = "less" if name == "below" else "at_most"
        return fmpq(sum(_chosen(relation, knot - xs[0], [0, 1]) == 0 for knot in xs[1:]))
    x = xs[0] if isinstance(xs[0], arb) else arb(xs[0])
    result: Number = _FUNCTIONS[name](x)
    return result


def _floor(x: Number) -> Number:
    whole = x.floor().unique_fmpz() if isinstance(x, arb) else x.floor()
    if whole is None:
        raise ValueError("a whole part cannot be decided")
    return fmpq(whole)


def _power(x: Number, exponent: Number) -> Number:
    if isinstance(exponent, fmpq) and exponent.q == 1:
        if isinstance(x, fmpq) and x == 0 and exponent < 0:
            raise ValueError("v divides by 0")
        whole: Number = x ** int(exponent.p)
        return whole
    if isinstance(x, fmpq) and x == 0 and exponent > 0:
        return fmpq(0)
    base, power = (y if isinstance(y, arb) else arb(y) for y in (x, exponent))
    return (power * base.log()).exp() if not base > 0 else base**power


def ordered(a: arb, b: arb, tolerance: Fraction) -> bool:
    """Whether a > b by more than a share of their sizes."""
    return bool(a - b > ball(tolerance) * (abs(a) + abs(b)))
