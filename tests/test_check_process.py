"""``halos check`` has an answer whatever the code of a target does: it runs in a child with limits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_halos import ROOT, halos_check

from halos_pl.conformance import check_halo
from halos_pl.conformance.child import Child
from halos_pl.conformance.target import TargetError, UncheckableError
from halos_pl.objective.rewards import LogRatio


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The targets of tests/meta, beside files that give no answer on import."""
    path = tmp_path_factory.mktemp("targets") / "targets.py"
    shutil.copy(ROOT / "tests" / "meta" / "process_targets.py", path)
    (path.parent / "loops.py").write_text("while True:\n    pass\n")
    (path.parent / "generator.py").write_text("raise GeneratorExit\n")
    return path


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("targets.py:Leaves", "ends the process that checks it, with status 0"),
        ("targets.py:LeavesLater", "with status 1"),
        ("targets.py:LeavesAChild", "with status 0"),
        ("targets.py:IsKilled", "SIGKILL"),
        ("targets.py:Terminates", "SIGTERM"),
        ("targets.py:Closes", "ends the process"),
        ("targets.py:Loops", "more than 2 s; --timeout"),
        ("targets.py:Sleeps", "more than 2 s; --timeout"),
        ("targets.py:Generator", "raises GeneratorExit"),
        ("targets.py:Interrupts", "raises KeyboardInterrupt"),
        ("targets.py:Large", "runs out of memory"),
        ("targets.py:LargeForLarge", "runs out of memory"),
        ("loops.py:Any", "more than 2 s; --timeout"),
        ("generator.py:Any", "raises GeneratorExit"),
    ],
)
def test_a_target_without_an_answer_is_one_line_and_status_2(target, said, file, capfd):
    timeout = 2 if "2 s" in said else 60
    code, out, err = halos_check(capfd, file.parent / target, "--json", "--timeout", timeout)
    assert (code, out) == (2, "")
    assert f"{target} could not be checked: it " in err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_what_a_target_and_its_processes_print_is_not_part_of_the_report(file, capfd):
    printed = {
        "Prints": "in Python",
        "Writes": "to the descriptor",
        "Runs": "in a process of its own",
    }
    for name, text in printed.items():
        code, out, err = halos_check(capfd, f"{file}:{name}", "--json")
        assert json.loads(out)["verdict"] == ("halo" if code == 0 else "halo-shaped")
        assert text in err


WRITES_EVERYWHERE = """
import os
from contextlib import suppress
import torch
from value_functions import ValueFunction

class Falls(ValueFunction):
    calls = 0

    def forward(self, u):
        Falls.calls += 1
        for fd in range(3, 256 if Falls.calls < 50 else 0):  # no reader empties some of the pipes
            with suppress(OSError):
                os.write(fd, b'\\x00\\x00\\x00\\x02{}\\n{"answer": {}}\\n' + b"0" * 32 + b' {"answer": {}}\\n{')
        return -torch.tanh(u)
"""


def test_a_target_that_writes_to_every_descriptor_changes_no_verdict(tmp_path):
    """In a process of its own: under xdist, the connection of this one to its master would be written to as well."""
    (tmp_path / "everywhere.py").write_text(WRITES_EVERYWHERE)
    command = [sys.executable, "-m", "halos_pl", "check", "everywhere.py:Falls", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, close_fds=True, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr  # which has what was written to copies of standard output
    if done.returncode == 2:  # without a verdict
        assert (done.stdout, "could not be checked" in done.stderr) == ("", True)
    else:
        assert done.returncode == 1, done.stderr
        assert "non_decreasing" in [c["clause"] for c in json.loads(done.stdout)["clauses"] if c["status"] == "failed"]


@pytest.mark.slow
def test_a_fork_of_the_target_gives_no_second_answer(file, capfd):
    code, out, _ = halos_check(capfd, f"{file}:Forks", "--json")
    assert code == 0
    assert json.loads(out)["verdict"] == "halo"


def test_no_process_is_left_over(file, capfd):
    halos_check(capfd, f"{file}:LeavesAChild")
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 987" not in running.splitlines()


def answer(question: Any) -> Any:
    if question == "die":
        os._exit(3)
    if question == "wait":
        time.sleep(1e4)
    return [question, os.getpid(), os.getppid()]


def test_a_child_for_each_question_sees_nothing_of_the_others():
    with Child(answer, timeout=30, memory=8e9, anew=True) as child:
        first, second = child.ask("a"), child.ask("b")
        assert (first[0], second[0]) == ("a", "b")
        assert len({first[1], second[1], os.getpid()}) == 3


def test_one_child_answers_many_questions_and_is_replaced_when_it_has_died():
    with Child(answer, timeout=30, memory=8e9) as child:
        first, second = child.ask("a"), child.ask("b")
        assert [first[0], second[0]] == ["a", "b"]
        assert first[1] == second[1] != os.getpid()
        with pytest.raises(UncheckableError, match="with status 3"):
            child.ask("die")
        third = child.ask("c")
        assert third[1] not in (first[1], os.getpid())
        child.timeout = 0.5
        with pytest.raises(UncheckableError, match=r"more than 0\.5 s"):
            child.ask("wait")
        child.timeout = 30
        assert child.ask("d")[1] not in (first[1], third[1])
        last = child.ask("e")[1]
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


@pytest.mark.parametrize("needs", [{"reference": True}, ["reference"], "reference"])
def test_needs_of_a_wrong_type_are_refused_in_one_line(needs):
    wrong = type("Wrong", (LogRatio,), {"needs": needs})
    with pytest.raises(TargetError, match=rf"Wrong.needs is a {type(needs).__name__}; it must be Needs\(") as raised:
        check_halo(wrong())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "words", [["--timeout", "0"], ["--timeout", "soon"], ["--memory", "much"], ["--memory", "0GB"]]
)
def test_limits_that_are_none_are_refused(words, capfd):
    code, out, err = halos_check(capfd, "Logistic", *words)
    assert (code, out) == (2, "")
    assert words[0] in err


def test_an_unknown_key_of_the_model_is_refused(tmp_path, capfd):
    config = yaml.safe_load((ROOT / "experiments" / "objectives" / "kto.yaml").read_text())
    for place in (config["model"], config["model"]["value_function"]["init_args"]):
        place["betta"] = 3
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
        code, out, err = halos_check(capfd, tmp_path / "mine.yaml")
        assert (code, out) == (2, "")
        assert "betta" in err
        assert err.count("\n") == 1
        del place["betta"]


@pytest.mark.slow
def test_thousands_of_knots_are_checked_in_a_gigabyte(tmp_path):
    (tmp_path / "knots.py").write_text(
        textwrap.dedent(
            """
            import torch
            from value_functions import ValueFunction


            class Knots(ValueFunction):
                def __init__(self):
                    super().__init__()
                    self.register_buffer("knots", torch.linspace(-50, 90, 2000))

                def forward(self, u):
                    return torch.minimum(u[..., None], self.knots.to(u.dtype)).mean(-1)
            """
        )
    )
    command = [sys.executable, "-m", "halos_pl", "check", "knots.py:Knots", "--memory", "1GB", "--timeout", "600"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
