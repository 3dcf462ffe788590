"""A run that goes on under ``max_steps`` logs the steps that an uninterrupted one logs.

Lightning#19617: killed after step 10 of 14, 10 steps an epoch, a run logged steps 11 to 14 after 0 to 9.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from run_halos import KILLED, binary_data, fit, metrics, run
from test_resume import checkpoint, equal, kill_at

EPOCH = 3
LIMITS = {
    "steps": ("--trainer.max_steps=5", "--trainer.max_epochs=9"),
    "steps alone": ("--trainer.max_steps=7", "--trainer.max_epochs=-1"),
    "both": ("--trainer.max_steps=6", "--trainer.max_epochs=2"),
    "epochs": ("--trainer.max_epochs=2",),
}


@pytest.mark.parametrize(
    ("limit", "kills"),
    [
        ("steps", (EPOCH,)),
        *(
            pytest.param(limit, kills, marks=pytest.mark.slow)
            for limit in LIMITS
            for kills in ((2,), (EPOCH, EPOCH + 1), (EPOCH - 1, EPOCH), (EPOCH, EPOCH + 2))
        ),
        pytest.param("steps alone", (EPOCH, 2 * EPOCH), marks=pytest.mark.slow),
    ],
)
def test_logged_steps_are_continuous(tiny_folder: Path, tmp_path: Path, limit: str, kills: tuple[int, ...]) -> None:
    data = binary_data(tmp_path / "data.jsonl", 4 * EPOCH)
    options = (*LIMITS[limit], "--checkpoint.every_n_steps=1")
    runs = {}
    for name in ("whole", "killed"):
        words = fit(tiny_folder, "bco", data, tmp_path / name, *options)
        for number, step in enumerate(kills if name == "killed" else ()):
            more = ["--ckpt_path=last"] if number else []
            ended = run([*words, *more, *kill_at(step, "after_checkpoint")], tmp_path)
            assert ended.status == KILLED, ended
        ended = run([*words, "--ckpt_path=last"] if name == "killed" else words, tmp_path)
        assert ended.status == 0, ended
        runs[name] = tmp_path / name
    whole, resumed = metrics(runs["whole"]), metrics(runs["killed"])
    assert [row["step"] for row in resumed] == [str(step) for step in range(len(resumed))]
    assert equal(whole, resumed) == []
    loops = [checkpoint(folder)["loops"]["fit_loop"] for folder in runs.values()]
    assert equal(*loops) == []
