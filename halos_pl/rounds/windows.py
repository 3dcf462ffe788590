"""The prompts of each round, and the held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from halos_pl.common.files import write
from halos_pl.data.prompt_files import PromptRow


def window(number: int, size: int, prompts: int) -> list[int]:
    """The indices of a round's prompts: the next ``size`` ones, from the first again after the last.

    Args:
        number: Number of the round, from 1.
        size: Number of prompts per round.
        prompts: Number of prompts in the file.
    """
    start = (number - 1) * size
    return [i % prompts for i in range(start, start + size)]


def wraps(number: int, size: int, prompts: int) -> bool:
    """Whether a round contains prompts of an earlier one, or a prompt twice."""
    return number * size > prompts


def write_prompts(path: Path, rows: Iterable[PromptRow]) -> None:
    """Writes prompts as JSON lines, with all columns of their rows; a line of text becomes the column ``prompt``."""
    write(path, "".join(json.dumps(row.columns, ensure_ascii=False) + "\n" for row in rows))
