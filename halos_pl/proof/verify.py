"""Checks a certificate of ``halos prove`` with python-flint alone; nothing of the prover is used or trusted.

In it, v is a chain of quotients of polynomials in u, the parameters and kernels such as exp(g). Derivatives are formed
anew, their signs on each cell follow from those of their irreducible factors, and neighbours are compared at the seams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import reduce
from itertools import pairwise
from math import prod
from typing import Any

from flint import Ordering, arb, arb_poly, ctx, fmpq, fmpq_mpoly_ctx, fmpq_poly

Quotient = tuple[Any, Any]  # of polynomials
INF, ZERO, TOLERANCE, PRECISION = arb("inf"), arb(0), arb(2) ** -48, 160
CLAIMS = {"non_decreasing": (1, 1, 0), "concave_on_gains": (2, -1, 1), "undesirable_concave_on_gains": (2, 1, -1)}
FUNCTIONS: dict[str, tuple[Callable[[arb, Any], arb], Any, Any]] = {  # rising functions and their limits
    "exp": (lambda x, p: x.exp(), ZERO, INF),
    "sigmoid": (lambda x, p: 1 / (1 + (-x).exp()), ZERO, arb(1)),
    "softplus": (lambda x, p: x.exp().log1p() if x < 0 else x + (-x).exp().log1p(), ZERO, INF),
    "log": (lambda x, p: x.log(), -INF, INF),
    "atan": (lambda x, p: x.atan(), arb(-2), arb(2)),
    "erf": (lambda x, p: x.erf(), arb(-1), arb(1)),
    "log_ndtr": (lambda x, p: _log_ndtr(x), -INF, ZERO),
    "hazard": (lambda x, p: (2 / arb.pi()).sqrt() * (-x * x / 2).exp() / (x / arb(2).sqrt()).erfc(), ZERO, INF),
    "gap": (lambda x, p: x + FUNCTIONS["hazard"][0](-x, p), ZERO, INF),
    "power": (lambda x, p: x**p, ZERO, INF),
    "pi": (lambda x, p: arb.pi(), ZERO, INF),
}


def _log_ndtr(x: arb) -> arb:
    tail = -x * x / 2 - (-x * (2 * arb.pi()).sqrt()).log() + ZERO.union(-2 / x**2)  # Mills' ratio
    return tail if x < -10_000 else ((-x / arb(2).sqrt()).erfc() / 2).log()


class RefusedError(ValueError):
    """The certificate does not prove what it claims; the message says why."""


def number(text: str | None, otherwise: Any = None) -> Any:
    """A rational from its text, which is a whole number or a fraction."""
    return otherwise if text is None else fmpq(*Fraction(text).as_integer_ratio())


def _span(p: dict[str, Any]) -> tuple[Any, Any]:
    return number(p["low"], -INF), number(p["high"], INF)


def _corners(a: Sequence[Any], b: Sequence[Any]) -> list[arb]:  # of a product of ranges; 0 times infinity is 0
    ends = [ZERO if x == 0 or y == 0 else arb(x) * y for x in a[:2] for y in b[:2]]
    return [-greatest([-x for x in ends]), greatest(ends)]


def greatest(ends: Sequence[arb]) -> arb:
    """An upper bound of some numbers."""
    return reduce(arb.max, ends).upper()


class Chain:
    """Quotients in lowest terms, kernels and derivatives."""

    def __init__(self, graph: dict[str, Any]) -> None:
        variables = 40 + len(graph["parameters"]) + 6 * len(graph["kernels"])
        self.ctx = fmpq_mpoly_ctx.get([f"x{i}" for i in range(variables)], Ordering.lex)
        self.x, self.one = self.ctx.gens(), self.ctx.constant(1)
        self.zero = 0 * self.one, self.one
        self.kernels, self.index = dict[int, tuple[str, Quotient, Any]](), dict[str, int]()
        self.parameters = {1 + i: p for i, p in enumerate(graph["parameters"])}
        for k in graph["kernels"]:
            self.kernel(k["kind"], self.read(k["argument"]), number(k["exponent"]))
        self.pieces = [(*_span(piece), self.read(piece["value"])) for piece in graph["pieces"]]
        if len(self.kernels) < len(graph["kernels"]):
            raise RefusedError("a function occurs twice")

    def read(self, data: Sequence[list[Any]]) -> Quotient:
        n, d = ({tuple(dict(e).get(i, 0) for i in range(len(self.x))): number(c) for c, e in terms} for terms in data)
        return self.ratio(self.ctx.from_dict(n), self.ctx.from_dict(d))

    def ratio(self, n: Any, d: Any) -> Quotient:
        if d.is_zero() or max(len(n), len(d)) > 5000:
            raise RefusedError("a division by 0, or an expression of thousands of terms")
        for i, (kind, _, p) in self.kernels.items():
            if kind == "power" and p.p == 1 and max(n.degrees()[i], d.degrees()[i]) >= p.q:
                a, b = self.reduced(n, i), self.reduced(d, i)
                return self.ratio(a[0] * b[1], a[1] * b[0])
        common = d if n.is_zero() else n.gcd(d)
        n, d, leading = n / common, d / common, (d / common).leading_coefficient()
        return n / leading, d / leading

    def reduced(self, p: Any, i: int) -> Quotient:
        total, (_, g, root) = self.zero, self.kernels[i]
        for e, c in p.terms():
            whole, rest = divmod(int(e[i]), int(root.q))
            monomial = self.ctx.from_dict({(*e[:i], rest, *e[i + 1 :]): c})
            total = self.add(total, (monomial * g[0] ** whole, g[1] ** whole))
        return total

    def add(self, a: Quotient, b: Quotient) -> Quotient:
        return self.ratio(a[0] * b[1] + b[0] * a[1], a[1] * b[1])

    def mul(self, a: Quotient, b: Quotient) -> Quotient:
        return self.ratio(a[0] * b[0], a[1] * b[1])

    def kernel(self, kind: str, g: Quotient, p: Any = None) -> Any:
        i = self.index.setdefault(f"{kind} {g} {p}", 1 + len(self.parameters) + len(self.kernels))
        self.kernels.setdefault(i, (kind, g, p))
        return self.x[i]

    def slope(self, i: int) -> Quotient:
        if i not in self.kernels:
            return (self.one if i == 0 else self.zero[0]), self.one
        (kind, g, p), x, inner = self.kernels[i], self.x[i], self.derivative(self.kernels[i][1])
        if inner[0].is_zero():
            return inner
        (n2, d2), pi, minus = self.mul(g, g), (self.kernel("pi", self.zero), self.one), (-g[0], g[1])
        outer: dict[str, Callable[[], Quotient]] = {
            "exp": lambda: (x, self.one),
            "sigmoid": lambda: (x * (1 - x), self.one),
            "softplus": lambda: (self.kernel("sigmoid", g), self.one),
            "log": lambda: (g[1], g[0]),
            "atan": lambda: (d2, n2 + d2),
            "erf": lambda: (2 * self.kernel("exp", (-n2, d2)), self.kernel("power", pi, fmpq(1, 2))),
            "log_ndtr": lambda: (self.kernel("hazard", minus), self.one),
            "hazard": lambda: (x * self.kernel("gap", minus), self.one),
            "gap": lambda: (1 - x * self.kernel("hazard", minus), self.one),
            "power": lambda: (p * x * g[1], g[0]),
        }
        return self.mul(outer[kind](), inner)

    def derivative(self, a: Quotient) -> Quotient:
        (n, d), total = a, self.zero
        for i in [i for i, k in enumerate((n * d).degrees()) if k > 0]:
            total = self.add(total, self.mul((n.derivative(i) * d - n * d.derivative(i), d * d), self.slope(i)))
        return total


class Cell:
    """Ranges and signs where u and the parameters are in ranges: the two ends, and whether each is excluded."""

    def __init__(self, chain: Chain, low: Any, high: Any) -> None:
        self.chain, self.known = chain, {0: (low, high, True, True)}
        self.known |= {i: (*_span(p), p["above_low"], p["below_high"]) for i, p in chain.parameters.items()}

    def __getitem__(self, i: int) -> tuple[Any, Any, bool, bool]:
        if i not in self.known:
            kind, g, p = self.chain.kernels[i]
            (f, least, most), (low, high, _) = FUNCTIONS[kind], self.range(g)
            undefined = kind in ("log", "power") and not low > 0  # at its lower end, at most
            if (undefined and self.sign(g) != (1, True)) or (p is not None and p < 0):
                raise RefusedError(f"the argument of {kind} may be 0 or below")
            a, b = f(low, p) if low.is_finite() and not undefined else least, f(high, p) if high.is_finite() else most
            a, b = a.lower() if a > least else least, b.upper() if b < most else most
            self.known[i] = a, b, bool(a == least), bool(b == most)
        return self.known[i]

    def range(self, a: Quotient) -> list[arb]:  # low, high, and the sum of the sizes of the monomials
        spans = []
        for p in a:
            total = [ZERO, ZERO, ZERO]
            for e, c in p.terms():
                ends = [arb(c)] * 2
                for i in (i for i, k in enumerate(e) for _ in range(int(k))):
                    ends = _corners(ends, self[i])
                total = [x + y for x, y in zip(total, [*ends, greatest([-ends[0], ends[1]])], strict=True)]
            spans.append([-INF, INF, INF] if any(x.is_nan() for x in total) else total)
        sign, strict = self.sign((a[1], self.chain.one))
        if not (sign and strict):
            raise RefusedError("a divisor may be 0")
        low, high = (x * sign for x in spans[1][:2][::sign])
        inverse = [1 / high if high.is_finite() else ZERO, 1 / low if low > 0 else INF]
        return [*_corners([x * sign for x in spans[0][:2][::sign]], inverse), _corners([spans[0][2]] * 2, inverse)[1]]

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
                if one is None and times % 2:
                    return None, False
                result, strict = result * (one if one and times % 2 else 1), strict and never
        return result, strict

    def of_factor(self, p: Any) -> tuple[int | None, bool]:
        found, one = self.of_terms(p), self.chain.one
        for i in [i for i, k in enumerate(p.degrees()) if k == 1 and i in self.chain.kernels and not found[1]]:
            (kind, g, q), b = self.chain.kernels[i], p.derivative(i)
            if kind == "power" and q == fmpq(1, 2):  # a + b sqrt(g), by a^2 - b^2 g
                a = p - b * self.chain.x[i]
                first, second = self.sign((a, one)), self.sign((b, one))
                larger = self.sign(self.chain.add((a * a, one), (-b * b * g[0], g[1])))
                if first[0] and second[0] and (first[0] == second[0] or larger[0]):
                    return first if first[0] == second[0] else ((first if larger[0] == 1 else second)[0], larger[1])
        return found

    def of_terms(self, p: Any) -> tuple[int | None, bool]:
        """The sign of all coefficients after each variable is written in t > 0, and whether the sum is never 0."""
        used = [i for i, degree in enumerate(p.degrees()) if degree > 0]
        terms: dict[tuple[int, ...], Any] = {tuple(int(e[i]) for i in used): c for e, c in p.terms()}
        ends = []
        for place, i in enumerate(used):
            (low, high, above, below), n, new = self[i], p.degrees()[i], dict[tuple[int, ...], Any]()
            left, right = abs(arb(low)) < INF, abs(arb(high)) < INF
            x = [low, high] if left and right else [low, 1] if left else [high, -1] if right else [0, 1]
            poly = arb_poly if any(isinstance(c, arb) for c in x) else fmpq_poly
            y = poly([1, 1]) if left and right else poly([1])  # x = (low + high t) / (1 + t), low + t, high - t or t
            rows = [list((poly(x) ** k * y ** (n - k)).coeffs()) for k in range(n + 1)]
            for e, c in terms.items():
                for j, factor in enumerate(rows[e[place]]):
                    if factor != 0:
                        key = (*e[:place], j, *e[place + 1 :])
                        new[key] = new.get(key, fmpq(0)) + c * factor
            if len(new) > 5000 or (not (left or right) and any(e[place] % 2 for e in new)):
                return None, False
            ends.append((above, below) if left and right else (above if left else below, True))
            terms = new
        nonzero = [e for e, c in terms.items() if not arb(c).contains(0)]
        if any(e not in nonzero and not arb(c).is_zero() for e, c in terms.items()):  # a ball around 0
            return None, False
        degrees, signs = [p.degrees()[i] for i in used], {1 if arb(terms[e]) > 0 else -1 for e in nonzero}
        strict = len(nonzero) == prod(n + 1 for n in degrees)
        for e in nonzero:
            strict |= all((k == 0 or a) and (k == n or b) for k, n, (a, b) in zip(e, degrees, ends, strict=True))
        return (signs.pop(), strict) if len(signs) == 1 else (None, False)


def _covers(parts: Sequence[tuple[Any, Any]], low: Any, high: Any, overlap: bool = False) -> bool:  # in order
    met = all(a[1] == b[0] or (overlap and a[0] < b[0] < a[1] < b[1]) for a, b in pairwise(parts))
    return bool(parts) and parts[0][0] == low and parts[-1][1] == high and met and all(a < b for a, b in parts)


def target(chain: Chain, claim: dict[str, Any], value: Quotient) -> Quotient:
    """The derivative that a claim is about, on a piece."""
    slope = chain.derivative(value)
    return slope if CLAIMS[claim["claim"]][0] == 1 else chain.derivative(slope)


def check(graph: dict[str, Any], claim: dict[str, Any]) -> list[str]:
    """The jumps that the tolerance excuses; raises RefusedError unless the cells and seams prove the claim."""
    chain, (_, wanted, side), jumps = Chain(graph), CLAIMS[claim["claim"]], list[str]()
    if not _covers([(low, high) for low, high, _ in chain.pieces], -INF, INF, overlap=True):
        raise RefusedError("the pieces do not cover the real line")
    for i, (low, high, value) in enumerate(chain.pieces):
        low, high = fmpq(0) if side > 0 and low < 0 else low, fmpq(0) if side < 0 and high > 0 else high
        cells = [tuple(map(number, ends, (-INF, INF) * 2)) for ends in claim["cells"][i]]
        if not (_covers([(a, b) for a, b, _, _ in cells], low, high) if low < high else not cells):
            raise RefusedError(f"the cells of piece {i} are not a cover of it")
        signed = target(chain, claim, value)
        for a, b, least, most in cells:
            for x in [(a, b)] if a == low else [(a, b), (a, a)]:  # v is smooth on a cell, and where two meet
                Cell(chain, *x).range(value)
            cell = Cell(chain, a, b)
            found = cell.range(signed) if abs(arb(least)) < INF or abs(arb(most)) < INF else (least, most)
            if not (least <= found[0] and found[1] <= most):
                raise RefusedError(f"a derivative on piece {i} is not enclosed as it says")
            if cell.sign(signed)[0] not in (0, wanted):
                slope = cell.sign(chain.derivative(signed))[0]
                end = a if slope == wanted else b  # from here, where the sign is right, it moves away from 0
                jumps += _step(chain, chain.zero, signed, end, end, wanted if slope and abs(arb(end)) < INF else 2)
    for (_, high, left), (low, _, right) in pairwise(chain.pieces):
        if not (side and high == low == 0) and not (side > 0 and high <= 0) and not (side < 0 and low >= 0):
            jumps += _step(chain, left, right, low, high, 0 if side else 1)
            if side:
                jumps += _step(chain, chain.derivative(left), chain.derivative(right), low, high, wanted)
    return jumps


def _step(chain: Chain, left: Quotient, right: Quotient, low: Any, high: Any, allowed: int) -> list[str]:
    """Raises RefusedError if ``right - left`` is neither 0 nor of the allowed sign, within the tolerance."""
    cell = Cell(chain, low, high)
    if allowed != 2 and cell.sign(chain.add(right, (-left[0], left[1])))[0] in (0, allowed):
        return []
    a, b = cell.range(left), cell.range(right)
    size, up, down = TOLERANCE * (a[2] + b[2]), b[1] - a[0], b[0] - a[1]
    if allowed == 2 or not size < INF or not (allowed == 1 or up <= size) or not (allowed == -1 or down >= -size):
        raise RefusedError(f"a value, slope or curvature has the wrong sign, or a jump, at or near {low}")
    size = greatest([up, -down]) if up < 0 or down > 0 else ZERO
    return [f"u = {float(arb(low)):.6g}: a jump of up to {float(size):.1e}, within the tolerance"] * bool(size > 0)


def verify(certificate: dict[str, Any], source: str) -> dict[str, list[str]]:
    """The proved claims of a certificate, and for each the jumps that the tolerance excuses.

    ``source`` is the SHA-256 of the code of v as it is now. Raises RefusedError if a claim is not proved.
    """
    ctx.prec, claims, graphs = PRECISION, certificate["claims"], certificate["graphs"]
    if certificate["source"] != source:
        raise RefusedError("the code of v has changed since the proof; run halos prove again")
    proved = [claim for claim in claims if claim["graph"] is not None]
    return {claim["claim"]: check(graphs[claim["graph"]], claim) for claim in proved}
