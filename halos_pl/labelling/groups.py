"""Reads a file of samples: the completions of each prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halos_pl.data.example import DataError, Prompt
from halos_pl.data.messages import is_blank, prompt_like
from halos_pl.data.prompt_files import (
    LOGPROB,
    PROMPT_ROW,
    SAME_TOKENS,
    SAMPLE_INDEX,
    SEED,
    TOKEN_LOGPROBS,
    read_prompt_rows,
)
from halos_pl.data.values import BadRow

#: Columns that describe a completion rather than its prompt; lists if the completions of a prompt are in one row.
_LISTED = ("finished", SAME_TOKENS, SEED, LOGPROB, TOKEN_LOGPROBS)
#: The same where each completion has a row.
PER_COMPLETION = (*_LISTED, SAMPLE_INDEX)


@dataclass(frozen=True)
class Completion:
    """A completion to label.

    Attributes:
        place: ``PATH:LINE`` of its row.
        number: Its number among the prompt's completions, from 1.
        text: The completion: text or messages.
        finished: Whether the model ended it; true if the file does not tell.
        columns: Columns that describe it: its own, and those that differ between the rows of the prompt.
    """

    place: str
    number: int
    text: Prompt
    finished: bool
    columns: dict[str, Any]


@dataclass(frozen=True)
class Group:
    """The completions of one prompt.

    Attributes:
        place: ``PATH:LINE`` of the first of its rows.
        number: That line, from 1.
        prompt: Text or messages.
        columns: The other columns of the prompt: in files with a row per completion, those that agree in all of them.
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
        DataError: A row has no prompt, no completion, or an invalid one; names file and line.
    """
    groups: dict[str, Group] = {}
    for row in read_prompt_rows(path):
        columns = dict(row.columns)
        columns.pop("prompt")
        if {"completion", "completions"} <= columns.keys():
            raise DataError(f"{row.place}: the row has 'completion' and 'completions'; remove one of them")
        if isinstance(listed := columns.pop("completions", None), list) and listed:
            values: dict[str, list[Any]] = {}
            for name in [name for name in _LISTED if name in columns]:
                values[name] = columns.pop(name)
                if not isinstance(values[name], list) or len(values[name]) != len(listed):
                    raise DataError(f"{row.place}: column '{name}' must be a list with a value for each completion")
            group = Group(row.place, row.number, row.prompt, columns, True)
            for i, text in enumerate(listed):
                own = {name: each[i] for name, each in values.items()}
                group.completions.append(_completion(row.place, i + 1, f"completion {i + 1}", text, own))
            groups[f"{row.number}"] = group
        elif "completion" in columns:
            text = columns.pop("completion")
            key = json.dumps([columns.get(PROMPT_ROW), row.prompt, row.tools])
            group = groups.setdefault(key, Group(row.place, row.number, row.prompt, {}, False))
            number = len(group.completions) + 1
            group.completions.append(_completion(row.place, number, "the completion", text, columns))
        else:
            raise DataError(f"{row.place}: the row has no 'completions' or 'completion' to label")
    for group in groups.values():
        if not group.in_one_row:
            _take_shared(group)
    return list(groups.values())


def without_empty(groups: Sequence[Group]) -> list[Group]:
    """The groups without empty completions, which ``halos fit`` refuses, and without prompts that have no other."""
    kept = [
        replace(group, completions=[each for each in group.completions if not is_blank(each.text)]) for group in groups
    ]
    return [group for group in kept if group.completions]


def _take_shared(group: Group) -> None:
    """Moves the columns that agree in all rows of a prompt from its completions to the prompt."""
    rows = [each.columns for each in group.completions]
    for name in [name for name in rows[0] if name not in PER_COMPLETION]:
        # As JSON, since True == 1.
        if all(name in row for row in rows) and len({json.dumps(row[name]) for row in rows}) == 1:
            group.columns[name] = rows[0][name]
            for row in rows:
                del row[name]


def _completion(place: str, number: int, what: str, text: Any, columns: dict[str, Any]) -> Completion:
    try:
        text = prompt_like(text, "completion")
    except BadRow as bad:
        raise DataError(f"{place}: {what}{bad.within} {bad.reason}") from bad
    if not text and isinstance(text, list):
        raise DataError(f"{place}: {what} is an empty list; it must be text or a list of messages")
    finished = columns.get("finished", True)
    if not isinstance(finished, bool):
        raise DataError(f"{place}: finished is {str(finished)[:40]!r}; it must be true or false")
    return Completion(place, number, text, finished, columns)


def text_of(completion: Completion) -> str:
    """The completion as text; of messages, the content of the last one."""
    return completion.text if isinstance(completion.text, str) else str(completion.text[-1]["content"])
