"""Runs Python programs that a model wrote, in a process without network, files, children or time to spare.

``unshare`` gives the process its own user, network, mount, process and IPC namespaces. :mod:`halos_pl.tasks.sandboxed`
then makes all mounts read-only, hides ``/proc``, ``/dev`` and temporary folders, mounts an empty working folder in
memory, limits time, memory, file size and open files, drops all capabilities, and forbids system calls that open
sockets, start processes or change any of this. Linux only. A program can still read files that this user can read.

Whether a program has passed is told by a token that the program cannot see. But tests run in the process of the program
that they test, as in HumanEval's own harness: one that sets out to deceive them can, for example by objects that are
equal to everything.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from halos_pl.data.example import DataError

CHILD = Path(__file__).with_name("sandboxed.py")


@dataclass(frozen=True)
class Limits:
    """Limits of a program.

    Attributes:
        cpu: Seconds of processor time, whole.
        wall: Seconds of time until it is killed.
        memory: Bytes of address space.
        disk: Bytes of all files in its working folder, which is in memory.
    """

    cpu: int = 5
    wall: float = 20.0
    memory: int = 1 << 30
    disk: int = 16 << 20


class NoSandboxError(DataError):
    """This machine cannot isolate programs."""


@dataclass(frozen=True)
class Outcome:
    """The end of a program.

    Attributes:
        passed: Whether it ran to its end without an exception or an exit.
        why: The reason otherwise: an exception, ``exited``, ``killed by signal N`` or ``timed out``.
    """

    passed: bool
    why: str = ""


def passes(program: str, limits: Limits = Limits()) -> bool:
    """Whether a program runs to its end without an exception.

    Raises:
        NoSandboxError: if the sandbox cannot be set up.
    """
    return execute(program, limits).passed


def execute(program: str, limits: Limits = Limits()) -> Outcome:
    """Runs a program in the sandbox.

    Raises:
        NoSandboxError: if the sandbox cannot be set up.
    """
    unshare = shutil.which("unshare")
    if sys.platform != "linux" or unshare is None:
        raise NoSandboxError("code of models runs only on Linux with the command unshare (util-linux)")
    try:
        text = program.encode()
    except UnicodeEncodeError as error:  # no Python program
        return Outcome(False, type(error).__name__)
    token = secrets.token_hex(16)  # a program that ends early does not know it
    # Caps in the new user namespace last until the child drops them; it needs them to mount.
    words = [unshare, "--map-root-user", "--net", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--"]
    words += [sys.executable, "-I", str(CHILD)]
    settings = [f"{key}={value}" for key, value in asdict(limits).items()]
    environment = {"PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            [*words, str(writer), *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[writer],
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb") as reports:
        try:
            _, errors = process.communicate(f"{token}\n".encode() + text, limits.wall)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = reports.read(1 << 16).decode("utf-8", "replace").splitlines()
    if not lines or lines[0] != "ready":
        why = lines[0] if lines else errors.decode("utf-8", "replace").strip().replace("\n", " ")
        raise NoSandboxError(
            f"this machine does not allow the namespaces that isolate code of models ({why[:200] or 'unshare failed'});"
            " run without --allow_code_execution and the tasks that need it, or where user namespaces are allowed"
        )
    status = process.returncode  # of unshare: 128 + N after signal N
    if token in lines and status == 0:
        return Outcome(True)
    if len(lines) > 1 and token != lines[1]:
        return Outcome(False, lines[1])
    number = -status if status < 0 else status - 128
    return Outcome(False, f"killed by signal {number}" if number > 0 else "exited")


@cache
def check_sandbox() -> None:
    """Refuses a machine that cannot isolate programs.

    Raises:
        NoSandboxError: with the reason.
    """
    outcome = execute("pass")
    if not outcome.passed:
        raise NoSandboxError(f"an empty program fails in the sandbox: {outcome.why}")
