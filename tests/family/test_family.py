"""Every file in ``experiments/objectives``, parsed and trained by the real command, against its formula."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from typing import Any

import pytest
import torch
import yaml
from family_runs import FILES, FOLDER, Rescorer, assert_equals_formula, assert_the_formulas, rows_for, run
from family_runs import objective as parsed
from formulas import LOSSES
from run_halos import write_data


def steps_of(objective: str) -> int:
    """Enough for each case that the loss must meet, or for a reference that moves; after the first step rewards vary.

    Of a reference that is re-synced every two steps the third step sees rewards of 0 again, the fourth what follows.
    """
    loss = LOSSES[objective]
    weights = [{"w": torch.tensor(float(step))} for step in range(3)]
    return 4 if loss.reaches or loss.has_history or any(w["w"] != 0 for _, w in loss.references(weights)) else 2


LR = "--model.optimizer.init_args.lr=1e-2"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def rescorer(tiny_folder):
    return Rescorer(tiny_folder)


def test_every_file_has_a_formula_and_every_formula_a_file():
    assert sorted(LOSSES) == FILES


@pytest.mark.parametrize("objective", FILES)
def test_the_file_is_short_and_says_what_it_is(objective):
    lines = (FOLDER / f"{objective}.yaml").read_text().splitlines()
    header = list(takewhile(lambda line: line.startswith("#"), lines))
    assert header, "no comment at the top"
    said = " ".join(header).replace("# ", "")
    of = re.search(r"The loss is that of (\w+)\.yaml", said)
    known = re.search(r"HALO|[Cc]omposite|degenerate reference", said) or (of and of[1] in FILES)
    assert known, "the header does not say whether it is a HALO"
    assert sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines) <= 20  # about 15


# Those with rows, weights, history or references of their own kind. The fits of the others are slow; their formulas are
# compared on tensors by default.
SAMPLE = {
    *("alpha_dpo", "aot_unpaired", "bco", "beta_dpo", "cpo_simpo", "csft", "dpo", "fipo", "grpo", "humanline_kto"),
    *("infonca", "kto", "kto_no_reference_model", "kto_one_y_per_x", "mnpo", "qrpo", "real", "rebel", "tpo", "tr_dpo"),
}
FITTED = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in FILES]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("objective", FITTED)
def test_loss_and_gradient_are_the_formulas(objective, tiny_folder, data, rescorer, tmp_path):
    loss = LOSSES[objective]
    steps = run(objective, tiny_folder, data, tmp_path / "run", LR, steps=steps_of(objective))
    assert len(steps) == steps_of(objective)
    seen = assert_the_formulas(objective, steps, rescorer)
    for number, step in enumerate(seen):
        classes = {True} if loss.imitates else {True, False}
        assert set(step.desirable[step.train].tolist()) == classes
        # Rewards are exactly 0 where the reference has just become the policy, and far from 0 otherwise.
        models = [weights for _, weights in loss.references([s.weights for s in steps[: number + 1]])]
        if all(torch.equal(model[name], weight) for model in models for name, weight in steps[number].weights.items()):
            assert number in ((0, 2) if "humanline" in objective else (0,))
            assert step.r.abs().max() < 1e-12
        else:
            assert step.r.abs().max() > 0.1
    for case, occurs in loss.reaches.items():
        assert any(map(occurs, seen)), f"no step has {case}"


def settings_of(model: Any, place: tuple = ()) -> Iterator[tuple]:
    """Places of every number and switch that a file gives to a plug-in."""
    if isinstance(model, dict | list):
        for key, value in model.items() if isinstance(model, dict) else enumerate(model):
            yield from settings_of(value, (*place, key))
    elif isinstance(model, bool | int | float):
        yield place


def changed(value: float, factor: float) -> Any:
    if isinstance(value, int):
        return not value if isinstance(value, bool) else value + 1
    return factor * value if value else 0.02


@pytest.mark.parametrize("objective", FILES)
def test_the_formula_says_every_number_of_the_file(objective):
    """Were any of them another one, the comparison with the formula would fail: it is not blind to it."""
    model = yaml.safe_load((FOLDER / f"{objective}.yaml").read_text())["model"]
    model.pop("reference_model", None)  # how it moves shows over steps only
    if model["reward"] is None:
        model.pop("loss_offset")  # of a HALO that is not there
    tried = [rows_for(objective, seed=seed, scale=3.0) for seed in range(4)]
    tried.append(rows_for(objective, seed=4, scale=8.0))
    if LOSSES[objective].data == "rows":  # one class has more than the other, or their z0 may cancel
        tried = [each.select(torch.arange(1, len(each))) for each in tried]
    for each in tried:
        assert_equals_formula(objective, each)
    for place in settings_of(model):
        # Both readings are one loss without undesirable rows or with a symmetric v.
        if {place[-1], ".".join(map(str, place))} & {"reflect_undesirable", *LOSSES[objective].idle}:
            continue

        def change(model: Any, factor: float, place: tuple = place) -> None:
            *folders, last = place
            for key in folders:
                model = model[key]
            model[last] = changed(model[last], factor)

        try:
            made = parsed(objective, partial(change, factor=1.02))
        except ValueError:  # of a bound that may not be higher
            made = parsed(objective, partial(change, factor=0.98))
        with pytest.raises(AssertionError):  # noqa: PT012
            for each in tried:
                assert_equals_formula(objective, each, made)
            pytest.fail(f"nothing depends on {place}", pytrace=False)
