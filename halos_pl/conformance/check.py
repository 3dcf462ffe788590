"""Runs the clauses of a target and computes the report and the verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, get_args

import torch

from halos_pl.conformance import (
    feedback,
    objective,
    policy_weight,
    proofs,
    reference_point,
    reward,
    value_function,
)
from halos_pl.conformance.clause import Clause
from halos_pl.conformance.feedback import FeedbackCase
from halos_pl.conformance.halo_case import HaloCase
from halos_pl.conformance.objective import halo_shaped
from halos_pl.conformance.reference_case import ReferencePointCase
from halos_pl.conformance.report import CheckFailed, ClauseResult, Definition, Report
from halos_pl.conformance.reward import RewardCase
from halos_pl.conformance.target import Target, as_target, refuse_wrong_needs
from halos_pl.conformance.value_case import ValueFunctionCase
from halos_pl.conformance.witness import Raised, WrongShape
from halos_pl.objective.halo import Objective
from halos_pl.objective.policy_weighted import PolicyWeighted
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import Reward
from value_functions import ValueFunction

# Factor of the number of steps searched with ``thorough``.
_THOROUGH = 10


@dataclass(frozen=True)
class Checks:
    """The checks of a target, before they run.

    Attributes:
        name: name of the target.
        clauses: its clauses, in the order of the definition.
        verdict: function from the names of the failed clauses and the definition to the verdict on the target.
    """

    name: str
    clauses: list[Clause]
    verdict: Callable[[list[str], Definition], str]


def _verdict_of_part(failed: list[str], definition: Definition) -> str:
    return halo_shaped(failed) if failed else "halo"


def _checks_of_objective(target: Objective, examples: int, thorough: bool, shared: dict[Any, Any] | None) -> Checks:
    parts = objective.terms(target)
    halos = [(name, term) for name, term in parts if objective.is_halo(term)]
    if not halos:
        witness = f"{type(target).__name__} does not consist of a reward, reference point, value function and feedback"
        return Checks(type(target).__name__, [Clause("identity", lambda: witness)], lambda *_: "not a halo")
    examples = max(1, examples // len(halos))  # divided among the terms, so that a sum takes no longer
    shared = {} if shared is None else shared
    cases = [
        HaloCase(term, objective.CLAUSES, examples=examples, thorough=thorough, shared=shared) for _, term in halos
    ]
    clauses = [
        clause.of_term(name if len(halos) > 1 else "")
        for (name, _), case in zip(halos, cases, strict=True)
        for clause in objective.clauses(case)
    ]
    weighted = [module for module in target.modules() if isinstance(module, PolicyWeighted)]
    for each in weighted:
        name, case = next((name, case) for (name, term), case in zip(halos, cases, strict=True) if term is each.of)
        clause = policy_weight.clause_of(each, case, examples)
        clauses.append(clause.of_term(name if len(halos) > 1 else ""))
    sums = objective.own_sums(target)
    if sums:
        # A sum of another class may add up differently, so its loss may differ from that of its terms.
        at = next(i for i, clause in enumerate(clauses) if clause.name.endswith("identity"))
        of_terms = clauses[at].check

        def identity() -> str | None:
            return next(filter(None, (objective.sum_of_terms(summed, examples) for summed in sums)), None) or of_terms()

        clauses[at] = replace(clauses[at], check=identity)
    name = " + ".join(type(term).__name__ for _, term in parts)
    if weighted:
        return Checks(name, clauses, lambda *_: policy_weight.VERDICT)
    if len(parts) == 1:
        return Checks(name, clauses, partial(objective.verdict, cases[0]))
    return Checks(name, clauses, lambda *_: "composite")


def checks_of(
    target: Target, examples: int = 60, thorough: bool = False, shared: dict[Any, Any] | None = None
) -> Checks:
    """The checks of ``target``; see :func:`reports` for the arguments.

    Raises:
        TargetError: it declares something in a wrong way.
    """
    refuse_wrong_needs(target)
    name = type(target).__name__
    if isinstance(target, Objective):
        return _checks_of_objective(target, examples, thorough, shared)
    if isinstance(target, ValueFunction):
        v = ValueFunctionCase(target, value_function.CLAUSES, thorough=thorough)
        return Checks(name, list(value_function.clauses(v)), _verdict_of_part)
    if isinstance(target, Reward):
        return Checks(name, list(reward.clauses(RewardCase(target, examples=examples))), _verdict_of_part)
    if isinstance(target, ReferencePoint):
        z0 = ReferencePointCase(target, reference_point.CLAUSES, examples=examples)

        def verdict(failed: list[str], definition: Definition) -> str:
            degenerate = not failed and z0.constant is not None
            return "degenerate reference" if degenerate else _verdict_of_part(failed, definition)

        return Checks(name, list(reference_point.clauses(z0)), verdict)
    return Checks(name, list(feedback.clauses(FeedbackCase(target, examples=examples))), _verdict_of_part)


def clauses(target: Target, definition: Definition = "icml") -> Iterator[Clause]:
    """The clauses of ``target`` under ``definition``, before they run."""
    return (clause for clause in checks_of(target).clauses if definition in clause.definitions)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Uses one thread, since the operations are many and small, and enables gradients even if the caller did not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(before)


def _unusable(witnesses: list[str | None]) -> str | None:
    """Why the target cannot be judged: it returns a wrong shape, or always raises."""
    shapes = [witness for witness in witnesses if isinstance(witness, WrongShape)]
    raised = [witness for witness in witnesses if isinstance(witness, Raised)]
    if shapes:
        return shapes[0]
    return raised[0] if len(raised) == len(witnesses) else None


def _result(
    clause: Clause, witness: str | None, definition: Definition, expected_failures: Mapping[str, str]
) -> tuple[ClauseResult, bool]:
    """The row of one clause under a definition, and whether its failure counts against the target."""
    if witness is None:
        return ClauseResult(clause.name, "passed", reason=clause.note()), False
    if excused := clause.excused():
        return ClauseResult(clause.name, "expected", witness, excused), False
    unneeded = clause.not_required(definition)
    row = ClauseResult(clause.name, "failed", witness, unneeded or clause.note(), required=unneeded is None)
    if clause.name in expected_failures:
        row = replace(row, status="expected", reason=expected_failures[clause.name])
    return row, unneeded is None


def reports(
    target: Target,
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int = 60,
    thorough: bool = False,
    shared: dict[Any, Any] | None = None,
) -> dict[Definition, Report]:
    """The report under each definition, from one run of the checks.

    Args:
        target: see :func:`check_halo`, as are ``expected_failures``, ``max_examples`` and ``thorough``.
        shared: dictionary with the parts of earlier objectives, so that equal parts are checked once.

    Raises:
        ValueError: see :func:`check_halo`.
        TargetError: the target declares something in a wrong way, or runs out of memory.
    """
    start = time.perf_counter()
    expected = expected_failures or {}
    if not isinstance(expected, Mapping) or not all(isinstance(why, str) and why.strip() for why in expected.values()):
        raise ValueError(f"expected_failures is {expected!r}; it takes a reason for each clause, {{clause: reason}}")
    if max_examples < 1:
        raise ValueError(f"max_examples is {max_examples}; it must be at least 1")
    checks = checks_of(target, max_examples * (_THOROUGH if thorough else 1), thorough, shared)
    names = [clause.name for clause in checks.clauses]
    unknown = [name for name in expected if name not in names]
    if unknown:
        raise ValueError(f"expected_failures: {checks.name} has no clause {unknown[0]!r}; it has {', '.join(names)}")
    with _one_thread():
        witnesses = [clause.witness() for clause in checks.clauses]
        known = {} if _unusable(witnesses) else proofs.outcomes(target)
        witnesses = [
            witness or proofs.disproof(known, clause.name)
            for clause, witness in zip(checks.clauses, witnesses, strict=True)
        ]
        # A remark may take several calls of the target, and is the same under both definitions.
        bound = [replace(clause, note=cache(clause.note)) for clause in checks.clauses]
        proved = {name: str(outcome) for name, outcome in known.items()}
        verdicts: dict[Definition, str] = {}
        rows: dict[Definition, list[ClauseResult]] = {}
        for definition in get_args(Definition):
            applicable = [
                _result(clause, witness, definition, expected)
                for clause, witness in zip(bound, witnesses, strict=True)
                if definition in clause.definitions
            ]
            rows[definition] = [replace(row, proof=proved.get(row.clause)) for row, _ in applicable]
            verdicts[definition] = checks.verdict([row.clause for row, counts in applicable if counts], definition)
    seconds, unusable = time.perf_counter() - start, _unusable(witnesses)
    return {
        definition: Report(checks.name, definition, verdicts[definition], rows[definition], seconds, unusable)
        for definition in verdicts
    }


def check_halo(
    target: object,
    *,
    definition: Definition = "icml",
    expected_failures: Mapping[str, str] | None = None,
    on_fail: Literal["raise", "report"] = "raise",
    max_examples: int = 60,
    thorough: bool = False,
) -> Report:
    """Checks a loss, or a part of one, against the definition of human-aware losses. The target's code is executed.

    Args:
        target: an ``Objective``, ``ValueFunction``, ``ReferencePoint``, ``Reward`` or ``Feedback``, or such a class
            without required arguments; or, as on the command line, an objective's YAML file,
            ``path/to/file.py:Class``, a dotted class, or the bare name of a plug-in.
        definition: ``icml`` (Ethayarajh et al., ICML 2024, Def. 3.4) or ``v1`` (arXiv v1: any parameterised reward).
        expected_failures: clauses that may fail, each with a reason. They are reported as ``expected`` and do not
            raise. The verdict does not change: it is computed, and cannot be declared.
        on_fail: ``raise`` to raise if a clause fails unexpectedly, ``report`` to return the report in any case. Clauses
            that are only reported (those of -v(-u) for a value function alone) never raise.
        max_examples: number of steps of random rows on which to try each clause of a reward, reference point, feedback
            or objective. Value functions are searched on a grid instead.
        thorough: whether to try ten times as many steps, and a grid four times as dense.

    Raises:
        CheckFailed: see ``on_fail``; an AssertionError with the ``report``.
        TypeError: the target has the wrong type.
        TargetError: a name or file contains nothing to check; a subclass of ValueError.
        ValueError: ``definition``, ``on_fail`` or ``max_examples`` is invalid, or an expected failure has no reason or
            names a clause that the target does not have.
    """
    if definition not in get_args(Definition):
        raise ValueError(f"definition is {definition!r}; choose icml or v1")
    if on_fail not in ("raise", "report"):
        raise ValueError(f"on_fail is {on_fail!r}; choose raise or report")
    every = reports(
        as_target(target), expected_failures=expected_failures, max_examples=max_examples, thorough=thorough
    )
    report = every[definition]
    if on_fail == "raise" and any(clause.status == "failed" and clause.required for clause in report.clauses):
        raise CheckFailed(report)
    return report
