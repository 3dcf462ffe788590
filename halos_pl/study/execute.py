"""Carries out a study: one process a run, each of which anyone can start by hand."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from halos_pl.callbacks import LAST, SUMMARY
from halos_pl.study.evaluate import FILE
from halos_pl.study.plan import Checked, Run, Study, StudyError, command

STUDY = "study.yaml"
OVER = "over.yaml"
FAILED = "failed.json"
LOG = "log.txt"
PLAN = "plan.json"
CODE = ("rule", "judge")  # what evaluate names as file.py:function
TIMED = "timed_step"


def _process(words: list[str], log: Path, env: Mapping[str, str]) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(f"$ {command(words)}\n")
        file.flush()
        return subprocess.run(
            [sys.executable, "-m", "halos_pl", *words], stdout=file, stderr=subprocess.STDOUT, env=env
        ).returncode


def _last_words(log: Path, start: int) -> str:
    """The line that says why a command has failed whose words begin at byte ``start``."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("halos", "error:")) and "rror" in line]
    return (said or lines or ["it said nothing"])[-1][:500]


def mark_of(run: Run) -> Path:
    """The file that says of a run that it has failed, and why."""
    return run.folder.with_name(f"{run.folder.name}.{FAILED}")


def execute_run(run: Run, study: Study, env: Mapping[str, str], keep_checkpoints: bool = False) -> str | None:
    """Trains and measures one run, from where an earlier attempt has left it; why it failed, None if it has not.

    What the commands have said is beside the folder: ``halos fit`` moves aside what it finds in it.
    """
    log = run.folder.with_name(f"{run.folder.name}.{LOG}")
    mark = mark_of(run)
    mark.unlink(missing_ok=True)
    steps = []
    if not (run.folder / SUMMARY).is_file():
        begun = (run.folder / LAST).is_file()
        steps.append([*run.fit, *(["--ckpt_path=last"] if begun else [])])
    steps.append(study.evaluation(run))
    for words in steps:
        start = log.stat().st_size if log.is_file() else 0
        if _process(words, log, env):
            why = _last_words(log, start)
            mark.write_text(json.dumps({"command": command(words), "error": why}) + "\n")
            return why
    if not keep_checkpoints:
        (run.folder / LAST).unlink(missing_ok=True)
    return None


def state(run: Run) -> str:
    """``done``, ``failed``, ``begun`` or ``waiting``."""
    if run.done:
        return "done"
    if mark_of(run).is_file():
        return "failed"
    return "begun" if run.folder.is_dir() else "waiting"


def failure(run: Run) -> dict[str, str]:
    """The command that failed and what it said."""
    found: dict[str, str] = json.loads(mark_of(run).read_text())
    return found


def claim(study: Study, out: Path, digests: Mapping[str, str]) -> None:
    """Makes ``out`` the folder of this study.

    Raises:
        StudyError: where it is another one's, or holds runs that were trained or measured otherwise.
    """
    code = [str(study.evaluate[key]).rpartition(":")[0] for key in CODE if key in study.evaluate]
    plan: dict[str, Any] = {
        "study": str(study.path),
        "over": None if study.over is None else str(study.over),
        "digests": dict(digests),
        "seeds": list(study.seeds),
        "evaluate": dict(study.evaluate),
        "files": {path: digest_of(path) for path in sorted({*study.data_files, *code})},
    }
    known = out / PLAN
    if known.is_file():
        before = json.loads(known.read_text())
        if Path(before.get("study", study.path)).stem != study.path.stem:
            raise StudyError(
                f"{out} holds the results of another study, {before['study']}; name another folder with --out"
            )
        for arm in study.arms:
            folder = out / arm.folder
            if folder.is_dir() and before["digests"].get(arm.name, digests[arm.name]) != digests[arm.name]:
                raise StudyError(
                    f"{out} holds the results of another study: arm {arm.name!r} had another config or other data; name"
                    f" another folder with --out, or remove {folder} to run the arm again"
                )
        measured = any(run.done for run in study.runs(out))
        if measured and any(before.get(key, plan[key]) != plan[key] for key in ("evaluate", "files")):
            raise StudyError(
                f"{out} holds the results of another study: its runs were measured in another way or on other files;"
                f" name another folder with --out, or remove each {FILE} in it to measure again what has a checkpoint"
            )
        plan["digests"] = {**before["digests"], **plan["digests"]}
    elif out.is_dir() and any(out.iterdir()):
        raise StudyError(f"{out} is not empty and holds no study; name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(plan, indent=2) + "\n")
    for name, file in ((STUDY, study.path), (OVER, study.over)):
        if file is not None:
            (out / name).write_text(file.read_text())
        else:
            (out / name).unlink(missing_ok=True)


def digest_of(path: str) -> str:
    """The first half of a file's SHA-256."""
    file = Path(os.path.expandvars(path))
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32] if file.is_file() else "not a file here"


def _seconds(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _plain(seconds: float) -> str:
    """Two digits, without an exponent: 160, 4.6, 0.12."""
    return f"{float(f'{seconds:.2g}'):g}"


def environment(jobs: int) -> dict[str, str]:
    """The variables of a run's process: its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def timed_step(study: Study, out: Path, env: Mapping[str, str]) -> tuple[float, float]:
    """Seconds of a step and of starting a run, from two steps of the first arm.

    Raises:
        StudyError: where they fail.
    """
    folder = out / TIMED
    words = [*study.arms[0].words(folder, study.seeds[0]), "--trainer.max_steps=2"]
    log = out / f"{TIMED}.{LOG}"
    log.unlink(missing_ok=True)
    start = time.monotonic()
    if _process(words, log, env):
        raise StudyError(f"{study.path}: two steps of arm {study.arms[0].name!r} fail: {_last_words(log, 0)}")
    whole = time.monotonic() - start
    training = json.loads((folder / SUMMARY).read_text())["wall_seconds"]
    (folder / LAST).unlink(missing_ok=True)
    return training / 2, whole - training


def show_plan(
    study: Study,
    checked: Mapping[str, Checked],
    runs: list[Run],
    times: tuple[float, float] | None,
    jobs: int,
) -> None:
    """The arms, their commands, and how long all of it may take, by the seconds of a step and of a start."""
    console = Console()
    table = Table(title=f"{study.path}: {len(study.arms)} arms x {len(study.seeds)} seeds", title_justify="left")
    for column in ("arm", "steps", "command of its first run"):
        table.add_column(column, overflow="fold")
    for arm in study.arms:
        first = next(run for run in runs if run.arm is arm)
        table.add_row(arm.name, str(checked[arm.name].steps), command(first.fit))
    console.print(table)
    left = [run for run in runs if not run.done]
    said = f"{len(runs)} runs, {len(runs) - len(left)} done already"
    if times is not None:
        step, start = times
        seconds = sum(start + step * checked[run.arm.name].steps for run in left) / max(1, min(jobs, len(left)))
        said += f"; a step takes {_plain(step)} s, a start {start:.0f} s: about {_seconds(seconds)}"
        said += f" with {jobs} at a time, without measuring"
    console.print(f"{said}.", highlight=False)


def execute(
    study: Study, out: Path, jobs: int, keep_checkpoints: bool, tell: Callable[[str], None] = print
) -> dict[str, str]:
    """Carries out what is not done yet; a run that fails does not stop the others.

    Returns:
        why, by the folder of each run that has failed.
    """
    runs = [run for run in study.runs(out) if not run.done]
    failed: dict[str, str] = {}
    if study.cluster is not None:
        return _on_cluster(study, out, runs, keep_checkpoints, tell)
    env, lock, began = environment(jobs), threading.Lock(), time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(execute_run, run, study, env, keep_checkpoints): run for run in runs}
        try:
            for number, future in enumerate(as_completed(waiting), start=1):
                run, why = waiting[future], future.result()
                if why:
                    failed[str(run.folder)] = why
                with lock:
                    spent = time.monotonic() - began
                    rest = (
                        f", about {_seconds(spent / number * (len(runs) - number))} left" if number < len(runs) else ""
                    )
                    tell(f"[{number}/{len(runs)}] {run.folder}: {f'failed: {why}' if why else 'done'}{rest}")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            for run in waiting.values():  # an interrupted process ends as a failed one does
                if str(run.folder) not in failed:
                    mark_of(run).unlink(missing_ok=True)
            raise
    return failed


def _on_cluster(
    study: Study, out: Path, runs: list[Run], keep_checkpoints: bool, tell: Callable[[str], None]
) -> dict[str, str]:
    """Hands each run to submitit, which knows SLURM, and waits."""
    try:
        import submitit
    except ImportError as error:
        raise StudyError(f"{study.path}: cluster needs submitit: pip install submitit") from error
    given: dict[str, Any] = dict(study.cluster or {})
    executor = submitit.AutoExecutor(folder=out / "cluster", cluster=given.pop("cluster", None))
    executor.update_parameters(**given)
    tasks = [(run, executor.submit(execute_run, run, study, dict(os.environ), keep_checkpoints)) for run in runs]
    failed = {}
    for number, (run, task) in enumerate(tasks, start=1):
        try:
            why = task.result()
        except Exception as error:  # of the cluster's: out of memory, out of time
            why = f"{type(error).__name__}: {error}"
        if why:
            failed[str(run.folder)] = why
        tell(f"[{number}/{len(runs)}] {run.folder}: {f'failed: {why}' if why else 'done'}")
    return failed
