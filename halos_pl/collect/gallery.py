"""Pages of collected rows, newest first, from a file that may grow meanwhile."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos_pl.data.example import DataError

#: Rows of a page.
SIZE = 20

_READ = ("prompt", "completion", "label", "chosen", "rejected", "annotator", "time")


@dataclass(frozen=True)
class Shown:
    """A row as the gallery shows it.

    Attributes:
        line: its line in the file.
        earlier: messages of the prompt before the last.
        message: the last message of the prompt.
        answers: heading, text and verdict of each answer; the verdict is None if the row has none.
        who: name of the person, if recorded.
        time: time of the verdict, if recorded.
        facts: names and values of the other columns.
        fault: why the row cannot be shown; empty if it can.
    """

    line: int
    earlier: tuple[tuple[str, str], ...] = ()
    message: str = ""
    answers: tuple[tuple[str, str, bool | None], ...] = ()
    who: str = ""
    time: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class Page:
    """Some rows of the file.

    Attributes:
        number: number of the page, from 1, which has the newest rows.
        pages: number of pages, at least 1.
        rows: number of rows in the file.
        shown: rows of this page.
    """

    number: int
    pages: int
    rows: int
    shown: list[Shown]


class Gallery:
    """The rows of a file. Several threads may call :meth:`page`.

    Args:
        path: JSON lines; while the file is missing, it counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.Lock()
        self._state: tuple[int, ...] = ()
        self._lines: list[tuple[int, int, int]] = []  # number, start and length of each line with content

    def page(self, number: int) -> Page:
        """A page; numbers beyond the last one give the last page.

        Raises:
            OSError: the file cannot be read.
        """
        with self._mutex:
            try:
                with self.path.open("rb") as file:
                    self._index(file)
                    rows = len(self._lines)
                    pages = max(1, -(-rows // SIZE))
                    number = min(max(1, number), pages)
                    end = rows - SIZE * (number - 1)
                    shown = []
                    for line, start, length in reversed(self._lines[max(0, end - SIZE) : end]):
                        file.seek(start)
                        shown.append(_shown(line, file.read(length)))
            except FileNotFoundError:
                return Page(1, 1, 0, [])
            return Page(number, pages, rows, shown)

    def _index(self, file: Any) -> None:
        stat = os.fstat(file.fileno())
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if state == self._state:
            return
        self._lines, start = [], 0
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                self._lines.append((line, start, len(raw)))
            start += len(raw)
        self._state = state


def check_shown(path: Path) -> None:
    """Refuses a file that cannot be read, or whose first row is not feedback that a page shows.

    Raises:
        DataError: names the file, and the line at fault.
    """
    try:
        with path.open("rb") as file:
            first = next(((line, raw) for line, raw in enumerate(file, start=1) if raw.strip()), None)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; name a file of halos collect") from error
    if first and (fault := _shown(*first).fault):
        raise DataError(
            f"{path}: {fault}; --readonly true shows rows of halos collect: prompt with completion and label, or with"
            " chosen and rejected"
        )


def _shown(line: int, raw: bytes) -> Shown:
    try:
        row = json.loads(raw)
        if not isinstance(row, dict):
            raise ValueError("it is not a JSON object")
        *earlier, (_, message) = _messages(row.get("prompt"))
        return Shown(
            line,
            tuple(earlier),
            message,
            _answers(row),
            str(row.get("annotator") or ""),
            str(row.get("time") or ""),
            tuple((name, _value(value)) for name, value in row.items() if name not in _READ),
        )
    except RecursionError:
        return Shown(line, fault=f"line {line} cannot be shown: it is nested too deeply")
    except (ValueError, TypeError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        return Shown(line, fault=f"line {line} cannot be shown: {reason}")


def _messages(prompt: Any) -> list[tuple[str, str]]:
    if isinstance(prompt, str):
        return [("user", prompt)]
    if not isinstance(prompt, list):
        raise ValueError("it has no prompt")
    return [(str(message["role"]), str(message["content"])) for message in prompt] or [("user", "")]


def _answers(row: dict[str, Any]) -> tuple[tuple[str, str, bool | None], ...]:
    if "chosen" in row:
        return ("Chosen", _value(row["chosen"]), True), ("Rejected", _value(row["rejected"]), False)
    label = row.get("label")
    good = None if label is None else bool(label)
    return (("Answer" if good is None else "Good" if good else "Bad", _value(row["completion"]), good),)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
