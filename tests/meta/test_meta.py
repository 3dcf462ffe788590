"""The conformance suite is only worth what it catches: mutants, each with one planted mistake, must all be caught.

And what is correct, however unusual, must pass. The mutants of one seed have other places, sizes and scales than those
of another. Every run takes one in six of the mutants of one seed, each held only to the clauses that it is meant for,
and one in twelve of the correct functions and parts. The others, and 19 more seeds of whatever draws anything, are
slow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import objective_mutants
import part_families
import part_mutants
import pytest
import step_families
import torch
from members import MUTANTS, PARTS, SOUND, VALUES, kind_of, report_on, unshrunk, witness_against
from mutant import CLAUSES, KIND_OF, KINDS, PROCESS, Mutant, draws
from run_halos import one_in
from unusual_values import UNUSUAL

from halos_pl.batch import Needs
from halos_pl.conformance import CheckFailed, check_halo
from halos_pl.conformance.check import checks_of, reports
from halos_pl.conformance.smallest import _halved, smallest
from halos_pl.conformance.step_split import shares
from halos_pl.conformance.steps import Step, large_steps
from halos_pl.conformance.witness import Raised
from halos_pl.objective.feedback import Binary
from halos_pl.objective.reference_points import MismatchedKL
from halos_pl.objective.rewards import LogProb, LogRatio
from value_functions import Identity, KahnemanTversky, Logistic

EVERY_CLAUSE = [clause for clauses in CLAUSES.values() for clause in clauses]
SEEDS = range(1, 20)
TWICE = "DPO from both sides"


@pytest.fixture(name="unshrunk")
def _unshrunk() -> Iterator[None]:
    with unshrunk():
        yield


def assert_caught(mutant: Mutant, seed: int) -> str:
    """The witness against the mutant."""
    witness = witness_against(mutant, seed)
    assert witness is not None, f"seed {seed}: {mutant.name} has escaped"
    return witness


def assert_passes(name: str, seed: int, examples: int = 60) -> None:
    report = report_on(name, seed, examples)
    assert report.sound, f"seed {seed}: {name} was rejected\n{report}"


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("mutant", one_in(6, MUTANTS), ids=lambda m: f"{m.clauses[0]}: {m.name}")
def test_a_mutant_is_caught_by_the_clause_it_belongs_to(mutant):
    witness = assert_caught(mutant, 0)
    assert not isinstance(witness, Raised), witness  # a mutant that does not run proves nothing


@pytest.mark.slow
@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("mutant", objective_mutants.PLANTED, ids=lambda m: m.name)
def test_a_mutant_is_caught_behind_an_objective(mutant):
    assert_caught(mutant, 0)


@pytest.mark.parametrize("name", one_in(12, VALUES, slow={TWICE}))
def test_a_correct_function_passes(name):
    assert_passes(name, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.drawn], ids=lambda m: f"{m.clauses[0]}: {m.name}")
def test_a_mutant_is_caught_at_other_places_and_sizes(mutant):
    for seed in SEEDS:
        assert_caught(mutant, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, make in VALUES.items() if draws(make)])
def test_a_correct_function_passes_at_other_places_and_scales(name):
    for seed in SEEDS:
        assert_passes(name, seed)


@pytest.mark.parametrize("name", one_in(12, PARTS, slow={TWICE}))
def test_a_sound_part_passes(name):
    assert_passes(name, 0, examples=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_sound_part_passes_on_more_steps_and_with_other_numbers(name):
    for seed in (0, *SEEDS[:4]) if draws(PARTS[name]) else (0,):
        assert_passes(name, seed, examples=20)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(
    ("field", "formula"),
    {
        "reference_logps": lambda rows: (rows.policy_logps - rows.reference_logps).sum(1),
        "kl": lambda rows: rows.policy_logps.sum(1) - rows.kl.sum(1),
        "scalar": lambda rows: rows.scalar + 0,
    }.items(),
)
def test_what_a_part_has_not_asked_for_is_none(field, formula):
    forgets = part_mutants.Formula(formula)
    forgets.needs = Needs()
    witness = next(clause for clause in checks_of(forgets).clauses if clause.name == "reward_shape").witness()
    assert isinstance(witness, Raised), field


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("clause", step_families.FAILS_WITHOUT_ROWS)
def test_a_part_that_fails_on_a_rank_without_rows_is_caught(clause):
    checks = checks_of(step_families.FAILS_WITHOUT_ROWS[clause]()).clauses
    assert isinstance(next(check for check in checks if check.name == clause).witness(), Raised)


@pytest.mark.usefixtures("unshrunk")
def test_a_reward_that_sees_the_pair_runs_and_is_no_function_of_x_and_y():
    report = check_halo(part_families.shared_length(Random(0)), on_fail="report", max_examples=20)
    assert report.verdict == "halo-shaped: reward is not a function of (x, y)"


@pytest.mark.usefixtures("unshrunk")
def test_a_clamp_at_zero_is_a_fact_about_log_ratios_only():
    about = {"reference_in_range", "reference_shift_equivariant"}
    for reward, failed in ((LogRatio(), set()), (LogProb(), about)):
        checks = checks_of(objective_mutants.halo(reference_point=MismatchedKL(), reward=reward), examples=10).clauses
        found = {clause.name for clause in checks if clause.name in about and clause.witness() and not clause.excused()}
        assert found == failed


def test_a_loss_is_recognised_as_the_one_that_it_equals():
    """-u of a rejected row is u of the chosen one, so twice DPO reflects nothing; against 0, the same rows do."""
    report = report_on(TWICE, 0, 10)
    assert report.verdict == "halo"
    assert next(c for c in report.clauses if c.clause == "undesirable_concave_on_gains").required is False


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_check_has_gradients_whatever_the_caller_has_switched_off(without):
    target = next(m for m in MUTANTS if m.name == "fully detached")(0)
    with without():
        assert "gradient" in check_halo(target, on_fail="report").failed
        assert check_halo(Identity()).sound


MADE_OF = {
    "reward, per token": lambda: LogRatio(length_normalised=True),
    "mismatched KL without clamp": lambda: MismatchedKL(clamp=False),
    "binary": lambda: Binary(lambda_undesirable=0.0),
    "KTO without clamp": objective_mutants.halo,
    "KTO without clamp, identity": lambda: objective_mutants.halo(value_function=Identity()),
    "KTO without clamp, Kahneman-Tversky": lambda: objective_mutants.halo(value_function=KahnemanTversky()),
    "KTO without clamp, same": lambda: objective_mutants.halo(
        value_function=Logistic(beta=1.0), reflect_undesirable=False
    ),
}


@pytest.fixture(scope="module")
def shared() -> dict[Any, Any]:
    """The parts that several objectives have, each checked once."""
    return {}


@pytest.mark.parametrize("name", one_in(6, MADE_OF))
def test_what_the_mutants_were_made_of_passes(name, shared):
    """Otherwise a mutant would be caught for what it has in common with the sound part. Of the library's parts
    themselves this is shown in tests/test_conformance.py."""
    report = reports(MADE_OF[name](), max_examples=8, shared=shared)["icml"]
    assert not report.failed, str(report)


def test_the_witness_is_that_of_the_smallest_step_at_fault():
    """Also without Hypothesis, as far as halving goes."""

    def fault(step: Step) -> str | None:
        return f"{step.units} {step.mismatched} {step.tokens}" if step.units >= 3 and step.tokens >= 2 else None

    assert smallest(fault, Needs()) == "3 0 2"
    assert _halved(fault, Step(units=12, tokens=8, mismatched=4), "12 4 8") == "3 1 2"


@pytest.mark.parametrize("needs", [Needs(), Needs(pairs=True), Needs(groups=True), Needs(pairs=True, mismatched=True)])
def test_some_rows_of_either_class_have_the_largest_number_of_tokens(needs):
    rows = max((step for step in large_steps(needs)), key=lambda step: step.tokens).rows()
    full = rows.mask.sum(dim=1) == 8192
    for kind in (rows.labels.desirable, ~rows.labels.desirable):
        assert (full & kind & rows.labels.train).any()
    assert (full & rows.labels.mismatched).any() == rows.labels.mismatched.any()


def test_ranks_share_the_rows_of_a_step_and_some_have_none():
    sizes = set()
    for seed in range(30):
        rows = Step(seed=seed, units=1 + seed % 7, mismatched=seed % 4).rows()
        parts = shares(rows, Needs(), seed, 3)
        assert sorted(torch.cat(parts).tolist()) == list(range(len(rows)))
        assert all(bool(rows.labels.train[part].any()) for part in parts if len(part))
        sizes |= {len(part) for part in parts}
    assert {0, 1, 2} <= sizes


def test_every_clause_has_at_least_two_mutants():
    count = Counter(mutant.clauses[0] for mutant in MUTANTS)
    assert {clause: count[clause] for clause in EVERY_CLAUSE if count[clause] < 2} == {}
    assert {clause for mutant in MUTANTS for clause in mutant.clauses} <= set(EVERY_CLAUSE)
    assert len({m.name for m in MUTANTS}) >= 45
    assert len(UNUSUAL) >= 20


def test_every_target_has_a_kind_and_every_kind_has_targets():
    kinds = [m.kind for m in MUTANTS] + [kind_of(make) for make in SOUND.values()]
    assert {*kinds, PROCESS} == set(KINDS)  # the targets of process_targets.py are classes in a file
    assert len(SOUND) == len(VALUES) + len(PARTS)
    assert set(KIND_OF) <= {*EVERY_CLAUSE, "process"}


def test_the_clauses_are_those_that_the_suite_reports():
    """A KTO that reflects and has a step reference has every clause there is."""
    assert {clause.name for clause in checks_of(objective_mutants.halo()).clauses} == set(EVERY_CLAUSE)


def test_a_mutant_raises_where_failures_are_raised_and_passes_where_they_are_expected():
    mutant = next(m for m in MUTANTS if m.name == "squared error, as in IPO")
    with pytest.raises(CheckFailed) as raised:
        check_halo(mutant(0))
    failed = raised.value.report.failed
    assert "non_decreasing" in failed
    report = check_halo(mutant(0), expected_failures=dict.fromkeys(failed, "falls past its peak"))
    assert report.failed == []
    assert {c.clause: c.reason for c in report.clauses if c.status == "expected"} == dict.fromkeys(
        failed, "falls past its peak"
    )
