"""Where the time of a study's runs went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halos_pl.common.files import write
from halos_pl.common.spent import REFERENCE, SAMPLING, SCORING, START, TRAINING
from halos_pl.evaluation.files import MEASURED
from halos_pl.run_dir import SUMMARY
from halos_pl.study.spec import Run, Study
from halos_pl.study.state import read_part

#: All else: plots, checkpoints after the last step, writing, the end of the process, and attempts that did not finish.
REST = "the rest"


def _file(run: Run) -> Path:
    return run.folder.with_name(f"{run.folder.name}.seconds.json")


def add_seconds(run: Run, command: str, seconds: float) -> None:
    """Records the wall time of a command of a run, in addition to that of earlier attempts."""
    earlier = _read(_file(run))
    write(_file(run), json.dumps(earlier | {command: round(earlier.get(command, 0.0) + seconds, 3)}) + "\n")


def time_spent(study: Study, out: Path) -> dict[str, float]:
    """Seconds of the study's commands by part, tuning runs included; those without a record are left out."""
    spent = dict.fromkeys((START, REFERENCE, TRAINING, SCORING, SAMPLING, REST), 0.0)
    for run in study.possible_runs(out):
        for command, total in _read(_file(run)).items():
            parts = _read(run.folder / (SUMMARY if command == "fit" else MEASURED)).get("seconds", {})
            for name, seconds in parts.items():
                spent[name] = spent.get(name, 0.0) + seconds  # parts had other names in earlier versions
            spent[REST] += total - sum(parts.values())
    return spent


def _read(path: Path) -> dict[str, Any]:
    return read_part(path, {}) if path.is_file() else {}
