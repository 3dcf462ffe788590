"""Compares a value function with the chain of a certificate, so that one of another function is refused.

What is left to trust is that v is, between the points that are compared, the function that was recorded.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from random import Random
from typing import Any

import torch
from flint import arb, ctx, fmpq
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from halos_pl.proof.construction import Unknown, rebuilt, unknowns
from halos_pl.proof.verify import FUNCTIONS, PRECISION, Chain, Quotient, RefusedError, greatest

POINTS, FEWER = 10_000, 400  # for the parameters as they are, and for each of the others
TAILS = (-6, 12)  # exponents of 10
_WIDEST, _ERROR = 1e-8, arb(2) ** -40  # of the sizes: of an enclosure, and of what float64 rounds
_SINGLY = 20  # parameters that are also changed one at a time


def compare(graph: dict[str, Any], v: nn.Module) -> None:
    """Raises RefusedError unless v agrees with the chain, for its parameters as they are and others in their ranges.

    Args:
        graph: of a certificate.
        v: a value function; a copy in float64 is compared.
    """
    ctx.prec = PRECISION
    chain, v = Chain(graph), copy.deepcopy(v).to(torch.float64)
    own = unknowns(v)
    _require_ranges(graph["parameters"], own)
    claimed = {p["name"]: own[p["name"]] for p in graph["parameters"]}
    _agree(chain, v, {name: each.value for name, each in claimed.items()}, POINTS)
    changed = set[str]()
    for values in _others(claimed):
        other = rebuilt(v, claimed, values)
        if other is not None:
            changed |= values.keys()
            now = unknowns(other)
            _agree(chain, other, {name: now[name].value for name in claimed}, FEWER)
    if fixed := [name for name, each in claimed.items() if not each.learnable and name not in changed]:
        raise RefusedError(f"it is for a range of {fixed[0]}, but v cannot be built with another value of it")


def _require_ranges(parameters: Sequence[Mapping[str, Any]], own: Mapping[str, Unknown]) -> None:
    """Raises RefusedError unless the parameters are those of v, each with the range that its class declares."""
    names = [p["name"] for p in parameters]
    if len({*names}) < len(names):
        raise RefusedError("a parameter occurs twice")
    if missing := [name for name, each in own.items() if each.learnable and name not in names]:
        raise RefusedError(f"it is for one value of {missing[0]}, which training changes")
    for p in parameters:
        if (each := own.get(p["name"])) is None:
            raise RefusedError(f"v has no parameter {p['name']} with a range")
        if (p["low"], p["high"], p["above_low"], p["below_high"]) != each.limits:
            raise RefusedError(f"the range of {p['name']} is not the one that v declares")
        if not each.inside:
            raise RefusedError(f"v's own {p['name']} is outside its range")


def _others(claimed: Mapping[str, Unknown]) -> Iterator[dict[str, Fraction]]:
    """Other values of the parameters: of all together, and of one at a time."""
    values = {name: each.others() for name, each in claimed.items()}
    for k in range(5 if claimed else 0):
        yield {name: found[(k + i) % len(found)] for i, (name, found) in enumerate(values.items())}
    for name, found in [*values.items()][:_SINGLY]:
        yield from ({name: value} for value in found[:2] + found[5:])


class _Curve:
    """The chain at numbers."""

    def __init__(self, chain: Chain, parameters: Sequence[Fraction]) -> None:
        self.chain, self.parameters = chain, {1 + i: arb(_exact(x)) for i, x in enumerate(parameters)}
        self.lows = [float(arb(low)) for low, _, _ in chain.pieces]
        self.sparse: dict[int, list[tuple[arb, list[int]]]] = {}

    def at(self, u: float) -> list[tuple[arb, arb]]:
        """v(u), and the size of what it is a sum of; at a seam, on both pieces."""
        exact = fmpq(*u.as_integer_ratio())
        near = abs(exact) / 10**12  # within rounding of a seam, either side
        last = bisect_right(self.lows, u + float(near))
        pieces = self.chain.pieces[max(0, last - 3) : last + 1]
        values = [value for low, high, value in pieces if low - near <= exact <= high + near]
        return [self._of(value, self.parameters | {0: arb(exact)}) for value in values]

    def _of(self, a: Quotient, known: dict[int, arb]) -> tuple[arb, arb]:  # kernels are added to known
        totals, size = [arb(0), arb(0)], arb(0)
        for place, p in enumerate(a):
            if id(p) not in self.sparse:  # powers one by one: a ball around 0 has none in python-flint
                rows = [(arb(c), enumerate(e)) for e, c in p.terms()]
                self.sparse[id(p)] = [(c, [i for i, k in e for _ in range(int(k))]) for c, e in rows]
            for c, powers in self.sparse[id(p)]:
                for i in powers:
                    if i not in known:
                        kind, g, exponent = self.chain.kernels[i]
                        known[i] = FUNCTIONS[kind][0](self._of(g, known)[0], exponent)
                    c = c * known[i]
                totals[place] += c
                size += abs(c) if place == 0 else 0
        return totals[0] / totals[1], size / abs(totals[1])


def _exact(x: Fraction) -> fmpq:
    return fmpq(x.numerator, x.denominator)


def _points(chain: Chain, count: int) -> list[float]:
    """Outcomes, nearest to 0 first: near the seams, on each piece, and far out on both sides."""
    ends = [[float(arb(end)) for end in (low, high)] for low, high, _ in chain.pieces]
    seams = {0.0, *(end for piece in ends for end in piece if abs(end) < float("inf"))}
    powers = range(-9, 1) if count * 3 > 31 * len(seams) else (-9, -4)
    found = {s + w * 10.0**k for s in seams for w in (-1, 0, 1, 3) for k in powers}
    bounded = [(a, b) for a, b in ends if -float("inf") < a < b < float("inf")]
    found |= {a + (b - a) * part for a, b in bounded for part in (0.2, 0.5, 0.9)}
    each, (first, last) = max(count - len(found), count // 2) // 2 + 9, TAILS
    found |= {s * 10 ** (first + (last - first) * i / (each - 1)) for i in range(each) for s in (-1, 1)}
    return sorted(found, key=abs)


def _agree(chain: Chain, v: nn.Module, parameters: Mapping[str, Fraction], count: int) -> None:
    curve, us = _Curve(chain, [*parameters.values()]), _points(chain, count)
    found = [(u, curve.at(u)) for u in us]
    near, expected = greatest([size for u, x in found if abs(u) <= 1 for _, size in x]), dict[float, tuple[arb, arb]]()
    largest = {side: near for side in (-1, 0, 1)}  # on gains and on losses: those of one say nothing about the other
    for u, x in found:
        side = (u > 0) - (u < 0)
        largest[side] = greatest([largest[side], *(size for _, size in x)])
        if not all(value.rad() <= _WIDEST * largest[side] for value, _ in x):
            raise RefusedError(f"v({u:.17g}) cannot be computed from its expression")
        error = _ERROR * greatest([largest[side], near * abs(u)])  # such as of 3 u - 3 (u - 7)
        expected[u] = min(value.lower() for value, _ in x) - error, greatest([value for value, _ in x]) + error
    where = "".join(f", {name} = {float(value):.6g}" for name, value in parameters.items())
    for u, value in _values(v, us):
        low, high = expected[u]
        beyond = high < -1e308 if value < 0 else low > 1e308  # more than float64 contains
        if not (low <= arb(value) <= high or (abs(value) == float("inf") and beyond)):
            middle = float((low + high) / 2)
            raise RefusedError(f"v({u:.17g}{where}) is {value:.17g}, and {middle:.17g} in the certificate")


class _ExactSoftplus(TorchDispatchMode):
    """log(1 + e^x) on the whole line: torch's softplus returns x from 20 on, which a proof does not follow."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.softplus.default:
            x, beta, threshold = (*args, 1, 20)[:3] if len(args) < 3 else args
            if threshold >= 20:
                return torch.logaddexp(beta * x, torch.zeros_like(x)) / beta
        return func(*args, **(kwargs or {}))


def _values(v: nn.Module, us: list[float]) -> Iterator[tuple[float, float]]:
    """u and v(u) of all outcomes, in several orders, sizes of batches and modes."""
    mixed = Random(0).sample(us, len(us))
    small, large = mixed[: len(us) // 20], mixed[len(us) // 20 :]
    batches = [us, us[::-1], large, *(small[i : i + 1 + i % 7] for i in range(0, len(small), 4))]
    for number, batch in enumerate(batches):
        v.train(number % 2 == 0)
        u = torch.tensor(batch, dtype=torch.float64, requires_grad=number % 3 == 0)
        try:
            with torch.inference_mode(number % 3 == 1), torch.set_grad_enabled(number % 3 == 0), _ExactSoftplus():
                found = v(u)
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")
            raise RefusedError(f"v raises {text}") from error
        if not isinstance(found, torch.Tensor) or found.shape != u.shape or found.dtype != u.dtype:
            raise RefusedError("v returns something else than a tensor of the shape and dtype of u")
        yield from zip(batch, found.tolist(), strict=True)
