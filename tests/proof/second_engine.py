"""A second check of certificates, which reads their JSON alone and shares no code with halos_pl: mpmath's intervals.

Value, slope and curvature are carried together (a jet). Signs, enclosures and seams are checked on random narrow
intervals, to within 2^-48 of the sizes involved; it refutes, and does not prove.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from random import Random
from typing import Any

from mpmath import iv, mp

FAR, TOLERANCE = Fraction(10**6), Fraction(1, 2**48)  # where a tail ends; of the sizes
CLAIMS = {"non_decreasing": (1, 1, 0), "concave_on_gains": (2, -1, 1), "undesirable_concave_on_gains": (2, 1, -1)}
Jet = tuple[Any, Any, Any]


class Refuted(AssertionError):
    """A certificate that does not hold; the message says where."""


def _iv(x: Any) -> Any:
    x = Fraction(x)
    return iv.mpf(x.numerator) / x.denominator


def _rising(f: Any, x: Any) -> Any:
    """Encloses a rising function between its values at the ends, each rounded outwards by 2^-300."""
    low, high = (f(mp.make_mpf(end._mpi_[0])) for end in (x.a, x.b))
    wide = iv.mpf([1 - mp.mpf(2) ** -300, 1 + mp.mpf(2) ** -300])
    return iv.mpf([(iv.mpf(low) * wide).a, (iv.mpf(high) * wide).b])


def _mp_hazard(x: Any) -> Any:
    return mp.sqrt(2 / mp.pi) * mp.exp(-x * x / 2) / mp.erfc(x / mp.sqrt(2))


def _hazard(x: Any) -> Jet:
    h, gap = _rising(_mp_hazard, x), _rising(lambda y: y + _mp_hazard(-y), -x)
    return h, h * gap, h * gap * gap + h * (h * gap - 1)


def _outer(kind: str, x: Any, exponent: str | None) -> Jet:
    """A kernel, its slope and its curvature on an interval."""
    if kind in ("log", "power") and not x.a > 0:
        raise Refuted(f"{kind} is undefined")
    if kind == "exp":
        return (iv.exp(x),) * 3
    if kind in ("sigmoid", "softplus"):
        s, t = 1 / (1 + iv.exp(-x)), 1 / (1 + iv.exp(x))
        return (s, s * t, s * t * (t - s)) if kind == "sigmoid" else (iv.log(1 + iv.exp(x)), s, s * t)
    if kind == "log":
        return iv.log(x), 1 / x, -1 / (x * x)
    if kind == "atan":
        return _rising(mp.atan, x), 1 / (1 + x * x), -2 * x / (1 + x * x) ** 2
    if kind == "erf":
        slope = 2 / iv.sqrt(iv.pi) * iv.exp(-x * x)
        return _rising(mp.erf, x), slope, -2 * x * slope
    if kind == "pi":
        return iv.pi, iv.mpf(0), iv.mpf(0)
    if kind == "power":
        p, log = _iv(exponent), iv.log(x)
        return iv.exp(p * log), p * iv.exp((p - 1) * log), p * (p - 1) * iv.exp((p - 2) * log)
    h, slope, curvature = _hazard(x if kind == "hazard" else -x)
    if kind == "log_ndtr":
        return _rising(lambda y: mp.log(mp.erfc(-y / mp.sqrt(2)) / 2), x), h, -slope
    return (
        (h, slope, curvature) if kind == "hazard" else (_rising(lambda y: y + _mp_hazard(-y), x), 1 - slope, curvature)
    )


def _times(a: Jet, b: Jet) -> Jet:
    return a[0] * b[0], a[1] * b[0] + a[0] * b[1], a[2] * b[0] + 2 * a[1] * b[1] + a[0] * b[2]


def _quotient(data: Any, known: list[Jet]) -> tuple[Jet, Any]:
    """A quotient of polynomials, and the size of the terms of its numerator."""
    sums, size = [], iv.mpf(0)
    for terms in data:
        total: Jet = (iv.mpf(0),) * 3
        for c, powers in terms:
            product: Jet = (_iv(c), iv.mpf(0), iv.mpf(0))
            for i, k in powers:
                for _ in range(k):
                    product = _times(product, known[i])
            total = tuple(x + y for x, y in zip(total, product, strict=True))  # type: ignore[assignment]
            size += abs(product[0]) if not sums else 0
        sums.append(total)
    top, (b, b1, b2) = sums
    if 0 in b:
        raise Refuted("a divisor may be 0")
    return _times(top, (1 / b, -b1 / b**2, 2 * b1**2 / b**3 - b2 / b**2)), size / abs(b)


def _variables(data: Any) -> set[int]:
    return {i for terms in data for _, powers in terms for i, _ in powers}


def _at(graph: Any, piece: Any, u: Any, parameters: list[Any]) -> tuple[Jet, Any]:
    constants: list[Jet] = [(x, iv.mpf(0), iv.mpf(0)) for x in parameters]
    known: list[Jet] = [(u, iv.mpf(1), iv.mpf(0)), *constants]
    first, needed = len(known), _variables(piece["value"])
    for i, kernel in reversed([*enumerate(graph["kernels"], first)]):
        needed |= _variables(kernel["argument"]) if i in needed else set()
    for i, kernel in enumerate(graph["kernels"], first):
        g = _quotient(kernel["argument"], known)[0] if i in needed else None
        f = _outer(kernel["kind"], g[0], kernel["exponent"]) if g else None
        known.append((f[0], f[1] * g[1], f[2] * g[1] ** 2 + f[1] * g[2]) if f and g else known[0])
    return _quotient(piece["value"], known)


def _drawn(p: Any, draw: Random) -> Any:
    low, high = (None if p[end] is None else Fraction(p[end]) for end in ("low", "high"))
    if low is not None and high is not None:
        return _iv(low + (high - low) * Fraction(draw.uniform(0.01, 0.99)))
    away = Fraction(10 ** draw.uniform(-2, 1))
    return _iv(low + away if low is not None else high - away if high is not None else draw.uniform(-5, 5))


def _points(a: Fraction, b: Fraction, draw: Random, count: int) -> list[Any]:
    """Narrow intervals in [a, b]: at its ends, and at random on linear and logarithmic scales from them."""
    width = (b - a) / 2**200
    inner = [Fraction(x) for _ in range(count) for x in (draw.random(), 10 ** draw.uniform(-7, -0.4))]
    inner = [x if i % 4 < 2 else 1 - x for i, x in enumerate(inner)]
    starts = [a, *(a + (b - a) * x for x in inner), b - width]
    return [iv.mpf([_iv(x).a, _iv(x + width).b]) for x in starts]


def _covers(parts: list[tuple[Any, Any]], low: Any, high: Any) -> bool:
    met = all(b == c or a < c < b < d for (a, b), (c, d) in pairwise(parts))
    return bool(parts) and parts[0][0] == low and parts[-1][1] == high and met and all(a < b for a, b in parts)


def _span(low: Any, high: Any) -> tuple[Any, Any]:
    inf = float("inf")
    return -inf if low is None else Fraction(low), inf if high is None else Fraction(high)


def check(certificate: dict[str, Any], draw: Random, count: int = 4) -> None:
    """Raises Refuted if a claim, enclosure, cover or seam of a certificate is found to be wrong."""
    iv.prec, mp.prec, inf = 400, 500, float("inf")
    for claim in (claim for claim in certificate["claims"] if claim["graph"] is not None):
        graph, (order, wanted, side) = certificate["graphs"][claim["graph"]], CLAIMS[claim["claim"]]
        pieces = [(*_span(p["low"], p["high"]), p) for p in graph["pieces"]]
        if not _covers([p[:2] for p in pieces], -inf, inf):
            raise Refuted("the pieces do not cover the line")
        for (low, high, piece), listed in zip(pieces, claim["cells"], strict=True):
            low, high = max(low, 0) if side > 0 else low, min(high, 0) if side < 0 else high
            cells = [(*_span(*cell[:2]), *_span(*cell[2:])) for cell in listed]
            if not (_covers([c[:2] for c in cells], low, high) if low < high else not cells):
                raise Refuted("the cells do not cover a piece")
            for a, b, least, most in cells:
                for u in _points(max(a, min(-FAR, b - 1)), min(b, max(FAR, a + 1)), draw, count):
                    jet, size = _at(graph, piece, u, [_drawn(p, draw) for p in graph["parameters"]])
                    d, slack = jet[order], _iv(TOLERANCE) * (1 + size + abs(jet[order].mid))
                    if not (d * wanted).a >= -slack.b:
                        raise Refuted(f"{claim['claim']}: a derivative has the wrong sign at {float(u.mid)}")
                    if (least > -inf and d.a < (_iv(least) - slack).a) or (most < inf and d.b > (_iv(most) + slack).b):
                        raise Refuted(f"{claim['claim']}: a derivative is not enclosed at {float(u.mid)}")
        for (_, high, left), (low, _, right) in pairwise(pieces):
            if side and (low == high == 0 or (high <= 0 if side > 0 else low >= 0)):
                continue
            parameters = [_drawn(p, draw) for p in graph["parameters"]]
            u = iv.mpf([_iv(low).a, _iv(high).b])
            (x, size), (y, other) = _at(graph, left, u, parameters), _at(graph, right, u, parameters)
            slack = _iv(TOLERANCE) * (size + other + abs(x[1].mid) + abs(y[1].mid))
            jump, bend = y[0] - x[0], (y[1] - x[1]) * wanted
            if not jump.a >= -slack.b or (side and not (jump.b <= slack.b and bend.a >= -slack.b)):
                raise Refuted(f"{claim['claim']}: a wrong step at {float(u.mid)}")
