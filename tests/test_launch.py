"""The launch files start a run over two "nodes" of this machine, which trains like one process and resumes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kills import checkpoint, fail_at
from run_halos import ROOT, binary_data, fit, free_port, metrics, run

from halos_pl.training.slurm import is_requeued, note_job

LAUNCH = ROOT / "experiments" / "launch"


def halos_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("halos: ")]


class Nodes:
    """Starts a launch file as each node of a cluster would, on this machine."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.folder, self.model, self.data = folder, model, data

    def options(self, run_dir: Path, *more: str) -> list[str]:
        words = fit(
            self.model, "bco", self.data, run_dir, "--trainer.max_epochs=2", "--checkpoint.every_n_steps=1", *more
        )[1:]
        return [w for w in words if not w.startswith(("--config=", "--run_dir="))]

    def env(self, run_dir: Path, **more: str) -> dict[str, str]:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        return {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PRECISION": "32-true",
            "STRATEGY": "ddp",
            "OBJECTIVE": "bco",
            "RUN_DIR": str(run_dir),
            **more,
        }

    def __call__(
        self, file: str, words: list[str], env: list[dict[str, str]], more: tuple[list[str], ...] = ([], [])
    ) -> tuple[list[int], list[str]]:
        """Exit statuses and outputs; ``more`` has the words of each node alone."""
        command = ["bash", str(LAUNCH / file), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started = [
            subprocess.Popen([*command, *own], cwd=self.folder, env=each, **pipes)
            for each, own in zip(env, more, strict=False)
        ]  # type: ignore[call-overload]
        outputs = [process.communicate(timeout=240)[0] for process in started]
        return [process.returncode for process in started], outputs


@pytest.fixture
def nodes(tmp_path, tiny_folder) -> Nodes:
    return Nodes(tmp_path, tiny_folder, binary_data(tmp_path / "data.jsonl", 12))


@pytest.mark.parametrize("file", sorted(path.name for path in LAUNCH.iterdir()))
def test_a_launch_file_is_valid(file):
    subprocess.run(["bash", "-n", str(LAUNCH / file)], check=True)


@pytest.mark.slow
def test_torchrun_on_two_nodes_trains_like_one_process_and_resumes(nodes, tmp_path):
    port = str(free_port())
    run_dir = tmp_path / "two"
    env = [nodes.env(run_dir, NODES="2", GPUS="1", PORT=port)] * 2
    statuses, outputs = nodes("torchrun.sh", nodes.options(run_dir, *fail_at(rank=1, how="user", step=2)), env)
    assert statuses == [1, 1], outputs
    lines = halos_lines("".join(outputs))
    assert len(lines) == 2, outputs  # one on each node
    assert all("rank 1" in line and "no widget" in line for line in lines)
    statuses, outputs = nodes("torchrun.sh", nodes.options(run_dir), env)
    assert statuses == [0, 0], outputs
    assert run(fit(nodes.model, "bco", nodes.data, tmp_path / "one", "--trainer.max_epochs=2"), tmp_path).status == 0
    one, two = metrics(tmp_path / "one"), metrics(run_dir)
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for a, b in zip(one, two, strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), abs=1e-5)


@pytest.mark.slow
def test_torchrun_shards_with_a_replica_on_each_node(nodes, tmp_path):
    port = str(free_port())
    run_dir = tmp_path / "run"
    env = [nodes.env(run_dir, NODES="2", GPUS="1", PORT=port, STRATEGY="fsdp2")] * 2
    statuses, outputs = nodes("torchrun.sh", nodes.options(run_dir), env)
    assert statuses == [0, 0], outputs
    assert (run_dir / "checkpoints" / "last.ckpt").is_dir()


@pytest.mark.slow
def test_an_error_on_one_node_before_the_ranks_have_met(nodes, tmp_path):
    port = str(free_port())
    run_dir = tmp_path / "run"
    env = [nodes.env(run_dir, NODES="2", GPUS="1", PORT=port)] * 2
    began = time.monotonic()
    statuses, outputs = nodes("torchrun.sh", nodes.options(run_dir), env, ([], ["--config=missing.yaml"]))
    assert time.monotonic() - began < 120
    assert statuses == [1, 1], outputs
    for output in outputs:
        [line] = halos_lines(output)
        assert "missing.yaml" in line


SRUN = """#!/bin/bash
# Starts the tasks of a job on this machine, one a node, as srun does on a cluster.
shift  # --kill-on-bad-exit=1
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_NODEID=$i SLURM_LOCALID=0 "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.slow
def test_a_slurm_job_is_requeued_and_resumes(nodes, tmp_path):
    run_dir, programs = tmp_path / "job", tmp_path / "bin"
    programs.mkdir()
    program(programs / "srun", SRUN)
    program(programs / "scontrol", f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol.log\n')
    program(programs / "halos", f'#!/bin/bash\nexec {sys.executable} -m halos_pl "$@"\n')
    port = str(free_port())
    env = nodes.env(run_dir, SLURM_JOB_ID="4242", SLURM_JOB_NAME="kto", SLURM_NNODES="2", SLURM_NTASKS="2")
    env |= {
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    env["PATH"] = f"{programs}{os.pathsep}{env['PATH']}"
    send = {"name": "SIGUSR1", "moment": "on_before_zero_grad", "step": 2}
    words = [
        "--trainer.callbacks+=plugins.signal_at.SignalAt",
        *(f"--trainer.callbacks.{k}={v}" for k, v in send.items()),
    ]
    statuses, outputs = nodes("kto.sbatch", nodes.options(run_dir, *words), [env])
    assert statuses == [128 + 10], outputs
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4242\n"
    assert checkpoint(run_dir)["global_step"] == 3
    statuses, outputs = nodes("kto.sbatch", nodes.options(run_dir), [env | {"SLURM_RESTART_COUNT": "1"}])
    assert statuses == [0], outputs
    assert [line["step"] for line in metrics(run_dir)] == list("012345")


def test_only_the_requeued_job_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    note_job(tmp_path)
    assert not is_requeued(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_requeued(tmp_path)
    assert not is_requeued(tmp_path / "elsewhere")
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # a job that starts another run in the folder, and was preempted before
    assert not is_requeued(tmp_path)
