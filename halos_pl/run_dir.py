"""The files in a run's folder, and whether its training has finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = "config.yaml"
SUMMARY = "summary.json"
TEST = "test.json"  #: figures of ``halos test``, and the step of the checkpoint
LAST = Path("checkpoints") / "last.ckpt"
PREVIOUS = LAST.with_name("previous.ckpt")


def shortfall(folder: Path) -> str | None:
    """Why the training in a run's folder does not count as finished; None if it does.

    Older versions wrote a summary, without ``finished``, only after training had finished; see :func:`untold`.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return f"it has no {SUMMARY}: its training did not finish"
    summary = _read(path)
    if summary is None:
        return f"its {SUMMARY} cannot be read"
    if summary.get("finished", True) is True:
        return None
    steps, planned = summary.get("steps"), summary.get("planned_steps")
    return f"ended by {summary.get('ended')} after {steps} of {planned} steps"


def untold(folder: Path) -> bool:
    """Whether the summary in a run's folder was written by an older version, which did not record ``finished``."""
    path = folder / SUMMARY
    summary = _read(path) if path.is_file() else None
    return summary is not None and "finished" not in summary


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
