"""A rank that fails or dies ends all ranks at once; one line names it, and the last checkpoint is whole."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from kills import fail_at
from run_halos import KILLED, ROOT, binary_data, fit, refused, run_ranks
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


@pytest.mark.slow
@pytest.mark.parametrize("how", ["user", "kill"])
def test_all_ranks_of_a_sharded_run_end(tiny_folder, tmp_path, how):
    data = binary_data(tmp_path / "data.jsonl", 15)
    words = fit(tiny_folder, "bco", data, tmp_path / "run", "--checkpoint.every_n_steps=1")
    ended = run_ranks([*words, *fail_at(rank=1, how=how, step=2)], tmp_path, strategy="fsdp2")
    assert [each.status for each in ended] == [1, KILLED if how == "kill" else 1], ended
    [line] = [line for each in ended for line in each.splitlines() if line.startswith("halos: ")]
    assert "rank 1" in line
    resumed = run_ranks([*words, "--ckpt_path=last"], tmp_path, strategy="fsdp2")
    assert [each.status for each in resumed] == [0, 0], resumed


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_more_ranks_than_examples_is_one_line(tiny_folder, tmp_path, strategy):
    data = binary_data(tmp_path / "data.jsonl", 1)
    ended = run_ranks(fit(tiny_folder, "bco", data, tmp_path / "run"), tmp_path, strategy=strategy)
    assert [each.status for each in ended] == [1, 1], ended
    lines = [line for each in ended for line in each.splitlines() if line.startswith("halos: ")]
    assert len(lines) == 1, ended
    assert "data.jsonl" in lines[0]
    assert "2 ranks" in lines[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_replicas_are_checked_before_anything_is_loaded(tiny_folder, tmp_path, capfd, no_model):
    strategy = "{class_path: halos_pl.training.strategy.ShardedStrategy, init_args: {replicas: 3}}"
    options = ("--trainer.devices=2", f"--trainer.strategy={strategy}")
    line = refused(capfd, fit(tiny_folder, "bco", tmp_path / "missing.jsonl", tmp_path / "run", *options))
    assert "replicas is 3" in line
    assert "ranks, 2" in line


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_the_command_has_started_dies(tiny_folder, tmp_path, rank):
    """Lightning's own observer would kill the rest without a word."""
    data = binary_data(tmp_path / "data.jsonl", 15)
    words = fit(tiny_folder, "bco", data, tmp_path / "run", "--trainer.devices=2", "--trainer.strategy=ddp")
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "halos_pl", *words, *fail_at(rank=rank, how="kill", step=1)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ended = subprocess.run(command, env=env, cwd=tmp_path, timeout=180, check=False, **pipes)  # waits for both
    assert ended.returncode == (KILLED if rank == 0 else 1)
    [line] = [line for line in ended.stdout.splitlines() if line.startswith("halos: ")]
    assert f"rank {rank}" in line
