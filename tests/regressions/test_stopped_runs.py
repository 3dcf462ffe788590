"""A fit that is told to stop saves a checkpoint and says so by its exit status (Lightning#19916, #2095)."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_halos import Ended, binary_data, fit, metrics, run, run_here
from stopping import saved, signal_at

OPTIONS = ("--trainer.max_epochs=2", "--data.seed=47")
EPOCH, STEPS = 4, 8


class Fits:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.data = binary_data(folder / "data.jsonl", 15)
        self.whole: dict[tuple[str, ...], Path] = {}

    def words(self, name: str, *options: str) -> list[str]:
        return fit(self.model, "bco", self.data, self.folder / name, *OPTIONS, *options)

    def start(self, words: list[str]) -> Ended:
        return run(words, self.folder)

    def run(self, name: str, *options: str) -> Ended:
        return self.start(self.words(name, *options))

    def uninterrupted(self, start: Callable[[list[str]], Ended], *options: str) -> Path:
        if options not in self.whole:
            name = f"whole{len(self.whole)}"
            ended = start(self.words(name, *options))
            assert ended.status == 0, ended
            self.whole[options] = self.folder / name
        return self.whole[options]


@pytest.fixture(scope="module")
def fits(tmp_path_factory, tiny_folder) -> Fits:
    return Fits(tmp_path_factory.mktemp("stopped"), tiny_folder)


def assert_same(whole: Path, parts: Path) -> None:
    assert metrics(parts) == metrics(whole)
    a, b = saved(whole), saved(parts)
    assert a["global_step"] == b["global_step"]
    for key, value in a["state_dict"].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, b["state_dict"][key]), key


def saves_and_goes_on(fits, start, name, moment, step, reached, validates) -> None:
    """A fit that gets a signal; ``start`` runs a command."""
    options = (f"--data.validation={fits.data}", "--trainer.val_check_interval=2") if validates else ()
    where = f"{name}{moment}{step}{validates}{start.__name__}"
    ended = start(fits.words(where, *options, *signal_at(name, moment, step)))
    assert ended.status == 128 + signal.Signals[name], ended
    assert "Traceback" not in ended
    assert saved(fits.folder / where)["global_step"] == reached
    summary = json.loads((fits.folder / where / "summary.json").read_text())
    assert (summary["steps"], summary["planned_steps"]) == (reached, STEPS)
    if summary["finished"]:
        assert reached == STEPS
        return
    assert summary["ended"] == name
    line = next(line for line in ended.splitlines() if line.endswith("--ckpt_path last"))
    again = [word for word in shlex.split(line)[1:] if "callbacks" not in word]
    ended = start(again)
    assert ended.status == 0, ended
    assert_same(fits.uninterrupted(start, *options), fits.folder / where)
    summary = json.loads((fits.folder / where / "summary.json").read_text())
    assert (summary["steps"], summary["finished"]) == (STEPS, True)


@pytest.fixture
def here(capfd, caplog, monkeypatch):
    """Runs a command in this process."""
    monkeypatch.setattr(sys, "argv", ["halos"])

    def here(words: list[str]) -> Ended:
        caplog.clear()
        ended = run_here(capfd, words)
        said = Ended("\n".join([*caplog.messages, ended]))  # the log's own stream is not captured
        said.status = ended.status
        return said

    return here


def test_a_fit_stopped_within_a_step_saves_and_goes_on_exactly(fits, here):
    saves_and_goes_on(fits, here, "SIGTERM", "on_before_zero_grad", 2, 3, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "moment", "step", "reached", "validates"),
    [
        ("SIGTERM", "on_validation_batch_start", EPOCH, EPOCH, True),  # at an epoch's end
        ("SIGTERM", "on_before_zero_grad", 2, 3, False),  # within step 3
        ("SIGHUP", "on_before_zero_grad", 2, 3, False),
        ("SIGUSR1", "on_before_zero_grad", 2, 3, False),
        ("SIGINT", "on_train_batch_end", 2, 2, False),
        ("SIGTERM", "on_train_batch_end", EPOCH, EPOCH, False),
        ("SIGTERM", "on_validation_batch_start", 2, 2, True),
        ("SIGTERM", "on_validation_epoch_end", 2, 2, True),
        ("SIGTERM", "on_validation_end", EPOCH, EPOCH, True),
        ("SIGTERM", "on_train_batch_end", 2, 2, True),
        ("SIGTERM", "on_train_epoch_start", EPOCH, EPOCH + 1, True),
        ("SIGTERM", "on_train_batch_end", STEPS, STEPS, False),  # after the last step
        ("SIGTERM", "writing", STEPS, STEPS, False),
    ],
)
def test_a_stopped_fit_saves_and_goes_on_exactly(fits, name, moment, step, reached, validates):
    """In a process of its own."""
    saves_and_goes_on(fits, fits.start, name, moment, step, reached, validates)


def test_before_the_first_step_nothing_is_saved(fits, here):
    ended = here(fits.words("early", *signal_at("SIGTERM", "setup")))
    assert ended.status == 143, ended
    assert "Traceback" not in ended
    assert not (fits.folder / "early" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.3, 0.0])
def test_a_second_ctrl_c_stops_at_once(fits, pause):
    """But not one that a launcher sends to the process and to its group at the same time."""
    ended = fits.run(f"twice{pause}", *signal_at("SIGINT", "on_before_zero_grad", 2, times=2, pause=pause))
    assert ended.status == 130, ended
    assert "Traceback" not in ended
    assert (fits.folder / f"twice{pause}" / "checkpoints" / "last.ckpt").exists() is (pause == 0)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["on_train_end", "on_fit_end"])
def test_a_signal_after_the_last_step_leaves_a_finished_run(fits, moment):
    ended = fits.run(moment, *signal_at("SIGTERM", moment, STEPS))
    assert ended.status == 143, ended
    assert json.loads((fits.folder / moment / "summary.json").read_text())["finished"]


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_leaves_the_workers_alone(fits):
    """As scancel and timeout send it; a worker that dies would end the fit with an error."""
    ended = fits.run("group", "--data.num_workers=2", *signal_at("SIGTERM", "on_before_zero_grad", 2, group=True))
    assert ended.status == 143, ended
    assert "Traceback" not in ended
    assert saved(fits.folder / "group")["global_step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", ["test", "validate", "predict"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_other_commands_stop_at_once(fits, command, name):
    run_dir = fits.uninterrupted(fits.start)
    moment = f"on_{'validation' if command == 'validate' else command}_batch_end"
    words = [command, f"--config={run_dir}/config.yaml", f"--run_dir={run_dir}", f"--data.validation={fits.data}"]
    words += [f"--data.test={fits.data}", *signal_at(name, moment, 0)]
    ended = run(words, fits.folder)
    assert ended.status == 128 + signal.Signals[name], ended
    assert "Traceback" not in ended
    assert not [path for path in run_dir.iterdir() if path.name.startswith(("test.json", "predictions"))]


@pytest.mark.slow
def test_early_stopping_is_an_end_and_the_reason_is_said(fits):
    """Lightning says that max_epochs was reached."""
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=rewards/margins"]
    stop += ["--trainer.callbacks.mode=max", "--trainer.callbacks.stopping_threshold=-1000", "--trainer.max_epochs=1"]
    ended = fits.run("stopping", *stop, f"--data.validation={fits.data}", "--trainer.val_check_interval=2")
    assert ended.status == 0, ended
    assert "max_epochs=1" not in ended
    summary = json.loads((fits.folder / "stopping" / "summary.json").read_text())
    assert (summary["steps"], summary["planned_steps"], summary["finished"]) == (2, EPOCH, True)
    assert "rewards/margins" in summary["ended"]
