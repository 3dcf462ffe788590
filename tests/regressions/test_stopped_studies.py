"""A study counts a run when its training came to its end, and goes on with those that a signal stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_halos import ROOT, pair_data

from halos_pl.cli.ablate import Parsers, status
from halos_pl.evaluation.arguments import measuring
from halos_pl.study.claim import claim
from halos_pl.study.preflight import Checked, CheckedArm, evaluate_arguments
from halos_pl.study.read import load_study
from halos_pl.study.results import Results
from halos_pl.study.spec import Study
from halos_pl.study.state import state as state_of


@pytest.fixture
def path(tiny_folder: Path, tmp_path: Path) -> Path:
    pairs = pair_data(tmp_path / "pairs.jsonl", 8)
    study = {
        "configs": [f"{ROOT}/experiments/base.yaml", f"{ROOT}/experiments/objectives/kto.yaml"],
        "options": {
            "model.policy.path": str(tiny_folder),
            "data.train": str(pairs),
            "data.batch_size": 1,
            "trainer.accelerator": "cpu",
            "trainer.max_epochs": 1,
            "checkpoint.every_n_steps": 1000,
        },
        "arms": {"one": {}, "other": {"model.optimizer.init_args.lr": 1e-3}},
        "seeds": [0],
        "evaluate": {"held_out": [str(pairs)]},
        "metrics": ["nll_desirable"],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    return tmp_path / "study.yaml"


def measured(study: Study, out: Path, number: int, summary: dict[str, Any] | None) -> None:
    """A run that was trained and measured, as its files have it."""
    folder = study.runs(out)[number].folder
    folder.mkdir(parents=True)
    (folder / "measured.json").write_text(json.dumps(measuring(evaluate_arguments(study, Parsers()))))
    (folder / "evaluation.json").write_text(json.dumps({"nll_desirable": {"a": 1.0, "b": 2.0 + number}}))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))


def claimed(study: Study, out: Path) -> None:
    arms = {arm.name: CheckedArm(8, arm.name, arm.name) for arm in study.arms}
    claim(study, out, Checked(arms, 2, measuring(evaluate_arguments(study, Parsers()))))


WHOLE = {"steps": 8, "planned_steps": 8, "ended": "max_epochs=1 reached", "finished": True}
EARLY = {"steps": 5, "planned_steps": 8, "ended": "stopped early: no better", "finished": True}


@pytest.mark.parametrize(
    ("summary", "state", "named"),
    [
        (WHOLE, "done", ()),
        (EARLY, "done", ()),  # as it was configured
        ({"steps": 8}, "done", ()),  # an older version's, which wrote it at a regular end only
        (None, "begun", ("summary.json",)),  # an older version measured a run that SIGTERM had stopped
        ({**WHOLE, "steps": 3, "ended": "SIGTERM", "finished": False}, "stopped", ("SIGTERM", "3 of 8")),
        ("[]", "stopped", ("summary.json",)),
        ({**WHOLE, "finished": "no"}, "stopped", ("max_epochs=1",)),
    ],
)
def test_a_measured_run_counts_when_its_training_is_finished(path, tmp_path, capsys, summary, state, named):
    study, out = load_study(path), tmp_path / "out"
    claimed(study, out)
    measured(study, out, 0, WHOLE)
    measured(study, out, 1, summary)
    results, run = Results(study, out), study.runs(out)[1]
    assert state_of(run) == state
    assert (run in results.done) is run.done is (state == "done")
    status(str(out))
    for word in named:
        assert word in results.faults[run]
        assert word in "".join(capsys.readouterr().out.replace("│", "").split()).replace("3of8", "3 of 8")
        status(str(out))


def test_summaries_of_an_older_version_are_said_to_count(path, tmp_path, capsys):
    study, out = load_study(path), tmp_path / "out"
    claimed(study, out)
    measured(study, out, 0, WHOLE)
    measured(study, out, 1, {"steps": 8})
    status(str(out))
    said = capsys.readouterr().err
    assert str(study.runs(out)[1].folder) in said
    assert "1 of 2" in said


def test_seeds_that_were_trained_for_another_number_of_steps_are_named(path, tmp_path):
    study = yaml.safe_load(path.read_text()) | {"seeds": [0, 1, 2]}
    path.write_text(yaml.safe_dump(study))
    loaded, out = load_study(path), tmp_path / "out"
    for number in range(6):
        measured(loaded, out, number, WHOLE if number != 2 else {**WHOLE, "steps": 20, "planned_steps": 20})
    run = loaded.runs(out)[2]
    assert list(Results(loaded, out).faults) == [run]
    assert "20" in Results(loaded, out).faults[run]


def wait_for(what: Any, process: subprocess.Popen, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, "it has ended before"
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["study", "fit"])
def test_a_stopped_study_goes_on(path, tmp_path, whom):
    """The signal goes to ``halos ablate``, or to one of its fits; the run is not measured, and goes on later."""
    study = yaml.safe_load(path.read_text())
    study["options"]["trainer.max_epochs"] = 200
    path.write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    words = [sys.executable, "-m", "halos_pl", "ablate", str(path), f"--out={out}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process: Any = subprocess.Popen(words, env=env, cwd=tmp_path, **pipe)
    first = out / "one" / "seed-0"
    wait_for(lambda: (first / "metrics.csv").is_file() and len((first / "metrics.csv").open().readlines()) > 5, process)
    if whom == "study":
        process.send_signal(signal.SIGTERM)
    else:
        newest = ["pgrep", "-n", "-P", str(process.pid)]  # the oldest is the process that it was forked from
        [fit] = subprocess.run(newest, capture_output=True, text=True).stdout.split()
        os.kill(int(fit), signal.SIGTERM)
        second = out / "other" / "seed-0" / "metrics.csv"
        wait_for(second.is_file, process)
        process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[0]
    assert process.returncode == (143 if whom == "study" else 130), said
    assert "Traceback" not in said
    runs = load_study(path).runs(out)
    assert state_of(runs[0]) == "stopped"
    assert not runs[0].measured
    steps = json.loads((first / "summary.json").read_text())
    assert 0 < steps["steps"] < steps["planned_steps"] == 3200
    assert (first / "checkpoints" / "last.ckpt").is_file()
