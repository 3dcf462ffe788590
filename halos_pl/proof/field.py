"""The rules of kernels: how each function simplifies, and its derivative.

The derivative of a kernel is a quotient of polynomials in kernels again (Liouville's elementary extensions), so v' and
v'' are found, brought to lowest terms and factored exactly. Factors have signs that hold far out, where v' and v'' tend
to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from flint import fmpq

from halos_pl.proof.element import Element, Expressions

LARGEST_ROOT = 8


class Field(Expressions):
    """The expressions of one program, closed under its functions and d/du.

    Args:
        parameters: names of the unknowns beside u.
        size: number of variables: u, the parameters and all kernels.
    """

    def __init__(self, parameters: Sequence[str], size: int) -> None:
        super().__init__(parameters, size)
        self._slopes: dict[int, Element] = {}

    def apply(self, kind: str, g: Element) -> Element:
        """exp, log, sigmoid, softplus, atan, erf, log_ndtr, hazard, sin or cos of an expression."""
        negative = not g.is_zero and g.numerator.leading_coefficient() < 0
        if kind == "exp":
            return self._exp(g)
        if kind == "log" and g.rational == 1:
            return self.zero
        if kind == "log" and g.denominator.is_one() and (i := self._sole("exp", g)) is not None:
            return self.kernels[i].argument
        if g.is_zero and kind in ("sin", "atan", "erf"):
            return self.zero
        if g.is_zero and kind in ("sigmoid", "cos"):
            return self.one if kind == "cos" else self.constant(Fraction(1, 2))
        if kind == "log" and (i := self._one_and_exp(g)) is not None:
            return self.apply("softplus", self.kernels[i].argument)
        if negative and kind in ("sin", "atan", "erf"):
            return -self.apply(kind, -g)
        if negative and kind == "cos":
            return self.apply(kind, -g)
        if negative and kind == "sigmoid":
            return self.one - self.apply(kind, -g)
        if negative and kind == "softplus":
            return self.apply(kind, -g) + g
        return self.variable(self.kernel(kind, g))

    def _sole(self, kind: str, g: Element) -> int | None:
        """The index of the kernel that g is, if it is one of that kind."""
        indices = [i for i in g.variables if i in self.kernels and self.kernels[i].kind == kind]
        return indices[0] if len(indices) == 1 and g.numerator == self.generators[indices[0]] else None

    def _one_and_exp(self, g: Element) -> int | None:
        """The kernel exp(h), if g is 1 + exp(h)."""
        return self._sole("exp", g - self.one) if g.denominator.is_one() and len(g.numerator) == 2 else None

    def _exp(self, g: Element) -> Element:
        """exp(g): e^(k log h) = h^k, e^(k softplus(h)) = (1 - sigmoid(h))^-k, and e^(k h) = (e^h)^k."""
        factor = self.one
        if g.denominator.is_one():
            for exponents, coefficient in g.numerator.terms():
                used = [i for i, e in enumerate(exponents) if e]
                if len(used) != 1 or exponents[used[0]] != 1 or used[0] not in self.kernels:
                    continue
                kernel, whole = self.kernels[used[0]], fmpq(coefficient)
                if kernel.kind not in ("log", "softplus") or whole.q != 1 or abs(whole.p) > LARGEST_ROOT:
                    continue
                inner = kernel.argument
                base = inner if kernel.kind == "log" else self.one / (self.one - self.apply("sigmoid", inner))
                factor = factor * base.power(int(whole.p))
                g = g - self.variable(used[0]) * self.constant(int(whole.p))
        if g.is_zero:
            return factor
        for i, kernel in self.kernels.items():
            if kernel.kind == "exp":
                ratio = (g / kernel.argument).rational
                if ratio is not None and ratio.denominator == 1 and abs(ratio) <= LARGEST_ROOT:
                    return factor * self.variable(i).power(int(ratio))
        return factor * self.variable(self.kernel("exp", g))

    def raised(self, g: Element, exponent: Element) -> Element:
        """g^exponent, for g above 0 or a whole exponent."""
        p = exponent.rational
        if p is not None and p.denominator == 1:
            return g.power(int(p))
        if g.rational in (0, 1) and p is not None:
            if p < 0 and g.is_zero:
                raise ZeroDivisionError("0 to a negative power")
            return g
        if g.rational == 1:
            return self.one
        if p is None:
            base = g.rational
            if base is not None and base > 0:  # a^x is an exponential in x, whatever a is
                return self._exp(exponent * self.apply("log", g))
            if 0 in exponent.depends_on:
                return self._exp(exponent * self.apply("log", g))
            return self.variable(self.kernel("power", g, exponent))
        if p < 0:
            return self.one / self.raised(g, -exponent)
        if p.denominator <= LARGEST_ROOT:
            whole = _exact_root(g.rational, p.denominator)
            if whole is not None:
                return self.constant(whole).power(p.numerator)
            root = self.kernel("power", g, Fraction(1, p.denominator))
            self._roots[root] = p.denominator
            return self.variable(root).power(p.numerator)
        return self.variable(self.kernel("power", g, p))

    def slope(self, index: int) -> Element:
        """d/du of a variable."""
        if index not in self._slopes:
            self._slopes[index] = self._slope(index)
        return self._slopes[index]

    def _slope(self, index: int) -> Element:
        if 0 not in self.base_of(index):
            return self.zero
        if index == 0:
            return self.one
        kernel, x = self.kernels[index], self.variable(index)
        g, inner = kernel.argument, kernel.argument.derivative
        if kernel.kind == "exp":
            return x * inner
        if kernel.kind == "sigmoid":
            return x * (self.one - x) * inner
        if kernel.kind == "softplus":
            return self.apply("sigmoid", g) * inner
        if kernel.kind == "log":
            return inner / g
        if kernel.kind == "atan":
            return inner / (self.one + g * g)
        if kernel.kind == "erf":
            pi = self.variable(self.kernel("pi", self.zero))
            return self.constant(2) / self.raised(pi, self.constant(Fraction(1, 2))) * self._exp(-(g * g)) * inner
        if kernel.kind == "log_ndtr":  # log of the normal distribution: its slope is the hazard rate at -g
            return self.variable(self.kernel("hazard", -g)) * inner
        if kernel.kind == "hazard":
            return x * self.variable(self.kernel("gap", -g)) * inner
        if kernel.kind == "gap":  # g + hazard(-g)
            return (self.one - x * self.variable(self.kernel("hazard", -g))) * inner
        if kernel.kind == "sin":
            return self.apply("cos", g) * inner
        if kernel.kind == "cos":
            return -self.apply("sin", g) * inner
        exponent = kernel.exponent if isinstance(kernel.exponent, Element) else self.constant(kernel.exponent or 0)
        return exponent * x * inner / g

    def substituted(self, element: Element, root: Element, memo: dict[int, Element]) -> Element:
        """The expression at u = ``root``, an expression in the parameters."""
        if 0 not in element.depends_on:
            return element

        def replaced(index: int) -> Element:
            if index not in memo:
                if 0 not in self.base_of(index):
                    memo[index] = self.variable(index)
                elif index == 0:
                    memo[index] = root
                else:
                    kernel = self.kernels[index]
                    g = self.substituted(kernel.argument, root, memo)
                    if kernel.kind == "power":
                        e = kernel.exponent
                        memo[index] = self.raised(g, e if isinstance(e, Element) else self.constant(e or 0))
                    else:
                        memo[index] = self.apply(kernel.kind, g)
            return memo[index]

        used = sorted(element.variables)
        values = {i: replaced(i) for i in used}
        return self.composed(element.numerator, values) / self.composed(element.denominator, values)


def _exact_root(value: Fraction | None, q: int) -> Fraction | None:
    """The q-th root of a rational, if it is one."""
    if value is None or value <= 0:
        return None
    root = Fraction(round(value.numerator ** (1 / q)), round(value.denominator ** (1 / q)))
    return root if root**q == value else None
