"""Defects of other libraries that belong to a loss, each over every objective file that could have it.

The numbers are those of the project's list of them. Defects of data, tokens and memory are tested beside the data
and the models; what is tested here for the whole family is tested elsewhere in depth for a loss or two.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml
from family_runs import (
    FILES,
    FOLDER,
    Rescorer,
    as_step,
    assert_equals_formula,
    assert_the_formulas,
    objective,
    rows,
    rows_for,
    run,
)
from formulas import LOSSES
from newer_formulas import OLDER
from run_halos import write_data

from halos_pl.batch import LogProbBatch
from halos_pl.objective.halo import HALO, Objective

LR = "--model.optimizer.init_args.lr=1e-2"
# On tensors each takes no time, but there are many: those of the newer losses are left to the slow suite, too.
every_file = pytest.mark.parametrize(
    "name", [name if name in OLDER else pytest.param(name, marks=pytest.mark.slow) for name in FILES]
)
# One of each kind of reference point, feedback and reference model. The other files differ from these in plug-ins
# that know nothing of models, so their fits are left to the slow suite.
KINDS = {"aot_unpaired", "bco", "dpo", "grpo", "humanline_kto", "kto", "tr_dpo"}


def fits(names: list[str]) -> Any:
    marks = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", marks)


WITH_REFERENCE = [name for name in FILES if name in LOSSES and LOSSES[name].uses_reference]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def rescorer(tiny_folder):
    return Rescorer(tiny_folder)


@every_file
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_defect_4_a_log_ratio_of_zero_is_no_padding(name, share):
    """0 is what every token's log-ratio is at the start: a value, not a mask."""
    made = rows_for(name, seed=4)
    same = torch.rand(made.mask.shape, generator=torch.Generator().manual_seed(0)) < share
    reference = torch.where(same & made.mask, made.policy_logps.detach(), made.reference_logps)
    assert_equals_formula(name, dataclasses.replace(made, reference_logps=reference))


@pytest.mark.parametrize("name", [name for name in FILES if name != "unlikelihood"])
def test_defect_4_a_log_prob_of_zero_is_no_padding(name):
    """So is the log-prob of a token that the policy is certain of. (Its unlikelihood is infinite.)"""
    made = rows_for(name, seed=4)
    certain = torch.zeros_like(made.mask)
    certain[:, 0] = made.mask.sum(1) > 1
    policy = torch.where(certain, 0.0, made.policy_logps.detach())
    assert_equals_formula(name, dataclasses.replace(made, policy_logps=policy))


@every_file
@pytest.mark.parametrize(
    ("pairs", "mismatched", "tokens"), [(4, 2, 10), (4, 2, 8), (4, 2, 2), (1, 1, 2), (1, 1, 1), (3, 3, 4)]
)
def test_defect_5_nothing_broadcasts(name, pairs, mismatched, tokens):
    """As many tokens as rows, train rows, mismatched rows or pairs: where a wrong shape would pass without a word."""
    assert_equals_formula(name, rows_for(name, pairs, mismatched, seed=5, tokens=tokens))


@fits(WITH_REFERENCE)
@pytest.mark.filterwarnings("ignore")
def test_defects_6_and_17_under_an_adapter_the_reference_is_the_model_without_it(
    name, tiny_folder, data, rescorer, tmp_path
):
    """Log-ratios and not log-probs, also in later steps, when the adapter has moved, and under a synced reference."""
    # Mixing the two factors of an adapter is not mixing their products, so a soft update has no formula here.
    steps = run(
        name, tiny_folder, data, tmp_path / "run", LR, "--model.policy.lora={r: 4}", steps=2 + (name != "tr_dpo")
    )
    seen = assert_the_formulas(name, steps, rescorer, gradient=False)
    assert bool((seen[0].r == 0).all())
    assert seen[1].r.abs().max() > 1e-2


def with_feedback(argument: str) -> Any:
    """The files whose feedback takes ``argument``."""
    feedback = {name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"]["feedback"] for name in FILES}
    return pytest.mark.parametrize("name", [n for n, f in feedback.items() if argument in str(f)])


def first_halo(name: str) -> HALO:
    return next(m for m in objective(name).modules() if isinstance(m, HALO))


@with_feedback("lambda_desirable")
def test_defect_6_weights_of_the_classes_count(name):
    """The loss is the weighted sum of what it is with one class alone, each over the same denominator."""
    halo, made = first_halo(name), rows(seed=6)
    feedback: Any = next(m for m in halo.feedback.modules() if hasattr(m, "lambda_desirable"))

    def loss(desirable: float, undesirable: float) -> float:
        feedback.lambda_desirable, feedback.lambda_undesirable = desirable, undesirable
        halo.eval()  # a running mean stays where it is
        return halo(made).loss.item()

    assert loss(2.0, 0.5) == pytest.approx(2 * loss(1.0, 0.0) + 0.5 * loss(0.0, 1.0), rel=1e-6)
    assert min(abs(loss(1.0, 0.0)), abs(loss(0.0, 1.0))) > 1e-4


@with_feedback("label_smoothing")
def test_defect_6_label_smoothing_counts(name):
    """With smoothing the loss is mixed with that of the opposite preference; robust DPO takes it off again."""
    if name in ("alpha_dpo", "gamma_po", "rebel"):
        pytest.skip("a margin belongs to the pair as it is labelled, and a square is the same from both sides")
    halo, made = first_halo(name), rows(seed=6)
    feedback: Any = next(m for m in halo.feedback.modules() if hasattr(m, "label_smoothing"))

    def loss(epsilon: float, rows: LogProbBatch = made) -> float:
        feedback.label_smoothing = epsilon
        return halo(rows).loss.item()

    other = loss(
        0.0,
        dataclasses.replace(
            made, labels=dataclasses.replace(made.labels, desirable=~made.labels.desirable & made.labels.train)
        ),
    )
    expected = 0.7 * loss(0.0) + 0.3 * other
    if name == "robust_dpo":
        expected = (0.7 * loss(0.0) - 0.3 * other) / (1 - 2 * 0.3)
    assert loss(0.3) == pytest.approx(expected, rel=1e-6)
    assert abs(loss(0.3) - loss(0.0)) > 1e-4


def weights_of(model: Any, place: tuple = ()) -> Iterator[tuple]:
    """Places of every weight that a file states."""
    if isinstance(model, dict | list):
        for key, value in model.items() if isinstance(model, dict) else enumerate(model):
            yield from weights_of(value, (*place, key))
    elif place[0] != "value_function" and re.fullmatch("weight|label_smoothing|lambda_.*", str(place[-1])):
        yield place


def with_weight(name: str, place: tuple, value: Any) -> Objective:
    def change(model: Any) -> None:
        *folders, last = place
        for key in folders:
            model = model[key]
        model[last] = value

    return objective(name, change)


def all_weights() -> list[tuple[str, tuple]]:
    models = {name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"] for name in FILES}
    return [(name, place) for name, model in models.items() for place in weights_of(model)]


@pytest.mark.parametrize(("name", "place"), all_weights(), ids=lambda x: x if isinstance(x, str) else f"{x[0]}.{x[-1]}")
def test_defect_7_an_explicit_zero_is_zero(name, place):
    """And not "nothing said, so 1": at 0 the loss is what it is next to 0."""
    if place[-1] in LOSSES[name].idle:
        pytest.skip("it does not change the loss")
    made = rows_for(name, seed=7)
    at_zero = with_weight(name, place, 0.0)(made).loss.item()
    assert at_zero == pytest.approx(with_weight(name, place, 1e-9)(made).loss.item(), rel=1e-8, abs=1e-6)
    assert abs(at_zero - with_weight(name, place, 0.4)(made).loss.item()) > 1e-4


@fits(FILES)
@pytest.mark.filterwarnings("ignore")
def test_defect_8_a_step_in_parts_is_the_whole_step(name, tiny_folder, data, rescorer, tmp_path):
    """One denominator, one z0 and one set of ranks for a step however it is split; pairs and groups with it."""
    steps = run(name, tiny_folder, data, tmp_path / "run", LR, "--model.micro_batch_rows=3", steps=2)
    assert_the_formulas(name, steps, rescorer)


@pytest.mark.parametrize(
    "name", [name for name in FILES if name in LOSSES and not LOSSES[name].data.endswith(("pairs", "triples"))]
)
@pytest.mark.parametrize("desirable", [True, False])
def test_defect_9_a_step_of_one_class_is_defined(name, desirable):
    """No 0 / 0: neither in the loss nor in its slope."""
    made = rows_for(name, seed=9)
    one = made.select(((made.labels.desirable == desirable) | made.labels.mismatched).nonzero().squeeze(1))
    logps = one.policy_logps.detach().requires_grad_()
    loss = objective(name)(dataclasses.replace(one, policy_logps=logps)).loss
    loss.backward()
    assert loss.isfinite()
    assert bool(logps.grad.isfinite().all())
    value = LOSSES[name].of(as_step(one, one.policy_logps.detach()), [])
    if value.isfinite():
        assert loss.item() == pytest.approx(value.item(), rel=1e-6, abs=1e-7)


@fits(WITH_REFERENCE)
@pytest.mark.filterwarnings("ignore")
def test_defect_13_in_half_precision_the_start_is_that_of_rewards_of_zero(name, tiny_folder, data, rescorer, tmp_path):
    """A reference in another dtype than the policy's would make them differ at the first step."""
    steps = run(name, tiny_folder, data, tmp_path / "run", "--model.policy.dtype=bfloat16", steps=1)
    step = rescorer.step(name, steps, 0, gradient=False)
    equal = dataclasses.replace(step, reference=step.policy)
    assert steps[0].logged["loss"] == pytest.approx(LOSSES[name].of(equal, []).item(), rel=1e-6)


def moves(name: str) -> bool:
    """Whether the reference follows the policy."""
    weights = [{"w": torch.tensor(float(step))} for step in range(3)]
    return any(of_model["w"] != 0 for _, of_model in LOSSES[name].references(weights))


@fits([n for n in FILES if n in LOSSES and (LOSSES[n].has_history or moves(n))])
@pytest.mark.filterwarnings("ignore")
def test_defect_15_state_of_a_loss_is_in_the_checkpoint(name, tiny_folder, data, rescorer, tmp_path):
    """A fit that was stopped between two re-syncs, or in the middle of a mean, goes on as if it had not been."""
    folder = tmp_path / "run"
    before = run(name, tiny_folder, data, folder, LR, steps=3)
    after = run(name, tiny_folder, data, folder, LR, "--ckpt_path=last", steps=5)
    assert (len(before), len(after)) == (3, 2)
    assert_the_formulas(name, before + after, rescorer)


@every_file
def test_defect_15_no_other_loss_has_state(name):
    """Whatever a step leaves behind in an objective is in its state dict, and only where the formula says so."""
    made, first, second = objective(name), rows_for(name, seed=1), rows_for(name, seed=2)
    fresh = made(second).loss.item()
    made(first)
    again = made(second).loss.item()
    assert (again != fresh) == LOSSES[name].has_history
    assert bool(made.state_dict()) == LOSSES[name].has_history
