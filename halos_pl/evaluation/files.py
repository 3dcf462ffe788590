"""What an evaluation leaves in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "evaluation.json"
BEFORE = "before.json"  #: the same of the model that a run began with
MEASURED = "measured.json"  #: how it was measured, and on what
ROWS = "held_out.jsonl"
ANSWERS = "answers.jsonl"


def measured_how(run: Path) -> dict[str, Any]:
    """What a run says of its measuring: :func:`measuring`, and by what (``by``); empty where it says nothing."""
    path = run / MEASURED
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
