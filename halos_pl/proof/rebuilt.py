"""Whether v, built anew with other hyper-parameters, is the function that was recorded with them as unknowns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from flint import arb
from torch import nn

from halos_pl.proof.by_slope import subject
from halos_pl.proof.construction import built
from halos_pl.proof.point import ordered, value_at
from halos_pl.proof.program import Node, rational
from halos_pl.proof.recorder import UntraceableError
from halos_pl.proof.trace import Symbol, trace
from value_functions.ranges import Range

_TRIED = (-1e4, -10.0, -1.5, -0.5, 0.0, 1e-5, 1e-3, 0.01, 0.3, 0.75, 1.0, 1.5, 3.0, 10.0, 100.0, 1e4)
# Not round: at a quotient of round numbers there may be a jump, at which floats are on either side.
_OUTCOMES = [Fraction(sign) * Fraction(u) for u in ("0.00109", "0.3137", "1.0093", "2.7191", "10.931", "77.17",
             "1009.3", "100019.7") for sign in (-1, 1)]  # fmt: skip
_SHARE = Fraction(1, 2**20)  # a difference of large rounded constants may be inaccurate
_LEAST = arb(2) ** -36  # of the largest value: what is below it may be left over where such constants cancel


def _tried(symbol: Symbol) -> list[float]:
    limits: Range = getattr(symbol.module, "ranges")[symbol.name]  # noqa: B009
    ends = [limits.low, limits.high]
    if all(abs(end) < float("inf") for end in ends):
        width = limits.high - limits.low
        ends += [limits.low + width / 1000, limits.low + width / 3, limits.high - width / 1000]
    return [x for x in sorted({*_TRIED, *ends}) if abs(x) < float("inf") and x in limits]


def _settings(hyper: Mapping[str, Symbol]) -> Iterator[dict[str, float]]:
    """A small and a large value of each hyper-parameter alone, then many values of all of them."""
    tried = {name: _tried(symbol) for name, symbol in hyper.items()}
    for name, values in tried.items():
        yield from ({name: value} for value in (values[0], values[-1]))
    for k in range(max(map(len, tried.values()))):
        yield {name: values[(k + j) % len(values)] for j, (name, values) in enumerate(tried.items())}


def difference(
    v: nn.Module,
    graph: tuple[Node, ...],
    symbols: Mapping[str, Symbol],
    hyper: Mapping[str, Symbol],
    own: Mapping[str, Fraction],
) -> str:
    """Says with which hyper-parameters v is not what was recorded, or why that is not known; empty if there are none.

    Args:
        v: a value function.
        graph: what was recorded of it.
        symbols: the unknowns in it, by name.
        hyper: those that are hyper-parameters.
        own: the present value of each unknown.
    """
    count = 0
    for setting in _settings(hyper):
        changes: dict[tuple[int, str], dict[int | None, float]] = {}
        for name, value in setting.items():
            symbol = hyper[name]
            changes.setdefault((id(symbol.module), symbol.name), {})[symbol.index] = value
        text = ", ".join(f"{name} = {value:g}" for name, value in setting.items())
        try:
            other = built(v, changes)
        except ValueError:
            continue  # there is no such function
        except (TypeError, AttributeError) as error:
            return f"it cannot be built with other hyper-parameters: {error}"
        count += 1
        modules = dict(other.named_modules())
        there = {name: _moved(symbol, name, modules) for name, symbol in symbols.items()}
        numbers = {**own, **{name: rational(value) for name, value in setting.items()}}
        try:
            same = trace(subject(other), there, once=True) == graph
            given = {name: symbol for name, symbol in there.items() if name not in hyper}
            plain = trace(subject(other), given, once=True)
        except UntraceableError as error:
            return f"built with {text}, it {error}"
        if not same or _differs(graph, plain, numbers):
            return f"built with {text}, it is another function"
    return "" if count else "it cannot be built with other hyper-parameters"


def _moved(symbol: Symbol, name: str, modules: Mapping[str, nn.Module]) -> Symbol:
    """The unknown of the same name in another module."""
    path = name.partition("[")[0].rpartition(".")[0]
    return Symbol(modules[path], symbol.name, symbol.index)


def _differs(one: Sequence[Node], other: Sequence[Node], numbers: Mapping[str, Fraction]) -> bool:
    """Whether two expressions have another value, or another domain, at some outcome."""
    pairs = [tuple(_value(nodes, u, numbers) for nodes in (one, other)) for u in _OUTCOMES]
    largest = max((abs(a).upper() for a, _ in pairs if a is not None), default=arb(0))
    return any(
        a is not b
        if a is None or b is None
        else abs(a - b) > largest * _LEAST and (ordered(a, b, _SHARE) or ordered(b, a, _SHARE))
        for a, b in pairs
    )


def _value(nodes: Sequence[Node], u: Fraction, numbers: Mapping[str, Fraction]) -> arb | None:
    try:
        return value_at(nodes, u, numbers)
    except (ValueError, ZeroDivisionError):
        return None
