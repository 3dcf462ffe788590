"""Reads a file of samples: the completions of each prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halos_pl.data.example import DataError, Prompt
from halos_pl.data.prompt_files import (
    LOGPROB,
    PROMPT_ROW,
    SAME_TOKENS,
    SAMPLE_INDEX,
    SEED,
    TOKEN_LOGPROBS,
    read_prompt_rows,
)

#: Columns that describe a completion rather than its prompt; lists if the completions of a prompt are in one row.
_PER_COMPLETION = ("finished", SAME_TOKENS, SEED, LOGPROB, TOKEN_LOGPROBS)


@dataclass(frozen=True)
class Completion:
    """A completion to label.

    Attributes:
        text: The completion: text or messages.
        finished: Whether the model ended it; true if the file does not tell.
        columns: Columns that describe it.
    """

    text: Any
    finished: bool
    columns: dict[str, Any]


@dataclass(frozen=True)
class Group:
    """The completions of one prompt.

    Attributes:
        place: ``PATH:LINE`` of the first of its rows.
        number: That line, from 1.
        prompt: Text or messages.
        columns: The other columns of the prompt.
        in_one_row: Whether the completions are a list in one row.
        completions: The completions.
    """

    place: str
    number: int
    prompt: Prompt
    columns: dict[str, Any]
    in_one_row: bool
    completions: list[Completion] = field(default_factory=list)


def read_groups(path: Path) -> list[Group]:
    """The prompts of a file of ``halos sample``, or of any JSON lines with "prompt" and "completion(s)".

    Rows with one completion each are grouped by their prompt's line, or by the prompt itself.

    Raises:
        DataError: A row has no prompt or no completion; names file and line.
    """
    groups: dict[str, Group] = {}
    for row in read_prompt_rows(path):
        columns = dict(row.columns)
        columns.pop("prompt")
        if isinstance(listed := columns.pop("completions", None), list) and listed:
            values: dict[str, list[Any]] = {}
            for name in [name for name in _PER_COMPLETION if name in columns]:
                values[name] = columns.pop(name)
                if not isinstance(values[name], list) or len(values[name]) != len(listed):
                    raise DataError(f"{row.place}: column '{name}' must be a list with a value for each completion")
            group = Group(row.place, row.number, row.prompt, columns, True)
            for i, text in enumerate(listed):
                group.completions.append(_completion(row.place, text, {name: v[i] for name, v in values.items()}))
            groups[f"{row.number}"] = group
        elif "completion" in columns:
            text = columns.pop("completion")
            own = {name: columns.pop(name) for name in (*_PER_COMPLETION, SAMPLE_INDEX) if name in columns}
            key = json.dumps([columns.get(PROMPT_ROW), row.prompt])
            group = groups.setdefault(key, Group(row.place, row.number, row.prompt, columns, False))
            group.completions.append(_completion(row.place, text, own))
        else:
            raise DataError(f"{row.place}: the row has no 'completions' or 'completion' to label")
    return list(groups.values())


def _completion(place: str, text: Any, columns: dict[str, Any]) -> Completion:
    if not isinstance(text, str | list):
        raise DataError(f"{place}: a completion is {str(text)[:40]!r}; it must be text or a message list")
    finished = columns.get("finished", True)
    if not isinstance(finished, bool):
        raise DataError(f"{place}: finished is {str(finished)[:40]!r}; it must be true or false")
    return Completion(text, finished, columns)


def text_of(completion: Completion) -> str:
    """The completion as text; of messages, the content of the last one."""
    return completion.text if isinstance(completion.text, str) else str(completion.text[-1].get("content") or "")
