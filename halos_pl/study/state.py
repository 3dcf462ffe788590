"""The progress of a study's runs, read from the files in and beside their folders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halos_pl.common.files import write
from halos_pl.data.example import DataError
from halos_pl.evaluation.files import read_object
from halos_pl.run_dir import SUMMARY, shortfall
from halos_pl.study.record_shape import TEXT, fault_in
from halos_pl.study.spec import Run, command

#: Files in a study's folder: copies of the study's files, and its plan.
STUDY, OVERRIDES, PLAN = "study.yaml", "overrides.yaml", "plan.json"
#: Key of the plan and of ``record.json``: digests of what runs are trained from and measured on, whatever their paths.
BY_CONTENT = "by_content"
#: What to do about a damaged file.
AGAIN = "remove it and repeat halos ablate, which writes it anew"
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
    """The ``command`` that failed, and its ``error``.

    Raises:
        DataError: if the file is damaged; names it.
    """
    return read_part(failure_file(run), {"command": TEXT, "error": TEXT})


def read_part(
    path: Path, shape: Mapping[str, Any], *, optional: Mapping[str, Any] | None = None, cure: str = AGAIN
) -> dict[str, Any]:
    """The JSON object in one of the files that the runs of a study leave.

    Args:
        path: the file.
        shape: what it contains, see :mod:`halos_pl.study.record_shape`.
        optional: what it may contain besides.
        cure: what to do if it is damaged.

    Raises:
        DataError: if it is damaged; names it.
    """
    content = read_object(path, cure)
    if fault := fault_in(content, shape, whole=True) or fault_in(content, optional or {}):
        raise DataError(f"{path} is damaged: {fault}; {cure}")
    return content


def read_plan(out: Path) -> dict[str, Any]:
    """The plan of a study; empty if there is none.

    Raises:
        DataError: if it is damaged; names it.
    """
    shape = {"study": TEXT, "digests": {"*": TEXT}}
    contents = {BY_CONTENT: {"arms": {"*": TEXT}, "files": {"*": TEXT}}}
    cure = "restore it, or name another folder with --out"
    return read_part(out / PLAN, shape, optional=contents, cure=cure) if (out / PLAN).is_file() else {}


def by_variable(out: Path) -> Callable[[str], str]:
    """How records name a path: below a folder that the study names by an environment variable, by that variable.

    Records are committed, and another machine has its data elsewhere.
    """
    texts = [(out / name).read_text(encoding="utf-8") for name in (STUDY, OVERRIDES) if (out / name).is_file()]
    names = dict.fromkeys(re.findall(r"\$\{?(\w+)", "".join(texts)))
    folders = {name: os.environ.get(name, "").rstrip("/") for name in names}

    def named(path: str) -> str:
        name = next((name for name, folder in folders.items() if folder and path.startswith(f"{folder}/")), None)
        return path if name is None else f"${name}{path.removeprefix(folders[name])}"

    return named


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
