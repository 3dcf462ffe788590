"""All mutants and all sound targets, and whether the suite is right about one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

import objective_mutants
import part_families
import part_mutants
import run_families
import step_families
import value_call_mutants
import value_mutants
import value_state_mutants
from mutant import FALSE_ALARMS, TRAINING, Mutant, Sound, Value
from sound_parts import SOUND_PARTS, LoggingSum
from sound_values import SOUND_VALUES
from torch import nn
from unusual_values import UNUSUAL

from halos_pl.conformance import check_halo, strategies
from halos_pl.conformance.check import checks_of
from halos_pl.conformance.report import Report

MUTANTS: list[Mutant] = [
    *value_mutants.MUTANTS,
    *value_state_mutants.MUTANTS,
    *value_call_mutants.MUTANTS,
    *part_mutants.MUTANTS,
    *part_families.MUTANTS,
    *objective_mutants.MUTANTS,
    *step_families.MUTANTS,
    *run_families.MUTANTS,
]


def _unusual(name: str) -> Callable[[Random], nn.Module]:
    return lambda rng: Value(UNUSUAL[name](rng))


def _fixed(name: str) -> Sound:
    return Sound(kind_of(SOUND_PARTS[name]), lambda rng: SOUND_PARTS[name]())


def kind_of(make: Callable[..., nn.Module]) -> str:
    return make.kind if isinstance(make, Sound) else FALSE_ALARMS


VALUES: dict[str, Callable[[Random], nn.Module]] = {name: _unusual(name) for name in UNUSUAL} | SOUND_VALUES
PARTS: dict[str, Callable[[Random], nn.Module]] = {
    **{name: _fixed(name) for name in SOUND_PARTS},
    "a sum of another class that adds nothing": Sound(TRAINING, lambda rng: LoggingSum([objective_mutants.halo()])),
    **part_families.SOUND,
    **step_families.SOUND,
}
SOUND = VALUES | PARTS


def made(name: str, seed: int) -> nn.Module:
    """The sound target of that name and seed."""
    return SOUND[name](Random(f"{name} {seed}"))


@contextmanager
def unshrunk() -> Iterator[None]:
    """Any witness will do: the search for the smallest takes half the time."""
    before = strategies.shrunk
    strategies.shrunk = lambda fault, first, needs, **_: first
    try:
        yield
    finally:
        strategies.shrunk = before


def witness_against(mutant: Mutant, seed: int) -> str | None:
    """What the clauses that the mutant is meant for find, the first of them; None if it escapes."""
    for clause in checks_of(mutant(seed)).clauses:
        if clause.name in mutant.clauses and (witness := clause.witness()) and clause.excused() is None:
            return witness
    return None


def report_on(name: str, seed: int, examples: int) -> Report:
    """The report on a sound target."""
    return check_halo(made(name, seed), on_fail="report", max_examples=examples)
