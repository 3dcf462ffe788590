"""A fit that is told to stop saves a checkpoint and says so by its exit status (Lightning#19916, #2095)."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from run_halos import Ended, binary_data, fit, metrics, run

OPTIONS = ("--trainer.max_epochs=2", "--data.seed=47")
EPOCH, STEPS = 4, 8


class Fits:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.data = binary_data(folder / "data.jsonl", 15)
        self.whole: dict[tuple[str, ...], Path] = {}

    def words(self, name: str, *options: str) -> list[str]:
        return fit(self.model, "bco", self.data, self.folder / name, *OPTIONS, *options)

    def run(self, name: str, *options: str) -> Ended:
        return run(self.words(name, *options), self.folder)

    def uninterrupted(self, *options: str) -> Path:
        if options not in self.whole:
            name = f"whole{len(self.whole)}"
            ended = self.run(name, *options)
            assert ended.status == 0, ended
            self.whole[options] = self.folder / name
        return self.whole[options]


@pytest.fixture(scope="module")
def fits(tmp_path_factory, tiny_folder) -> Fits:
    return Fits(tmp_path_factory.mktemp("stopped"), tiny_folder)


def signal_at(name: str, moment: str, step: int = 0, **more: object) -> list[str]:
    given = {"name": name, "moment": moment, "step": step, **more}
    plugin = "plugins.signal_at.SignalAt"
    return [f"--trainer.callbacks+={plugin}", *(f"--trainer.callbacks.{k}={v}" for k, v in given.items())]


def saved(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(whole: Path, parts: Path) -> None:
    assert metrics(parts) == metrics(whole)
    a, b = saved(whole), saved(parts)
    assert a["global_step"] == b["global_step"]
    for key, value in a["state_dict"].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, b["state_dict"][key]), key


@pytest.mark.parametrize(
    ("name", "moment", "step", "reached", "validates"),
    [
        ("SIGTERM", "on_before_zero_grad", 2, 3, False),  # within step 3
        ("SIGINT", "on_train_batch_end", 2, 2, False),
        ("SIGTERM", "on_train_batch_end", EPOCH, EPOCH, False),  # at an epoch's end
        ("SIGTERM", "on_validation_batch_start", 2, 2, True),
        ("SIGTERM", "on_train_batch_end", 2, 2, True),  # validated, then stopped
        ("SIGTERM", "on_train_batch_end", EPOCH, EPOCH, True),
        ("SIGTERM", "on_train_batch_end", STEPS, STEPS, False),  # after the last step
    ],
)
def test_a_stopped_fit_saves_and_goes_on_exactly(fits, request, name, moment, step, reached, validates):
    options = (f"--data.validation={fits.data}", "--trainer.val_check_interval=2") if validates else ()
    whole = fits.uninterrupted(*options)
    where = f"{name}{moment}{step}{validates}"
    ended = fits.run(where, *options, *signal_at(name, moment, step))
    assert ended.status == {"SIGINT": 130, "SIGTERM": 143}[name], ended
    assert "Traceback" not in ended
    assert saved(fits.folder / where)["global_step"] == reached
    line = next(line for line in ended.splitlines() if line.endswith("--ckpt_path last"))
    again = [word for word in shlex.split(line)[1:] if "callbacks" not in word]
    ended = run(again, fits.folder)
    assert ended.status == 0, ended
    assert_same(whole, fits.folder / where)
