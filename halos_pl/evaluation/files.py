"""The files of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "evaluation.json"
BEFORE = "before.json"  #: the same for a run's model before training
MEASURED = "measured.json"  #: the settings and the data of the evaluation
ROWS = "held_out.jsonl"
ANSWERS = "answers.jsonl"
WIN_RATE = "win_rate.json"  #: the report on a judge's verdicts
VERDICTS = "verdicts.jsonl"  #: each reply of the judge, and how it was read
TRANSCRIPTS = "transcripts.jsonl"  #: requests to the judge and its replies, which later evaluations reuse
#: Folders of lm-eval's files: of the model, and of a run's model before training.
BENCHMARKS, BENCHMARKS_BEFORE = "benchmarks", "benchmarks_before"


def trained_on(run: Path, metric: str) -> str | None:
    """How many questions of a benchmark the run's training data contain, in words; None if none."""
    tasks: dict[str, dict[str, Any]] = measured_how(run).get("tasks") or {}
    return tasks.get(metric.partition("/")[0], {}).get("trained_on")


def measured_how(run: Path) -> dict[str, Any]:
    """How a run was measured: its ``evaluate`` arguments, digests of ``files``, and code (``by``); empty if unknown."""
    path = run / MEASURED
    how: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return how
