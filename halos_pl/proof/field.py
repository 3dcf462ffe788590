"""Exact expressions of u: quotients of polynomials in u, the parameters and kernels such as exp(g) and log(g).

The derivative of a kernel is such a quotient again (Liouville's elementary extensions), so v' and v'' are found,
brought to lowest terms and factored exactly. Factors have signs that hold far out, where v' and v'' tend to 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from flint import Ordering, fmpq, fmpq_mpoly, fmpq_mpoly_ctx

# Coefficients that cancel to within this share of their size are taken as equal: constants of v are floats.
TOLERANCE = fmpq(1, 2**40)
LARGEST_ROOT, LARGEST_POWER, MOST_TERMS = 8, 24, 3000


class TooLargeError(ValueError):
    """An expression grows beyond what is worth computing."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A function of an expression that is a variable of the polynomials.

    Attributes:
        kind: exp, sigmoid, softplus, log, atan, erf, sin, cos, power, or pi, which has no argument.
        argument: the expression g.
        exponent: of a power, a rational or an expression in the parameters.
    """

    kind: str
    argument: Element
    exponent: Fraction | Element | None = None


@dataclass(frozen=True, eq=False)
class Element:
    """numerator / denominator in lowest terms; the denominator's leading coefficient is 1."""

    field: Field
    numerator: fmpq_mpoly
    denominator: fmpq_mpoly

    @cached_property
    def key(self) -> str:
        """Equal for equal expressions."""
        return f"{self.numerator}/{self.denominator}"

    @property
    def is_zero(self) -> bool:
        """Whether the expression is 0 identically."""
        return bool(self.numerator.is_zero())

    @cached_property
    def rational(self) -> Fraction | None:
        """The value of a rational constant, else None."""
        if not (self.numerator.is_constant() and self.denominator.is_constant()):
            return None
        value = fmpq(self.numerator.leading_coefficient()) if not self.is_zero else fmpq(0)
        return Fraction(int(value.p), int(value.q))

    @cached_property
    def variables(self) -> frozenset[int]:
        """Indices of the variables in it, without those in the arguments of kernels."""
        degrees = zip(self.numerator.degrees(), self.denominator.degrees(), strict=True)
        return frozenset(i for i, (a, b) in enumerate(degrees) if a > 0 or b > 0)

    @cached_property
    def depends_on(self) -> frozenset[int]:
        """Indices of u and of parameters in it, at any depth."""
        return frozenset().union(*(self.field.base_of(i) for i in self.variables))

    @cached_property
    def rational_root(self) -> tuple[Fraction, int] | None:
        """Where it vanishes and whether it rises there (1) or falls (-1), if it is a u + b with rational a and b."""
        if self.variables != {0} or not self.denominator.is_one() or self.numerator.degrees()[0] != 1:
            return None
        a = self.numerator.derivative(0)
        b = fmpq((self.numerator - a * self.field.generators[0]).leading_coefficient() or 0)
        root = -b / fmpq(a.leading_coefficient())
        return Fraction(int(root.p), int(root.q)), (1 if a.leading_coefficient() > 0 else -1)

    def __add__(self, other: Element) -> Element:
        return self.field.total([self, other])

    def __neg__(self) -> Element:
        return Element(self.field, -self.numerator, self.denominator)

    def __sub__(self, other: Element) -> Element:
        return self + -other

    def __mul__(self, other: Element) -> Element:
        return self.field.quotient(self.numerator * other.numerator, self.denominator * other.denominator)

    def __truediv__(self, other: Element) -> Element:
        return self.field.quotient(self.numerator * other.denominator, self.denominator * other.numerator)

    def power(self, exponent: int) -> Element:
        """A whole power."""
        if abs(exponent) > LARGEST_POWER:
            raise TooLargeError(f"a power of {exponent}")
        if exponent < 0:
            return self.field.quotient(self.denominator**-exponent, self.numerator**-exponent)
        return self.field.quotient(self.numerator**exponent, self.denominator**exponent)

    @cached_property
    def derivative(self) -> Element:
        """d/du."""
        field, n, d = self.field, self.numerator, self.denominator
        total = field.zero
        for i in sorted(self.variables):
            slope = field.slope(i)
            if not slope.is_zero:
                partial = n.derivative(i) * d - n * d.derivative(i)
                total = total + field.quotient(partial, d * d) * slope
        return total

    @cached_property
    def addends(self) -> list[Element]:
        """Expressions whose sum this is, by the kernels in its numerator."""
        groups: dict[frozenset[int], dict[tuple[int, ...], Any]] = {}
        for exponents, coefficient in self.numerator.terms():
            used = frozenset(i for i, e in enumerate(exponents) if e and i in self.field.kernels)
            groups.setdefault(used, {})[exponents] = coefficient
        parts = [self.field.ctx.from_dict(terms) for terms in groups.values()]
        return [self.field.quotient(part, self.denominator) for part in parts]

    def __str__(self) -> str:
        text = str(self.numerator) if self.denominator.is_one() else f"({self.numerator})/({self.denominator})"
        return re.sub(r"x(\d+)", lambda match: self.field.name(int(match[1])), text)


class Field:
    """The expressions of one program.

    Args:
        parameters: names of the unknowns beside u.
        size: number of variables: u, the parameters and all kernels.
    """

    def __init__(self, parameters: Sequence[str], size: int) -> None:
        self.ctx = fmpq_mpoly_ctx.get([f"x{i}" for i in range(size)], Ordering.lex)
        self.generators = self.ctx.gens()
        self.parameters = list(parameters)
        self.kernels: dict[int, Kernel] = {}
        self._by_key: dict[tuple[str, str, str], int] = {}
        self._next = 1 + len(parameters)
        self._slopes: dict[int, Element] = {}
        self._factors: dict[str, tuple[int, list[tuple[fmpq_mpoly, int]]]] = {}
        self._bases: dict[int, frozenset[int]] = {}
        self._roots: dict[int, int] = {}  # q by the kernel g^(1/q)
        self.one = Element(self, self.ctx.constant(1), self.ctx.constant(1))
        self.zero = Element(self, self.ctx.constant(0), self.ctx.constant(1))
        self.u = self.variable(0)

    def name(self, index: int) -> str:
        """A readable name of a variable."""
        if index not in self.kernels:
            return ["u", *self.parameters][index]
        kernel = self.kernels[index]
        exponent = "" if kernel.exponent is None else f", {kernel.exponent}"
        return kernel.kind if kernel.kind == "pi" else f"{kernel.kind}({kernel.argument}{exponent})"

    def variable(self, index: int) -> Element:
        """u (0), a parameter or a kernel."""
        return Element(self, self.generators[index], self.ctx.constant(1))

    def constant(self, value: Fraction | int) -> Element:
        """A rational constant."""
        return Element(self, self.ctx.constant(fmpq(value.numerator, value.denominator)), self.ctx.constant(1))

    def base_of(self, index: int) -> frozenset[int]:
        """u and parameters on which a variable depends."""
        if index not in self.kernels:
            return frozenset([index])
        if index not in self._bases:
            kernel = self.kernels[index]
            exponent = kernel.exponent.depends_on if isinstance(kernel.exponent, Element) else frozenset()
            self._bases[index] = kernel.argument.depends_on | exponent
        return self._bases[index]

    def quotient(self, n: fmpq_mpoly, d: fmpq_mpoly) -> Element:
        """n / d in lowest terms, with roots reduced.

        Raises:
            ZeroDivisionError: d is 0 identically.
            TooLargeError: it has too many terms.
        """
        if len(n) > MOST_TERMS or len(d) > MOST_TERMS:
            raise TooLargeError("an expression of thousands of terms")
        for root, q in self._roots.items():
            if n.degrees()[root] >= q or d.degrees()[root] >= q:
                top, bottom = self._reduced(n, root, q), self._reduced(d, root, q)
                return top / bottom
        if d.is_zero():
            raise ZeroDivisionError("division by 0")
        if n.is_zero():
            return self.zero
        if not d.is_constant():
            common = n.gcd(d)
            if not common.is_constant():
                n, d = n / common, d / common
        leading = d.leading_coefficient()
        return Element(self, n / leading, d / leading) if leading != 1 else Element(self, n, d)

    def factors(self, polynomial: fmpq_mpoly) -> tuple[int, list[tuple[fmpq_mpoly, int]]]:
        """The sign of the constant factor, and the irreducible factors with their multiplicities."""
        key = str(polynomial)
        if key not in self._factors:
            constant, factors = polynomial.factor()
            self._factors[key] = (1 if constant > 0 else -1), [(factor, int(times)) for factor, times in factors]
        return self._factors[key]

    def _reduced(self, polynomial: fmpq_mpoly, root: int, q: int) -> Element:
        """Replaces (g^(1/q))^q by g."""
        parts: dict[int, dict[tuple[int, ...], Any]] = {}
        for exponents, coefficient in polynomial.terms():
            whole, rest = divmod(int(exponents[root]), q)
            key = (*exponents[:root], rest, *exponents[root + 1 :])
            parts.setdefault(whole, {})[key] = coefficient
        g, total = self.kernels[root].argument, self.zero
        for whole, terms in parts.items():
            part = Element(self, self.ctx.from_dict(terms), self.ctx.constant(1))
            total = total + part * g.power(whole)
        return total

    def total(self, elements: Sequence[Element]) -> Element:
        """The sum; coefficients that cancel to within ``TOLERANCE`` of their sizes are 0."""
        elements = [e for e in elements if not e.is_zero]
        if len(elements) < 2:
            return elements[0] if elements else self.zero
        d = elements[0].denominator
        for e in elements[1:]:
            if e.denominator != d:
                d = d * (e.denominator / d.gcd(e.denominator))
        parts = [e.numerator if e.denominator == d else e.numerator * (d / e.denominator) for e in elements]
        n = parts[0]
        for part in parts[1:]:
            n = n + part
        if sum(map(len, parts)) > len(n) or len(parts) > 2:
            n = self._without_residues(n, parts)
        return self.quotient(n, d)

    def _without_residues(self, n: fmpq_mpoly, parts: Sequence[fmpq_mpoly]) -> fmpq_mpoly:
        sizes: dict[tuple[int, ...], Any] = {}
        for part in parts:
            for exponents, coefficient in part.terms():
                sizes[exponents] = sizes.get(exponents, 0) + abs(coefficient)
        kept = {e: c for e, c in n.terms() if abs(c) > TOLERANCE * sizes[e]}
        return n if len(kept) == len(n) else self.ctx.from_dict(kept)

    # -- kernels ----------------------------------------------------------------------------------------------

    def kernel(self, kind: str, argument: Element, exponent: Fraction | Element | None = None) -> int:
        """The variable of a kernel, which is added if it is new."""
        power = exponent.key if isinstance(exponent, Element) else str(exponent)
        key = (kind, argument.key, power)
        if key not in self._by_key:
            if self._next == len(self.generators):
                raise TooLargeError("more different functions than expected")
            self._by_key[key] = self._next
            self.kernels[self._next] = Kernel(kind, argument, exponent)
            self._next += 1
        return self._by_key[key]

    def apply(self, kind: str, g: Element) -> Element:
        """exp, log, sigmoid, softplus, atan, erf, sin or cos of an expression."""
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

    def root_of(self, index: int) -> int | None:
        """q, if the kernel is g^(1/q)."""
        return self._roots.get(index)

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

    def composed(self, polynomial: fmpq_mpoly, values: Mapping[int, Element]) -> Element:
        """A polynomial with expressions in the place of some variables."""
        parts = []
        for exponents, coefficient in polynomial.terms():
            part = Element(self, self.ctx.constant(coefficient), self.ctx.constant(1))
            for i, exponent in enumerate(exponents):
                if exponent:
                    part = part * values.get(i, self.variable(i)).power(int(exponent))
            parts.append(part)
        return self.total(parts)


def _exact_root(value: Fraction | None, q: int) -> Fraction | None:
    """The q-th root of a rational, if it is one."""
    if value is None or value <= 0:
        return None
    root = Fraction(round(value.numerator ** (1 / q)), round(value.denominator ** (1 / q)))
    return root if root**q == value else None
