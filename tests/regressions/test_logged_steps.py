"""A run that is resumed under ``max_steps`` logs the steps that an uninterrupted one logs.

Lightning#19617: killed after step 10 of 14, 10 steps an epoch, a run logged steps 11 to 14 after 0 to 9.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from kills import checkpoint, equal, kill_at
from lightning.pytorch.callbacks import Callback
from run_halos import KILLED, binary_data, fit, metrics, run

from halos_pl.cli.main import main

EPOCH = 3
LIMITS = {
    "steps": ("--trainer.max_steps=5", "--trainer.max_epochs=9"),
    "steps alone": ("--trainer.max_steps=7", "--trainer.max_epochs=-1"),
    "both": ("--trainer.max_steps=6", "--trainer.max_epochs=2"),
    "epochs": ("--trainer.max_epochs=2",),
}


class CopyAt(Callback):
    """Copies the run's folder when an epoch begins after ``step`` steps: it is what a kill at that moment leaves."""

    def __init__(self, step: int, to: str) -> None:
        self.step, self.to = step, to

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.step:
            shutil.copytree(trainer.default_root_dir, self.to)


def same(whole: Path, resumed: Path) -> None:
    steps = [row["step"] for row in metrics(resumed)]
    assert steps == [str(step) for step in range(len(steps))]
    assert equal(metrics(whole), metrics(resumed)) == []
    loops = [checkpoint(folder)["loops"]["fit_loop"] for folder in (whole, resumed)]
    assert equal(*loops) == []


def test_logged_steps_go_on_after_an_epoch(tiny_folder: Path, tmp_path: Path) -> None:
    data, killed = binary_data(tmp_path / "data.jsonl", 4 * EPOCH), tmp_path / "killed"
    words = fit(tiny_folder, "bco", data, tmp_path / "whole", *LIMITS["steps"], "--checkpoint.every_n_steps=1")
    copy = [f"--trainer.callbacks+={__name__}.CopyAt", f"--trainer.callbacks.step={EPOCH}"]
    main([*words, *copy, f"--trainer.callbacks.to={killed}"])
    assert len(metrics(killed)) == EPOCH
    main([*words, f"--run_dir={killed}", "--ckpt_path=last"])
    same(tmp_path / "whole", killed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "kills"),
    [
        ("steps", (EPOCH,)),
        *(
            (limit, kills)
            for limit in LIMITS
            for kills in ((2,), (EPOCH, EPOCH + 1), (EPOCH - 1, EPOCH), (EPOCH, EPOCH + 2))
        ),
        ("steps alone", (EPOCH, 2 * EPOCH)),
    ],
)
def test_logged_steps_are_continuous(tiny_folder: Path, tmp_path: Path, limit: str, kills: tuple[int, ...]) -> None:
    data = binary_data(tmp_path / "data.jsonl", 4 * EPOCH)
    options = (*LIMITS[limit], "--checkpoint.every_n_steps=1")
    for name in ("whole", "killed"):
        words = fit(tiny_folder, "bco", data, tmp_path / name, *options)
        for number, step in enumerate(kills if name == "killed" else ()):
            more = ["--ckpt_path=last"] if number else []
            ended = run([*words, *more, *kill_at(step, "after_checkpoint")], tmp_path)
            assert ended.status == KILLED, ended
        ended = run([*words, "--ckpt_path=last"] if name == "killed" else words, tmp_path)
        assert ended.status == 0, ended
    same(tmp_path / "whole", tmp_path / "killed")
