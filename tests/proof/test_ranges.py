"""What is proved for all hyper-parameters, where branches and switching points depend on these."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from laws import law
from make_parts import WRAPPERS, example, library
from parametrized import FORMULAS, Parametrized, violation

import value_functions
from halos_pl.proof.prove import prove
from value_functions import ValueFunction
from value_functions.by_slope import BySlope

SHIPPED = library(value_functions.__name__)
NOT_DECIDED = [("Mixture", "DiscoPOP")]  # two exponentials that both vanish where the slope does
BRANCHING = ("CARA", "Hinge", "KahnemanTversky")  # at places that depend on their parameters


def _pairs() -> list[Any]:
    return [
        pytest.param(
            wrapper, name, marks=() if wrapper in ("Clipped", "Shifted") and name in BRANCHING else pytest.mark.slow
        )
        for wrapper in WRAPPERS
        for name in SHIPPED
        if name not in WRAPPERS
        and (wrapper, name) not in NOT_DECIDED
        and not issubclass(SHIPPED[name], BySlope)  # which are proved only by themselves
    ]


@pytest.mark.parametrize(("wrapper", "name"), _pairs())
def test_wrappers_are_decided_for_all_parameters_of_theirs_and_of_what_they_wrap(wrapper, name):
    v: ValueFunction = WRAPPERS[wrapper](example(SHIPPED[name]))
    for outcome in prove(v).outcomes.values():
        assert outcome.status != "undecided", str(outcome)
        if outcome.status == "proved":
            for_all = outcome.scope.startswith("for every") and "given" not in outcome.scope
            assert for_all or outcome.reason.startswith("disproved for"), str(outcome)


def _require_true(formula: str) -> None:
    for claim, outcome in prove(Parametrized(formula=formula)).outcomes.items():
        if outcome.status == "proved" and "given" not in outcome.scope:
            assert not violation(formula, claim), str(outcome)


@law(10)
@given(FORMULAS)
def test_what_is_proved_for_all_parameters_holds_for_some(formula):
    _require_true(formula)


@pytest.mark.slow
@law(600)
@given(FORMULAS)
def test_what_600_proofs_say_holds_for_some_parameters(formula):
    _require_true(formula)
