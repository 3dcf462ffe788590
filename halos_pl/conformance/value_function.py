"""The clauses of a value function: v(u), elementwise, non-decreasing, concave on gains, sound in every dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from halos_pl.conformance.clause import Clause, Law
from halos_pl.conformance.report import Definition
from halos_pl.conformance.value_calls import elementwise, no_in_place_change, shape
from halos_pl.conformance.value_case import ValueFunctionCase
from halos_pl.conformance.value_curve import (
    UNDESIRABLE,
    concave_on_gains,
    non_decreasing,
    undesirable_concave_on_gains,
    undesirable_non_decreasing,
)
from halos_pl.conformance.value_numbers import finite, gradient, precision
from halos_pl.conformance.value_states import deterministic
from halos_pl.conformance.witness import Raised

CLAUSES: tuple[Law, ...] = (
    shape,
    elementwise,
    deterministic,
    no_in_place_change,
    finite,
    precision,
    non_decreasing,
    concave_on_gains,
    gradient,
    undesirable_non_decreasing,
    undesirable_concave_on_gains,
)
_NOT_REQUIRED = "reported only: required of objectives with reflect_undesirable: true (arXiv v1: false)"
_SINGLE = "v rounds its outcomes to float32 (see precision), which may be the cause"


def _required_of_objectives(law: Law, definition: Definition) -> str | None:
    return _NOT_REQUIRED if law in UNDESIRABLE else None


def clauses(
    case: ValueFunctionCase, not_required: Callable[[Law, Definition], str | None] = _required_of_objectives
) -> Iterator[Clause]:
    """The clauses of a value function.

    Args:
        case: the value function.
        not_required: why a failed clause is only reported under a version of the definition, else None; default: that
            of a value function alone.
    """

    def note(law: Law) -> str | None:
        imprecise = case.witness(precision)
        if law is precision or imprecise is None or isinstance(imprecise, Raised) or case.witness(law) is None:
            return case.note(law)
        return _SINGLE if imprecise == case.single_precision else case.note(law)

    for law in case.laws:
        yield case.clause(law, not_required=partial(not_required, law), note=lambda law=law: note(law))
