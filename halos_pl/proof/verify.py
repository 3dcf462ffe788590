"""Checks a certificate of ``halos prove`` with python-flint alone; nothing of the prover is used or trusted.

In it, v is a chain of pieces: quotients of polynomials in u, the parameters and kernels such as exp(g). Derivatives are
formed anew, their signs on each cell follow from those of their irreducible factors, and neighbours are compared at the
seams. Then v itself is compared with the chain at thousands of points. What is left to trust: that between those points,
v is the function that was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import comb, isfinite, prod
from typing import Any

from flint import Ordering, arb, ctx, fmpq, fmpq_mpoly_ctx

Poly, Quotient, Span = Any, tuple[Any, Any], tuple[Any, Any, bool, bool]  # a span: its ends, and whether it is open there
INF, ZERO, TOLERANCE, PRECISION, POINTS, AGREEMENT = arb("inf"), arb(0), arb(2) ** -40, 160, 10_000, 1e-8
CLAIMS = {"non_decreasing": (1, 1, 0), "concave_on_gains": (2, -1, 1), "undesirable_concave_on_gains": (2, 1, -1)}
FUNCTIONS: dict[str, tuple[Callable[[arb], arb], Any, Any]] = {  # rising functions and their limits
    "exp": (lambda x: x.exp(), ZERO, INF),
    "sigmoid": (lambda x: 1 / (1 + (-x).exp()), ZERO, arb(1)),
    "softplus": (lambda x: x.exp().log1p() if x < 0 else x + (-x).exp().log1p(), ZERO, INF),
    "log": (lambda x: x.log(), -INF, INF),
    "atan": (lambda x: x.atan(), arb(-2), arb(2)),
    "erf": (lambda x: x.erf(), arb(-1), arb(1)),
}


class RefusedError(ValueError):
    """The certificate does not prove what it claims; the message says why."""


def number(text: str | None, otherwise: Any = None) -> Any:
    """A rational from its text."""
    return otherwise if text is None else fmpq(*Fraction(text).as_integer_ratio())


def corners(a: Sequence[Any], b: Sequence[Any]) -> list[arb]:
    """The ends of a product of two spans, where 0 times infinity is 0."""
    ends = [ZERO if x == 0 or y == 0 else arb(x) * y for x in a[:2] for y in b[:2]]
    return [-greatest([-x for x in ends]), greatest(ends)]


def greatest(ends: Sequence[arb]) -> arb:
    """An upper bound of the largest of some numbers."""
    top = ends[0]
    for x in ends:
        top = top.max(x)
    return top.upper() if top.is_finite() else top


class Chain:
    """Quotients in lowest terms, kernels and derivatives."""

    def __init__(self, graph: dict[str, Any]) -> None:
        self.ctx = fmpq_mpoly_ctx.get([f"x{i}" for i in range(40 + 6 * len(graph["kernels"]))], Ordering.lex)
        self.x, self.one, self.zero = self.ctx.gens(), self.ctx.constant(1), (self.ctx.constant(0), self.ctx.constant(1))
        self.kernels: dict[int, tuple[str, Quotient, Any]] = {}
        self.index: dict[str, int] = {}
        self.next, self.parameters = 1 + len(graph["parameters"]), list(graph["parameters"].values())
        for k in graph["kernels"]:
            self.kernel(k["kind"], self.read(k["argument"]), number(k["exponent"]))
        self.pieces = [(number(p["low"], -INF), number(p["high"], INF), self.read(p["value"])) for p in graph["pieces"]]

    def read(self, data: Sequence[list[Any]]) -> Quotient:
        if any(int(i) >= self.next for terms in data for _, powers in terms for i in powers):
            raise RefusedError("an expression uses a function that is not defined before it")
        n, d = ({tuple(e.get(str(i), 0) for i in range(len(self.x))): number(c) for c, e in terms} for terms in data)
        return self.ratio(self.ctx.from_dict(n), self.ctx.from_dict(d))

    def ratio(self, n: Poly, d: Poly) -> Quotient:
        if d.is_zero() or max(len(n), len(d)) > 5000:
            raise RefusedError("a division by 0, or an expression of thousands of terms")
        for i, (kind, _, p) in self.kernels.items():
            if kind == "power" and p.p == 1 and max(n.degrees()[i], d.degrees()[i]) >= p.q:
                a, b = self.reduced(n, i), self.reduced(d, i)
                return self.ratio(a[0] * b[1], a[1] * b[0])
        common = d if n.is_zero() else n.gcd(d)
        n, d = n / common, d / common
        return n / d.leading_coefficient(), d / d.leading_coefficient()

    def reduced(self, p: Poly, i: int) -> Quotient:
        """The polynomial with g in the place of (g^(1/q))^q."""
        total, (_, g, root) = self.zero, self.kernels[i]
        for e, c in p.terms():
            whole, rest = divmod(int(e[i]), int(root.q))
            total = self.add(total, (self.ctx.from_dict({(*e[:i], rest, *e[i + 1 :]): c}) * g[0] ** whole, g[1] ** whole))
        return total

    def add(self, *terms: Quotient) -> Quotient:
        n, d = self.zero
        for a, b in terms:
            n, d = n * b + a * d, d * b
        return self.ratio(n, d)

    def mul(self, *factors: Quotient) -> Quotient:
        n, d = self.one, self.one
        for a, b in factors:
            n, d = n * a, d * b
        return self.ratio(n, d)

    def kernel(self, kind: str, g: Quotient, p: Any = None) -> Quotient:
        if (key := f"{kind} {g} {p}") not in self.index:
            self.index[key], self.kernels[self.next], self.next = self.next, (kind, g, p), self.next + 1
        return self.x[self.index[key]], self.one

    def slope(self, i: int) -> Quotient:
        """d/du of a variable."""
        if i not in self.kernels:
            return (self.one if i == 0 else self.zero[0]), self.one
        (kind, g, p), (x, one) = self.kernels[i], (self.x[i], self.one)
        if (inner := self.derivative(g))[0].is_zero():
            return inner
        n2, d2 = self.mul(g, g)
        outer: dict[str, Callable[[], Quotient]] = {
            "exp": lambda: (x, one),
            "sigmoid": lambda: (x * (1 - x), one),
            "softplus": lambda: self.kernel("sigmoid", g),
            "log": lambda: (g[1], g[0]),
            "atan": lambda: (d2, n2 + d2),
            "erf": lambda: (2 * self.kernel("exp", (-n2, d2))[0], self.kernel("power", self.kernel("pi", self.zero), fmpq(1, 2))[0]),
            "sin": lambda: self.kernel("cos", g),
            "cos": lambda: (-self.kernel("sin", g)[0], one),
            "power": lambda: (p * x * g[1], g[0]),
        }  # fmt: skip
        return self.mul(outer[kind](), inner)

    def derivative(self, a: Quotient) -> Quotient:
        n, d = a
        used = [i for i in range(self.next) if n.degrees()[i] > 0 or d.degrees()[i] > 0]
        partial = [(n.derivative(i) * d - n * d.derivative(i), d * d) for i in used]
        return self.add(self.zero, *(self.mul(each, self.slope(i)) for each, i in zip(partial, used, strict=True)))


class Cell:
    """Ranges and signs where u and the parameters are in spans."""

    def __init__(self, chain: Chain, low: Any, high: Any, at_values: bool = False) -> None:
        self.chain, self.known = chain, {0: (low, high, True, True)}
        for i, p in enumerate(chain.parameters):
            ends = (number(p["value"]),) * 2 if at_values else (number(p["low"], -INF), number(p["high"], INF))
            self.known[1 + i] = (*ends, p["above_low"], p["below_high"])

    def __getitem__(self, i: int) -> Span:
        if i not in self.known:
            self.known[i] = self.of_kernel(*self.chain.kernels[i])
        return self.known[i]

    def of_kernel(self, kind: str, g: Quotient, p: Any) -> Span:
        if kind in ("pi", "sin", "cos"):
            return (arb.pi(), arb.pi(), False, False) if kind == "pi" else (arb(-1), arb(1), False, False)
        low, high = self.range(g)
        if kind == "softminus":
            kind, low, high = "softplus", -high, -low
        if kind in ("log", "power") and not low > 0:
            low = ZERO
            if self.sign(g) != (1, True):
                raise RefusedError(f"the argument of {kind} may be 0 or below")
        f, least, most = FUNCTIONS.get(kind, (lambda x: x**p, ZERO, INF))
        turned = kind == "power" and p < 0
        first, last = (most, least) if turned else (least, most)
        a, b = f(low) if low.is_finite() and (low > 0 or kind not in ("log", "power")) else first, f(high) if high.is_finite() else last
        a, b = (b, a) if turned else (a, b)
        a, b = least if not a > least else a.lower(), most if not b < most else b.upper()
        return a, b, bool(a == least), bool(b == most)

    def range(self, a: Quotient, sizes: bool = False) -> list[arb]:
        """Encloses a quotient, monomial by monomial; ``sizes``: the sum of the absolute values of its monomials."""
        spans = []
        for p in a:
            total = [ZERO, ZERO]
            for e, c in p.terms():
                ends = [arb(c)] * 2
                for i in (i for i, k in enumerate(e) for _ in range(int(k))):
                    ends = corners(ends, self[i])
                ends = [greatest([-ends[0], ends[1]])] * 2 if sizes and p is a[0] else ends
                total = [x + y for x, y in zip(total, ends, strict=True)]
            spans.append([-INF, INF] if any(x.is_nan() for x in total) else total)
        sign, strict = self.sign((a[1], self.chain.one))
        if not sign or not strict:
            raise RefusedError("a divisor may be 0")
        low, high = (x * sign for x in spans[1][::sign])
        inverse = [1 / high if high.is_finite() else ZERO, 1 / low if low > 0 else INF]
        return corners([x * sign for x in spans[0][::sign]], inverse)

    def sign(self, a: Quotient) -> tuple[int | None, bool]:
        """1, -1, 0 (identically) or None (not found), and whether the quotient is never 0."""
        result, strict = 1, True
        for p in a:
            if p.is_zero():
                return 0, False
            c, factors = p.factor()
            result *= 1 if c > 0 else -1
            for factor, times in factors:
                one, never = self.of_factor(factor)
                if one is None and (times % 2 or p is a[1]):
                    return None, False
                result, strict = result * (one if one and times % 2 else 1), strict and never
        return result, strict

    def of_factor(self, p: Poly) -> tuple[int | None, bool]:
        found, one = self.of_terms(p), self.chain.one
        for i in [i for i, degree in enumerate(p.degrees()) if degree > 0 and i in self.chain.kernels and not found[1]]:
            kind, g, q = self.chain.kernels[i]
            b = p.derivative(i)
            rest = p - b * self.chain.x[i]
            if kind == "softplus" and g[1] == one and self.range(g)[0] >= 0:  # softplus(g) = g + softplus(-g)
                turned = self.chain.kernel("softminus", g)[0] + g[0]
                values = [turned if j == i else x for j, x in enumerate(self.chain.x)]
                return self.sign((p.compose(*values, ctx=self.chain.ctx), one))
            if kind == "power" and q == fmpq(1, 2) and p.degrees()[i] == 1:  # rest + b sqrt(g)
                first, second = self.sign((rest, one)), self.sign((b, one))
                larger = self.sign(self.chain.add((rest * rest, one), (-b * b * g[0], g[1])))
                if first[0] and second[0] and (first[0] == second[0] or larger[0]):
                    return (first[0], first[1]) if first[0] == second[0] else (first[0] if larger[0] == 1 else second[0], larger[1])
        return found

    def of_terms(self, p: Poly) -> tuple[int | None, bool]:
        """The sign of all coefficients after each variable is written in t > 0: low + t, high - t or a mean of both."""
        used = [i for i, degree in enumerate(p.degrees()) if degree > 0]
        terms: dict[tuple[int, ...], Any] = {tuple(int(e[i]) for i in used): c for e, c in p.terms()}
        always = {}
        for place, i in enumerate(used):
            (low, high, above, below), n, new = self[i], p.degrees()[i], {}
            left, right = arb(low).is_finite(), arb(high).is_finite()
            always[place] = (above or n == 0, below) if left and right else (above if left else below, True)

            def row(k: int, j: int, n: int = n, low: Any = low, high: Any = high, left: bool = left, right: bool = right) -> Any:
                if left and right:  # x = (low + high t) / (1 + t)
                    hs = range(max(0, j - n + k), min(j, k) + 1)
                    return sum((comb(k, h) * comb(n - k, j - h) * low ** (k - h) * high**h for h in hs), fmpq(0))
                end, way = (low, 1) if left else (high, -1) if right else (fmpq(0), 1)
                return comb(k, j) * end ** (k - j) * way**j if j <= k else fmpq(0)

            for e, c in terms.items():
                for j in range(n + 1):
                    if (factor := row(e[place], j)) != 0:
                        key = (*e[:place], j, *e[place + 1 :])
                        new[key] = new.get(key, fmpq(0)) + c * factor
            if len(new) > 5000 or not (left or right) and any(e[place] % 2 for e in new):
                return None, False
            terms = new
        full = len(terms) == prod(p.degrees()[i] + 1 for i in used) and all(arb(c) > 0 or arb(c) < 0 for c in terms.values())
        signs, strict = set[int | None](), full
        for e, c in terms.items():
            c = arb(c)
            signs |= {1 if c >= 0 else -1 if c <= 0 else None} - ({1, -1} if c == 0 else set())
            sure = all((k == 0 or always[i][0]) and (k == p.degrees()[used[i]] or always[i][1]) for i, k in enumerate(e))
            strict |= sure and bool(c > 0 or c < 0)
        return (signs.pop(), strict) if len(signs) == 1 and None not in signs else (None, False)


def _pieces(chain: Chain, side: int) -> Iterator[tuple[int, Any, Any, Quotient]]:
    """The part of each piece on gains (1), on losses (-1) or everywhere (0)."""
    for i, (low, high, value) in enumerate(chain.pieces):
        low, high = (fmpq(0) if side > 0 and low < 0 else low), (fmpq(0) if side < 0 and high > 0 else high)
        if low < high:
            yield i, low, high, value


def check(graph: dict[str, Any], claim: dict[str, Any]) -> None:
    """Raises RefusedError unless the cells and seams of the chain prove the claim."""
    chain, (order, wanted, side) = Chain(graph), CLAIMS[claim["claim"]]
    ends = [(low, high) for low, high, _ in chain.pieces]
    if not (ends and ends[0][0] == -INF and ends[-1][1] == INF and all(a[0] < b[0] <= a[1] < b[1] for a, b in zip(ends, ends[1:], strict=False))):
        raise RefusedError("the pieces do not cover the real line")
    for i, low, high, value in _pieces(chain, side):
        cells = [(number(a, -INF), number(b, INF)) for a, b in claim["cells"].get(str(i), [])]
        if not cells or (cells[0][0], cells[-1][1]) != (low, high) or any(a[1] != b[0] for a, b in zip(cells, cells[1:], strict=False)):
            raise RefusedError(f"the cells of piece {i} do not cover it")
        target = chain.derivative(value) if order == 1 else chain.derivative(chain.derivative(value))
        for a, b in cells:
            cell, start = Cell(chain, a, b), Cell(chain, a, a)
            cell.range(value)
            if a != low:
                start.range(value)  # v is smooth where two cells meet
            if cell.sign(target)[0] not in (0, wanted):
                slope = cell.sign(chain.derivative(target))[0]
                end = a if slope == wanted else b
                if slope is None or not abs(arb(end)) < INF or not _at_least(chain, target, end, wanted):
                    raise RefusedError(f"piece {i}: the derivative may have the wrong sign in ({a}, {b})")
    for left, right in zip(chain.pieces, chain.pieces[1:], strict=False):
        if not (side and left[1] == right[0] == 0) and not (side > 0 and left[1] <= 0) and not (side < 0 and right[0] >= 0):
            _step(chain, left[2], right[2], right[0], left[1], 0 if side else 1)
            if side:
                _step(chain, chain.derivative(left[2]), chain.derivative(right[2]), right[0], left[1], wanted)


def _at_least(chain: Chain, a: Quotient, u: Any, wanted: int) -> bool:
    """Whether the quotient has the wanted sign at u, or is 0 there to within the tolerance."""
    cell = Cell(chain, u, u)
    (low, high), size = cell.range(a), cell.range(a, sizes=True)[1]
    return bool((low if wanted > 0 else -high) >= -TOLERANCE * size)


def _step(chain: Chain, left: Quotient, right: Quotient, low: Any, high: Any, allowed: int) -> None:
    """Raises RefusedError if there is a jump at a seam that the claim does not allow."""
    cell = Cell(chain, low, high)
    a, b = cell.range(left), cell.range(right)
    size = TOLERANCE * (cell.range(left, sizes=True)[1] + cell.range(right, sizes=True)[1])
    if left != right and not ((allowed > 0 or b[1] - a[0] <= size) and (allowed < 0 or b[0] - a[1] >= -size)):
        raise RefusedError(f"v or its slope jumps at {float(arb(low)):g}")


def compare(graph: dict[str, Any], v: Callable[[list[float]], list[float]]) -> None:
    """Raises RefusedError unless v agrees with the chain at points of all pieces, in both tails and near the seams."""
    chain = Chain(graph)
    seams = {float(arb(end)) for low, high, _ in chain.pieces for end in (low, high) if abs(arb(end)) < INF} | {0.0}
    points = {s + w * 10.0**k for s in seams for w in (-1, 0, 1, 3) for k in range(-9, 1)}
    points |= {s * 10 ** (8 * i / POINTS - 4) for i in range(POINTS) for s in (-1, 1)}
    us, largest = sorted(points, key=abs), 0.0
    for u, found in zip(us, v(us), strict=True):
        exact, ranges = number(str(Fraction(u))), list[arb]()
        near = abs(exact) / 10**9  # within rounding of a seam, either side
        for low, high, value in chain.pieces:
            if low - near <= exact <= high + near:
                ranges += Cell(chain, exact, exact, at_values=True).range(value)
        if ranges and isfinite(found):
            a, b = -float(greatest([-x for x in ranges])), float(greatest(ranges))
            largest = max(largest, abs(a), abs(b))
            if not a - AGREEMENT * largest <= found <= b + AGREEMENT * largest:
                raise RefusedError(f"v({u:.17g}) is {found:.17g}; the certificate is about another function, which is {a:.17g} there")
        elif not ranges or abs(u) < 700:
            raise RefusedError(f"v({u:.17g}) is {found}; it cannot be compared with the certificate")


def verify(certificate: dict[str, Any], v: Callable[[list[float]], list[float]], source: str) -> list[str]:
    """The proved claims of a certificate, after all that it says has been checked.

    Args:
        certificate: the parsed JSON.
        v: the function that it names, at float64 outcomes in nats.
        source: SHA-256 of that function's code.

    Raises:
        RefusedError: the certificate does not prove what it claims about v.
    """
    ctx.prec, proved = PRECISION, [claim for claim in certificate["claims"] if claim["status"] == "proved"]
    if certificate["source"] != source:
        raise RefusedError("the code of v has changed since the proof; run halos prove again")
    for claim in proved:
        check(certificate["graphs"][claim["graph"]], claim)
    for graph in {claim["graph"] for claim in proved}:
        compare(certificate["graphs"][graph], v)
    return [claim["claim"] for claim in proved]
