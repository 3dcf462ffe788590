"""The precision of an evaluation: that of the weights, bfloat16, or that of the run's training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_halos import ROOT, fit, line_of, one_error, pair_data, small_options

from halos_pl.cli.ablate import Parsers
from halos_pl.cli.main import main
from halos_pl.evaluation.arguments import measuring
from halos_pl.evaluation.compare import differences
from halos_pl.study.preflight import check
from halos_pl.study.read import load_study
from halos_pl.study.spec import StudyError


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were trained in each precision, data and prompts."""
    folder = tmp_path_factory.mktemp("precision")
    data = pair_data(folder / "pairs.jsonl")
    (folder / "prompts.txt").write_text("question one\nquestion two\n")
    for name in ("32-true", "bf16-mixed", "bf16-true"):
        options = ("--trainer.max_steps=2", "--model.policy.lora.r=2", f"--trainer.precision={name}")
        main(fit(tiny_folder, "dpo", data, folder / name, *options))
    return folder


def measured(runs: Path, run: str, *options: str) -> tuple[Any, Path]:
    out = runs / "-".join([run, *options, "measured"]).replace("=", "")
    words = [f"--held_out={runs / 'pairs.jsonl'}", f"--prompts={runs / 'prompts.txt'}", "--max_new_tokens=4"]
    main(["evaluate", str(runs / run), *words, f"--out={out}", *options])
    return json.loads((out / "evaluation.json").read_text()), out


@pytest.mark.slow
def test_log_probs_are_those_of_the_precision(runs: Path) -> None:
    exact, first = measured(runs, "32-true")
    assert measured(runs, "32-true", "--precision=as_trained")[0] == exact
    assert measured(runs, "32-true", "--precision=32-true")[0] == exact
    half, second = measured(runs, "32-true", "--precision=bf16-mixed")
    for row, value in exact["nll_desirable"].items():
        assert value == pytest.approx(half["nll_desirable"][row], rel=0.02)
    assert exact["nll_desirable"] != half["nll_desirable"]
    assert exact["kl_held_out"].keys() == half["kl_held_out"].keys()
    assert differences(first, first) == []
    assert any(line.startswith("precision differs: 32-true in") for line in differences(first, second))


def test_as_trained_is_the_precision_of_the_training(runs: Path) -> None:
    half, first = measured(runs, "bf16-mixed", "--precision=as_trained")
    same, second = measured(runs, "bf16-mixed", "--precision=bf16-mixed")
    assert half == same
    assert measured(runs, "bf16-mixed")[0] != half
    assert differences(first, second) == []
    _, exact = measured(runs, "32-true", "--precision=as_trained")
    assert any("precision differs: bf16-mixed in" in line for line in differences(first, exact))


def test_as_trained_needs_a_run_of_such_a_precision(runs: Path, tiny_folder: Path, capfd: Any) -> None:
    for model, named in ((runs / "bf16-true", "bf16-true"), (tiny_folder, tiny_folder.name)):
        words = ["evaluate", str(model), f"--held_out={runs / 'pairs.jsonl'}", "--precision=as_trained"]
        assert named in one_error(words, capfd)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_a_study_of_a_precision_that_cannot_be_measured_is_refused_before_its_first_run(
    precision: str, runs: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    pairs = str(runs / "pairs.jsonl")
    content = {
        "configs": [str(ROOT / "experiments/base.yaml")],
        "options": small_options(tiny_folder, Path(pairs), **{"trainer.precision": precision}),
        "arms": {"kto": {"objective": "kto"}},
        "evaluate": {"held_out": [pairs], "precision": "as_trained"},
        "metrics": ["reward_accuracy"],
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    if precision == "bf16-mixed":
        assert check(load_study(path), Parsers()).arms
        return
    with pytest.raises(StudyError, match=precision) as error:
        check(load_study(path), Parsers())
    assert str(error.value).startswith(f"{path}:{line_of(path, 'evaluate:')}: ")


def test_a_rule_and_a_judge_compute_in_their_own_precision(runs: Path) -> None:
    """Whatever the precision of the model's passes."""
    code = "import torch\ndef {}:\n    x = torch.full((1, 1), 1 + 2.0**-12)\n    return float((x @ x) > 1)\n"
    (runs / "rule.py").write_text(code.format("exact(answer, row)"))
    (runs / "judge.py").write_text(code.format("exact(answer, other, row)"))
    options = ("--precision=as_trained", f"--rule={runs / 'rule.py'}:exact", f"--judge={runs / 'judge.py'}:exact")
    words = [f"--prompts={runs / 'prompts.txt'}", "--max_new_tokens=4", f"--out={runs / 'exact'}"]
    main(["evaluate", str(runs / "bf16-mixed"), *words, *options])
    found = json.loads((runs / "exact/evaluation.json").read_text())
    assert set(found["rule"].values()) == {1.0}
    assert set(found["judge"].values()) <= {0.5, 1.0}  # equal answers are a tie


def test_a_setting_of_0_is_recorded_and_the_default_precision_is_not() -> None:
    recorded = measuring({"num_fewshot": 0, "limit": None, "allow_code_execution": False, "precision": "32-true"})
    assert recorded["evaluate"] == {"num_fewshot": 0}
    assert measuring({"precision": "as_trained"})["evaluate"] == {"precision": "as_trained"}
