"""Checks in a child process: whatever the code of a target does, the command that checks it gets an answer."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from halos_pl.conformance.target import TargetError, UncheckableError, one_line

_CONTEXT = multiprocessing.get_context("fork")  # in milliseconds, with everything imported that a check needs


class Child:
    """A process that answers questions one after another, and is replaced after it has died or been stopped.

    Its standard output goes to standard error, also that of processes that it starts. A context manager; leaving it
    stops the process.

    Args:
        work: answers a question, in the child; both are plain data that JSON can contain.
        timeout: seconds that an answer may take.
        memory: memory that the child may allocate, in bytes (Linux only); processes that it starts, as much each.
    """

    def __init__(self, work: Callable[[Any], Any], *, timeout: float, memory: float) -> None:
        self.work, self.timeout, self.memory = work, timeout, memory
        self._process: Any = None
        self._connection: Connection | None = None

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
        connection = self._connection or self._start()
        try:
            connection.send_bytes(json.dumps(question).encode())
            in_time = bool(wait([connection, self._process.sentinel], self.timeout))
            answer = json.loads(connection.recv_bytes()) if connection.poll() else None
        except (EOFError, OSError, ValueError):
            in_time, answer = True, None
        except BaseException:
            self._stop()
            raise
        if not in_time:
            self._stop()
            raise UncheckableError(f"it takes more than {self.timeout:g} s; --timeout SECONDS allows more")
        if answer is None:
            raise UncheckableError(f"it ends the process that checks it, {self._stop()}")
        if "uncheckable" in answer:
            raise UncheckableError(answer["uncheckable"])
        if "error" in answer:
            raise TargetError(answer["error"])
        return answer["answer"]

    def _start(self) -> Connection:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()  # else the child would write it again
        ours, theirs = _CONTEXT.Pipe()
        arguments = (theirs, ours, self.work, self.timeout, self.memory)
        self._process = _CONTEXT.Process(target=_answer_questions, args=arguments)
        self._process.start()
        theirs.close()
        self._connection = ours
        return ours

    def _stop(self) -> str:
        """Ends the child and what it has started; how it ended by itself, in words."""
        if self._process is None:
            return ""
        self._process.join(0.5)
        code = self._process.exitcode
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its own group, see _answer_questions
        self._process.kill()
        self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None
        if code is None:
            return "or its connection to the command"
        return f"with status {code}" if code >= 0 else f"with signal {-code} ({signal.Signals(-code).name})"


def _answer_questions(
    connection: Connection, other: Connection, work: Callable[[Any], Any], timeout: float, memory: float
) -> None:
    """Runs the child until the command closes its end of the connection."""
    os.setsid()  # a group that can be stopped as a whole, and that Ctrl-C does not reach
    other.close()
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = int(memory) if hard == resource.RLIM_INFINITY else min(int(memory), hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    me = os.getpid()
    while True:
        try:
            question = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, timeout + 5)  # ends it if the command is no longer there to do so
        answer: dict[str, Any]
        try:
            answer = {"answer": work(question)}
        except UncheckableError as error:
            answer = {"uncheckable": str(error)}
        except TargetError as error:
            answer = {"error": str(error)}
        except BaseException as error:
            answer = {"uncheckable": f"it raises {one_line(error)}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        if os.getpid() != me:  # the target has forked, and this is its child
            os._exit(0)
        try:
            connection.send_bytes(json.dumps(answer).encode())
        except OSError:  # the target has closed it, or the command is no longer there
            os._exit(1)
