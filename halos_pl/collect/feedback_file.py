"""The file that clicks are written to: JSON lines that ``halos fit`` reads at any moment.

A first click appends a row. A correction or an undo replaces or removes that row in a new copy of the file, which takes
the place of the old one at once, so no reader sees two verdicts on one answer. Both are on the disk before the page
confirms them.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from halos_pl.common.files import check_target, naming, part_of, sync
from halos_pl.data.example import DataError, Example, Fault, Skipped
from halos_pl.data.memory import MemorySource
from halos_pl.data.read import read
from halos_pl.data.source import Source

#: ``thumbs``: each answer is good or bad. ``choices``: one of two answers is better.
Kind = Literal["thumbs", "choices"]

_MEANING = {"thumbs": "an answer with a label", "choices": "a choice between two answers"}


def refuse_unreadable(row: dict[str, Any]) -> None:
    """Refuses a row that ``halos fit`` would refuse or skip.

    Raises:
        DataError: names the column and the reason.
    """
    for item in read(MemorySource("row", data=[row])):
        if isinstance(item, Fault):
            raise DataError(item.reason)
        if isinstance(item, Skipped):
            raise DataError(f"halos fit would skip this row: {item.reason}")


def _kind_of(example: Example) -> Kind | None:
    if example.paired:
        return "choices"
    return "thumbs" if len(example.completions) == 1 and example.labels[0] is not None else None


def _checked_rows(path: Path, kind: Kind) -> int:
    """The number of rows in an existing file.

    Raises:
        DataError: a row cannot be read, is of another kind, or has a weight; names file and line.
    """
    rows = 0
    for item in read(Source(str(path))):
        if isinstance(item, Fault):
            raise DataError(f"{item}; fix it, or name another file with --out")
        rows += 1
        if isinstance(item, Example) and item.weighted_by:
            raise DataError(
                f"{item.row_id}: has a weight in column '{item.weighted_by}', which new rows would lack; name another"
                " file with --out"
            )
        if isinstance(item, Example) and _kind_of(item) != kind:
            other = _kind_of(item)
            what = _MEANING[other] if other else "neither a labelled answer nor a choice"
            cure = f"set --kind {other}, or name another file with --out" if other else "name another file with --out"
            raise DataError(f"{item.row_id}: is {what}, but --kind {kind} adds rows with {_MEANING[kind]}; {cure}")
    return rows


class FeedbackFile:
    """Rows with verdicts, each with a column ``id``. Several threads may call all methods.

    Args:
        path: JSON lines, which need not exist yet; existing rows are kept.
        kind: kind of the rows.

    Attributes:
        path: path of the file, without links.
        rows: number of rows in it.

    Raises:
        DataError: the file has rows of another kind, or unreadable ones.
        FileExistsError: another process is collecting into the file.
        OSError: the file cannot be written; names it.
    """

    def __init__(self, path: Path, kind: Kind) -> None:
        if path.suffix != ".jsonl":
            raise DataError(f"--out {path} must end in .jsonl")
        check_target(path)
        self.path, self.kind = path.resolve(), kind
        self._mutex = threading.Lock()
        with naming(path):
            if path.exists():
                path.open("ab").close()  # raises if it is not writable, also on a read-only disk
            self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise FileExistsError(
                    f"another halos collect is writing to {path}; stop it, or name another file with --out"
                ) from None
            except NotImplementedError:
                print(f"halos: {path} is not protected from other writers: its file system has no locks")
        try:
            self._seen: tuple[int, ...] | None = None
            self.rows = 0
            self._follow()
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Lets other processes collect into the file."""
        self._lock.release()

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row and waits until it is on the disk.

        Raises:
            DataError: ``halos fit`` could not read the row, or the file has changed and has rows of another kind.
            OSError: the row could not be written; the file is unchanged.
        """
        refuse_unreadable(row)
        with self._mutex, naming(self.path):
            self._follow()
            self._append(_line(row))
            self.rows += 1

    def replace(self, row_id: str, row: dict[str, Any] | None) -> None:
        """Replaces the row with the column ``id`` equal to ``row_id``, or removes it if ``row`` is None.

        The other lines are unchanged, edits by other programs included. If the row has gone, ``row`` is appended.

        Raises:
            DataError: ``halos fit`` could not read the row, or the file has changed and has rows of another kind.
            OSError: the file could not be written; it is unchanged.
        """
        if row is not None:
            refuse_unreadable(row)
        with self._mutex, naming(self.path):
            self._follow()
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
            at = next((i for i, line in enumerate(lines) if _has_id(line, row_id)), None)
            if at is None:
                if row is not None:
                    self._append(_line(row))
                    self.rows += 1
                return
            lines[at : at + 1] = [] if row is None else [_line(row).removesuffix(b"\n")]
            self._rewrite(b"\n".join(lines))
            self.rows -= row is None

    def _follow(self) -> None:
        """Checks and counts the rows again if another program has changed, replaced or removed the file."""
        if (state := self._state()) != self._seen:
            self.rows = _checked_rows(self.path, self.kind) if state and self.path.stat().st_size else 0
            self._seen = state

    def _state(self) -> tuple[int, ...] | None:
        if not self.path.exists():
            return None
        found = self.path.stat()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _append(self, line: bytes) -> None:
        is_new = not self.path.exists()
        # Opened anew each time, as an editor may have replaced the file.
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(file, rest) :]
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)
        if is_new:
            sync(self.path.parent)
        self._seen = self._state()

    def _rewrite(self, content: bytes) -> None:
        part = part_of(self.path, "collect")
        try:
            part.write_bytes(content)
            shutil.copymode(self.path, part)
            sync(part)
            os.replace(part, self.path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        sync(self.path.parent)
        self._seen = self._state()


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _has_id(line: bytes, row_id: str) -> bool:
    if row_id.encode() not in line:
        return False
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and row.get("id") == row_id
