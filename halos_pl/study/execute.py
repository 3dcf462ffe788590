"""Carries out a study: one process a run, each of which anyone can start by hand."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halos_pl.common import stopping
from halos_pl.common.files import write
from halos_pl.common.import_path import folder_last
from halos_pl.common.messages import counted, plain
from halos_pl.evaluation.evaluate import FILE, measured_how
from halos_pl.study.plan import Checked, Run, Study, StudyError, command, measuring_of
from halos_pl.training.checkpoint import LAST, PREVIOUS
from halos_pl.training.ending import SUMMARY, shortfall

STUDY = "study.yaml"
OVER = "over.yaml"
FAILED = "failed.json"
LOG = "log.txt"
PLAN = "plan.json"
TIMED = "timed_step"


class _Children:
    """The commands that are running, which are told to stop when this process is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._told: int | None = None

    def run(self, words: list[str], **given: Any) -> int:
        """The exit status of a command; that of a stopped one where no more may be started."""
        with self._lock:
            if self._told is not None:
                return 128 + self._told
            process = subprocess.Popen(words, **given)
            self._running.add(process)
        try:
            return process.wait()
        except BaseException:
            self.stop(process, signal.SIGTERM)
            process.wait()
            raise
        finally:
            with self._lock:
                self._running.discard(process)

    @staticmethod
    def stop(process: subprocess.Popen[bytes], number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    def stop_all(self, number: int) -> None:
        """Tells all of them, and starts no others."""
        with self._lock:
            self._told = number
            for process in self._running:
                self.stop(process, signal.SIGTERM)

    def may_start(self) -> None:
        """Lets commands be started, after an earlier study of this process was stopped."""
        self._told = None


_children = _Children()


def _process(words: list[str], log: Path, env: Mapping[str, str], lock: int | None = None) -> int:
    """The exit status of a command; it holds the file descriptor ``lock`` too, and so the lock if this process dies."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {command(words)}\n")
        file.flush()
        return _children.run(
            [sys.executable, "-m", "halos_pl", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**env, **folder_last()},
            pass_fds=() if lock is None else (lock,),
        )


def _stopping_signal(status: int) -> int | None:
    """The signal that has stopped a command with this exit status, so that it can resume; None for other ends."""
    number = status - 128 if status > 128 else -status
    return number if number in stopping.SIGNALS else None


def _last_words(log: Path, start: int, status: int) -> str:
    """Why a command has failed: the line of its words, which begin at byte ``start``, that says so."""
    if number := _stopping_signal(status):
        return f"stopped by {stopping.name_of(number)}; the next halos ablate resumes it"
    if status < 0:  # the last line says what it did until then
        return f"killed by {signal.Signals(-status).name}{', for want of memory, perhaps' if status == -9 else ''}"
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [i for i, line in enumerate(lines) if line.startswith(("halos", "error:")) and "rror" in line]
    # A parser gives the reason in the lines behind.
    words = " ".join(lines[said[-1] :]).partition(" All options: ")[0] if said else (lines or ["it said nothing"])[-1]
    return words[:500]


def mark_of(run: Run) -> Path:
    """The file that says of a run that it has failed, and why."""
    return run.folder.with_name(f"{run.folder.name}.{FAILED}")


def _fail(run: Run, words: list[str], why: str) -> None:
    mark_of(run).parent.mkdir(parents=True, exist_ok=True)
    write(mark_of(run), json.dumps({"command": command(words), "error": why}) + "\n")


def execute_run(
    run: Run, study: Study, env: Mapping[str, str] | None = None, keep_checkpoints: bool = False
) -> str | None:
    """Trains and measures one run, from where an earlier attempt has left it; why it failed, None if it has not.

    What the commands have said is beside the folder: ``halos fit`` moves aside what it finds in it. Where another
    process works on the run, as after a cluster's jobs were submitted twice, that is waited for.

    Args:
        run, study: which.
        env: variables of its processes; None for those of this one.
        keep_checkpoints: of a run that has been measured.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.folder.with_name(f"{run.folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"halos: {plain(run.folder)}: another process works on it; waiting for that one", file=sys.stderr)
        lock.acquire()
    try:
        why = None if run.done else _execute_run(run, study, os.environ if env is None else env, _descriptor(lock))
        if run.done and not keep_checkpoints:  # also of one that outlived an interrupted study
            for checkpoint in (LAST, PREVIOUS):
                (run.folder / checkpoint).unlink(missing_ok=True)
        return why
    finally:
        lock.release()


def _descriptor(lock: FileLock) -> int | None:
    """Of the file that is locked; None where the platform's lock has none that a child could inherit."""
    return lock._context.lock_file_fd if os.name == "posix" else None


def _execute_run(run: Run, study: Study, env: Mapping[str, str], lock: int | None) -> str | None:
    log = run.folder.with_name(f"{run.folder.name}.{LOG}")
    mark = mark_of(run)
    mark.unlink(missing_ok=True)
    steps = []
    begun = (run.folder / LAST).is_file()
    if not (begun and shortfall(run.folder) is None):  # a finished run whose weights are gone cannot be measured
        steps.append([*run.fit, *(["--ckpt_path=last"] if begun else [])])
    steps.append(study.evaluation(run))
    for words in steps:
        start = log.stat().st_size if log.is_file() else 0
        if status := _process(words, log, env, lock):
            why = _last_words(log, start, status)
            if _stopping_signal(status) is None:
                _fail(run, words, why)
            return why
        if words[0] == "fit" and (short := shortfall(run.folder)):
            why = f"it is not measured: {short}"
            _fail(run, words, why)
            return why
    return None


def state(run: Run) -> str:
    """``done``, ``failed``, ``stopped`` by a signal, ``begun`` or ``waiting``."""
    if run.done:
        return "done"
    if mark_of(run).is_file():
        return "failed"
    if (run.folder / SUMMARY).is_file() and shortfall(run.folder):
        return "stopped"
    return "begun" if run.folder.is_dir() else "waiting"


def failure(run: Run) -> dict[str, str]:
    """The command that failed and what it said."""
    found: dict[str, str] = json.loads(mark_of(run).read_text(encoding="utf-8"))
    return found


def claim(study: Study, out: Path, digests: Mapping[str, str]) -> None:
    """Makes ``out`` the folder of this study.

    Raises:
        StudyError: where it is another one's, or holds runs that were trained or measured otherwise.
    """
    plan: dict[str, Any] = {
        "study": str(study.path),
        "over": None if study.over is None else str(study.over),
        "digests": {arm.folder: digests[arm.name] for arm in study.arms},
        "seeds": list(study.seeds),
        "primary": study.primary,
    } | measuring_of(study)
    known = out / PLAN
    if known.is_file():
        before = json.loads(known.read_text(encoding="utf-8"))
        # Another file with runs of this one is this study by another name, or as it was before an arm was added.
        same = any(before["digests"].get(arm.folder) == digests[arm.name] for arm in study.arms)
        others = any((out / folder).is_dir() for folder in before["digests"])
        if others and not same and Path(before["study"]).resolve() != study.path.resolve():
            raise StudyError(
                f"{out} holds the results of another study, {before['study']}; name another folder with --out"
            )
        for arm in study.arms:
            folder = out / arm.folder
            if folder.is_dir() and before["digests"].get(arm.folder) != digests[arm.name]:
                raise StudyError(
                    f"{out} holds the results of another study: arm {arm.name!r} had another config or other data; name"
                    f" another folder with --out, or remove {folder} to run the arm again"
                )
        for run in study.runs(out):
            if run.done and any(plan[key] != measured_how(run.folder).get(key) for key in ("evaluate", "files")):
                raise StudyError(
                    f"{out} holds the results of another study: {run.folder} was measured in another way or on other"
                    f" files; name another folder with --out, or remove each {FILE} in it to measure again (and to"
                    " train again where there is no checkpoint)"
                )
        plan["digests"] = {**before["digests"], **plan["digests"]}
        if any(run.measured for run in study.runs(out)):  # chosen later, it may be what came out best
            plan["primary"] = before.get("primary")
    elif out.is_dir() and any(out.iterdir()):
        raise StudyError(f"{out} is not empty and holds no study; name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    write(known, json.dumps(plan, indent=2) + "\n")
    for name, file in ((STUDY, study.path), (OVER, study.over)):
        if file is not None:
            write(out / name, file.read_text(encoding="utf-8"))
        else:
            (out / name).unlink(missing_ok=True)


def _seconds(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _plain(seconds: float) -> str:
    """Two digits, without an exponent: 160, 4.6, 0.12."""
    return f"{float(f'{seconds:.2g}'):g}"


def environment(jobs: int) -> dict[str, str]:
    """The variables of a run's process: its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def timed_step(study: Study, out: Path, env: Mapping[str, str]) -> tuple[float, float] | None:
    """Seconds of a step and of starting a run, from two steps of the first arm that is not done and takes them.

    None, and why, where all fail; that is no reason not to run them, as other steps may not.
    """
    folder = out / TIMED
    log = out / f"{TIMED}.{LOG}"
    left = {run.arm.name: run.arm for run in study.runs(out) if not run.done}
    with FileLock(out / f"{TIMED}.lock"):
        for arm in left.values():
            log.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)  # of one that was stopped
            start = time.monotonic()
            status = _process([*arm.words(folder, study.seeds[0]), "--trainer.max_steps=2"], log, env)
            if not status:
                whole = time.monotonic() - start
                training = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["wall_seconds"]
                shutil.rmtree(folder)
                return training / 2, whole - training
            print(f"halos: two steps of arm {arm.name!r} fail: {plain(_last_words(log, 0, status))}", file=sys.stderr)
    return None


def show_plan(
    study: Study,
    checked: Mapping[str, Checked],
    runs: list[Run],
    times: tuple[float, float] | None,
    jobs: int,
) -> None:
    """The arms, their commands, and how long all of it may take, by the seconds of a step and of a start."""
    console = Console()
    table = Table(
        title=f"{escape(plain(study.path))}: {counted(len(study.arms), 'arm')} x {counted(len(study.seeds), 'seed')}",
        title_justify="left",
    )
    for column in ("arm", "steps", "command of its first run"):
        table.add_column(column, overflow="fold")
    for arm in study.arms:
        first = next(run for run in runs if run.arm is arm)
        table.add_row(escape(plain(arm.name)), str(checked[arm.name].steps), escape(plain(command(first.fit))))
    console.print(table)
    left = [run for run in runs if not run.done]
    said = f"{counted(len(runs), 'run')}, {len(runs) - len(left)} done already"
    if times is not None:
        step, start = times
        seconds = sum(start + step * checked[run.arm.name].steps for run in left) / max(1, min(jobs, len(left)))
        said += f"; a step takes {_plain(step)} s, a start {start:.0f} s: about {_seconds(seconds)}"
        said += f" with {jobs} at a time, without measuring"
    console.print(f"{said}.", highlight=False)


def _said(why: str | None) -> str:
    return "done" if why is None else why if why.startswith("stopped by") else f"failed: {why}"


def execute(
    study: Study, out: Path, jobs: int, keep_checkpoints: bool, tell: Callable[[str], None] = print
) -> dict[str, str]:
    """Carries out what is not done yet; a run that fails does not stop the others.

    Returns:
        why, by the folder of each run that has failed.
    """
    runs = [run for run in study.runs(out) if not run.done or ((run.folder / LAST).is_file() and not keep_checkpoints)]
    failed: dict[str, str] = {}
    if study.cluster is not None:
        return _on_cluster(study, out, runs, keep_checkpoints, tell)
    _children.may_start()
    env, lock, began = environment(jobs), threading.Lock(), time.monotonic()
    earlier = {mark: mark.stat().st_mtime_ns for run in runs if (mark := mark_of(run)).is_file()}
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(execute_run, run, study, env, keep_checkpoints): run for run in runs}
        try:
            for number, future in enumerate(as_completed(waiting), start=1):
                run, why = waiting[future], future.result()
                if why:
                    failed[str(run.folder)] = why
                with lock:
                    spent, left = time.monotonic() - began, len(runs) - number
                    begun = min(jobs, left) / 2  # those that are under way are half done, as far as one knows
                    rest = f", about {_seconds(spent / (number + begun) * (left - begun))} left" if left else ""
                    tell(plain(f"[{number}/{len(runs)}] {run.folder}: {_said(why)}{rest}"))
        except (KeyboardInterrupt, stopping.Stopped) as error:
            _children.stop_all(error.signum if isinstance(error, stopping.Stopped) else signal.SIGINT)
            pool.shutdown(cancel_futures=True)
            for run in waiting.values():  # an interrupted process ends as a failed one does
                mark = mark_of(run)
                if str(run.folder) not in failed and mark.is_file() and mark.stat().st_mtime_ns != earlier.get(mark):
                    mark.unlink()
            raise
    return failed


def executor_of(study: Study, out: Path) -> Any:
    """submitit's executor with the study's parameters.

    Raises:
        StudyError: where submitit is missing, or does not know the cluster or a parameter.
    """
    place = study.places["cluster"]
    try:
        import submitit
    except ImportError as error:
        raise StudyError(f"{place}: cluster needs submitit: pip install submitit") from error
    given: dict[str, Any] = dict(study.cluster or {})
    try:
        executor = submitit.AutoExecutor(folder=out / "cluster", cluster=given.pop("cluster", None))
        executor.update_parameters(**given)
    except (NameError, RuntimeError, TypeError, ValueError) as error:  # what it raises for each of these
        raise StudyError(f"{place}: cluster: {error}") from error
    return executor


def _on_cluster(
    study: Study, out: Path, runs: list[Run], keep_checkpoints: bool, tell: Callable[[str], None]
) -> dict[str, str]:
    """Hands each run to submitit, which knows SLURM, and waits; when that is interrupted, they are called back."""
    executor = executor_of(study, out)
    tasks = [(run, executor.submit(execute_run, run, study, None, keep_checkpoints)) for run in runs]
    failed = {}
    for number, (run, task) in enumerate(tasks, start=1):
        try:
            why = task.result()
        except (KeyboardInterrupt, stopping.Stopped):
            for _, each in tasks:
                each.cancel()
            raise
        except Exception as error:  # of the cluster's: out of memory, out of time
            why = f"{type(error).__name__}: {error}"
            _fail(run, run.fit, why)
        if why:
            failed[str(run.folder)] = why
        tell(plain(f"[{number}/{len(runs)}] {run.folder}: {_said(why)}"))
    return failed
