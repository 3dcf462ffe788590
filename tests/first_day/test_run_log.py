"""``metrics.csv`` has one line a step, whoever logs its figures, and begins with the step."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from kills import kill_at
from run_halos import KILLED, binary_data, fit, metrics, run

from halos_pl.cli.main import main
from halos_pl.training.run_log import METRICS, RunCSVLogger, StepWriter


def lines(folder: Path) -> list[dict[str, str]]:
    with (folder / METRICS).open(newline="") as file:
        return list(csv.DictReader(file))


def names(folder: Path) -> list[str]:
    return (folder / METRICS).read_text().splitlines()[0].split(",")


OWN = ("--trainer.callbacks+=plugins.own_log.OwnLog",)
LRS = ("--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=DeviceStatsMonitor")


@pytest.fixture(scope="module")
def logged(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit of two epochs of three steps, with callbacks of Lightning's and of a user's, and validations."""
    folder = tmp_path_factory.mktemp("logged")
    data = binary_data(folder / "data.jsonl")
    options = (f"--data.validation={data}", "--trainer.max_epochs=2", *OWN, *LRS)
    main(fit(tiny_folder, "kto", data, folder / "run", *options))
    return folder / "run"


def test_each_step_has_one_line_with_all_its_figures(logged: Path) -> None:
    rows = lines(logged)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4", "5", "6"]  # of the last there is own/next alone
    for step, row in enumerate(rows[:-1]):
        assert float(row["loss"]) > 0
        assert float(row["lr-AdamW"]) >= 0
        assert float(row["own/log"]) == float(row["own/direct"]) == step
        assert (row["own/next"] == "") if step == 0 else float(row["own/next"]) == step - 1
        assert (row["val/loss"] != "") is (row["own/epoch"] != "") is (step in (2, 5))
        assert any(row[name] for name in row if name.startswith("DeviceStatsMonitor"))
    assert rows[2]["own/late"] == "2.0"


def test_the_first_columns_are_those_that_are_looked_for_first(logged: Path) -> None:
    found = names(logged)
    assert found[:4] == ["step", "epoch", "loss", "grad_norm"]
    place = {name: i for i, name in enumerate(found)}
    assert place["rewards/margins"] < place["logps/chosen"] < place["own/log"] < place["val/loss"] < place["tokens/s"]
    assert len(set(found)) == len(found)


@pytest.mark.slow  # the same of a run with a LearningRateMonitor: tests/test_resume.py
@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_writes_the_same_file(tiny_folder: Path, tmp_path: Path, step: int) -> None:
    """Killed after an epoch's last step and its validation, or before; columns and lines are those of a whole run."""
    data = binary_data(tmp_path / "data.jsonl")
    more = ("--trainer.max_epochs=2", f"--data.validation={data}", "--checkpoint.every_n_steps=1")
    files = {}
    for name in ("whole", "killed"):
        words = fit(tiny_folder, "bco", data, tmp_path / name, *more, "--trainer.callbacks+=LearningRateMonitor")
        if name == "killed":
            assert run([*words, *kill_at(step, "after_checkpoint")], tmp_path).status == KILLED
            words = [*words, "--ckpt_path=last"]
        ended = run(words, tmp_path)
        assert ended.status == 0, ended
        files[name] = (names(tmp_path / name), metrics(tmp_path / name))
    assert files["killed"] == files["whole"]


# -- the writer alone -----------------------------------------------------------------------------------


def written(folder: Path, *entries: tuple[int | None, dict[str, Any]], save: bool = True) -> list[dict[str, str]]:
    writer = StepWriter(str(folder))
    for step, figures in entries:
        writer.log_metrics(figures, step)
        if save:
            writer.save()
    writer.save()
    return lines(folder)


@pytest.mark.parametrize("save", [True, False])
def test_figures_that_come_late_are_added(tmp_path: Path, save: bool) -> None:
    entries = [(0, {"lr": 1.0}), (0, {"loss": 2.0}), (1, {"loss": 1.0}), (None, {"val/loss": 3.0}), (5, {"loss": 0.5})]
    found = written(tmp_path, *entries, save=save)
    assert [(row["step"], row["loss"], row["lr"], row["val/loss"]) for row in found] == [
        ("0", "2.0", "1.0", ""),
        ("1", "1.0", "", "3.0"),
        ("5", "0.5", "", ""),
    ]


def test_a_line_that_becomes_shorter_leaves_no_rest(tmp_path: Path) -> None:
    found = written(tmp_path, (0, {"loss": 0.123456789}), (0, {"loss": 1.0}))
    assert found == [{"step": "0", "loss": "1.0"}]


def test_a_writer_goes_on_with_the_last_line(tmp_path: Path) -> None:
    written(tmp_path, (0, {"loss": 2.0}), (1, {"loss": 1.0}))
    found = written(tmp_path, (1, {"val/loss": 3.0}), (2, {"loss": 0.5}))
    assert [(row["step"], row["loss"], row["val/loss"]) for row in found] == [
        ("0", "2.0", ""),
        ("1", "1.0", "3.0"),
        ("2", "0.5", ""),
    ]


def test_many_steps_cost_no_more_than_few(tmp_path: Path) -> None:
    """The lines of old steps are neither kept in memory nor written again."""
    writer = StepWriter(str(tmp_path))
    for step in range(50):
        writer.log_metrics({"loss": float(step)}, step)
        writer.save()
    assert len(writer._open) == StepWriter.OPEN
    assert [row["loss"] for row in lines(tmp_path)] == [f"{step}.0" for step in range(50)]


def test_a_file_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its columns were sorted by name, and a callback's figures had lines of their own."""
    (tmp_path / METRICS).write_text("loss,lr,step,z0\n,0.1,0,\n1.0,,0,0.5\n,0.2,1,\n0.9,,1,0.4\n,0.3,2,\n")
    logger = RunCSVLogger(str(tmp_path))
    assert logger.drop_from(2) == 1
    assert names(tmp_path) == ["step", "loss", "lr", "z0"]
    logger.log_metrics({"loss": 0.8, "lr": 0.3}, step=2)
    logger.save()
    assert [(row["step"], row["loss"], row["lr"]) for row in lines(tmp_path)] == [
        ("0", "1.0", "0.1"),
        ("1", "0.9", "0.2"),
        ("2", "0.8", "0.3"),
    ]
