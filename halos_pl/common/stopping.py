"""Signals end a command cleanly: a fit saves a checkpoint first, and the exit status names the signal.

A command that is told to stop exits with 128 plus the signal's number, as a shell counts it: 130 after Ctrl-C, 143
after SIGTERM, 129 after its terminal has closed. A fit finishes its optimizer step, saves ``checkpoints/last.ckpt`` and
prints the command that resumes it. Before its first step, and in any other command, it stops at once, as it does at a
second Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, n))
# Launchers such as GNU timeout send a signal to the process and to its group, which are not two presses of Ctrl-C.
REPEAT = 0.1


class Stopped(BaseException):
    """A signal has told this process to stop; not an ``Exception``, so that no handler of errors swallows it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(name_of(signum))


class _State:
    """Which signals this process has received, and how it reacts to them."""

    def __init__(self) -> None:
        self.owner = 0  # the process that listens; a forked one does not
        self.words: list[str] = []
        self.signum: int | None = None
        self.when = 0.0
        self.interrupts = 0
        self.waits = False  # for a step to end, rather than stopping at once
        self.children: list[subprocess.Popen[bytes]] = []


_state = _State()


def name_of(signum: int) -> str:
    """``SIGTERM`` for 15."""
    return signal.Signals(signum).name


def received() -> int | None:
    """The signal that has told this process to stop, None where none has."""
    return _state.signum


def agree(signum: int) -> None:
    """Takes over a signal that another rank has received."""
    _state.signum = _state.signum or signum


def wait_for_step(waits: bool) -> None:
    """Whether a signal waits until the code that asks :func:`received` after each step sees it, or stops at once."""
    _state.waits = waits


def wait_for(children: list[subprocess.Popen[bytes]]) -> None:
    """Makes this process end after its children, which are stopping too and may still need it."""
    _state.children += children


def command_line(*more: str, without: tuple[str, ...] = ()) -> str:
    """The command as a person types it.

    Args:
        more: words to add.
        without: options, such as ``--ckpt_path``, whose words are dropped.
    """
    words, skip = [], False
    for word in _state.words:
        name = word.partition("=")[0]
        if not skip and name not in without:
            words.append(word)
        skip = not skip and word in without
    program = ["python", "-m", "halos_pl"] if Path(sys.argv[0]).name == "__main__.py" else ["halos"]
    return shlex.join([*program, *words, *more])


def say(text: str) -> None:
    """Prints a line on the terminal from within a signal handler; only on the first rank of a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):  # of a terminal that is gone
            os.write(2, f"\nhalos: {text}\n".encode())


def _leave_terminal() -> None:
    """Discards what is printed from now on: writing to a terminal that is gone would fail, and the fit with it."""
    for fd in (1, 2):
        with suppress(OSError):
            os.fstat(fd)
            if fd in _terminals:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, fd)
                os.close(null)


_terminals: set[int] = set()


def _handle(signum: int, frame: Any) -> None:
    if os.getpid() != _state.owner:  # a forked worker: the main process decides
        if signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        return
    first, now = _state.signum is None, time.monotonic()
    if not first and now - _state.when < REPEAT:
        return
    _state.when = now
    _state.interrupts += signum == signal.SIGINT
    if first:
        _state.signum = signum
    if _state.interrupts > 1:
        say("stopped at once by a second Ctrl-C")
        os._exit(128 + signum)
    if signum == getattr(signal, "SIGHUP", None):
        _leave_terminal()
    if not _state.waits:
        raise Stopped(signum)
    if first:
        again = "; Ctrl-C again stops at once" if signum == signal.SIGINT else ""
        say(f"{name_of(signum)}: stopping when this step is done and a checkpoint is saved{again}")


def ignore_signals(worker: int = 0) -> None:
    """Makes a data loader's process ignore signals that are sent to a whole job; its main process ends it."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def listening(words: list[str]) -> Iterator[None]:
    """While entered, signals end the command cleanly.

    A signal that the process was started to ignore, as SIGHUP under nohup, stays ignored.

    Args:
        words: of the command, for the line that says how to resume.

    Raises:
        SystemExit: with 128 plus the signal's number, where one has come.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():  # only that one may listen
        yield
        return
    outer, _state = _state, _State()
    _state.owner, _state.words = os.getpid(), words
    _terminals.update(fd for fd in (1, 2) if os.isatty(fd))
    before = {s: signal.getsignal(s) for s in SIGNALS}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, _handle)
    try:
        yield
        failed: BaseException | None = None
    except BaseException as error:
        failed = error
    finally:
        told, at_once = _state.signum, not _state.waits
        for child in _state.children:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
        _state = outer
        for signum, handler in before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
    if isinstance(failed, KeyboardInterrupt):
        told = told or signal.SIGINT
    # A library may have replaced our exception by another; Lightning's own SystemExit has no code.
    if told is not None and (failed is None or at_once or not _is_fault(failed)):
        if at_once and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"halos: stopped by {name_of(told)}", file=sys.stderr)
        raise SystemExit(128 + told) from None
    if failed is not None:
        raise failed


def _is_fault(error: BaseException) -> bool:
    return isinstance(error, Exception) or (isinstance(error, SystemExit) and bool(error.code))
