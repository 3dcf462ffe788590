"""The progress of a study's runs, read from the files in and beside their folders."""

from __future__ import annotations

import json
from pathlib import Path

from halos_pl.common.files import write
from halos_pl.run_dir import SUMMARY, shortfall
from halos_pl.study.spec import Run, command

#: Files in a study's folder: copies of the study's files, and its plan.
STUDY, OVERRIDES, PLAN = "study.yaml", "overrides.yaml", "plan.json"
#: Key of the plan and of ``record.json``: digests of what runs are trained from and measured on, whatever their paths.
BY_CONTENT = "by_content"
#: Names of the errors, in the messages of commands, that end a run at a number that is not finite.
NON_FINITE = ("NonFiniteLossError", "NonFiniteWeightsError", "NonFiniteLogProbError")


def failure_file(run: Run) -> Path:
    """The file that records that a run has failed, and why."""
    return run.folder.with_name(f"{run.folder.name}.failed.json")


def record_failure(run: Run, words: list[str], why: str) -> None:
    """Records the command that failed, and why."""
    path = failure_file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps({"command": command(words), "error": why}) + "\n")


def failure(run: Run) -> dict[str, str]:
    """The ``command`` that failed, and its ``error``."""
    content: dict[str, str] = json.loads(failure_file(run).read_text(encoding="utf-8"))
    return content


def diverged(run: Run) -> bool:
    """Whether a tuning run was ended by a number that is not finite, which rules out its value of the option."""
    return run.trial and failure_file(run).is_file() and any(name in failure(run)["error"] for name in NON_FINITE)


def ended(run: Run) -> bool:
    """Whether nothing is left to do for a run."""
    return run.done or diverged(run)


def state(run: Run) -> str:
    """``done``, ``diverged`` (a tuning run), ``failed``, ``stopped`` by a signal, ``begun`` or ``waiting``."""
    if run.done:
        return "done"
    if diverged(run):
        return "diverged"
    if failure_file(run).is_file():
        return "failed"
    if (run.folder / SUMMARY).is_file() and shortfall(run.folder):
        return "stopped"
    return "begun" if run.folder.is_dir() else "waiting"
