"""How long a study will take: two steps are timed before it begins."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halos_pl.common.leases import Lease
from halos_pl.common.messages import counted, plain
from halos_pl.run_dir import SUMMARY
from halos_pl.study import processes
from halos_pl.study.execute import duration
from halos_pl.study.preflight import Checked
from halos_pl.study.spec import Arm, Run, Study, command
from halos_pl.study.state import ended

FOLDER = "timed_step"


def timed_step(runs: list[Run], out: Path, env: Mapping[str, str]) -> tuple[float, float] | None:
    """Times two steps of the first unfinished arm whose steps do not fail.

    Args:
        runs: the runs of a study.
        out: its folder.
        env: environment of the process.

    Returns:
        Seconds of a step, and of starting a run; None, with a message, if all of them fail.
    """
    folder = out / FOLDER
    log = out / f"{FOLDER}.{processes.LOG}"
    unfinished = {run.arm.title: run for run in runs if run.arm.decided and not ended(run)}
    with Lease(out / f"{FOLDER}.lease").held():
        for run in unfinished.values():
            log.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)  # left by a study that was stopped
            start = time.monotonic()
            words = [*run.arm.words(folder, run.seed), "--trainer.max_steps=2"]
            status = processes.run_command(words, log, env)
            if not status:
                total = time.monotonic() - start
                training = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["wall_seconds"]
                shutil.rmtree(folder)
                return training / 2, total - training
            why = plain(processes.last_words(log, 0, status))
            print(f"halos: two steps of arm {run.arm.title!r} fail: {why}", file=sys.stderr)
    return None


def show_plan(
    study: Study,
    checked: Checked,
    runs: list[Run],
    unfinished: list[Run],
    times: tuple[float, float] | None,
    jobs: int,
) -> None:
    """Prints the arms, their commands, and how long the study may take.

    Args:
        study, checked, runs: the study, its pre-flight and its runs, tuning runs included.
        unfinished: those of the runs that are left.
        times: seconds of a step and of a start; None if unknown.
        jobs: number of runs at a time.
    """
    console = Console()
    title = f"{study.path}: {counted(len(study.arms), 'arm')} x {counted(len(study.seeds), 'seed')}"
    trials = [run for run in runs if run.trial]
    if study.tune is not None:
        title += f", after {counted(len(trials), 'tuning run')} that choose {study.tune.option} of each arm"
    table = Table(title=escape(plain(title)), title_justify="left")
    for column in ("arm", "steps", "command of its first run"):
        table.add_column(column, overflow="fold")
    for arm in study.arms:
        first = next(run for run in runs if run.arm.name == arm.name and run.arm.decided)
        steps = str(_steps(study, checked, arm))
        table.add_row(escape(plain(arm.name)), steps, escape(plain(command(first.fit))))
    console.print(table)
    summary = f"{counted(len(runs), 'run')}, {len(runs) - len(unfinished)} already done"
    if times is not None:
        step, start = times
        total = sum(start + step * _steps(study, checked, run.arm) for run in unfinished)
        summary += f"; a step takes {_two_digits(step)} s, a start {start:.0f} s: about"
        summary += f" {duration(total / max(1, min(jobs, len(unfinished))))} with {jobs} at a time, without measuring"
    console.print(f"{summary}.", highlight=False)


def _steps(study: Study, checked: Checked, arm: Arm) -> int:
    """Optimizer steps of an arm; the most of any value that it tries if it is not decided."""
    if arm.decided:
        return checked.arms[arm.title].steps
    return max(checked.arms[each.title].steps for each in study.variants if each.name == arm.name)


def _two_digits(seconds: float) -> str:
    """Without an exponent: 160, 4.6, 0.12."""
    return f"{float(f'{seconds:.2g}'):g}"
