"""Commands that are forked from one process compute and end like those that start Python; and where time goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_halos import ROOT, UNEQUAL, fit, metrics, pair_data, small_options

from halos_pl.common import spent, stopping
from halos_pl.common.import_path import folder_last
from halos_pl.policy import shared
from halos_pl.policy.loading import load_base, load_model
from halos_pl.policy.spec import ModelSpec
from halos_pl.run_dir import LAST
from halos_pl.study import forks, processes
from halos_pl.study.execute import execute
from halos_pl.study.read import load_study
from halos_pl.study.state import state
from halos_pl.study.time_spent import add_seconds, time_spent

needs_forks = pytest.mark.skipif(not forks.can_fork(), reason="commands are forked on Linux, without a GPU")


def test_the_parts_of_a_commands_time_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("halos_pl.common.spent.time.monotonic", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    spent.begin()
    pass_time(3)
    with spent.part("outer"):
        pass_time(1)
        with spent.part("inner"):
            pass_time(2)
        pass_time(4)
    spent.started()
    pass_time(100)
    spent.started()
    with spent.part("inner"):
        pass_time(16)
    assert spent.seconds() == {"outer": 5, "inner": 18, spent.START: 3}


def test_the_time_of_a_study_is_that_of_its_commands(tiny_folder: Path, tmp_path: Path) -> None:
    study = load_study(study_file(tiny_folder, tmp_path))
    first, second = study.runs(tmp_path / "out")[:2]
    first.folder.mkdir(parents=True)
    second.folder.parent.mkdir()
    (first.folder / "summary.json").write_text(json.dumps({"seconds": {spent.START: 3.0, spent.TRAINING: 5.0}}))
    (first.folder / "measured.json").write_text(json.dumps({"seconds": {spent.START: 4.0, spent.SAMPLING: 7.0}}))
    for run, command, seconds in (
        (first, "fit", 2.0),
        (first, "fit", 10.0),
        (first, "evaluate", 11.5),
        (second, "fit", 9.0),
    ):
        add_seconds(run, command, seconds)
    found = time_spent(study, tmp_path / "out")
    assert sum(found.values()) == pytest.approx(2 + 10 + 11.5 + 9)
    assert {name: seconds for name, seconds in found.items() if seconds} == {
        spent.START: 7,
        spent.TRAINING: 5,
        spent.SAMPLING: 7,
        "the rest": 2 + 2 + 0.5 + 9,
    }


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As in a forked process; lists the models that it reports."""
    missing: list[str] = []
    monkeypatch.setattr(shared, "_kept", {})
    monkeypatch.setattr(shared, "_missing", lambda line: missing.append(line.strip()))
    return missing


def test_a_model_that_was_loaded_before_is_taken_once(kept: list[str], tiny_folder: Path) -> None:
    spec = ModelSpec(str(tiny_folder))
    first = load_model(spec)
    [key] = kept
    shared._kept.clear()
    shared.keep(key, load_base, lambda: "")
    record = shared._kept[key]
    assert record is not None
    taken, again = load_model(spec), load_model(spec)
    assert taken is record.model
    assert again is not taken
    assert kept == [key]
    for model in (taken, again):
        assert all(map(torch.equal, first.state_dict().values(), model.state_dict().values()))
    assert load_model(ModelSpec(str(tiny_folder), dtype="bfloat16")).dtype == torch.bfloat16
    assert len(kept) == 2


@pytest.mark.parametrize("fault", ["draws", "changed", "default dtype"])
def test_a_model_is_not_taken_where_that_could_change_a_figure(
    kept: list[str], adapter: tuple[Any, Path], tiny_folder: Path, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "copy"
    load_model(ModelSpec(str(tiny_folder))).save_pretrained(folder)
    spec = ModelSpec(str(folder))
    load_model(spec)
    key = kept[-1]
    shared._kept.clear()

    def load(spec: ModelSpec) -> Any:
        if fault == "draws":
            torch.rand(1)
        return load_base(spec)

    shared.keep(key, load, lambda: "")
    if fault == "changed":
        os.utime(folder / "config.json")
    if fault == "default dtype":
        torch.set_default_dtype(torch.float64)
    try:
        assert shared.take(spec) is None
    finally:
        torch.set_default_dtype(torch.float32)


def study_file(tiny_folder: Path, folder: Path, steps: int = 3) -> Path:
    """A study of an adapter with dropout and of a whole model with a copy as its reference."""
    pairs = str(pair_data(folder / "pairs.jsonl", 12))
    (folder / "prompts.txt").write_text("one\ntwo why\nthree so\n")
    study = {
        "configs": [f"{ROOT}/experiments/base.yaml", f"{ROOT}/experiments/objectives/kto.yaml"],
        "options": small_options(
            tiny_folder,
            Path(pairs),
            **{"trainer.max_steps": steps, "trainer.max_epochs": -1, "model.optimizer.init_args.lr": 0.01},
        ),
        "arms": {"adapter": {"model.policy.lora": {"r": 2, "dropout": 0.1}}, "whole": {}},
        "seeds": [0],
        "evaluate": {"held_out": [pairs], "prompts": str(folder / "prompts.txt"), "max_new_tokens": 4},
        "metrics": ["reward_accuracy", "kl"],
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def figures(run: Path) -> dict[str, Any]:
    """All that a run and its evaluation computed."""
    checkpoint = torch.load(run / LAST, weights_only=False)
    summary = json.loads((run / "summary.json").read_text())
    names = ("evaluation.json", "before.json", "held_out.jsonl", "answers.jsonl")
    return {
        "metrics.csv": metrics(run),
        "summary": {name: value for name, value in summary["metrics"].items() if name not in UNEQUAL},
        "weights": {name: value.tolist() for name, value in checkpoint["state_dict"].items()},
        "optimizer": str(checkpoint["optimizer_states"]),
        **{name: (run / name).read_bytes() for name in names},
    }


@pytest.mark.slow
@needs_forks
def test_forked_runs_have_the_figures_of_runs_that_start_python(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two threads each, two at a time, to the last bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    study, env = load_study(study_file(tiny_folder, tmp_path)), processes.environment(2)
    found = {}
    for way in ("forked", "alone"):
        monkeypatch.setenv("HALOS_CACHE", str(tmp_path / f"cache-{way}"))
        env = processes.environment(2)
        if way == "forked":
            with processes.forking(env):
                # The first command of each finds no model, the others find it.
                assert execute(study, tmp_path / way, 2, keep_checkpoints=True) == {}
        else:
            assert execute(study, tmp_path / way, 2, keep_checkpoints=True) == {}
        found[way] = [figures(run.folder) for run in study.runs(tmp_path / way)]
    for forked, alone in zip(*found.values(), strict=True):
        for name, value in forked.items():
            assert value == alone[name], name


def test_a_study_that_waits_for_a_step_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As where a signal arrives while two steps are timed, on a processor on which a step takes minutes."""
    said: list[str] = []

    class Slow:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.signals: list[int] = []

        def send_signal(self, number: int) -> None:
            self.signals.append(number)

        def wait(self) -> int:
            if not self.signals:
                raise stopping.Stopped(signal.SIGTERM)
            said.append(capfd.readouterr().err)
            return 128 + self.signals[0]

    monkeypatch.setattr(processes.subprocess, "Popen", Slow)
    with pytest.raises(stopping.Stopped):
        processes.run_command(["fit"], tmp_path / "log.txt", {})
    assert "step" in said[0]


class Commands:
    """Commands that are forked in a folder."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder, self.env = folder, env
        self.forks = forks.Forks(env)

    def start(self, *words: str, log: str = "log.txt") -> forks.Forked | None:
        """A command that waits."""
        with (self.folder / log).open("a") as output:
            return self.forks.fork(list(words), output, self.env, None)

    def run(self, *words: str) -> tuple[int, str]:
        """Exit status and output of a command."""
        (self.folder / "log.txt").unlink(missing_ok=True)
        process = self.start(*words)
        assert process is not None
        process.go()
        return process.wait(), (self.folder / "log.txt").read_text()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Commands]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text("")  # a module that the process imports
    env = {**os.environ, **folder_last(), "PYTHONPATH": f"{tmp_path}/path:{ROOT}", "OMP_NUM_THREADS": "1"}
    made = Commands(tmp_path, env)
    yield made
    made.forks.close()


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 600
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@needs_forks
def test_a_forked_command_is_a_process_of_its_own(
    commands: Commands, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run("--version")[1].startswith("halos_pl ")
    assert commands.run("no-such-command")[0] == 2
    status, said = commands.run(
        "fit", "--objective=kto", "--data.train=nowhere.jsonl", f"--model.policy.path={tiny_folder}"
    )
    assert status == 1
    assert "halos: " in said.splitlines()[-1]
    assert "nowhere.jsonl" in said

    # A plug-in in the working folder is read anew by each command.
    for text in ("the first", "another"):
        (tmp_path / "own.py").write_text(f"raise RuntimeError({text!r})\n")
        assert text in commands.run("fit", "--print_config", "--model.value_function=own.Mine")[1]

    # Another process is started when an imported module changes.
    first = commands.forks._process
    (tmp_path / "path" / "sitecustomize.py").write_text("CHANGED = True\n")
    assert commands.run("--version")[0] == 0
    assert commands.forks._process is not first

    # A signal to one command neither ends another nor the process that they are forked from.
    data = pair_data(tmp_path / "pairs.jsonl", 8)
    long = ["--trainer.max_steps=100000", "--trainer.max_epochs=100000"]
    processes_ = []
    for name in ("stopped", "killed", "left"):
        process = commands.start(*fit(tiny_folder, "kto", data, tmp_path / name, *long), log=f"{name}.txt")
        assert process is not None
        process.go()
        processes_.append(process)
    stopped, killed, left = processes_
    for name in ("stopped", "killed", "left"):
        file = tmp_path / name / "metrics.csv"
        until(lambda file=file: file.is_file() and len(file.read_text().splitlines()) > 2)
    stopped.send_signal(signal.SIGTERM)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert stopped.wait() == 128 + signal.SIGTERM
    assert "--ckpt_path" in (tmp_path / "stopped.txt").read_text()
    assert (tmp_path / "stopped" / LAST).is_file()
    assert commands.run("--version")[0] == 0

    # A command outlives the process that it was forked from, which is said once; the next ones start alone.
    assert commands.forks._process is not None
    commands.forks._process.kill()
    assert commands.start("--version") is None
    assert "SIGKILL" in capsys.readouterr().err
    assert commands.start("--version") is None
    assert capsys.readouterr().err == ""
    os.kill(left.pid, 0)
    left.send_signal(signal.SIGINT)
    assert left.wait() == 128 + signal.SIGINT


@pytest.mark.slow
@needs_forks
def test_a_command_that_is_given_up_has_not_run(commands: Commands, tmp_path: Path) -> None:
    process = commands.start("--version")
    assert process is not None
    process.give_up()
    assert (tmp_path / "log.txt").read_text() == ""
    # What waits for the process to be ready is freed when it is closed.
    commands.forks.close()
    other = Commands(tmp_path, commands.env)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(other.start("--version")))
    thread.start()
    until(lambda: other.forks._process is not None)
    other.forks.close()
    thread.join(timeout=60)
    assert results == [None]


STUDY = """
import sys
from pathlib import Path
from halos_pl.study import processes
from halos_pl.study.execute import execute
from halos_pl.study.read import load_study
with processes.forking(processes.environment(1)):
    execute(load_study(sys.argv[1]), Path(sys.argv[2]), 1, False)
"""


@pytest.mark.slow
@needs_forks
def test_a_killed_study_leaves_no_process_but_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    """Which keeps its lock, as without forks; the process that it was forked from ends."""
    path, out = study_file(tiny_folder, tmp_path, steps=100000), tmp_path / "out"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    study = subprocess.Popen([sys.executable, "-c", STUDY, path, out], env=env, cwd=tmp_path)
    run = load_study(path).runs(out)[0]
    until(lambda: (run.folder / "metrics.csv").is_file())
    words = ["pgrep", "-P", str(study.pid)]
    children = [int(pid) for pid in subprocess.run(words, capture_output=True, text=True).stdout.split()]
    assert len(children) == 2
    study.kill()
    study.wait()

    def command(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "ended"

    until(lambda: any(command(pid) in ("ended", "Z") for pid in children))
    [fit_] = [pid for pid in children if command(pid) not in ("ended", "Z")]
    os.kill(fit_, signal.SIGTERM)
    until(lambda: command(fit_) in ("ended", "Z"))
    assert state(run) == "stopped"
