"""Forks the commands of a study from one process that has imported everything and loaded their model.

A forked command is a process like one that was started: with its own words, output, signals, exit status, plug-ins and
random numbers. It is also a child of the study, not of the process that it was forked from (the study is the subreaper
of its descendants), so it can be stopped, awaited and orphaned like any other.

That process has one thread of Python and computes on one thread, since a fork copies only the thread that forks. It
leaves, and is started again, when a module that it has imported changes.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from halos_pl.common import stopping
from halos_pl.common.import_path import put_last

_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
#: Exit status of a process whose modules have changed.
_STALE = 3
_IMPORTED = (
    "halos_pl.cli.main",
    "halos_pl.cli.commands",
    "halos_pl.cli.lightning_cli",
    "halos_pl.evaluation.evaluate",
    "halos_pl.evaluation.measurement",
    "halos_pl.evaluation.win_rates",
)


class Forked:
    """A command that was forked and waits; like ``subprocess.Popen`` after :meth:`go`."""

    def __init__(self, pid: int, gate: socket.socket) -> None:
        self.pid, self._gate, self._lock = pid, gate, threading.Lock()
        self._status: int | None = None

    def go(self) -> None:
        """Lets it run."""
        with suppress(OSError):  # it was killed
            self._gate.send(b"g")
        self._gate.close()

    def give_up(self) -> None:
        """Ends it before it has run."""
        self._gate.close()
        self.wait()

    def wait(self) -> int:
        """Its exit status, once it has ended; negative for a signal."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            if self._status is None:
                self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self._status

    def send_signal(self, number: int) -> None:
        """Sends it a signal, unless it has ended."""
        with self._lock:
            if self._status is None:
                os.kill(self.pid, number)


class Forks:
    """The process that commands are forked from, started for the first of them.

    Args:
        env: environment of the commands.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._open = True

    def _start(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                env=self.env,
                pass_fds=(theirs.fileno(),),
                stdout=self._said,
                stderr=self._said,
            )

    def fork(self, words: list[str], output: IO[Any], env: Mapping[str, str], lock: int | None) -> Forked | None:
        """A process for a command.

        Args:
            words: words of the command after ``halos``.
            output: file of its output.
            env: its environment.
            lock: file descriptor that it inherits.

        Returns:
            None if it cannot be forked.
        """
        if env != self.env:
            return None
        for _ in range(2):  # again, if the modules have changed
            with self._lock:
                if not self._open:
                    return None
                if self._process is None:
                    self._start()
                process = self._process
                gate, theirs = socket.socketpair()
                files = [theirs.fileno(), output.fileno(), *([] if lock is None else [lock])]
                with theirs, suppress(OSError):  # it has ended
                    socket.send_fds(self._control, [json.dumps([os.getcwd(), *words]).encode()], files)
            if pid := gate.recv(32):
                return Forked(int(pid), gate)
            gate.close()
            with self._lock:
                if process is self._process and self._open:
                    self._ended()
        return None

    def _ended(self) -> None:
        """Lets another process be started if the modules of this one have changed; otherwise, commands start alone."""
        assert self._process is not None
        self._control.close()
        status, self._process = self._process.wait(), None
        if status != _STALE:
            self._open = False
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "")
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended: {last}"
            print(f"halos: the process that commands are forked from {how}; each now starts alone", file=sys.stderr)
        self._said.close()

    def close(self) -> None:
        """Ends that process; commands that were forked from it go on."""
        with self._lock:
            self._open = False
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                self._control.close()
                self._said.close()
                self._process = None


def can_fork() -> bool:
    """Whether commands can be forked: on Linux, without a GPU, whose state a fork would break."""
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available()


def _stamps() -> dict[str, tuple[int, int]]:
    """The states of the files of all imported modules."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    found = {}
    for file in files - {None}:
        with suppress(OSError):
            state = os.stat(str(file))
            found[str(file)] = (state.st_mtime_ns, state.st_size)
    return found


def _compute_on(threads: int) -> None:
    """Sets the number of threads; ``torch.set_num_threads`` also changes settings of MKL, which commands keep."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    for path in {*re.findall(r"/\S*/lib[gi]?omp\S*\.so\S*", maps)}:
        ctypes.CDLL(path).omp_set_num_threads(threads)


def _fork() -> int:
    """Forks a grandchild whose parent ends, and returns its process ID; 0 in the grandchild."""
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        if pid := os.fork():
            os.write(writing, str(pid).encode())
            os._exit(0)
        os.close(reading)
        os.close(writing)
        return 0
    os.close(writing)
    with open(reading, "rb") as pipe:
        pid = int(pipe.read())
    os.waitpid(between, 0)  # now it is a child of the study
    return pid


def _serve(control: socket.socket) -> list[str]:
    """Forks commands until the study has ended.

    Returns:
        in a forked process, the words of its command.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)  # the study decides
    put_last(os.getcwd())
    for name in _IMPORTED:
        importlib.import_module(name)
    import numpy as np
    import torch
    from transformers.utils import logging

    from halos_pl import cache
    from halos_pl.policy import loading, shared

    threads = torch.get_num_threads()
    _compute_on(1)
    if torch.get_num_threads() > 1:
        raise SystemExit("torch computes on several threads")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar has a lock that all processes would share, and a thread
    cache.renew_in_forks()
    stamps, heard = _stamps(), 0
    reports, reporting = os.pipe()
    os.set_blocking(reports, False)

    def said() -> str:
        nonlocal heard
        sys.stdout.flush()
        sys.stderr.flush()
        start, heard = heard, os.fstat(2).st_size
        return os.pread(2, heard - start, start).decode(errors="replace")

    while True:
        message, files, _, _ = socket.recv_fds(control, 1 << 20, 3)
        if not message:
            raise SystemExit(0)
        if not stamps.items() <= _stamps().items():
            raise SystemExit(_STALE)
        with suppress(BlockingIOError):
            for key in os.read(reports, 1 << 16).decode().splitlines():
                with suppress(Exception):  # the command that needs it reports it
                    shared.keep(key, loading.load_base, said)
            stamps = _stamps() | stamps
        if threading.active_count() > 1:
            raise SystemExit(f"it has other threads: {threading.enumerate()}")
        sys.stdout.flush()
        sys.stderr.flush()
        gate = socket.socket(fileno=files[0])
        if pid := _fork():
            gate.send(str(pid).encode())
            gate.close()
            for file in files[1:]:
                os.close(file)
            continue
        control.close()
        os.close(reports)
        folder, *words = json.loads(message)
        if gate.recv(1) != b"g":
            os._exit(0)
        gate.close()
        os.chdir(folder)
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"halos {words[0]}".encode())  # in top
        for standard in (1, 2):
            os.dup2(files[1], standard)
        os.close(files[1])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
        importlib.invalidate_caches()
        _compute_on(threads)
        np.random.seed()
        if bars:
            logging.enable_progress_bar()
        cache.renew()
        shared.report_missing(os.fdopen(reporting, "w", buffering=1).write)
        return list(words)


if __name__ == "__main__":
    sys.argv[1:] = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.orig_argv = [sys.executable, "-m", "halos_pl", *sys.argv[1:]]
    runpy.run_module("halos_pl", run_name="__main__", alter_sys=True)
