"""A rank without a row of a held-out batch: it makes the same calls as the others, and changes no figure."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from policy_steps import batch
from run_halos import OBJECTIVES

from halos_pl.batch import TokenBatch
from halos_pl.conformance.ranks import Ranks
from halos_pl.objective.build import load_objective
from halos_pl.objective.halo import Objective
from halos_pl.policy.loading import ModelSpec, load_model
from halos_pl.policy.reference import FrozenCopy
from halos_pl.policy.scorer import Scorer
from halos_pl.training.engine import StepEngine
from halos_pl.training.held_out import HeldOut

NEEDS = {name: load_objective(name).needs for name in OBJECTIVES}
NAMES = [name for name, needs in NEEDS.items() if not needs.samples and not needs.routing]


@pytest.fixture(scope="module")
def models(tiny_folder: Any) -> tuple[Scorer, FrozenCopy]:
    spec = ModelSpec(str(tiny_folder))
    policy, reference = Scorer(load_model(spec), scalar_head=True), FrozenCopy()
    reference.bind(policy, spec)
    with torch.no_grad():  # away from the reference
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return policy, reference


def shares(objective: Objective, rows: int) -> list[TokenBatch]:
    """A batch of ``rows`` pairs, or rows of pairs, and one without rows."""
    whole = batch(rows, mismatched=objective.needs.mismatched)
    none = torch.zeros(0, dtype=torch.long)
    return [whole, whole.select(none, [])]


def figures(objective: Objective, models: Any, batches: list[TokenBatch], micro: int | None) -> dict[str, float]:
    """The figures of a rank over its shares of several batches, as a run logs them."""
    policy, reference = models
    engine = StepEngine(objective, policy, reference if objective.needs.reference else None, micro)
    module = SimpleNamespace(engine=engine, device=torch.device("cpu"), global_step=0, objective=objective)
    held_out = HeldOut(module)
    for each in batches:
        parts = list(held_out.measured(each))
        assert sum(len(part.rows) for part in parts) == sum(not extra for extra in each.host.mismatched)
        if objective.needs.reference:
            for kl, tokens in engine.divergences(each):
                held_out.add_kl(kl, tokens)
    return held_out.means.compute(empty=False)


@pytest.mark.parametrize(
    ("name", "micro"),
    [
        ("kto", None),  # mismatched rows
        ("dpo", 2),  # an estimate per row
        ("aot_unpaired", 2),  # rows compared over ranks
        *(pytest.param(name, micro, marks=pytest.mark.slow) for name in NAMES for micro in (None, 2)),
    ],
)
def test_a_rank_without_rows_changes_no_figure(name: str, micro: int | None, models: Any) -> None:
    """Of two batches, one is all on the first rank and the other all on the second."""
    one, two, alone = (load_objective(name).eval() for _ in range(3))
    (first, none), (second, _) = shares(alone, 3), shares(alone, 2)
    expected = figures(alone, models, [first, second], micro)
    jobs = [
        partial(figures, one, models, [first, none], micro),
        partial(figures, two, models, [none, second], micro),
    ]
    for of_rank in Ranks().run(jobs):
        assert of_rank == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert "loss" in expected
    assert ("logps/chosen" in expected) == alone.needs.policy_logps
