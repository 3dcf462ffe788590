"""Columns beyond those of the schema: used, refused by name, or listed as unused.

A column with a meaning in some known format is never dropped silently. A system text and earlier turns become messages
of the prompt, an ``input`` is appended to its ``instruction``, and the rest (pictures, part of a prompt) is refused
unless the source sets ``ignore: [NAME]``. Columns unknown to all formats, such as ids, are listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from halos_pl.data.calls import CARRIED, all_texts, objects_of, unfilled
from halos_pl.data.example import Example, Skipped, short
from halos_pl.data.meanings import (
    ANSWER,
    COLUMNS,
    DIALOGUES,
    FLAGS,
    KEYS,
    MARGIN,
    PARTS,
    PLACEHOLDER,
    SYSTEM,
    TEMPLATE,
    WEIGHT,
    is_markup,
    means,
    reason,
)
from halos_pl.data.messages import ROLES, Messages, messages_of, prompt_of
from halos_pl.data.parsers import idle_scores
from halos_pl.data.prompts import TextPrompts, asked
from halos_pl.data.schemas import SCHEMAS, Schema
from halos_pl.data.source import Source
from halos_pl.data.text import TEXT
from halos_pl.data.values import BadRow, checked_text, has_value
from halos_pl.data.weights import WEIGHTS, Weights

_MESSAGE = frozenset(("role", "content", "from", "value", *CARRIED))
_TOOLS = "tools"
_MESSAGES = "give the prompt as messages, or set text_prompts: chat"
_TELLING = 16  # characters; a prompt may contain a shorter text by chance


@cache
def is_read(name: str) -> bool:
    """Whether some schema reads a column ``name``, so that ``Source.columns`` may map to it."""
    read = {part for schema in SCHEMAS.values() for column in schema.columns for part in column.split("|")}
    patterns = (SYSTEM, PARTS, DIALOGUES)
    return (
        name in read
        or any(re.fullmatch(schema.also, name) for schema in SCHEMAS.values())
        or any(means(pattern, name) for pattern in patterns)
        or name == _TOOLS
        or name in WEIGHTS
    )


@dataclass(frozen=True)
class _Kinds:
    """The columns of a row, grouped by how they are treated."""

    read: tuple[str, ...]
    system: tuple[str, ...]
    parts: tuple[str, ...]
    refused: tuple[str, ...]
    unused: tuple[str, ...]
    tools: tuple[str, ...]


@lru_cache(maxsize=1024)
def _kinds(schema: Schema, columns: frozenset[str]) -> _Kinds:
    kinds: dict[str, list[str]] = {"read": [], "system": [], "parts": [], "refused": [], "unused": [], "tools": []}
    read = {next((name for name in column.split("|") if name in columns), column) for column in schema.columns}
    for name in sorted(columns):
        if name in read or name in WEIGHTS or re.fullmatch(schema.also, name):
            kinds["read"].append(name)
        elif means(SYSTEM, name):
            kinds["system"].append(name)
        elif name == _TOOLS:
            kinds["tools"].append(name)
        elif reason(COLUMNS, name):
            kinds["refused"].append(name)
        else:
            kinds["parts" if means(PARTS, name) or means(DIALOGUES, name) else "unused"].append(name)
    return _Kinds(**{kind: tuple(names) for kind, names in kinds.items()})


def _parts(kinds: _Kinds, row: dict[str, Any]) -> dict[str, Any]:
    """Columns with parts of a prompt; a mere count of turns is none."""
    counts = {name for name in kinds.parts if means(DIALOGUES, name) and isinstance(row[name], int | float)}
    return {name: row[name] for name in kinds.parts if name not in counts and has_value(row[name])}


def without(value: Any, ignored: Sequence[str], idle: set[str], depth: int = 6) -> Any:
    """A row without the keys ``ignored``, in itself and in its messages.

    Keys that occur are removed from ``idle``.
    """
    if isinstance(value, dict) and depth:
        idle.difference_update(value)
        return {k: without(v, ignored, idle, depth - 1) for k, v in value.items() if k not in ignored}
    return [without(v, ignored, idle, depth - 1) for v in value] if isinstance(value, list) and depth else value


class Columns:
    """The columns of one source's rows.

    Args:
        source: source of the rows.
        schema: schema of the rows.
        unused: receives the columns and message keys that have values but are not read.

    Attributes:
        weights: the weights of the rows.
    """

    def __init__(self, source: Source, schema: Schema, unused: dict[str, None]) -> None:
        self.source, self.schema, self.unused = source, schema, unused
        self.weights = Weights(source)
        # Alpaca's instruction and input are one prompt.
        mapped = source.columns.get("prompt") == "instruction"
        is_column = "instruction" in schema.columns
        self.instruction = "instruction" if is_column else "prompt" if mapped else None
        # Columnar files fill missing keys with nulls.
        self._filled = source.fills_columns and not any(ending in TEXT for ending in Path(source.path).suffixes)

    def checked(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row, with its ``input`` appended to its instruction.

        Raises:
            BadRow: a column, message key or placeholder has a meaning, but is not read.
        """
        row = {name: unfilled(value) for name, value in row.items()} if self._filled else row
        kinds = _kinds(self.schema, frozenset(row))
        for name in kinds.refused:
            value, why = row[name], reason(COLUMNS, name)
            assert why is not None
            if has_value(value) and _counts(value, why):
                raise BadRow(why, name, ignorable=name)
            self._note(name, value)
        for name in (*kinds.unused, *sorted(idle_scores(row, kinds.read))):
            self._note(name, row[name])
        if not isinstance(row.get("votes"), list | None) and "votes" in kinds.read:  # a count, of nobody knows what
            self._note("votes", row["votes"])
        self._check_values(row, kinds.read)
        for name in (*kinds.system, *kinds.parts):
            for text in _leaves(row[name]):
                self._check_text(text, name, "")
        if self.schema.prepare:  # its rows cannot be read one by one
            for name in (*kinds.system, *_parts(kinds, row), *kinds.tools):
                if has_value(row[name]):
                    raise BadRow(f"is not read by the schema '{self.schema.name}'", name, ignorable=name)
        if self.instruction and "input" in kinds.parts and has_value(row["input"]):
            parts = row[self.instruction], row["input"]
            if all(isinstance(part, str) for part in parts):
                row = {k: v for k, v in row.items() if k != "input"} | {self.instruction: "\n".join(parts)}
        return row

    def in_context(
        self, items: list[Example | Skipped], row: dict[str, Any], place: str = ""
    ) -> Iterator[Example | Skipped]:
        """The examples of a row, with its weight, and its system text and earlier turns prepended to the prompt.

        Raises:
            BadRow: a text prompt has no place for them, a part of the prompt is missing from it, or the weight is at
                fault.
        """
        kinds = _kinds(self.schema, frozenset(row))
        system = {name: row[name] for name in kinds.system if has_value(row[name])}
        parts = _parts(kinds, row)
        tools = self._tools(row[_TOOLS]) if kinds.tools else None
        weights: dict[str, Any] = {}
        if any(isinstance(item, Example) for item in items):  # a row without, such as a tie, needs no weight
            weights = {"weight": self.weights.of(row, place), "weighted_by": self.weights.column}
            if re.fullmatch(self.schema.also, "votes"):
                weights["votes"] = self.weights.votes(row)
        for item in items:
            if isinstance(item, Example):
                item = replace(item, **weights)
            if isinstance(item, Example) and (system or parts):
                item = _with_context(item, system, parts)
            if isinstance(item, Example) and tools:
                if isinstance(item.prompt, str):
                    raise BadRow(f"{TEMPLATE}, and the prompt is plain text; {_MESSAGES}", _TOOLS, ignorable=_TOOLS)
                item = replace(item, tools=tools)
            yield item

    def _tools(self, value: Any) -> list[dict[str, Any]] | None:
        """The tools that the model may call; None if there are none."""
        if not has_value(value) or not _counts(value, TEMPLATE):
            return None
        try:
            return objects_of(value, "tool", filled=self._filled)
        except ValueError as error:
            raise BadRow(str(error), _TOOLS, ignorable=_TOOLS) from error

    def _note(self, name: str, value: Any) -> None:
        if name not in self.unused and has_value(value):
            self.unused[name] = None

    def _check_values(self, row: dict[str, Any], columns: Sequence[str]) -> None:
        """Refuses content of texts and messages that would be lost."""
        for column in columns:
            value = row[column]
            if isinstance(value, str):
                self._check_text(value, column, "")
            elif isinstance(value, dict):
                self._check_message(value, column, "", True)
            elif isinstance(value, list):
                for i, item in enumerate(value, start=1):
                    if isinstance(item, dict):
                        is_last = column != "prompt" and (i == len(value) or _speaks(value[i]) == "assistant")
                        self._check_message(item, column, f", message {i}", is_last)
                    elif isinstance(item, list):
                        for message in item:
                            if isinstance(message, dict):
                                self._check_message(message, column, f", item {i}", message is item[-1])
                    elif isinstance(item, str):
                        self._check_text(item, column, f", item {i}")

    def _check_message(self, message: dict[str, Any], column: str, within: str, judged: bool) -> None:
        """Refuses keys and texts that would be lost; ``judged``: the message may carry the loss."""
        if message.keys() <= {"role", "content"} or message.keys() <= {"from", "value"}:
            texts: tuple[str, ...] = ("content", "value")
        elif message.keys() & {"role", "from"}:
            texts = ("content", "value")
            for key in message.keys() - _MESSAGE:
                value, why = message[key], reason(KEYS, key)
                if why and has_value(value) and not (value == "final" and means("channel", key)):  # the answer itself
                    raise BadRow(f"has {key}, which {why}", column, within, key)
                if not means(FLAGS, key):
                    self._note(f"{column}: {key}", value)
                elif value not in (None, 1) and _speaks(message) == "assistant" and (judged or value != 0):
                    raise BadRow(
                        f"has the {key} {short(value)}, but the answer that was judged always carries the loss",
                        column,
                        within,
                        key,
                    )
        else:  # an answer among several
            texts = ("response",)
            for key in message.keys() - {"response", "overall_score"}:
                self._note(f"{column}: {key}", message[key])
        for key in texts:
            value = message.get(key)
            for part in value if isinstance(value, list) else [value]:
                text = part.get("text") if isinstance(part, dict) else part
                if isinstance(text, str):
                    self._check_text(text, column, within)

    def _check_text(self, text: str, column: str, within: str) -> None:
        if "<" not in text and "[IMG" not in text:
            return
        for match in PLACEHOLDER.finditer(text):
            if match[0] not in self.source.ignore and not is_markup(match, text):
                raise BadRow(
                    f"contains {match[0]}, which stands for a picture or sound, and the model reads text only",
                    column,
                    within,
                    match[0],
                )


def prompt_in_context(row: dict[str, Any], text_prompts: TextPrompts = "plain") -> Example:
    """The ``prompt`` of a row to be answered, with its system text, earlier turns and tools, but no completions.

    Args:
        row: a row with a ``prompt``.
        text_prompts: encoding of plain-text prompts, see :mod:`halos_pl.data.prompts`.

    Raises:
        BadRow: the prompt is invalid, or another column has a meaning but no place in it.
    """
    columns = Columns(Source("prompts"), Schema("prompts", ("prompt",)), {})
    row = {name: value for name, value in row.items() if reason(COLUMNS, name) not in (ANSWER, MARGIN, WEIGHT)}
    example = Example(asked(prompt_of(row), text_prompts), (), (), "")
    items = columns.in_context([example], columns.checked(row))
    return next(item for item in items if isinstance(item, Example))


def _counts(value: Any, why: str) -> bool:
    """Whether a column contains what its name suggests; data sets also use such names for other things."""
    if why is WEIGHT:
        return isinstance(value, int | float) and value != 1
    if why.startswith(TEMPLATE) and isinstance(value, str):  # a single word is not a list of tools
        return value.lstrip().startswith(("[", "{")) or len(value.split()) > 1
    return value is not False


def _speaks(message: Any) -> str | None:
    role = (message.get("role") or message.get("from")) if isinstance(message, dict) else None
    return ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def _with_context(example: Example, system: dict[str, Any], parts: dict[str, Any]) -> Example:
    """The example with system text and history prepended to its prompt.

    Raises:
        BadRow: a text prompt has no place for them, or lacks one of ``parts``.
    """
    messages = example.prompt if isinstance(example.prompt, list) else None
    question = all_texts(example.prompt)
    answers = [text for completion in example.completions for text in all_texts(completion)]
    for name, text in system.items():
        if not isinstance(text, str):
            raise BadRow(f"is {short(text)}; it must be text", name)
        if messages is None:
            if not _holds(question, text):
                raise BadRow(
                    "is a system message, but the prompt is plain text; give the prompt as messages, or add it to the"
                    " prompt",
                    name,
                    ignorable=name,
                )
        elif messages[0]["role"] != "system":
            messages = [{"role": "system", "content": checked_text(text, name)}, *messages]
        elif messages[0]["content"].strip() != text.strip():
            raise BadRow("differs from the system message of the prompt; keep one of them", name, ignorable=name)
    for name, value in parts.items():
        if name.lower() == "history" and messages is not None and isinstance(value, list):
            earlier = _turns(value, name)
            start = int(messages[0]["role"] == "system")
            if messages[start : start + len(earlier)] != earlier:
                messages = [*messages[:start], *earlier, *messages[start:]]
            continue
        leaves = list(_leaves(value))
        held = question + answers if means(DIALOGUES, name) else question  # an answer may quote what the prompt lacks
        # The last turn of a dialogue may be an answer that was not judged.
        if not all(_holds(held, leaf) for leaf in (leaves[:-1] if len(leaves) > 1 else leaves)):
            raise BadRow(
                "is part of the prompt in some formats, but not of this prompt; add it to the prompt, or map it"
                f" (columns: {{prompt: {name}}})",
                name,
                ignorable=name,
            )
    return example if messages is None else replace(example, prompt=messages)


def _turns(value: list[Any], column: str) -> Messages:
    """Earlier turns: messages, or pairs of a user's text and its answer, as in LLaMA-Factory."""
    if all(isinstance(item, dict) for item in value):
        return messages_of(value, column)
    turns: Messages = []
    for i, item in enumerate(value, start=1):
        if not (isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item)):
            raise BadRow(f"is {short(item)}; it must be [user's text, answer]", column, f", item {i}")
        for role, text in zip(("user", "assistant"), item, strict=True):
            turns.append({"role": role, "content": checked_text(text, column, f", item {i}")})
    return turns


def _holds(texts: Sequence[str], text: str) -> bool:
    """Whether ``text`` is one of ``texts``, or a long enough part of one."""
    text = text.strip()
    return any(text == other.strip() or (len(text) >= _TELLING and text in other) for other in texts)


def _leaves(value: Any, depth: int = 4) -> Iterator[str]:
    """The texts in a value, except roles."""
    if isinstance(value, list) and depth:
        for item in value:
            yield from _leaves(item, depth - 1)
    elif isinstance(value, dict) and depth:
        for key, item in value.items():
            if key not in ("role", "from"):
                yield from _leaves(item, depth - 1)
    elif has_value(value):
        yield value if isinstance(value, str) else str(value)
