"""Exact expressions of u: quotients of polynomials in u, the parameters and kernels such as exp(g) and log(g)."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from math import comb
from typing import Any

from flint import Ordering, fmpq, fmpq_mpoly, fmpq_mpoly_ctx

# Coefficients that cancel to within this share of their size are taken as equal: constants of v are floats, and this is
# what 32 roundings of a float64 may amount to.
TOLERANCE = fmpq(1, 2**48)
_LONG = re.compile(r"(?=\d*/?\d{17})(\d+)(?:/(\d+))?")  # a rational that is shown as a decimal, as it is or nearly
LARGEST_POWER, MOST_TERMS, MOST_PRODUCTS = 24, 1500, 100_000


class TooLargeError(ValueError):
    """An expression grows beyond what is worth computing, or there is no time left to compute it."""


class UndecidedError(ValueError):
    """The proof cannot be completed; the message says where and why."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A function of an expression that is a variable of the polynomials.

    Attributes:
        kind: exp, sigmoid, softplus, log, atan, erf, log_ndtr, hazard (the slope of -log_ndtr(-g)), gap (g +
            hazard(-g)), sin, cos, power, or pi, which has no argument.
        argument: the expression g.
        exponent: of a power, a rational or an expression in the parameters.
    """

    kind: str
    argument: Element
    exponent: Fraction | Element | None = None


@dataclass(frozen=True, eq=False)
class Element:
    """numerator / denominator in lowest terms; the denominator's leading coefficient is 1."""

    field: Expressions
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
        product = self.field.product
        top, bottom = product(self.numerator, other.numerator), product(self.denominator, other.denominator)
        return self.field.quotient(top, bottom)

    def __truediv__(self, other: Element) -> Element:
        product = self.field.product
        top, bottom = product(self.numerator, other.denominator), product(self.denominator, other.numerator)
        return self.field.quotient(top, bottom)

    def power(self, exponent: int) -> Element:
        """A whole power."""
        if abs(exponent) > LARGEST_POWER:
            raise TooLargeError(f"a power of {exponent}")
        if comb(max(len(self.numerator), len(self.denominator)) + abs(exponent) - 1, abs(exponent)) > MOST_PRODUCTS:
            raise TooLargeError("an expression of thousands of terms")
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
                partial = field.product(n.derivative(i), d) - field.product(n, d.derivative(i))
                total = total + field.quotient(partial, field.product(d, d)) * slope
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
        text = _LONG.sub(lambda match: f"{Decimal(match[1]) / Decimal(match[2] or 1):.6g}", text)
        return re.sub(r"x(\d+)", lambda match: self.field.name(int(match[1])), text)


class Expressions:
    """The expressions of one program, and their arithmetic.

    Args:
        parameters: names of the unknowns beside u.
        size: number of variables: u, the parameters and all kernels.

    Attributes:
        excused: products of variables whose coefficient was taken as 0, with the largest such coefficient.
        assumed: signs of polynomials, and whether they are strict: never 0.
        replaced: what stands for a parameter, by its variable.
        monic: polynomials with leading coefficient 1, by key, of which signs are known somewhere.
        deadline: CPU time (``time.process_time``) after which nothing more is computed.
    """

    def __init__(self, parameters: Sequence[str], size: int) -> None:
        self.ctx = fmpq_mpoly_ctx.get([f"x{i}" for i in range(size)], Ordering.lex)
        self.generators = self.ctx.gens()
        self.parameters = list(parameters)
        self.kernels: dict[int, Kernel] = {}
        self._by_key: dict[tuple[str, str, str], int] = {}
        self._next = 1 + len(parameters)
        self._factors: dict[str, tuple[int, list[tuple[fmpq_mpoly, int]]]] = {}
        self._bases: dict[int, frozenset[int]] = {}
        self._roots: dict[int, int] = {}  # q by the kernel g^(1/q)
        self.deadline = float("inf")
        self.excused: dict[str, tuple[fmpq, Element]] = {}
        self.assumed: list[tuple[fmpq_mpoly, int, bool]] = []
        self.replaced: dict[int, Element] = {}
        self.monic: dict[str, fmpq_mpoly] = {}
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

    def parameter(self, name: str) -> Element:
        """A parameter, or what stands for it."""
        index = 1 + self.parameters.index(name)
        return self.replaced.get(index) or self.variable(index)

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

    def product(self, a: fmpq_mpoly, b: fmpq_mpoly) -> fmpq_mpoly:
        """a b, which must not be too large."""
        if len(a) * len(b) > MOST_PRODUCTS:
            raise TooLargeError("an expression of thousands of terms")
        return a * b

    def require_time(self) -> None:
        """Raises TooLargeError after the deadline. Each step that may take long asks first; none is long by itself."""
        if time.process_time() > self.deadline:
            raise TooLargeError("there is no time left")

    def slope(self, index: int) -> Element:
        """d/du of a variable."""
        raise NotImplementedError

    def quotient(self, n: fmpq_mpoly, d: fmpq_mpoly) -> Element:
        """n / d in lowest terms, with roots reduced.

        Raises:
            ZeroDivisionError: d is 0 identically.
            TooLargeError: it has too many terms.
        """
        if len(n) > MOST_TERMS or len(d) > MOST_TERMS:
            raise TooLargeError("an expression of thousands of terms")
        self.require_time()
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
            self.require_time()
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
                self.require_time()
                d = self.product(d, e.denominator / d.gcd(e.denominator))
        parts = [e.numerator if e.denominator == d else self.product(e.numerator, d / e.denominator) for e in elements]
        n = parts[0]
        for part in parts[1:]:
            n = n + part
        if sum(map(len, parts)) > len(n):
            n = self._without_residues(n, parts)
        return self.quotient(n, d)

    def _without_residues(self, n: fmpq_mpoly, parts: Sequence[fmpq_mpoly]) -> fmpq_mpoly:
        sizes = self.ctx.constant(0)
        for part in parts:
            sizes += self.ctx.from_dict({exponents: abs(c) for exponents, c in part.terms()})
        return self.settled(n, sizes).numerator

    def settled(self, n: fmpq_mpoly, sizes: fmpq_mpoly) -> Element:
        """A sum without coefficients that cancel to within ``TOLERANCE`` of the ``sizes`` that they come from."""
        of = {exponents: abs(c) for exponents, c in sizes.terms()}
        kept = {exponents: c for exponents, c in n.terms() if abs(c) > TOLERANCE * of[exponents]}
        if len(kept) == len(n):
            return Element(self, n, self.ctx.constant(1))
        for exponents, c in n.terms():
            if exponents not in kept:
                what = Element(self, self.ctx.from_dict({exponents: fmpq(1)}), self.ctx.constant(1))
                self.excused[what.key] = max(
                    self.excused.get(what.key, (fmpq(0), what)), (abs(c), what), key=lambda x: x[0]
                )
        return Element(self, self.ctx.from_dict(kept), self.ctx.constant(1))

    def kernel(self, kind: str, argument: Element, exponent: Fraction | Element | None = None) -> int:
        """The variable of a kernel, which is added if it is new."""
        power = exponent.key if isinstance(exponent, Element) else str(exponent)
        key = (kind, argument.key, power)
        if key not in self._by_key:
            if self._next == len(self.generators):
                raise TooLargeError(
                    f"it takes more than {len(self.kernels)} different functions, such as exp(u), and values of them,"
                    " such as exp(2); a simpler formula may take fewer"
                )
            self._by_key[key] = self._next
            self.kernels[self._next] = Kernel(kind, argument, exponent)
            self._next += 1
        return self._by_key[key]

    def root_of(self, index: int) -> int | None:
        """q, if the kernel is g^(1/q)."""
        return self._roots.get(index)

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
