"""Compound functions, such as tanh and clamp, as expressions of a program."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from halos_pl.proof.program import CHOICES, Program

HALF = Fraction(1, 2)
# From here on torch replaces softplus by its asymptote, an error of 2e-9 at most; the proof is about softplus itself.
SOFTPLUS_THRESHOLD = 20.0
_MOST_SORTED = 4


class NoRuleError(ValueError):
    """There is no rule for an operation; the message names it."""


class Algebra:
    """Compound expressions of a program."""

    def __init__(self, program: Program) -> None:
        self.p = program

    def c(self, value: Any) -> int:
        return self.p.constant(value)

    def f(self, name: str, x: int) -> int:
        return self.p.node(name, x)

    def times(self, factor: Any, x: int) -> int:
        return self.p.mul(self.c(factor), x)

    def tanh(self, x: int) -> int:
        return self.p.add(self.times(2, self.f("sigmoid", self.times(2, x))), self.c(-1))

    def log1p(self, x: int) -> int:
        return self.f("log", self.p.add(self.c(1), x))

    def expm1(self, x: int) -> int:
        return self.p.add(self.exp(x), self.c(-1))

    def exp(self, x: int) -> int:
        return self.c(1) if self.p.value(x) == 0 else self.f("exp", x)

    def log_sigmoid(self, x: int) -> int:
        return self.p.negative(self.f("softplus", self.p.negative(x)))

    def root(self, x: int) -> int:
        return self.p.pow(x, self.c(HALF))

    def square(self, x: int) -> int:
        return self.p.mul(x, x)

    def ndtr(self, x: int) -> int:
        return self.times(HALF, self.p.add(self.c(1), self.f("erf", self.p.div(x, self.root(self.c(2))))))

    def erfcx(self, x: int) -> int:
        """e^(x^2) (1 - erf(x)), as the inverse of the normal distribution's hazard rate, whose tails are known."""
        hazard = self.f("hazard", self.p.mul(self.root(self.c(2)), x))
        return self.p.div(self.root(self.p.div(self.c(2), self.c(math.pi))), hazard)

    def gelu(self, x: int, approximate: str = "none") -> int:
        if approximate == "none":
            return self.p.mul(x, self.ndtr(x))
        cubic = self.p.add(x, self.times(Fraction("0.044715"), self.p.mul(x, self.square(x))))
        inner = self.p.div(self.times(2, cubic), self.root(self.times(HALF, self.c(math.pi))))
        return self.p.mul(x, self.f("sigmoid", self.times(HALF * 2, inner)))

    def asinh(self, x: int) -> int:
        return self.f("log", self.p.add(x, self.root(self.p.add(self.c(1), self.square(x)))))

    def cosh(self, x: int, sign: int = 1) -> int:
        return self.times(HALF, self.p.add(self.exp(x), self.times(sign, self.exp(self.p.negative(x)))))

    def atanh(self, x: int) -> int:
        ratio = self.p.div(self.p.add(self.c(1), x), self.p.sub(self.c(1), x))
        return self.times(HALF, self.f("log", ratio))

    def asin(self, x: int) -> int:
        return self.f("atan", self.p.div(x, self.root(self.p.sub(self.c(1), self.square(x)))))

    def least(self, a: int, b: int) -> int:
        return self.p.choose("less", self.p.sub(a, b), a, b)

    def greatest(self, a: int, b: int) -> int:
        return self.p.choose("less", self.p.sub(a, b), b, a)

    def abs(self, x: int) -> int:
        return self.p.choose("less", x, self.p.negative(x), x)

    def clamp(self, x: int, low: int | None = None, high: int | None = None) -> int:
        x = x if low is None else self.greatest(x, low)
        return x if high is None else self.least(x, high)

    def softplus(self, x: int, beta: int, threshold: float) -> int:
        scaled = self.p.mul(beta, x)
        smooth = self.p.div(self.f("softplus", scaled), beta)
        if threshold >= SOFTPLUS_THRESHOLD:
            return smooth
        return self.p.choose("at_most", self.p.sub(scaled, self.c(threshold)), smooth, x)

    def logaddexp(self, a: int, b: int) -> int:
        return self.p.add(b, self.f("softplus", self.p.sub(a, b)))

    def elu(self, x: int, alpha: int, scale: int, input_scale: int) -> int:
        below = self.p.mul(alpha, self.expm1(self.p.mul(input_scale, x)))
        return self.p.mul(scale, self.p.choose("at_most", x, below, x))

    def relu6(self, x: int) -> int:
        return self.clamp(x, self.c(0), self.c(6))

    def truth(self, x: int) -> int:
        return self.p.choose("equal", x, self.c(0), self.c(1))

    def where(self, condition: int, a: int, b: int) -> int:
        name, *operands = self.p.nodes[condition]
        if name in CHOICES and [self.p.value(int(x)) for x in operands[1:]] == [1, 0]:
            return self.p.choose(name, int(operands[0]), a, b)
        return self.p.choose("equal", condition, b, a)

    def compare(self, name: str, a: int, b: int) -> int:
        relation, swapped, negated = {
            "lt": ("less", False, False),
            "le": ("at_most", False, False),
            "gt": ("less", True, False),
            "ge": ("at_most", True, False),
            "eq": ("equal", False, False),
            "ne": ("equal", False, True),
        }[name]
        d = self.p.sub(b, a) if swapped else self.p.sub(a, b)
        yes, no = (0, 1) if negated else (1, 0)
        return self.p.choose(relation, d, self.c(yes), self.c(no))

    def sign(self, x: int) -> int:
        return self.p.choose("less", x, self.c(-1), self.p.choose("equal", x, self.c(0), self.c(1)))

    def floor(self, x: int) -> int:
        value = self.p.value(x)
        return self.f("floor", x) if value is None else self.c(math.floor(value))

    def trunc(self, x: int) -> int:
        return self.p.choose("less", x, self.p.negative(self.floor(self.p.negative(x))), self.floor(x))

    def round(self, x: int) -> int:
        """To the nearest whole number; from halfway between two, to the even one."""
        shifted = self.p.add(x, self.c(HALF))
        whole = self.floor(shifted)
        odd = self.p.sub(whole, self.times(2, self.floor(self.times(HALF, whole))))
        return self.p.choose("equal", self.p.sub(shifted, whole), self.p.sub(whole, odd), whole)

    def remainder(self, x: int, y: int) -> int:
        return self.p.sub(x, self.p.mul(y, self.floor(self.p.div(x, y))))

    def fmod(self, x: int, y: int) -> int:
        return self.p.sub(x, self.p.mul(y, self.trunc(self.p.div(x, y))))

    def copysign(self, x: int, y: int) -> int:
        """Undefined where y is 0, unless x is: floats have a 0 of either sign, real numbers have not."""
        undefined = self.p.node("div", self.c(1), self.c(0))
        at_zero = self.p.choose("equal", x, x, undefined)
        size = self.abs(x)
        return self.p.choose("less", y, self.p.negative(size), self.p.choose("equal", y, at_zero, size))

    def huber(self, d: int, delta: int) -> int:
        """d^2 / 2 between -delta and delta, which is above 0, and the tangents there beyond."""
        near = self.clamp(d, self.p.negative(delta), delta)
        return self.times(HALF, self.p.mul(near, self.p.sub(self.times(2, d), near)))

    def smooth_l1(self, d: int, beta: int) -> int:
        return self.abs(d) if self.p.value(beta) == 0 else self.p.div(self.huber(d, beta), beta)

    def softmax(self, xs: list[int]) -> list[int]:
        if len(xs) == 2:
            return [self.f("sigmoid", self.p.sub(x, y)) for x, y in (xs, xs[::-1])]
        return [self.p.div(self.c(1), self._ratios(xs, own)) for own in xs]

    def log_softmax(self, xs: list[int]) -> list[int]:
        return [self.p.negative(self.f("log", self._ratios(xs, own))) for own in xs]

    def _ratios(self, xs: list[int], own: int) -> int:
        """The sum of e^x / e^own."""
        return self.total([self.exp(self.p.sub(x, own)) for x in xs])

    def ascending(self, xs: list[int]) -> list[int]:
        """The numbers in order."""
        if len(xs) > _MOST_SORTED:
            raise NoRuleError(f"no rule for sort of more than {_MOST_SORTED} numbers")
        xs = list(xs)
        for end in range(len(xs) - 1, 0, -1):
            for i in range(end):
                xs[i : i + 2] = self.least(*xs[i : i + 2]), self.greatest(*xs[i : i + 2])
        return xs

    def count(self, x: int, knots: list[int], with_equal: bool) -> int:
        """How many knots are below x, or at most x."""
        values = [self.p.value(k) for k in knots]
        known = [value for value in values if value is not None]
        if len(known) < len(values) or known != sorted(known):
            raise NoRuleError("boundaries are not ascending constants")
        return self.p.node("up_to" if with_equal else "below", x, *knots)

    def atan2(self, y: int, x: int) -> int:
        value = self.p.value(x)
        if value is None or value <= 0:
            raise NoRuleError("no rule for atan2 of a second operand that is not a positive constant")
        return self.f("atan", self.p.div(y, x))

    def total(self, xs: list[int]) -> int:
        return self.p.add(*xs)

    def mean(self, xs: list[int]) -> int:
        return self.times(Fraction(1, len(xs)), self.total(xs))

    def product(self, xs: list[int]) -> int:
        result = self.c(1)
        for x in xs:
            result = self.p.mul(result, x)
        return result

    def extreme(self, xs: list[int], pick: Callable[[int, int], int]) -> int:
        result = xs[0]
        for x in xs[1:]:
            result = pick(result, x)
        return result
