"""Signals end a command cleanly: a fit saves a checkpoint first, and the exit status names the signal.

A stopped command exits with 128 plus the signal's number, as in a shell: 130 after Ctrl-C, 143 after SIGTERM, 129 after
its terminal has closed. A fit finishes its optimizer step, saves ``checkpoints/last.ckpt`` and prints the command that
resumes it. A fit before its first step, and any other command, stops at once, as does a fit at a second Ctrl-C.
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
# Seconds within which a second signal is ignored, as launchers such as GNU timeout signal the process and its group.
REPEAT = 0.1


class Stopped(BaseException):
    """A signal has stopped this process; not an ``Exception``, so that no error handler swallows it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(name_of(signum))


class _State:
    """The signals that this process has received, and its reaction to them."""

    def __init__(self) -> None:
        self.owner = 0  # the process that handles signals; forked ones do not
        self.words: list[str] = []
        self.signum: int | None = None
        self.when = 0.0
        self.interrupts = 0
        self.waits = False  # for the end of a step, instead of stopping at once
        self.children: list[subprocess.Popen[bytes]] = []
        self.interruption: BaseException | None = None


_state = _State()


def name_of(signum: int) -> str:
    """``SIGTERM`` for 15."""
    return signal.Signals(signum).name


def received() -> int | None:
    """The signal that is stopping this process; None if there is none."""
    return _state.signum


def agree(signum: int) -> None:
    """Adopts a signal that another rank has received."""
    _state.signum = _state.signum or signum


def interrupt(error: BaseException) -> bool:
    """Raises an error in the main thread, from another one, as soon as it executes Python code.

    Returns:
        False if that is impossible, because this module does not handle signals.
    """
    number, thread = getattr(signal, "SIGUSR2", None), threading.main_thread().ident
    if number is None or thread is None or signal.getsignal(number) is not _handle:
        return False
    _state.interruption = error
    signal.pthread_kill(thread, number)
    return True


def wait_for_step(waits: bool) -> None:
    """Sets whether signals wait for the end of a step, where the caller checks :func:`received`, or stop at once."""
    _state.waits = waits


def wait_for(children: list[subprocess.Popen[bytes]]) -> None:
    """Makes this process outlive its children, which are stopping too and may still need it."""
    _state.children += children


def command_line(*more: str, without: tuple[str, ...] = ()) -> str:
    """The command as typed in a shell.

    Args:
        more: words to add.
        without: options to drop, with their values, such as ``--ckpt_path``.
    """
    words, skip = [], False
    for word in _state.words:
        name = word.partition("=")[0]
        if not skip and name not in without:
            words.append(word)
        skip = not skip and word in without
    program = ["python", "-m", "halos_pl"] if Path(sys.argv[0]).name == "__main__.py" else ["halos"]
    return shlex.join([*program, *words, *more])


def is_first() -> bool:
    """Whether this is the first rank of its machine; SLURM names ranks in its own way."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def say(text: str) -> None:
    """Prints a line from a signal handler, only on the first rank of a machine."""
    if is_first():
        with suppress(OSError):  # the terminal is gone
            os.write(2, f"\nhalos: {text}\n".encode())


def _leave_terminal() -> None:
    """Discards further output: writing to a closed terminal would fail, and end the fit."""
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
    if _state.interruption is not None:
        error, _state.interruption = _state.interruption, None
        raise error
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
    """Makes a data loader's worker ignore signals to the whole job; its main process ends it."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def listening(words: list[str]) -> Iterator[None]:
    """Inside this context, signals end the command cleanly.

    Signals that the process was started to ignore, as SIGHUP under nohup, stay ignored.

    Args:
        words: words of the command, for the line that tells how to resume.

    Raises:
        SystemExit: with 128 plus the number of a received signal.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():  # only that thread can handle signals
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
        stopped_by, at_once = _state.signum, not _state.waits
        for child in _state.children:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
        _state = outer
        for signum, handler in before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
    if isinstance(failed, KeyboardInterrupt):
        stopped_by = stopped_by or signal.SIGINT
    # A library may have replaced our exception; Lightning's own SystemExit has no code.
    if stopped_by is not None and (failed is None or at_once or not _is_fault(failed)):
        if at_once and is_first():
            print(f"halos: stopped by {name_of(stopped_by)}", file=sys.stderr)
        raise SystemExit(128 + stopped_by) from None
    if failed is not None:
        raise failed


def _is_fault(error: BaseException) -> bool:
    return isinstance(error, Exception) or (isinstance(error, SystemExit) and bool(error.code))
