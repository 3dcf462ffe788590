"""Rows of text files: JSON lines, lists of JSON objects, CSV. Nothing here depends on the meaning of a row.

Neither a file nor a line longer than ``most`` bytes is ever wholly in memory. A fault of a row is yielded, not raised.
"""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from halos_pl.data.broken import CHUNK, Broken, Read, too_large, twice
from halos_pl.data.example import short

BLANK = 16  # consecutive blank lines may take at most 1/16 of a row's size limit
SKIPPED = 64  # of a line that is too long, at most 64 times the limit is skipped to find the next one
_BLANK = re.compile(r"[ \t\r\n]*")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of other bytes


# JSON --------------------------------------------------------------------------------------------------


class _DuplicateKey(ValueError):
    """A key that occurs twice in an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _DuplicateKey(twice([name for name, _ in pairs]))
    return values


_JSON = json.JSONDecoder(object_pairs_hook=_object)
_PLAIN_JSON = json.JSONDecoder()


def _json_fault(error: Exception, ends: bool = False, line: int | None = None) -> Broken:
    """The fault of a row; ``line`` is where it is, if that is not the row's first line."""
    if isinstance(error, _DuplicateKey):
        name = str(error)
        return Broken(f"the key {short(name)} appears twice in one object; keep one of the two", name)
    reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    reason += f" of line {line}" if line else ""
    rest = "; no row from here on can be read" if ends else ""
    return Broken(
        f"invalid JSON ({reason}); write one JSON object on each line (or, in a .json file, one list of objects){rest}",
        ends=ends,
    )


def _decoded(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at ``at``, or a Broken for a duplicate key; and where it ends."""
    try:
        return _JSON.raw_decode(text, at)
    except _DuplicateKey as error:
        return _json_fault(error), _PLAIN_JSON.raw_decode(text, at)[1]


def _json_line(raw: bytes) -> Any:
    try:
        # Without the line break, as a fault at the end of the line would be located on the next one.
        return _JSON.decode(raw.decode("utf-8").removesuffix("\n"))
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8 text ({error.reason} at byte {error.start + 1}); save it as UTF-8")
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        return _json_fault(error)


def _lines(stream: io.BufferedReader, most: int) -> Iterator[bytes | Broken]:
    """Each line, or a Broken for one of more than ``most`` bytes."""
    blank = 0  # a compressed file of line breaks may be huge
    while raw := stream.readline(most + 1):
        blank = 0 if raw.strip() else blank + len(raw)
        if BLANK * blank > most:
            yield too_large(most, ends=True)
            return
        if len(raw) <= most or raw.endswith(b"\n"):
            yield raw
            continue
        size = len(raw)
        while not raw.endswith(b"\n") and (raw := stream.readline(CHUNK)):
            size += len(raw)
            if size > SKIPPED * most:
                yield too_large(most, size, ends=True)
                return
        yield too_large(most, size)


def _json_lines(stream: io.BufferedReader, most: int) -> Read:
    """Each line that is not blank."""
    start = stream.peek(4)[:4]
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and b"\0" in start:
        yield 0, Broken("is UTF-16 text; save it as UTF-8", ends=True)
        return
    for number, raw in enumerate(_lines(stream, most), start=1):
        if isinstance(raw, Broken):
            yield number, raw
            continue
        raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if raw.strip():
            yield number, _json_line(raw)


class _Text:
    """The text of a stream, read piece by piece; ``text`` from ``at`` on is not consumed yet."""

    def __init__(self, stream: io.BufferedReader, most: int) -> None:
        self.stream, self.most = stream, most
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False
        self.line, self._counted = 1, 0  # ``line`` is the line of the character ``_counted``

    def more(self) -> bool:
        """Reads on, at least doubling the text, so that decoding a large row takes linear time."""
        if self.ended:
            return False
        self.here()
        raw = self.stream.read(max(CHUNK, len(self.text) - self.at))
        try:
            decoded = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            self.line += self.text.count("\n", self.at) + raw[: error.start].count(b"\n")
            raise Broken(
                f"not UTF-8 text ({error.reason}); save it as UTF-8; no row from here on can be read", ends=True
            ) from None
        self.text, self.at, self._counted = self.text[self.at :] + decoded, 0, 0
        self.ended = not raw
        return True

    def here(self) -> int:
        """The line of ``at``."""
        self.line, self._counted = self.line + self.text.count("\n", self._counted, self.at), self.at
        return self.line

    def next(self) -> str:
        """Moves to the next character that is not blank, and returns it; empty at the end."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            self.at = blank.end() if blank else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The JSON value that begins here, or a Broken for a duplicate key; moves past it.

        Raises:
            Broken: it is not JSON, or too large.
        """
        while True:
            try:
                value, end = _decoded(self.text, self.at)
            except json.JSONDecodeError as error:
                # A row that continues in the next piece looks like this; anything else is a fault.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
                if cut and len(self.text) - self.at > self.most:
                    raise too_large(self.most, ends=True) from None
                if not (cut and self.more()):
                    below = self.text.count("\n", self.at, error.pos)
                    raise _json_fault(error, ends=True, line=self.here() + below if below else None) from None
                continue
            except (ValueError, RecursionError) as error:
                raise _json_fault(error, ends=True) from None
            if end < len(self.text) or not self.more():  # a number may continue
                start, self.at = self.at, end
                if 4 * (end - start) <= self.most:  # no character takes more bytes
                    return value
                size = len(self.text[start:end].encode())
                return too_large(self.most, size) if size > self.most else value


def _json_list(stream: io.BufferedReader, most: int) -> Read:
    """Each item of the one list in the stream, with the line where it begins."""
    text = _Text(stream, most)
    try:
        text.next()
        text.at += 1
        more = text.next() != "]"
        while more:
            text.line = line = text.here()
            value = text.value()
            yield line, value
            after = text.next()
            if after not in (",", "]"):
                text.line = line  # the row is at fault, not what follows it
                raise Broken(
                    "invalid JSON (no ',' or ']' after this row); check that the file was written completely; no row"
                    " from here on can be read",
                    ends=True,
                )
            more = after == ","
            if more:
                text.at += 1
                text.next()
        text.at += 1
        if text.next():
            text.here()
            raise Broken("invalid JSON (more text after the closing ']'); a file holds one list", ends=True)
    except Broken as broken:
        yield text.line, broken


def _json(stream: io.BufferedReader, most: int) -> Read:
    """A stream that begins with ``[`` is one list; any other is lines."""
    is_list = stream.peek(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    yield from _json_list(stream, most) if is_list else _json_lines(stream, most)


# CSV ---------------------------------------------------------------------------------------------------


_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")


def _cell(text: str) -> Any:
    """Messages are messages, as JSON or as Python writes them; an empty cell holds nothing; all else is text."""
    if not _MESSAGES.match(text):
        return text or None
    for parse in (_JSON.decode, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        is_messages = isinstance(value, list) and all(
            isinstance(m, dict) and {"role", "from"} & m.keys() for m in value
        )
        return value if is_messages else text
    return Broken("looks like a list of messages but is not valid JSON; write it with json.dumps")


def _csv(stream: io.BufferedReader, most: int) -> Read:
    """Rows under a header of column names; a row's line is its first."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # 131,072 characters by default
    # A byte that is not UTF-8 becomes a surrogate, so that only its own row is at fault.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    used = 0  # characters of the row so far

    def lines() -> Iterator[str]:
        nonlocal used
        while line := text.readline(most + 1):
            used += len(line)
            if used > most:
                raise too_large(most, ends=True)
            yield line

    reader = csv.reader(lines(), strict=True)  # not strict, a quote that is never closed swallows the file
    header: list[str] | None = None
    line, blank = 1, 0
    try:
        for cells in reader:
            if header is None:
                if cells:
                    header = cells
                    if (double := twice(header)) is not None:
                        reason = f"the column {short(double)} appears twice in the header; rename one of the two"
                        yield line, Broken(reason, double, ends=True)
                        return
            elif cells:
                yield line, _csv_row(header, cells)
            line, used, blank = reader.line_num + 1, 0, 0 if cells else blank + 1
            if BLANK * blank > most:
                raise too_large(most, ends=True)
    except Broken as broken:
        yield line, broken
    except csv.Error as error:
        yield line, Broken(f"invalid CSV ({error}); check the quotes; no row from here on can be read", ends=True)


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return Broken(
            f"the row has {len(cells)} values but the header has {len(header)} columns; "
            "quote values that contain commas or line breaks"
        )
    for name, cell in zip(header, cells, strict=True):
        if not cell.isascii() and _NOT_UTF8.search(cell):
            return Broken(f"column {short(name)} is not UTF-8 text; save the file as UTF-8", name)
    row = {name: _cell(cell) for name, cell in zip(header, cells, strict=True)}
    for name, value in row.items():
        if isinstance(value, Broken):
            return Broken(f"column {short(name)} {value}", name)
    return row


TEXT: dict[str, Callable[[io.BufferedReader, int], Read]] = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}
