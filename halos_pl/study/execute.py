"""Executes a study: one process per run, each of which can also be started by hand."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from halos_pl.common import stopping
from halos_pl.common.leases import Lease
from halos_pl.common.messages import plain
from halos_pl.run_dir import LAST, PREVIOUS, shortfall
from halos_pl.study import processes
from halos_pl.study.spec import Run, Study, StudyError
from halos_pl.study.state import diverged, ended, failure_file, record_failure
from halos_pl.study.time_spent import add_seconds
from halos_pl.training.checkpoint_links import remove_checkpoint


def execute(
    study: Study,
    out: Path,
    jobs: int,
    keep_checkpoints: bool,
    tell: Callable[[str], None] = print,
    runs: Iterable[Run] | None = None,
) -> dict[str, str]:
    """Executes the runs that are not done; one that fails does not stop the others.

    Args:
        study, out: the study and its folder.
        jobs: number of runs at a time.
        keep_checkpoints: whether to keep the checkpoints after measuring.
        tell: prints a line on each run that ends.
        runs: runs of the study; default: all but its tuning runs.

    Returns:
        Reason of each failure, by run folder. That of a tuning run that diverged is a result, not a failure.
    """
    runs = [
        run
        for run in (study.runs(out) if runs is None else runs)
        if not ended(run) or ((run.folder / LAST).exists() and not keep_checkpoints)
    ]
    if not runs:
        return {}
    if study.cluster is not None:
        return _on_cluster(study, out, runs, keep_checkpoints, tell)
    failed: dict[str, str] = {}
    processes.children.may_start()
    env, start = processes.environment(jobs), time.monotonic()
    earlier = {file: file.stat().st_mtime_ns for run in runs if (file := failure_file(run)).is_file()}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(execute_run, run, study, env, keep_checkpoints): run for run in runs}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                run, why = futures[future], future.result()
                if why and not diverged(run):
                    failed[str(run.folder)] = why
                spent, left = time.monotonic() - start, len(runs) - number
                under_way = min(jobs, left) / 2  # half done on average
                rest = f", about {duration(spent / (number + under_way) * (left - under_way))} left" if left else ""
                tell(plain(f"[{number}/{len(runs)}] {run.folder}: {_outcome(run, why)}{rest}"))
        except (KeyboardInterrupt, stopping.Stopped) as error:
            processes.children.stop_all(error.signum if isinstance(error, stopping.Stopped) else signal.SIGINT)
            pool.shutdown(cancel_futures=True)
            for run in futures.values():  # an interrupted process ends like one that failed
                file = failure_file(run)
                new = file.is_file() and file.stat().st_mtime_ns != earlier.get(file)
                if new and str(run.folder) not in failed and not diverged(run):
                    file.unlink()
            raise
    return failed


def duration(seconds: float) -> str:
    """``40 s`` or ``12 min``."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _outcome(run: Run, why: str | None) -> str:
    if why is None or why.startswith("stopped by"):
        return why or "done"
    return f"{'diverged' if diverged(run) else 'failed'}: {why}"


def execute_run(
    run: Run, study: Study, env: Mapping[str, str] | None = None, keep_checkpoints: bool = False
) -> str | None:
    """Trains and measures one run, from where an earlier attempt left off.

    The output of its commands goes into a file beside its folder, since ``halos fit`` may rename that folder. If
    another process works on the run, as after submitting a cluster's jobs twice, this one waits for it.

    Args:
        run, study: run to execute, and its study.
        env: environment of its processes; None for that of this process.
        keep_checkpoints: whether to keep the checkpoints after measuring.

    Returns:
        Reason of the failure; None after success.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(run, study) as lock:
        why = None if ended(run) else _train_and_measure(run, study, os.environ if env is None else env, lock)
        if ended(run) and not keep_checkpoints:  # also those of a process that outlived an interrupted study
            for checkpoint in (LAST, PREVIOUS):
                remove_checkpoint(run.folder / checkpoint)
        return why


@contextmanager
def _alone(run: Run, study: Study) -> Iterator[int | None]:
    """Waits until no other process works on a run.

    The nodes of a cluster use a lease, as their file system may have no locks. On one machine it is a lock of the file
    system, which the run's commands inherit: one that outlives its study keeps the lock, but could not renew a lease.

    Yields:
        The file descriptor that commands must inherit, if any.
    """
    beside, waits = run.folder.with_name, f"halos: {plain(run.folder)}: waiting for another process that works on it"
    if study.cluster is not None:
        lease = Lease(beside(f"{run.folder.name}.lease"))
        with lease.held(wait=False) as held:
            if held:
                yield None
                return
        print(waits, file=sys.stderr)
        with lease.held():
            yield None
        return
    lock = FileLock(beside(f"{run.folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(waits, file=sys.stderr)
        lock.acquire()
    try:
        yield descriptor(lock)
    finally:
        lock.release()


def descriptor(lock: FileLock) -> int | None:
    """The file descriptor of a lock; None on a platform where a child cannot inherit it."""
    return lock._context.lock_file_fd if os.name == "posix" else None


def _train_and_measure(run: Run, study: Study, env: Mapping[str, str], lock: int | None) -> str | None:
    log = run.folder.with_name(f"{run.folder.name}.{processes.LOG}")
    failure_file(run).unlink(missing_ok=True)
    commands = []
    begun = (run.folder / LAST).exists()
    if not (begun and shortfall(run.folder) is None):  # a finished run without its weights cannot be measured
        commands.append([*run.fit, *(["--ckpt_path=last"] if begun else [])])
    commands.append(study.evaluation(run))
    for words in commands:
        start, began = log.stat().st_size if log.is_file() else 0, time.monotonic()
        status = processes.run_command(words, log, env, lock)
        add_seconds(run, words[0], time.monotonic() - began)
        if status:
            why = processes.last_words(log, start, status)
            if processes.stopping_signal(status) is None:
                record_failure(run, words, why)
            return why
        if words[0] == "fit" and (short := shortfall(run.folder)):
            why = f"not measured: {short}"
            record_failure(run, words, why)
            return why
    return None


def executor_of(study: Study, out: Path) -> Any:
    """submitit's executor with the study's parameters.

    Raises:
        StudyError: if submitit is missing, or does not know the cluster or a parameter.
    """
    place = study.places["cluster"]
    try:
        import submitit
    except ImportError as error:
        raise StudyError(f"{place}: cluster needs submitit: pip install submitit") from error
    parameters: dict[str, Any] = dict(study.cluster or {})
    try:
        executor = submitit.AutoExecutor(folder=out / "cluster", cluster=parameters.pop("cluster", None))
        executor.update_parameters(**parameters)
    except (NameError, RuntimeError, TypeError, ValueError) as error:  # submitit raises all of these
        raise StudyError(f"{place}: cluster: {error}") from error
    return executor


def _on_cluster(
    study: Study, out: Path, runs: list[Run], keep_checkpoints: bool, tell: Callable[[str], None]
) -> dict[str, str]:
    """Submits each run through submitit and waits; cancels them all if it is interrupted."""
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
        except Exception as error:  # of the cluster: out of memory, out of time
            why = f"{type(error).__name__}: {error}"
            record_failure(run, run.fit, why)
        if why and not diverged(run):
            failed[str(run.folder)] = why
        tell(plain(f"[{number}/{len(runs)}] {run.folder}: {_outcome(run, why)}"))
    return failed
