"""The processes of a study: one for each command, stopped along with the study."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from halos_pl.common import stopping
from halos_pl.common.import_path import folder_last
from halos_pl.study.forks import Forked, Forks
from halos_pl.study.spec import command

LOG = "log.txt"


class _Children:
    """The running commands, which are stopped when this process is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes] | Forked] = set()
        self._stopped_by: int | None = None
        self.forks: Forks | None = None

    def run(self, words: list[str], output: Any, env: Mapping[str, str], lock: int | None) -> int:
        """Runs a command and returns its exit status; that of a stopped command if no more may be started.

        Args:
            words: its words after ``halos``.
            output: file of its output.
            env: its environment.
            lock: file descriptor that it inherits.
        """
        forked = self.forks.fork(words, output, env, lock) if self.forks is not None else None
        with self._lock:
            if self._stopped_by is not None:
                if forked is not None:
                    forked.give_up()
                return 128 + self._stopped_by
            if forked is not None:
                forked.go()
            process = forked or subprocess.Popen(
                [sys.executable, "-m", "halos_pl", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=() if lock is None else (lock,),
            )
            self._running.add(process)
        try:
            return process.wait()
        except BaseException:
            self._stop([process])
            process.wait()
            raise
        finally:
            with self._lock:
                self._running.discard(process)

    @staticmethod
    def _stop(running: Collection[subprocess.Popen[bytes] | Forked]) -> None:
        """Tells commands to stop, and says at once why that may take a while."""
        if running:
            stopping.say("stopping; a fit that is running finishes its step first")
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def stop_all(self, number: int) -> None:
        """Stops all commands because of this signal, and starts no others."""
        with self._lock:
            self._stopped_by = number
            if self.forks is not None:
                self.forks.close()
            self._stop(self._running)

    def may_start(self) -> None:
        """Allows commands again, after an earlier study of this process was stopped."""
        self._stopped_by = None


children = _Children()


@contextlib.contextmanager
def forking(env: Mapping[str, str]) -> Iterator[None]:
    """In this context, commands in this environment are forked from one process, see :mod:`halos_pl.study.forks`."""
    children.forks = Forks({**env, **folder_last()})
    try:
        yield
    finally:
        children.forks.close()
        children.forks = None


def environment(jobs: int) -> dict[str, str]:
    """The environment of a run's process, which limits it to its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def run_command(words: list[str], log: Path, env: Mapping[str, str], lock: int | None = None) -> int:
    """Runs a command of ``halos``.

    Args:
        words: words of the command after ``halos``.
        log: file that its output is appended to.
        env: environment of its process.
        lock: file descriptor that it inherits, so that the file stays locked if this process dies.

    Returns:
        its exit status.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {command(words)}\n")
        file.flush()
        return children.run(words, file, {**env, **folder_last()}, lock)


def stopping_signal(status: int) -> int | None:
    """The signal that stopped a command with this exit status, so that it can resume; None for other ends."""
    number = status - 128 if status > 128 else -status
    return number if number in stopping.SIGNALS else None


def last_words(log: Path, start: int, status: int) -> str:
    """Why a command failed, from its exit status or its output, which begins at byte ``start`` of the log."""
    if number := stopping_signal(status):
        return f"stopped by {stopping.name_of(number)}; the same command resumes it"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}{' (out of memory?)' if status == -9 else ''}"
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith(("halos", "error:")) and "rror" in line]
    if errors:  # a parser gives the reason in the lines that follow
        return " ".join(lines[errors[-1] :]).partition(" All options: ")[0][:500]
    return (lines or ["no output"])[-1][:500]
