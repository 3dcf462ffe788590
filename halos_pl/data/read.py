"""Files to validated examples: every fault names its file, line and column, and what to do about it.

A new schema (another set of columns) is one function and one entry of ``SCHEMAS``; a new file format is one
generator of (line, row) and one entry of ``FORMATS``.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halos_pl.data.tokenize import Prompt

SHOWN_FAULTS = 10
_BLANK = re.compile(r"[ \t\r\n]*")


class DataError(ValueError):
    """Faults in the data, as ``FILE:LINE: what is wrong; what to do`` lines."""


@dataclass(frozen=True)
class Example:
    """One line of a data file.

    Attributes:
        prompt: text or messages.
        completions: one (binary feedback) or two (a pair: chosen, rejected).
        labels: one for each completion, True for desirable; (True, False) for a pair.
        row_id: ``FILE:LINE``, with the path as it was given and lines counted from 1.
    """

    prompt: Prompt
    completions: tuple[Prompt, ...]
    labels: tuple[bool, ...]
    row_id: str

    @property
    def is_pair(self) -> bool:
        return len(self.completions) == 2


class _Fault(Exception):
    """What is wrong with one row."""


@dataclass
class _Faults:
    """Collects faults, so that a file is mended in one go; remembers a few, counts all."""

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN_FAULTS:
            self.shown.append(f"{place}: {reason}")

    def raise_if_any(self) -> None:
        if self.count:
            more = self.count - len(self.shown)
            rest = [f"... and {more} more fault{'s' * (more > 1)}"] if more else []
            raise DataError("\n".join([*self.shown, *rest]))


# Values ------------------------------------------------------------------------------------------------


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Fault(
            f"{where} holds half of a surrogate pair, which is not text; remove or repair the \\ud8xx escape"
        ) from None
    return value


def _messages_or_text(row: dict[str, Any], column: str) -> Prompt:
    value = row[column]
    if isinstance(value, str):
        if not value.strip():
            raise _Fault(f"column '{column}' is empty; give it some text or remove the row")
        return _text(value, f"column '{column}'")
    if not isinstance(value, list):
        raise _Fault(
            f"column '{column}' is {_short(value)}; it must be text or a list of messages "
            '{"role": ..., "content": ...}'
        )
    messages = []
    for i, message in enumerate(value):
        where = f"column '{column}', message {i + 1}"
        if not isinstance(message, dict):
            raise _Fault(f"{where} is {_short(message)}; it must be an object with 'role' and 'content'")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = f"has the {key} {_short(message[key])}" if key in message else f"has no '{key}'"
                raise _Fault(f"{where} {found}; every message needs a 'role' and a 'content', both text")
            _text(message[key], where)
        if not message["role"].strip():
            raise _Fault(f"{where} has an empty role; name one, such as 'user' or 'assistant'")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _prompt(row: dict[str, Any]) -> Prompt:
    prompt = _messages_or_text(row, "prompt")
    _refuse_blank(prompt, "prompt")
    return prompt


def _completion(row: dict[str, Any], column: str, prompt: Prompt) -> Prompt:
    completion = _messages_or_text(row, column)
    if isinstance(completion, list):
        if isinstance(prompt, str):
            raise _Fault(
                f"column '{column}' is a message list but 'prompt' is plain text; "
                "give both as messages or both as text"
            )
        if completion[: len(prompt)] == prompt:  # the conversation repeated from its start
            if completion and len(completion) == len(prompt):
                raise _Fault(f"column '{column}' only repeats the prompt; add the assistant's message")
            completion = completion[len(prompt) :]
    _refuse_blank(completion, column)
    return completion


def _refuse_blank(value: Prompt, column: str) -> None:
    if isinstance(value, list) and not any(message["content"].strip() for message in value):
        raise _Fault(f"column '{column}' is empty; give it a message with some text or remove the row")


# Schemas -----------------------------------------------------------------------------------------------

_Parsed = tuple[Prompt, tuple[Prompt, ...], tuple[bool, ...]]


def _binary(row: dict[str, Any]) -> _Parsed:
    label = row["label"]
    if type(label) not in (bool, int) or label not in (0, 1):
        raise _Fault(
            f"column 'label' is {_short(label)}; it must be true or 1 (desirable), "
            "or false or 0 (undesirable)"
        )
    prompt = _prompt(row)
    return prompt, (_completion(row, "completion", prompt),), (bool(label),)


def _pair(row: dict[str, Any]) -> _Parsed:
    prompt = _prompt(row)
    return prompt, tuple(_completion(row, column, prompt) for column in ("chosen", "rejected")), (True, False)


@dataclass(frozen=True)
class _Schema:
    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any]], _Parsed]

    def __str__(self) -> str:
        return "+".join(self.columns)


SCHEMAS = (
    _Schema(("prompt", "completion", "label"), _binary),
    _Schema(("prompt", "chosen", "rejected"), _pair),
)


def _schema_of(row: Any) -> _Schema:
    """The one schema whose columns the row has. A null column counts only where nothing else fits."""
    wanted = " or ".join(str(schema) for schema in SCHEMAS)
    if not isinstance(row, dict):
        raise _Fault(f"the row is {_short(row)}, not an object; a row has the columns {wanted}")
    filled = {column for column, value in row.items() if value is not None}
    for columns in (filled, set(row)):
        fitting = [schema for schema in SCHEMAS if columns.issuperset(schema.columns)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise _Fault(
                f"the row fits {' and '.join(map(str, fitting))}; keep the columns of one of them in the file"
            )
    nearest = max(SCHEMAS, key=lambda schema: len(set(schema.columns) & set(row)))
    missing = ", ".join(f"'{column}'" for column in nearest.columns if column not in row)
    has = ", ".join(_short(column) for column in list(row)[:8]) or "none"
    raise _Fault(f"the row lacks {missing}; a row has the columns {wanted} (this one has: {has})")


# Files -------------------------------------------------------------------------------------------------


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Fault(f"not UTF-8 text ({error.reason} at byte {error.start + 1}); save it as UTF-8") from None


def _json_fault(error: Exception) -> _Fault:
    reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return _Fault(
        f"invalid JSON ({reason}); write one JSON object on each line "
        "(or, in a .json file, one list of objects)"
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise _json_fault(error) from None


def _json_lines(lines: Iterator[bytes]) -> Iterator[tuple[int, Any]]:
    """(line, row or _Fault) of every line that is not blank."""
    for number, raw in enumerate(lines, start=1):
        raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if raw.strip():
            try:
                yield number, _parsed(_decoded(raw))
            except _Fault as fault:
                yield number, fault


def _json_list_or_lines(lines: Iterator[bytes]) -> Iterator[tuple[int, Any]]:
    """As ``_json_lines``; a file that begins with ``[`` is one list, and a row's line is its first."""
    whole = b"".join(lines).removeprefix(b"\xef\xbb\xbf")
    if not whole.lstrip().startswith(b"["):
        yield from _json_lines(iter(whole.splitlines(keepends=True)))
        return
    try:
        text = _decoded(whole)
    except _Fault as fault:
        yield 1, fault
        return
    decoder = json.JSONDecoder()
    line, counted = 1, 0  # ``line`` is the line of the character ``counted``
    at = _skip_blank(text, text.index("[") + 1)
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, _json_fault(error)
            return
        yield line, row
        at = _skip_blank(text, at)
        if text.startswith(",", at):
            at = _skip_blank(text, at + 1)
        elif not text.startswith("]", at):
            yield (
                line,
                _Fault("invalid JSON (no ',' or ']' after this row); was the file written completely?"),
            )
            return
    if _skip_blank(text, at + 1) < len(text):
        yield line, _Fault("invalid JSON (more text after the closing ']'); a file holds one list")


def _skip_blank(text: str, start: int) -> int:
    found = _BLANK.match(text, start)
    return found.end() if found else start


FORMATS: dict[str, Callable[[Iterator[bytes]], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json_list_or_lines,
}


def _rows(path: str, faults: _Faults) -> Iterator[tuple[int, Any]]:
    """(line, row) of the file; faults of the file itself and of its JSON go to ``faults``."""
    file = Path(path)
    zipped = path.endswith(".gz")
    name = file.name.removesuffix(".gz")
    known = ", ".join(f"{ending}, {ending}.gz" for ending in FORMATS)
    if file.is_dir():
        return faults.add(path, "is a folder; name the file in it")
    if not file.exists():
        return faults.add(path, f"no such file (looked from {Path.cwd()}); check the path")
    if Path(name).suffix not in FORMATS:
        return faults.add(path, f"unknown kind of file; supported are {known}")
    line = 0
    counted = 0  # lines read so far, to place a fault of the stream

    def lines() -> Iterator[bytes]:
        nonlocal counted
        with gzip.open(path, "rb") if zipped else open(path, "rb") as stream:
            for raw in stream:
                counted += 1
                yield raw

    try:
        for line, row in FORMATS[Path(name).suffix](lines()):
            if isinstance(row, _Fault):
                faults.add(f"{path}:{line}", str(row))
            else:
                yield line, row
    except EOFError:
        faults.add(
            f"{path}:{counted + 1}",
            "the gzip stream ends early: the file is cut off; copy or download it again",
        )
    except (OSError, zlib.error) as error:
        hint = "it may not be a gzip file, or be damaged" if zipped else "check its permissions"
        faults.add(f"{path}:{counted + 1}", f"cannot be read ({error}); {hint}")
    else:
        if not line:
            faults.add(path, "holds no rows; was it written completely?")


def _examples(path: str, faults: _Faults) -> list[Example]:
    examples: list[Example] = []
    first: tuple[int, _Schema] | None = None
    for line, row in _rows(path, faults):
        try:
            schema = _schema_of(row)
            first = first or (line, schema)
            if schema is not first[1]:
                raise _Fault(
                    f"a row of {schema}, but line {first[0]} is a row of {first[1]}; "
                    "put the two kinds into two files"
                )
            examples.append(Example(*schema.parse(row), row_id=f"{path}:{line}"))
        except _Fault as fault:
            faults.add(f"{path}:{line}", str(fault))
    return examples


def read_files(paths: Sequence[str]) -> dict[str, list[Example]]:
    """The examples of each file, in file order.

    Files are ``.jsonl`` or ``.json`` (a list, or lines), either with ``.gz``. The columns of the first row
    say which schema a file has: prompt+completion+label, or prompt+chosen+rejected; each value but the label
    is text or a message list. Other columns are ignored.

    Raises:
        DataError: with up to ten faults of all the files, and the number of the others.
    """
    faults = _Faults()
    examples = {path: _examples(path, faults) for path in paths}
    faults.raise_if_any()
    return examples
