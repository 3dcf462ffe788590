"""Rows of a source, whatever it is stored as: files, folders of ``datasets``, data sets of the hub.

A new kind of file is one generator of (line, row) and one entry of ``TEXT`` or ``BINARY``. Nothing here knows what
a row means. No file is ever wholly in memory, and no fault of a file is an exception: it is one of the rows.
"""

from __future__ import annotations

import ast
import codecs
import csv
import glob
import gzip
import io
import json
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from halos_pl.data.example import Fault
from halos_pl.data.source import Source

#: Line (row, where there are no lines; from 1, 0 for the source as a whole) and what is there.
Row = tuple[int, dict[str, Any] | Fault]
_Read = Iterator[tuple[int, Any]]

CHUNK = 1 << 20  # bytes read at a time of a .json list
BATCH = 1024  # rows decoded at a time of Arrow's formats

_BLANK = re.compile(r"[ \t\r\n]*")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of other bytes
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 57
_shorten.maxlevel = 3


def short(value: Any) -> str:
    """A value as it is shown in a message: at most 60 printable characters, however large or deep it is."""
    text = _shorten.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Broken(Exception):
    """A row that cannot be read. ``ends``: nor can any that follows."""

    def __init__(self, reason: str, column: str | None = None, ends: bool = False) -> None:
        super().__init__(reason)
        self.column, self.ends = column, ends


def _twice(names: Sequence[str]) -> str | None:
    """The first name that stands there twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


# JSON --------------------------------------------------------------------------------------------------


class _DuplicateKey(ValueError):
    """A key that stands twice in an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _DuplicateKey(_twice([name for name, _ in pairs]))
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_object)
_PLAIN_JSON = json.JSONDecoder()


def _json_fault(error: Exception, ends: bool = False) -> _Broken:
    if isinstance(error, _DuplicateKey):
        name = str(error)
        return _Broken(f"the key {short(name)} stands twice in one object; keep one of the two", name)
    reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    rest = "; no row from here on can be read" if ends else ""
    return _Broken(
        f"invalid JSON ({reason}); write one JSON object on each line (or, in a .json file, one list of objects){rest}",
        ends=ends,
    )


def _decoded(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at ``at``, or a _Broken with the key that stands twice in it; and where it ends."""
    try:
        return _JSON.raw_decode(text, at)
    except _DuplicateKey as error:
        return _json_fault(error), _PLAIN_JSON.raw_decode(text, at)[1]


def _json_line(raw: bytes) -> Any:
    try:
        return _JSON.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Broken(f"not UTF-8 text ({error.reason} at byte {error.start + 1}); save it as UTF-8")
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        return _json_fault(error)


def _json_lines(stream: io.BufferedReader) -> _Read:
    """Each line that is not blank."""
    for number, raw in enumerate(stream, start=1):
        raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if raw.strip():
            yield number, _json_line(raw)


class _Text:
    """The text of a stream, a piece at a time: ``text`` from ``at`` on is what has not been consumed yet."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False
        self.line, self._counted = 1, 0  # ``line`` is the line of the character ``_counted``

    def more(self) -> bool:
        """Reads on, as much again as there is, so that a large row is not decoded over and over."""
        if self.ended:
            return False
        self.here()
        raw = self.stream.read(max(CHUNK, len(self.text) - self.at))
        try:
            decoded = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            self.line += self.text.count("\n", self.at) + raw[: error.start].count(b"\n")
            raise _Broken(
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
        """The next character that is not blank, and moves to it; empty at the end."""
        while True:
            found = _BLANK.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The JSON value that begins here, or a _Broken with the key that stands twice in it; moves behind it.

        Raises:
            _Broken: it is no JSON.
        """
        while True:
            try:
                value, end = _decoded(self.text, self.at)
            except json.JSONDecodeError as error:
                # What a row that goes on in the next piece looks like; anything else is a mistake already.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
                if not (cut and self.more()):
                    raise _json_fault(error, ends=True) from None
                continue
            except (ValueError, RecursionError) as error:
                raise _json_fault(error, ends=True) from None
            if end < len(self.text) or not self.more():  # a number may go on
                self.at = end
                return value


def _json_list(stream: io.BufferedReader) -> _Read:
    """Each item of the one list in the stream, with the line where it begins."""
    text = _Text(stream)
    try:
        text.next()
        text.at += 1
        going_on = text.next() != "]"
        while going_on:
            line = text.here()
            value = text.value()
            yield line, value
            after = text.next()
            if after not in (",", "]"):
                text.line = line  # the row is at fault, not what follows it
                raise _Broken(
                    "invalid JSON (no ',' or ']' after this row); was the file written completely? "
                    "No row from here on can be read",
                    ends=True,
                )
            going_on = after == ","
            if going_on:
                text.at += 1
                text.next()
        text.at += 1
        if text.next():
            text.here()
            raise _Broken("invalid JSON (more text after the closing ']'); a file holds one list", ends=True)
    except _Broken as broken:
        yield text.line, broken


def _json(stream: io.BufferedReader) -> _Read:
    """A stream that begins with ``[`` is one list; any other is lines."""
    is_list = stream.peek(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    yield from _json_list(stream) if is_list else _json_lines(stream)


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
    return _Broken("begins as a list of messages does, but is none; write it with json.dumps")


def _csv(stream: io.BufferedReader) -> _Read:
    """Rows under a header of column names; a row's line is its first."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # 131,072 characters by default
    # A byte that is not UTF-8 becomes a surrogate, so that it can be laid at its own row's door.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)  # not strict, a quote that is never closed swallows the file
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if header is None:
                if cells:
                    header = cells
                    if (twice := _twice(header)) is not None:
                        reason = f"the column {short(twice)} stands twice in the header; rename one of the two"
                        yield line, _Broken(reason, twice, ends=True)
                        return
            elif cells:
                yield line, _csv_row(header, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        yield line, _Broken(f"invalid CSV ({error}); check the quotes; no row from here on can be read", ends=True)


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return _Broken(
            f"the row has {len(cells)} values but the header has {len(header)} columns; "
            "quote values that hold commas or line breaks"
        )
    for name, cell in zip(header, cells, strict=True):
        if not cell.isascii() and _NOT_UTF8.search(cell):
            return _Broken(f"column {short(name)} is not UTF-8 text; save the file as UTF-8", name)
    row = {name: _cell(cell) for name, cell in zip(header, cells, strict=True)}
    for name, value in row.items():
        if isinstance(value, _Broken):
            return _Broken(f"column {short(name)} {value}", name)
    return row


# Arrow, Parquet, datasets ------------------------------------------------------------------------------


def _batches(batches: Iterator[Any], names: Sequence[str]) -> _Read:
    """Rows of record batches or tables, numbered from 1."""
    if (twice := _twice(names)) is not None:
        reason = f"the column {short(twice)} stands twice in the file; rename one of the two"
        yield 0, _Broken(reason, twice, ends=True)
        return
    number = 0
    for large in batches:
        for start in range(0, large.num_rows, BATCH):
            batch = large.slice(start, BATCH)
            try:
                rows: list[Any] = batch.to_pylist()
            except (UnicodeDecodeError, ValueError, OverflowError):  # some row's; find it
                rows = [_arrow_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
            for row in rows:
                number += 1
                yield number, row


def _arrow_row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        return _Broken(f"the row cannot be decoded ({error}); write the file again, its text as UTF-8")


def _parquet(path: str) -> _Read:
    # Without these two, a row group is read as a whole, and a file may be one row group.
    with pq.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as file:
        yield from _batches(file.iter_batches(BATCH), file.schema_arrow.names)


def _arrow(path: str) -> _Read:
    """Both of Arrow's own formats: files for random access, and streams, which ``datasets`` writes."""
    with pa.memory_map(path) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            batches: Any = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            source.seek(0)
            file = batches = pa.ipc.open_stream(source)
        yield from _batches(iter(batches), file.schema.names)


def _dataset(found: Any, split: str | None, where: str) -> _Read:
    """Rows of a ``datasets`` object, of one split if it has several."""
    import datasets  # takes a second, and files do without

    if isinstance(found, dict):
        if split is None and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            what = f"has no split {short(split)}" if split else "has several splits"
            yield 0, _Broken(f"{where} {what}; name one of {', '.join(found)} as 'split'", ends=True)
            return
        found = found[split]
    if isinstance(found, datasets.Dataset):
        # As stored: a column of images, say, is not decoded.
        yield from _batches(found.with_format("arrow").iter(BATCH), found.column_names)
    else:
        yield from enumerate(found, start=1)


def _saved(path: str, source: Source) -> _Read:
    import datasets

    found = datasets.load_from_disk(path)
    if source.split and not isinstance(found, dict) and str(found.split) != source.split:
        which = f"the split {found.split}" if found.split else "a data set without splits"
        yield 0, _Broken(f"the folder holds {which}; leave out 'split: {source.split}', or name another", ends=True)
        return
    yield from _dataset(found, source.split, "the folder")


def is_hub_name(path: str) -> bool:
    """Whether ``path`` is the name of a data set of the hub: ``owner/name``, and nothing of that path exists here."""
    return bool(_HUB_NAME.fullmatch(path)) and _kind(path) is None and not Path(path).exists()


def hub_version(source: Source) -> str:
    """What the rows of a hub data set depend on: its commit. Offline, the one last downloaded.

    Returns:
        The commit; without a network and a download, the revision that was asked for.
    """
    import huggingface_hub
    from huggingface_hub import constants, file_download

    try:
        return str(huggingface_hub.HfApi().dataset_info(source.path, revision=source.revision, timeout=10).sha)
    except Exception:  # the hub's client raises those of several HTTP libraries
        folder = file_download.repo_folder_name(repo_id=source.path, repo_type="dataset")
        ref = Path(constants.HF_HUB_CACHE) / folder / "refs" / (source.revision or "main")
        return ref.read_text(encoding="utf-8").strip() if ref.is_file() else source.revision or "main"


def _hub(source: Source) -> _Read:
    import datasets

    number = 0
    try:
        found = datasets.load_dataset(
            source.path,
            source.name,
            data_dir=source.data_dir,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
        for number, row in _dataset(found, source.split, "the data set"):
            yield number, row
    except Exception as error:  # whatever the hub, the network or the builder of the data set raise
        message = " ".join(str(error).split())
        if number:
            yield number + 1, _Broken(f"cannot be read on ({type(error).__name__}: {message}); try again", ends=True)
        else:
            reason = (
                f"no such file or folder (looked from {Path.cwd()}), and as a data set of the hub it cannot be loaded "
                f"({type(error).__name__}: {message}); check the name, its 'name', 'data_dir', 'split' and 'revision', "
                "and the network"
            )
            yield 0, _Broken(reason, ends=True)


# Sources -----------------------------------------------------------------------------------------------

TEXT: dict[str, Callable[[io.BufferedReader], _Read]] = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}
BINARY: dict[str, Callable[[str], _Read]] = {".parquet": _parquet, ".arrow": _arrow}
_PACKED = (".gz", ".zst")
_SAVED = ("dataset_info.json", "dataset_dict.json")  # in folders written by datasets.save_to_disk


def _kind(path: str) -> str | None:
    """The ending that says how a file is read; None for one that is not known."""
    name = Path(path).name.lower()
    for packed in _PACKED:
        if name.endswith(packed):
            ending = Path(name.removesuffix(packed)).suffix
            return ending if ending in TEXT else None
    ending = Path(name).suffix
    return ending if ending in TEXT or ending in BINARY else None


_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}


def files_of(source: Source) -> list[Source]:
    """The source itself, or a source for each data file of the folder or pattern (``part-*.parquet``) that it names.

    A folder of ``save_to_disk`` is one source.

    Raises:
        ValueError: for several files and a number of rows, or for files of training and of held-out data.
    """
    path = Path(source.path)
    found: list[Path] = []
    if path.is_dir():
        if not any((path / mark).exists() for mark in _SAVED):
            found = [file for file in sorted(path.iterdir()) if file.is_file() and _kind(str(file))]
    elif not path.exists():
        found = [Path(name) for name in sorted(glob.glob(source.path))]
    words = [_SPLITS & set(re.findall(r"[a-z]+", file.name.lower())) for file in found]
    held_out = sorted({word for own in words if "train" not in own for word in own})
    if held_out and any("train" in own for own in words):
        raise ValueError(
            f"{source.path}: its files' names are those of several splits (train, {', '.join(held_out)});"
            " name the files of one"
        )
    if source.rows is not None and len(found) > 1:
        raise ValueError(
            f"{source.path}: rows is {source.rows}, of one file, but there are {len(found)}; name them one by one"
        )
    return [replace(source, path=str(file)) for file in found] or [source]


def _opened(path: str) -> Any:
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.lower().endswith(".zst"):
        return pa.input_stream(path, compression="zstd")  # notices a cut-off file; the zstandard package does not
    return open(path, "rb")


class _Counted(io.RawIOBase):
    """Counts the lines that have been read of a stream, to say where it breaks off."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.lines = stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self.stream.read1(min(len(buffer), 1 << 16))  # little, so that little is lost where it breaks off
        buffer[: len(read)] = read
        self.lines += read.count(b"\n")
        return len(read)


def _file(path: str, kind: str) -> _Read:
    """Rows of a file, and its fault where the file itself is at fault."""
    packed = path.endswith(_PACKED)
    place, counted = 0, None
    try:
        if kind in TEXT:
            with _opened(path) as stream:
                counted = _Counted(stream)
                for place, row in TEXT[kind](io.BufferedReader(counted, CHUNK)):
                    yield place, row
        else:
            for place, row in BINARY[kind](path):
                yield place, row
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        line = counted.lines + 1 if counted else place + 1
        if isinstance(error, EOFError) or "Truncated compressed stream" in str(error):
            what = "gzip" if path.endswith(".gz") else "zstd"
            reason = f"the {what} stream ends early: the file is cut off; copy or download it again"
        elif packed:
            what = "gzip" if path.endswith(".gz") else "Zstandard"
            reason = f"cannot be read ({error}); it may not be a {what} file, or be damaged"
        elif kind in BINARY:
            reason = f"cannot be read as {kind[1:].title()} ({error}); it may be cut off or damaged"
        else:
            reason = f"cannot be read ({error}); check its permissions"
        yield line, _Broken(" ".join(reason.split()), ends=True)


def _wrong_settings(source: Source) -> str | None:
    """Settings that a file has no use for: they would be ignored in silence."""
    path = Path(source.path)
    if is_hub_name(source.path) or not path.exists():
        return None
    settings = ["name", "data_dir", "revision", "streaming", *(["split"] if path.is_file() else [])]
    given = ", ".join(f"'{name}'" for name in settings if getattr(source, name))
    where = "a file" if path.is_file() else "a folder"
    return f"{given} is for data sets of the hub, and this is {where} here; leave it out" if given else None


def _read(source: Source) -> _Read:
    path = source.path
    kind = _kind(path)
    known = ", ".join([*(f"{ending}[.gz|.zst]" for ending in TEXT), *BINARY])
    if wrong := _wrong_settings(source):
        yield 0, _Broken(wrong, ends=True)
    elif Path(path).is_dir():
        if any((Path(path) / name).is_file() for name in _SAVED):
            try:
                yield from _saved(path, source)
            except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
                reason = f"cannot be read as a folder of datasets.save_to_disk ({error}); save it again"
                yield 0, _Broken(" ".join(reason.split()), ends=True)
        else:
            yield 0, _Broken("is a folder; name the file in it, or one written by datasets.save_to_disk", ends=True)
    elif is_hub_name(path):
        yield from _hub(source)
    elif not Path(path).exists():
        yield 0, _Broken(f"no such file (looked from {Path.cwd()}); check the path", ends=True)
    elif kind is None:
        yield 0, _Broken(f"unknown kind of file; supported are {known}", ends=True)
    else:
        yield from _file(path, kind)


def rows(source: Source) -> Iterator[Row]:
    """The rows of a source in its order, in bounded memory; at most ``source.rows`` of them.

    Yields:
        The line where a row begins (the row's number in formats without lines), counted from 1, and the row; a
        ``Fault`` in place of one that cannot be read. After a ``fatal`` fault nothing follows. A source without any
        rows is a fatal fault.
    """
    empty = True
    for line, row in islice(_read(source), source.rows):
        empty = False
        place = f"{source.path}:{line}" if line else source.path
        if isinstance(row, _Broken):
            yield line, Fault(place, str(row), row.column, row.ends)
            if row.ends:
                return
        elif isinstance(row, dict):
            yield line, row
        else:
            yield line, Fault(place, f"the row is {short(row)}, not an object with a value for each column")
    if empty:
        yield 0, Fault(source.path, "holds no rows; was it written completely?", fatal=True)
