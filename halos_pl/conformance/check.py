"""From checks to a report: which clauses a target has, what they found, and the verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch

from halos_pl.conformance import feedback, objective, reference_point, reward, value_function
from halos_pl.conformance.report import CheckFailed, Clause, Definition, Report
from halos_pl.conformance.target import Target, made
from halos_pl.conformance.witness import Raised, WrongShape
from halos_pl.objective.halo import Objective
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import Reward
from value_functions import ValueFunction

_NOT_REQUIRED = "reported: required only of an objective that reads undesirable rows as `reflect`"
_NO_WEIGHT = "reported: no row that it acts on carries weight"
_SINGLE = "v rounds its outcomes to float32 (see precision), which is what this may be"
_DEGENERATE = "a degenerate reference: there are no rewards that it averages"


def _halo_shaped(failed: list[str]) -> str:
    return f"halo-shaped: fails {', '.join(failed)}"


@dataclass(frozen=True)
class _Checks:
    """The checks of one target, not run yet.

    Attributes:
        name: of the target.
        clauses: what to call for each clause; ``None`` says that it holds.
        icml_only: clauses of the ICML definition that v1 does not have.
        expected: clauses that the library's own classes are known to fail, with the reason.
        notes: what is to be said of a clause beside its witness.
        hints: what is to be said of a clause that failed.
        optional: clauses that are only reported.
        overall: the verdict, given the names of the clauses that failed.
    """

    name: str
    clauses: dict[str, Callable[[], str | None]]
    icml_only: frozenset[str] = frozenset()
    expected: dict[str, str] = field(default_factory=dict)
    notes: Callable[[], dict[str, str]] = dict
    hints: dict[str, str] = field(default_factory=dict)
    optional: Callable[[], dict[str, str]] = dict
    overall: Callable[[list[str]], str] = lambda failed: _halo_shaped(failed) if failed else "halo"


def _once(checks: object, name: str) -> str | None:
    """What a clause found, looked for only once: terms of a sum may share the checks of a part."""
    found: dict[str, str | None] = vars(checks).setdefault("found", {})
    if name not in found:
        found[name] = getattr(checks, name)()
    return found[name]


def _bound(checks: object, names: tuple[str, ...], prefix: str = "") -> dict[str, Callable[[], str | None]]:
    return {prefix + name: partial(_once, checks, name) for name in names}


def _rounded(of_v: value_function.ValueFunctionChecks, prefix: str = "") -> dict[str, str]:
    """What is to be said of the clauses that a value function failed, where it computes in less than float64."""
    found: dict[str, str | None] = vars(of_v).get("found", {})
    if found.get("precision") is None or found["precision"] != of_v.single:
        return {}
    return {prefix + name: _SINGLE for name, witness in found.items() if witness and name != "precision"}


def _of_halo(target: objective.HALO, prefix: str, examples: int, thorough: bool, shared: dict[Any, Any]) -> _Checks:
    checks = objective.ObjectiveChecks(target, examples=examples, thorough=thorough, shared=shared)
    v_clauses = tuple(n for n in value_function.CLAUSES if checks.reflects or n not in value_function.UNDESIRABLE)
    clauses = (
        _bound(checks.value_function, v_clauses, prefix)
        | _bound(checks.reward, reward.CLAUSES, prefix)
        | _bound(checks.reference_point, reference_point.CLAUSES, prefix)
        | _bound(checks.feedback, feedback.CLAUSES, prefix)
        | _bound(checks, objective.CLAUSES, prefix)
    )
    clauses[f"{prefix}reference_split"] = checks.reference_split
    expected = {prefix + name: why for name, why in reference_point.expected(target.reference_point).items()}

    def optional() -> dict[str, str]:
        idle: tuple[str, ...] = ()
        if not checks.acts_reflected:
            idle += value_function.UNDESIRABLE
        if not checks.acts_on_desirable:
            idle += ("non_decreasing", "concave_on_gains")
        found = dict.fromkeys((prefix + name for name in idle), _NO_WEIGHT)
        # A reference that is a number whatever happens has a verdict of its own.
        if checks.reference_point.degenerate is not None:
            found |= dict.fromkeys((f"{prefix}reference_in_range", f"{prefix}reference_shift_equivariant"), _DEGENERATE)
        return found

    def notes() -> dict[str, str]:
        rounded = _rounded(checks.value_function, prefix)
        weights = sorted(checks.weights[-1] | checks.weights[1])
        if len(weights) < 2:
            return rounded
        by = f"{weights[0]:g} to {weights[-1]:g}" if len(weights) > 3 else ", ".join(f"{w:g}" for w in weights)
        return rounded | {f"{prefix}feedback_weight": f"rows weigh {by}: judged on the data re-weighted so"}

    def overall(failed: list[str]) -> str:
        reflected = [name for name in failed if name.removeprefix(prefix) in value_function.UNDESIRABLE]
        # What v itself, its reward or its feedback lack is said first; then that there is no reference point; then what
        # only the reflection of v lacks, since against z0 = 0 there are no gains and losses to reflect about.
        if failed and (len(failed) > len(reflected) or checks.reference_point.degenerate is None):
            return _halo_shaped(failed)
        if checks.reference_point.degenerate is not None:
            return "degenerate reference"
        return "halo (two-sided)" if checks.two_sided else "halo"

    return _Checks(
        name=type(target).__name__,
        clauses=clauses,
        icml_only=frozenset(prefix + name for name in reward.ICML_ONLY),
        expected=expected,
        hints={prefix + name: why for name, why in reference_point.hints(target.reference_point).items()},
        notes=notes,
        optional=optional,
        overall=overall,
    )


def _of_objective(target: Objective, examples: int, thorough: bool, shared: dict[Any, Any]) -> _Checks:
    parts = objective.terms(target)
    halos = [(name, term) for name, term in parts if objective.is_halo(term)]
    if not halos:
        witness = f"{type(target).__name__} holds no reward, reference point, value function and feedback"
        return _Checks(type(target).__name__, {"identity": lambda: witness}, overall=lambda failed: "not a halo")
    examples = max(1, examples // len(halos))  # shared out among the terms, so that a sum takes no longer
    each = [_of_halo(term, name if len(halos) > 1 else "", examples, thorough, shared) for name, term in halos]  # type: ignore[arg-type]
    sums = objective.own_sums(target)
    if sums:
        # A sum of another class may add up otherwise, so that it says something else than its terms.
        inner = each[0].clauses.get("identity", lambda: None)

        def identity() -> str | None:
            return next(filter(None, (objective.sum_of_terms(own, examples) for own in sums)), None) or inner()

        each[0].clauses["identity"] = identity
    if len(parts) == 1:
        return each[0]

    def merged(name: str) -> dict[str, str]:
        return {key: why for checks in each for key, why in getattr(checks, name)().items()}

    return _Checks(
        name=" + ".join(type(term).__name__ for _, term in parts),
        clauses={name: call for checks in each for name, call in checks.clauses.items()},
        icml_only=frozenset().union(*(checks.icml_only for checks in each)),
        expected={key: why for checks in each for key, why in checks.expected.items()},
        hints={key: why for checks in each for key, why in checks.hints.items()},
        notes=lambda: merged("notes"),
        optional=lambda: merged("optional"),
        overall=lambda failed: "composite",
    )


def _checks(target: Target, examples: int, thorough: bool, shared: dict[Any, Any]) -> _Checks:
    name = type(target).__name__
    if isinstance(target, Objective):
        return _of_objective(target, examples, thorough, shared)
    if isinstance(target, ValueFunction):
        of_v = value_function.ValueFunctionChecks(target, thorough=thorough)
        reported = dict.fromkeys(value_function.UNDESIRABLE, _NOT_REQUIRED)
        return _Checks(
            name,
            _bound(of_v, value_function.CLAUSES),
            notes=lambda: _rounded(of_v),
            optional=lambda: reported,
        )
    if isinstance(target, Reward):
        of_r = reward.RewardChecks(target, examples=examples)
        return _Checks(name, _bound(of_r, reward.CLAUSES), icml_only=frozenset(reward.ICML_ONLY))
    if isinstance(target, ReferencePoint):
        of_z = reference_point.ReferencePointChecks(target, examples=examples)

        def optional() -> dict[str, str]:
            if of_z.degenerate is None:
                return {}
            return dict.fromkeys(("reference_in_range", "reference_shift_equivariant"), _DEGENERATE)

        def overall(failed: list[str]) -> str:
            if failed:
                return _halo_shaped(failed)
            return "halo" if of_z.degenerate is None else "degenerate reference"

        return _Checks(
            name,
            _bound(of_z, reference_point.CLAUSES),
            expected=reference_point.expected(target),
            hints=reference_point.hints(target),
            optional=optional,
            overall=overall,
        )
    of_f = feedback.FeedbackChecks(target, examples=examples)
    return _Checks(name, _bound(of_f, feedback.CLAUSES))


def clause_names(target: Target, definition: Definition = "icml") -> list[str]:
    """The clauses that ``target`` is held to, without checking them."""
    checks = _checks(target, 1, False, {})
    return [name for name in checks.clauses if definition == "icml" or name not in checks.icml_only]


def _witness(call: Callable[[], str | None]) -> str | None:
    try:
        return call()
    except (Exception, SystemExit) as error:  # code under check that leaves the process would hide what it is
        return Raised.by(error)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small operations: waiting for other threads costs more than they do, on a busy machine ten times.

    And with gradients, whatever the caller has switched off.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(before)


def _unusable(witnesses: Mapping[str, str | None]) -> str | None:
    """Why nothing can be said of the target: something of another shape came back, or it always raises."""
    shapes = [witness for witness in witnesses.values() if isinstance(witness, WrongShape)]
    raised = [witness for witness in witnesses.values() if isinstance(witness, Raised)]
    if shapes:
        return shapes[0]
    return raised[0] if len(raised) == len(witnesses) else None


def reports(
    target: Target,
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int = 60,
    thorough: bool = False,
    shared: dict[Any, Any] | None = None,
) -> dict[Definition, Report]:
    """The report under each definition, from one run of the checks.

    Of objectives that are given the same ``shared``, parts that are the same function are held to their clauses once.
    """
    start = time.perf_counter()
    given = expected_failures or {}
    if not isinstance(given, Mapping) or not all(isinstance(why, str) and why.strip() for why in given.values()):
        raise ValueError(f"expected_failures is {given!r}; it takes a reason for each clause, {{clause: reason}}")
    if max_examples < 1:
        raise ValueError(f"max_examples is {max_examples}; it must be at least 1")
    checks = _checks(target, max_examples * (10 if thorough else 1), thorough, {} if shared is None else shared)
    unknown = [name for name in given if name not in checks.clauses]
    if unknown:
        clauses = ", ".join(checks.clauses)
        raise ValueError(f"expected_failures: {checks.name} has no clause {unknown[0]!r}; it has {clauses}")
    with _one_thread():
        witnesses = {name: _witness(call) for name, call in checks.clauses.items()}
        optional = {name: why for name, why in checks.optional().items() if witnesses.get(name) is not None}
        notes = checks.notes()
    seconds = time.perf_counter() - start
    found: dict[Definition, Report] = {}
    for definition in get_args(Definition):
        names = [n for n in witnesses if definition == "icml" or n not in checks.icml_only]
        rows, failed = [], []
        for name in names:
            row = Clause(name, "passed", witnesses[name], notes.get(name))
            # A reference point that is a number has a verdict of its own, which says it all.
            known = checks.expected.get(name) or (_DEGENERATE if optional.get(name) == _DEGENERATE else None)
            if row.witness is not None:
                if known:
                    row = replace(row, status="expected", reason=known)
                elif name in optional:
                    row = replace(row, status="failed", reason=optional[name], required=False)
                else:
                    failed.append(name)
                    row = replace(row, status="failed", reason=checks.hints.get(name) or row.reason)
                if name in given and row.status == "failed":
                    row = replace(row, status="expected", reason=given[name])
            rows.append(row)
        found[definition] = Report(checks.name, definition, checks.overall(failed), rows, seconds, _unusable(witnesses))
    return found


def check_halo(
    target: object,
    *,
    definition: Definition = "icml",
    expected_failures: Mapping[str, str] | None = None,
    on_fail: Literal["raise", "report"] = "raise",
    max_examples: int = 60,
    thorough: bool = False,
) -> Report:
    """Holds a loss, or a part of one, to the definition of human-aware losses. The target's code is executed.

    Args:
        target: an ``Objective``, ``ValueFunction``, ``ReferencePoint``, ``Reward`` or ``Feedback``, or such a class
            that can be made without arguments; or, as on the command line, an objective's YAML file,
            ``path/to/file.py:Class``, a dotted class, or the bare name of a plug-in.
        definition: ``icml`` (Ethayarajh et al., ICML 2024, Def. 3.4) or ``v1`` (arXiv v1: any parameterised reward).
        expected_failures: clauses that may fail, each with a reason. They are reported as ``expected`` and do not
            raise. The verdict does not change: it is computed, and cannot be declared.
        on_fail: ``raise`` for a clause that fails and is not expected, or ``report`` in any case. Clauses that are only
            reported (those of -v(-u) for a value function alone) never raise.
        max_examples: how many steps of random rows each clause of a reward, reference point, feedback or objective is
            tried on. Value functions are searched on a grid instead.
        thorough: ten times as many steps, and a grid four times as dense.

    Raises:
        CheckFailed: see ``on_fail``; an AssertionError with the ``report``.
        TypeError: for another target, in one line.
        TargetError: a ValueError, for a name or file that holds nothing to check.
        ValueError: for another definition or ``on_fail``, an expected failure of a clause that the target does not
            have or without a reason, or fewer than one example.
    """
    if definition not in get_args(Definition):
        raise ValueError(f"definition is {definition!r}; choose icml or v1")
    if on_fail not in ("raise", "report"):
        raise ValueError(f"on_fail is {on_fail!r}; choose raise or report")
    report = reports(made(target), expected_failures=expected_failures, max_examples=max_examples, thorough=thorough)[
        definition
    ]
    if on_fail == "raise" and any(clause.status == "failed" and clause.required for clause in report.clauses):
        raise CheckFailed(report)
    return report
