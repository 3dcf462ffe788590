"""Proves that a value function never falls and is concave on gains, for all of its parameters where that holds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from flint import arb
from torch import nn

from halos_pl.proof.by_slope import Slope, no_integral, subject
from halos_pl.proof.cases import Prover
from halos_pl.proof.claims import CLAIMS, CLAIMS_ON_SLOPES, Claim, Decision, Status
from halos_pl.proof.contexts import mismatch
from halos_pl.proof.element import UndecidedError
from halos_pl.proof.interval import INF, NEGATIVE_INF, REALS, Interval
from halos_pl.proof.program import Node, rational
from halos_pl.proof.rebuilt import difference
from halos_pl.proof.recorder import UntraceableError
from halos_pl.proof.trace import Symbol, trace

# Values at which learnable parameters are tried for a witness, beside their own.
_TRIED = (Fraction(-1), Fraction(1), Fraction(-3), Fraction(3))
SECONDS = 5.0  # of CPU time after the recording, for all claims together
Unknowns = dict[str, tuple[Symbol, Interval]]


@dataclass(frozen=True)
class Outcome:
    """What is known about one claim.

    Attributes:
        claim: the claim.
        status: proved, disproved or undecided.
        scope: the parameters that it is about, such as ``for every beta in (0, inf)``; empty if there are none.
        reason: why it is undecided, or disproved; or why it is not proved for more parameters.
        notes: jumps within the tolerance.
        decision: the proof or the witness; None if v could not be recorded.
        prover: what it is about.
        narrower: the proof for the hyper-parameters as they are, if this one is for all.
    """

    claim: Claim
    status: Status
    scope: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()
    decision: Decision | None = None
    prover: Prover | None = field(default=None, repr=False)
    narrower: Outcome | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return " ".join(filter(None, [self.status, self.scope])) + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Proof:
    """What is known about all claims.

    Attributes:
        name: of the value function.
        outcomes: by the name of the claim.
        seconds: CPU time.
        not_integral: where a function that is given by its slope is not the integral of it; empty if nowhere.
    """

    name: str
    outcomes: Mapping[str, Outcome]
    seconds: float
    not_integral: str = ""

    @property
    def proved(self) -> bool:
        """Whether v has the shape that the definition of a HALO asks for."""
        return all(self.outcomes[claim.name].status == "proved" for claim in CLAIMS[:2])


def _unknowns(v: nn.Module) -> tuple[Unknowns, Unknowns]:
    """The learnable parameters of v, over all reals, and its hyper-parameters, over their ranges."""
    learnable: Unknowns = {}
    hyper: Unknowns = {}
    for path, module in v.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.requires_grad:
                learnable[prefix + name] = (Symbol(module, name), REALS)
        for name, limits in getattr(module, "ranges", {}).items():
            value = vars(module).get(name)
            interval = Interval.of(
                NEGATIVE_INF if limits.low == float("-inf") else rational(limits.low),
                INF if limits.high == float("inf") else rational(limits.high),
                not limits.with_low,
                not limits.with_high,
            )
            for index, each in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(each, float) and abs(each) < float("inf"):
                    place = index if isinstance(value, list) else None
                    label = f"{prefix}{name}" + ("" if place is None else f"[{place}]")
                    hyper[label] = (Symbol(module, name, place), interval)
    return learnable, hyper


def _entries(unknowns: Unknowns) -> dict[str, tuple[Interval, Fraction]]:
    """The scalars of the unknowns: their ranges and values."""
    out = {}
    for name, (symbol, interval) in unknowns.items():
        if isinstance(symbol.value, float):
            out[name] = (interval, rational(symbol.value))
            continue
        for i, value in enumerate(symbol.value.detach().double().reshape(-1).tolist()):
            out[name if symbol.value.dim() == 0 else f"{name}[{i}]"] = (interval, rational(value))
    return out


def _used(graph: Sequence[Node]) -> set[str]:
    return {str(operands[0]) for name, *operands in graph if name == "parameter"}


def _scope(entries: Mapping[str, tuple[Interval, Fraction]], graph: tuple[Node, ...]) -> str:
    used, texts = _used(graph), []
    for name, (x, _) in entries.items():
        if name in used:
            left, right = (
                "(" if x.above_low or not x.low.is_finite() else "[",
                ")" if x.below_high or not x.high.is_finite() else "]",
            )
            ends = (f"{end:g}" if float(f"{end:g}") == end else repr(end) for end in (float(x.low), float(x.high)))
            texts.append(f"{name} in {left}{', '.join(ends)}{right}")
    return f"for every {', '.join(texts)}" if texts else ""


def _with_the_given(v: nn.Module, outcome: Outcome) -> Outcome:
    """The outcome with the hyper-parameters in its scope that have a range, but no part in what is proved for all."""
    if outcome.status != "proved" or outcome.prover is None or "given hyper-parameters" in outcome.scope:
        return outcome
    used, given = _used(outcome.prover.nodes), []
    for path, module in v.named_modules():
        for name in getattr(module, "ranges", {}):
            value, label = getattr(module, name, ()), f"{path}.{name}" if path else name
            each = [f"{label}[{i}]" for i in range(len(value))] if isinstance(value, list) else [label]
            given += [] if value is None else [one for one in each if one not in used]
    scope = f"{outcome.scope} and the given" if outcome.scope else "for the given"
    return replace(outcome, scope=f"{scope} {', '.join(given)}") if given else outcome


def _recorded(v: nn.Module, learnable: Unknowns, hyper: Unknowns) -> tuple[tuple[Node, ...], Unknowns]:
    """The expression of v, or of its slope, with as many unknowns as its code allows."""
    v = subject(v)
    try:
        return trace(v, {name: symbol for name, (symbol, _) in (learnable | hyper).items()}), learnable | hyper
    except UntraceableError:
        kept = dict(learnable)
        graph = trace(v, {name: symbol for name, (symbol, _) in kept.items()})
    for name, unknown in hyper.items():
        try:
            graph = trace(v, {key: symbol for key, (symbol, _) in kept.items()} | {name: unknown[0]})
            kept[name] = unknown
        except UntraceableError:
            continue  # its value is used by Python's own functions
    return graph, kept


def prove(v: nn.Module) -> Proof:
    """Decides each claim about v, first for its hyper-parameters as they are, then for all that it accepts.

    Learnable parameters are always taken over all reals, since training may move them anywhere.

    Args:
        v: a value function. Its code is executed; its mode and parameters are as before afterwards.
    """
    start = time.process_time()
    learnable, hyper = _unknowns(v)
    claims, off = CLAIMS if subject(v) is v else CLAIMS_ON_SLOPES, ""
    try:
        plain = trace(subject(v), {name: symbol for name, (symbol, _) in learnable.items()})
        deadline = time.process_time() + SECONDS
        entries = _entries(learnable)
        outcomes = _decided(plain, entries, claims, _samples(entries), deadline)
        why = _unfaithful(v, plain, learnable)
        if not why and (provers := [each.prover for each in outcomes.values() if each.prover is not None]):
            why = off = _no_integral(v, provers[0].seams)
        if why:
            outcomes = _undecided(why)
        proved = [outcome.claim for outcome in outcomes.values() if outcome.status == "proved"]
        if hyper and proved:
            graph, unknowns = _recorded(v, learnable, hyper)
            entries = _entries(unknowns)
            added = {name: symbol for name, (symbol, _) in unknowns.items() if name not in learnable}
            if added:
                own = {name: value for name, (_, value) in entries.items()}
                why = difference(v, graph, {name: symbol for name, (symbol, _) in unknowns.items()}, added, own)
                others = _samples(entries)[1:]  # those with its own hyper-parameters disproved nothing
                wider = _undecided(why, _scope(entries, graph))
                if not why:
                    wider |= _decided(graph, entries, proved, others, deadline)
                outcomes = _widened(outcomes, wider)
    except UntraceableError as error:
        outcomes = _undecided(f"{'its slope ' * isinstance(subject(v), Slope)}{error}")
    outcomes = {name: _with_the_given(v, outcome) for name, outcome in outcomes.items()}
    return Proof(type(v).__name__, outcomes, time.process_time() - start, off)


def _unfaithful(v: nn.Module, graph: tuple[Node, ...], learnable: Unknowns) -> str:
    """Why v, or its slope, as programs call it, is not what was recorded; empty if it is."""
    values, recorded = {name: value for name, (_, value) in _entries(learnable).items()}, subject(v)
    try:
        return mismatch(recorded, graph, values, "v'") if isinstance(recorded, Slope) else mismatch(v, graph, values)
    except Exception as error:
        return f"it {_raised(error)}"


def _no_integral(v: nn.Module, seams: Sequence[float]) -> str:
    """Where v is not the integral of the slope by which it is given; empty if nowhere, or if it is not so given."""
    recorded = subject(v)
    try:
        return no_integral(recorded, seams) if isinstance(recorded, Slope) else ""
    except UntraceableError:
        raise
    except Exception as error:
        raise UntraceableError(_raised(error)) from error


def _raised(error: Exception) -> str:
    return f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _undecided(why: str, scope: str = "") -> dict[str, Outcome]:
    return {claim.name: Outcome(claim, "undecided", scope, why) for claim in CLAIMS}


def _samples(entries: Mapping[str, tuple[Interval, Fraction]]) -> list[dict[str, Fraction]]:
    """Values of the parameters within their ranges: their own, and others for all of them and for each alone."""
    own = {name: value for name, (_, value) in entries.items()}

    def moved(values: Mapping[str, Fraction]) -> dict[str, Fraction]:
        return own | {name: x for name, x in values.items() if entries[name][0].contains(x)}

    samples = [own]
    for i, other in enumerate(_TRIED):
        samples.append(moved(dict.fromkeys(own, other)))
        samples += [moved({name: other}) for name in own if len(own) > 1]
        turned = {name: _TRIED[(i + k) % len(_TRIED)] for k, name in enumerate(own)}
        samples.append(moved({name: x if entries[name][0].contains(x) else -x for name, x in turned.items()}))
    return [sample for i, sample in enumerate(samples) if sample not in samples[:i]]


def _decided(
    graph: tuple[Node, ...],
    entries: Mapping[str, tuple[Interval, Fraction]],
    claims: Sequence[Claim],
    samples: Sequence[Mapping[str, Fraction]],
    deadline: float,
) -> dict[str, Outcome]:
    ranges = {name: interval for name, (interval, _) in entries.items()}
    scope = _scope(entries, graph)
    try:
        prover = Prover(graph, ranges, samples, deadline)
    except (UndecidedError, ValueError, ArithmeticError) as error:
        return _undecided(str(error), scope)
    outcomes = {}
    for claim in claims:
        decision = prover.decide(claim)
        if decision.status == "disproved":
            at = ", ".join(f"{name} = {_number(value)}" for name, value in decision.parameters.items())
            scope_here, reason = (f"for {at}" if at else ""), witness(claim, decision)
        else:
            scope_here, reason = scope, decision.reason
        outcomes[claim.name] = Outcome(
            claim, decision.status, scope_here, reason, tuple(decision.notes), decision, prover
        )
    return outcomes


def _widened(outcomes: Mapping[str, Outcome], wider: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """The claims for all hyper-parameters where those are proved, else for the hyper-parameters as they are."""
    merged = {}
    for name, outcome in outcomes.items():
        other = wider[name]
        if outcome.status != "proved" or other.status == "proved":
            merged[name] = outcome if outcome.status != "proved" else replace(other, narrower=outcome)
        else:
            as_is = " ".join(
                filter(
                    None,
                    [
                        outcome.scope,
                        "and the given hyper-parameters" if outcome.scope else "for the given hyper-parameters",
                    ],
                )
            )
            merged[name] = Outcome(
                outcome.claim, "proved", as_is, f"{other}", outcome.notes, outcome.decision, outcome.prover
            )
    return merged


def witness(claim: Claim, decision: Decision) -> str:
    """The disproof in numbers."""
    texts = [
        f"{claim.of}({_number(u)}) = {_digits(value)}"
        for u, value in zip(decision.points, decision.values, strict=True)
    ]
    if claim.order == 0:
        return f"{texts[0]} {'<' if claim.sign > 0 else '>'} 0"
    if claim.order == 1:
        return f"{texts[0]} {'>' if claim.sign > 0 else '<'} {texts[1]}"
    middle = (decision.values[0] + decision.values[2]) / 2
    a, c = _number(decision.points[0]), _number(decision.points[2])
    sign = "<" if claim.sign < 0 else ">"
    return f"{texts[1]} {sign} {_digits(middle)} = (v({a}) + v({c})) / 2"


def _number(u: Fraction) -> str:
    return f"{float(u)!r}".removesuffix(".0") if len(str(u)) > 25 or Fraction(repr(float(u))) == u else str(u)


def _digits(value: arb) -> str:
    text = str(value.str(20, radius=False))
    return text.rstrip("0").removesuffix(".") if "." in text and "e" not in text else text
