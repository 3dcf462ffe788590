"""Checks in a child process: whatever the code of a target does, the command that checks it gets an answer."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from halos_pl.conformance.target import TargetError, UncheckableError, one_line

_CONTEXT = multiprocessing.get_context("fork")  # in milliseconds, with everything imported that a check needs
_MARK = "HALOS_CHECK"  # environment of the child and of programs that it starts
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h: the child ends when the command does


class Child:
    """A process that answers questions one after another, and is replaced after it has died or been stopped.

    Its standard output goes to standard error, also that of processes that it starts. A context manager; leaving it
    stops the process.

    Args:
        work: answers a question, in the child; both are plain data that JSON can contain.
        timeout: seconds that an answer may take; on Linux, those in which the child waits for a core do not count.
        memory: memory that the child may allocate, in bytes (Linux only); processes that it starts, as much each.
        anew: whether each question gets a new process, so that no answer depends on settings that another left behind.
    """

    def __init__(self, work: Callable[[Any], Any], *, timeout: float, memory: float, anew: bool = False) -> None:
        self.work, self.timeout, self.memory, self.anew = work, timeout, memory, anew
        self._process: Any = None
        self._questions: Connection | None = None
        self._answers, self._mark = -1, ""

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def ask(self, question: Any) -> Any:
        """The answer of the child.

        Raises:
            UncheckableError: the code takes too long or too much memory, ends its process, or raises what no check
                expects; the message completes "could not be checked: ".
            TargetError: the question itself is wrong; the message is that of ``work``.
        """
        if self.anew:
            self._stop()
        questions = self._questions or self._start()
        try:
            with suppress(OSError):  # it has ended since its last answer
                questions.send_bytes(json.dumps(question).encode())
            answer = self._answer()
        except TimeoutError:
            self._stop()
            raise UncheckableError(f"it takes more than {self.timeout:g} s; --timeout SECONDS allows more") from None
        except BaseException:
            self._stop()
            raise
        if answer is None:
            raise UncheckableError(f"it ends the process that checks it, {self._stop()}")
        if "uncheckable" in answer:
            raise UncheckableError(answer["uncheckable"])
        if "error" in answer:
            raise TargetError(answer["error"])
        return answer["answer"]

    def _answer(self) -> dict[str, Any] | None:
        """The line with the mark of this child, whatever else the target writes there; None if the child has ended.

        Raises TimeoutError.
        """
        mark, line = self._mark.encode(), b""
        end = time.monotonic() + self.timeout - self._held_up()
        while (left := end + self._held_up() - time.monotonic()) > 0:
            if not wait([self._answers], min(left, 0.2)):
                if self._process.exitcode is not None:  # and a fork of it has kept the pipe open
                    return None
                continue
            part = os.read(self._answers, 1 << 16)
            *lines, line = (line + part).split(b"\n")
            for found in lines:
                if found.startswith(mark):
                    answer: dict[str, Any] = json.loads(found.removeprefix(mark))
                    return answer
            line = line if line[: len(mark)] == mark[: len(line)] else b"-"
            if not part:
                return None
        raise TimeoutError

    def _held_up(self) -> float:
        """Seconds for which the child could have run but had no core; 0 where the system does not say."""
        with suppress(OSError, ValueError, IndexError):
            return int(Path(f"/proc/{self._process.pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
        return 0.0

    def _start(self) -> Connection:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()  # else the child would write it again
        theirs, ours = _CONTEXT.Pipe(duplex=False)
        self._answers, answers = os.pipe()
        self._mark = f"{secrets.token_hex(16)} "
        arguments = (theirs, answers, (ours.fileno(), self._answers), self._mark, self.work, self.timeout, self.memory)
        self._process = _CONTEXT.Process(target=_answer_questions, args=arguments)
        self._process.start()
        theirs.close()
        os.close(answers)
        self._questions = ours
        return ours

    def _stop(self) -> str:
        """Ends the child and what it has started; how it ended by itself, in words."""
        if self._process is None:
            return ""
        if self._questions is not None:
            self._questions.close()  # which a child that waits for a question takes for the end
        # not join(): it would take what the target writes to its descriptors for the end
        end = time.monotonic() + 0.5
        while self._process.exitcode is None and time.monotonic() < end:
            time.sleep(0.01)
        code = self._process.exitcode
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its own group, see _answer_questions
        self._process.kill()
        self._process.join()
        for environment in Path("/proc").glob("[0-9]*/environ"):  # programs that have left the group
            with suppress(OSError):
                if f"{_MARK}={self._mark}".encode() in environment.read_bytes():
                    os.kill(int(environment.parent.name), signal.SIGKILL)
        if self._questions is not None:
            os.close(self._answers)
        self._process = self._questions = None
        if code is None:
            return "or its connection to the command"
        return f"with status {code}" if code >= 0 else f"with signal {-code} ({signal.Signals(-code).name})"


def _answer_questions(
    questions: Connection,
    answers: int,
    others: tuple[int, int],
    mark: str,
    work: Callable[[Any], Any],
    timeout: float,
    memory: float,
) -> None:
    """Runs the child until the command closes its end of the connection."""
    os.setsid()  # a group that can be stopped as a whole, and that Ctrl-C does not reach
    os.environ[_MARK] = mark
    for fd in others:
        os.close(fd)
    output = os.fstat(1)
    for name in os.listdir("/dev/fd"):  # standard output, and copies of it
        with suppress(OSError):
            if int(name) not in (0, 2) and os.path.samestat(os.fstat(int(name)), output):
                os.dup2(2, int(name))
    sys.stdout = sys.stderr
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = int(memory) if hard == resource.RLIM_INFINITY else min(int(memory), hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    else:  # a timer ends it if the command is no longer there to do so
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    me = os.getpid()
    while True:
        try:
            question = json.loads(questions.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        if sys.platform != "linux":
            signal.setitimer(signal.ITIMER_REAL, timeout + 5)
        answer: dict[str, Any]
        try:
            answer = {"answer": work(question)}
        except UncheckableError as error:
            answer = {"uncheckable": str(error)}
        except TargetError as error:
            answer = {"error": str(error)}
        except BaseException as error:
            answer = {"uncheckable": f"it raises {one_line(error)}"}
        if sys.platform != "linux":
            signal.setitimer(signal.ITIMER_REAL, 0)
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        if os.getpid() != me:  # the target has forked, and this is its child
            os._exit(0)
        line = memoryview(f"\n{mark}{json.dumps(answer)}\n".encode())
        try:
            while line:
                line = line[os.write(answers, line) :]
        except OSError:  # the target has closed it, or the command is no longer there
            os._exit(1)
