"""Programs of models in the sandbox."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from halos_pl.tasks.raw import humaneval
from halos_pl.tasks.sandbox import Limits, NoSandboxError, check_sandbox, execute, passes

DATA = os.environ.get("HALOS_TEST_DATA", "")
SHORT = Limits(cpu=1, wall=0.5)


@pytest.fixture(scope="module", autouse=True)
def _allowed() -> None:
    try:
        check_sandbox()
    except NoSandboxError as error:
        pytest.skip(str(error))


def test_a_program_passes_if_it_runs_to_its_end() -> None:
    assert passes("assert 1 + 1 == 2")
    assert execute("assert 1 + 1 == 3").why == "AssertionError"


#: Reports whatever may be a token in the frames and objects of its process, then ends.
SEARCH = """
import gc, os, re, sys
places, frame = gc.get_objects(), sys._getframe()
while frame:
    places += [frame.f_locals, frame.f_globals]
    frame = frame.f_back
for token in set(re.findall("[0-9a-f]{32}", " ".join(str(place) for place in places))):
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, f"{token}\\n".encode())
        except OSError:
            pass
os._exit(0)
"""
HOOK = "import sys\ndef hook(*_): raise SystemExit(0)\nsys.excepthook = hook\n"


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os; os._exit = print; raise SystemExit(0)",
        "raise KeyboardInterrupt",
        "1 +",
        "x = '\ud800'",
        SEARCH,
        f"{HOOK}assert False",
        f"{HOOK}class Kind(type): __name__ = property(lambda kind: 1 / 0)\nraise Kind('E', (Exception,), {{}})",
    ],
)
def test_a_program_that_ends_early_fails(program: str) -> None:
    assert not passes(program)


def test_the_working_folder_is_empty_and_everything_else_cannot_be_written(tmp_path: Path) -> None:
    program = f"""
import os, tempfile
assert os.listdir(".") == [] and os.listdir("/proc") == []
open("a", "w").write("b")
for path in ({str(tmp_path / "x")!r}, {str(Path.cwd() / "halos_x")!r}, "/dev/null", "/etc/x"):
    try:
        open(path, "w")
    except OSError:
        continue
    raise SystemError(path)
"""
    assert execute(program).why == ""
    assert list(tmp_path.iterdir()) == []
    assert not Path("halos_x").exists()


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import socket; socket.socket()", "PermissionError"),
        ("import os; os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
        ("x = [0] * 10**10", "MemoryError"),
        ("open('large', 'wb').write(bytes(10**8))", "OSError"),
        ("import os; os.kill(-1, 9)", "ProcessLookupError"),
        ("import time; time.sleep(100)", "timed out"),
        ("while True: print('x' * 1000)", "timed out"),
    ],
)
def test_a_harmful_program_is_contained(program: str, why: str) -> None:
    assert execute(program, SHORT if why == "timed out" else Limits()).why == why


def test_a_program_cannot_undo_its_isolation() -> None:
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x10000000) == -1 and libc.mount(b"none", b"/mnt", b"tmpfs", 0, None) == -1
assert libc.umount2(b"/proc", 2) == -1 and libc.ptrace(16, 1, 0, 0) == -1
import threading
thread = threading.Thread(target=int)
thread.start(), thread.join()
"""
    assert execute(program).why == ""


def test_a_program_does_not_see_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert passes("import os; assert 'secret' not in str(os.environ)")


def test_a_kernel_that_refuses_namespaces_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(refusing))
    with pytest.raises(NoSandboxError, match="Operation not permitted"):
        passes("pass")


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="HALOS_TEST_DATA names no data")
@pytest.mark.parametrize("wrong", [False, True])
def test_canonical_solutions_of_humaneval_pass_and_wrong_ones_do_not(wrong: bool) -> None:
    docs = humaneval(str(Path(DATA) / "eval"))["test"]
    passed = []
    for doc in docs:
        program, name = doc["prompt"] + doc["canonical_solution"], doc["entry_point"]
        if wrong:  # it computes the answer and returns something else
            program += f"\n_right = {name}\ndef {name}(*a, **k): return ('no', _right(*a, **k))\n"
        passed.append(passes(f"{program}\n{doc['test']}\ncheck({name})"))
    assert (len(passed), sum(passed)) == (164, 0 if wrong else 164)
