"""A rank that fails or dies ends all ranks at once; one line names it, and the last checkpoint is whole."""

from __future__ import annotations

import time

import pytest
from kills import fail_at
from run_halos import KILLED, binary_data, fit, run_ranks
from stopping import saved


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["user", "bug", "kill", "block", "stuck"])
def test_all_ranks_end_with_the_line_of_the_one_that_failed(tiny_folder, tmp_path, how, rank):
    data = binary_data(tmp_path / "data.jsonl", 15)
    options = ("--trainer.max_epochs=2", "--data.seed=47", "--checkpoint.every_n_steps=1")
    words = fit(tiny_folder, "bco", data, tmp_path / "run", *options)
    began = time.monotonic()
    ended = run_ranks([*words, *fail_at(rank=rank, how=how, step=2)], tmp_path)
    assert time.monotonic() - began < 60
    assert [each.status for each in ended] == [KILLED if how == "kill" and each == rank else 1 for each in (0, 1)], (
        ended
    )
    text = {"bug": "this is a bug", "kill": "died without a message"}.get(how, "no widget")
    named = [line for each in ended for line in each.splitlines() if f"rank {rank}" in line and text in line]
    lines = [line for each in ended for line in each.splitlines() if text in line and line.startswith("halos: ")]
    assert len(lines) == len(named) == 1, ended
    tracebacks = ["Traceback" in each for each in ended]
    assert tracebacks == [how == "bug" and each == rank for each in (0, 1)], ended
    assert saved(tmp_path / "run")["global_step"] in (1, 2)
    assert not list((tmp_path / "run").rglob("*.part*"))
    resumed = run_ranks([*words, "--ckpt_path=last"], tmp_path)
    assert [each.status for each in resumed] == [0, 0], resumed
