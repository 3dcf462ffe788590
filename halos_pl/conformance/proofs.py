"""What can be proved about the value function of a target, beside what the search finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from halos_pl.conformance import objective
from halos_pl.objective.halo import Objective
from halos_pl.proof.prove import Outcome, prove
from value_functions import ValueFunction


def value_function_of(target: Any) -> ValueFunction | None:
    """The value function of a target, if it has exactly one."""
    if isinstance(target, ValueFunction):
        return target
    parts = [part for _, part in objective.terms(target)] if isinstance(target, Objective) else []
    v = getattr(parts[0], "value_function", None) if len(parts) == 1 else None
    return v if isinstance(v, ValueFunction) else None


def outcomes(target: Any) -> Mapping[str, Outcome]:
    """What is known about each clause that can be proved; nothing for a target without a value function."""
    v = value_function_of(target)
    if v is None:
        return {}
    proof = prove(v)
    known = dict(proof.outcomes)
    if known:  # -v(-u) falls where v does
        known["undesirable_non_decreasing"] = known["non_decreasing"]
    if proof.not_integral:  # backward passes use the slope
        known["gradient"] = replace(known["non_decreasing"], status="disproved", reason=proof.not_integral, scope="")
    return known


def disproof(known: Mapping[str, Outcome], clause: str) -> str | None:
    """The witness of a clause that is disproved, else None."""
    outcome = known.get(clause)
    if outcome is None or outcome.status != "disproved":
        return None
    return " ".join(filter(None, [outcome.reason, outcome.scope]))
