"""Reads the rows of a source: a file, a folder of ``datasets``, a data set on the hub, or rows in memory.

A new file format is one generator of (line, row) and one entry of ``TEXT`` or ``BINARY``. Nothing here depends on the
meaning of a row. Files are never wholly in memory, and a fault of a file is yielded like a row, not raised.
"""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from halos_pl.common.misplaced import misplaced
from halos_pl.data.arrow import BINARY, ROW_FAULTS, SAVED, saved
from halos_pl.data.broken import CHUNK, Broken, Read
from halos_pl.data.example import DataError, Fault, short
from halos_pl.data.memory import MemorySource, dataset_rows
from halos_pl.data.source import Source
from halos_pl.data.text import TEXT

#: The line (or row, in formats without lines; from 1, or 0 for the source as a whole) and its content.
Row = tuple[int, dict[str, Any] | Fault]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_name(path: str) -> bool:
    """Whether ``path`` is the name of a data set on the hub: ``owner/name``, and no such path exists."""
    return bool(_HUB_NAME.fullmatch(path)) and _kind(path) is None and not Path(path).exists()


def hub_version(source: Source) -> str:
    """The commit of a hub data set; offline, of its last download; without one, the requested revision."""
    import huggingface_hub
    from huggingface_hub import constants, file_download

    try:
        return str(huggingface_hub.HfApi().dataset_info(source.path, revision=source.revision, timeout=10).sha)
    except Exception:  # the hub's client raises errors of several HTTP libraries
        folder = file_download.repo_folder_name(repo_id=source.path, repo_type="dataset")
        ref = Path(constants.HF_HUB_CACHE) / folder / "refs" / (source.revision or "main")
        return ref.read_text(encoding="utf-8").strip() if ref.is_file() else source.revision or "main"


def _hub(source: Source) -> Read:
    import datasets

    number = 0
    try:
        dataset = datasets.load_dataset(
            source.path,
            source.name,
            data_dir=source.data_dir,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
        for number, row in dataset_rows(dataset, source):
            yield number, row
    except Exception as error:  # of the hub, the network, or the builder of the data set
        message = " ".join(str(error).split())
        if number:
            yield number + 1, Broken(f"reading stopped here ({type(error).__name__}: {message}); try again", ends=True)
        else:
            reason = (
                f"no such file or folder (relative to {Path.cwd()}), and no data set on the hub that can be loaded "
                f"({type(error).__name__}: {message}); check the path, 'name', 'data_dir', 'split', 'revision' and the "
                "network"
            )
            yield 0, Broken(reason, ends=True)


# Sources -----------------------------------------------------------------------------------------------

_PACKED = (".gz", ".zst")


def _kind(path: str) -> str | None:
    """The file extension that decides how a file is read; None for an unknown one."""
    name = Path(path).name.lower()
    for packed in _PACKED:
        if name.endswith(packed):
            ending = Path(name.removesuffix(packed)).suffix
            return ending if ending in TEXT else None
    ending = Path(name).suffix
    return ending if ending in TEXT or ending in BINARY else None


_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}


NOT_THERE = "no such file (relative to {}); check the path"


def refuse_missing(sources: Iterable[Source]) -> None:
    """Refuses missing sources and unknown file formats, before anything is loaded.

    Raises:
        DataError: names them.
    """
    sources = [source for source in sources if not isinstance(source, MemorySource)]
    missing = [source.path for source in sources if not Path(source.path).exists() and not is_hub_name(source.path)]
    if missing:
        raise DataError(f"{', '.join(missing)}: {NOT_THERE.format(Path.cwd())}")
    for source in sources:
        if Path(source.path).is_file() and _kind(source.path) is None and not irregular(source.path):
            raise DataError(f"{source.path}: {_unknown_kind(source.path)}")


def files_of(source: Source) -> list[Source]:
    """The source itself, or one source per data file of the folder or pattern (``part-*.parquet``) that it names.

    A folder of ``save_to_disk`` is one source.

    Raises:
        ValueError: there are several files and ``rows`` or ``skip`` is set, or the files are of several splits.
    """
    if isinstance(source, MemorySource):
        return [source]
    path = Path(source.path)
    files: list[Path] = []
    if path.is_dir():
        if not any((path / mark).exists() for mark in SAVED):
            files = [file for file in sorted(path.iterdir()) if file.is_file() and _kind(str(file))]
    elif not path.exists():
        files = [Path(name) for name in sorted(glob.glob(source.path))]
    splits = [_SPLITS & set(re.findall(r"[a-z]+", file.name.lower())) for file in files]
    held_out = sorted({word for words in splits if "train" not in words for word in words})
    if held_out and any("train" in words for words in splits):
        raise ValueError(
            f"{source.path}: the files belong to several splits (train, {', '.join(held_out)});"
            " name the files of one split"
        )
    for name in ("skip", "rows"):
        if (number := getattr(source, name)) and len(files) > 1:
            raise ValueError(
                f"{source.path}: {name} is {number}, which counts per file, but there are {len(files)} files; name them"
                " one by one"
            )
    return [replace(source, path=str(file)) for file in files] or [source]


def _opened(path: str) -> Any:
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.lower().endswith(".zst"):
        return pa.input_stream(path, compression="zstd")  # unlike zstandard, it notices a truncated file
    return open(path, "rb")


class _Counted(io.RawIOBase):
    """Counts the lines read from a stream, to name the line where it breaks off."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.lines = stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self.stream.read1(min(len(buffer), 1 << 16))  # little, so that little is lost when it breaks off
        buffer[: len(read)] = read
        self.lines += read.count(b"\n")
        return len(read)


def _file(path: str, kind: str, most: int) -> Read:
    """Rows of a file, and a fault of the file itself."""
    packed = path.endswith(_PACKED)
    place, counted = 0, None
    try:
        if kind in TEXT:
            with _opened(path) as stream:
                counted = _Counted(stream)
                for place, row in TEXT[kind](io.BufferedReader(counted, CHUNK), most):
                    yield place, row
        else:
            for place, row in BINARY[kind](path, most):
                yield place, row
    except (OSError, EOFError, zlib.error, pa.ArrowException, *ROW_FAULTS) as error:
        line = counted.lines + 1 if counted else place + 1
        if isinstance(error, EOFError) or "Truncated compressed stream" in str(error):
            what = "gzip" if path.endswith(".gz") else "zstd"
            reason = f"the {what} stream ends early: the file is truncated; copy or download it again"
        elif packed:
            what = "gzip" if path.endswith(".gz") else "Zstandard"
            reason = f"cannot be read ({error}); it is no {what} file, or damaged; copy or download it again"
        elif kind in BINARY:
            reason = f"cannot be read as {kind[1:].title()} ({error}); it may be truncated; copy or download it again"
        else:
            reason = f"cannot be read ({error}); check its permissions"
        yield line, Broken(" ".join(reason.split()), ends=True)


def irregular(path: str) -> str | None:
    """What is at ``path`` if it is neither file nor folder: opening it may block forever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # nothing is there
        return None
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    return next((what for is_one, what in kinds.items() if is_one(mode)), None)


def _wrong_settings(source: Source) -> str | None:
    """The fault of settings that would be silently ignored for a file; None if there are none."""
    path = Path(source.path)
    if is_hub_name(source.path) or not path.exists():
        return None
    settings = ["name", "data_dir", "revision", "streaming", *(["split"] if path.is_file() else [])]
    wrong = ", ".join(f"'{name}'" for name in settings if getattr(source, name))
    where = "a file" if path.is_file() else "a folder"
    return f"{wrong} is for data sets on the hub, but this is {where}; remove it" if wrong else None


def _unknown_kind(path: str) -> str:
    formats = ", ".join([*(f"{ending}[.gz|.zst]" for ending in TEXT), *BINARY])
    return "; ".join(filter(None, (f"unknown file format; supported are {formats}", misplaced(path))))


def _read(source: Source) -> Read:
    if isinstance(source, MemorySource):
        yield from source.read()
        return
    path = source.path
    kind = _kind(path)
    if wrong := _wrong_settings(source):
        yield 0, Broken(wrong, ends=True)
    elif what := irregular(path):
        yield 0, Broken(f"is {what}; write its content to a file, and name that", ends=True)
    elif Path(path).is_dir():
        if any((Path(path) / name).is_file() for name in SAVED):
            try:
                yield from saved(path, source.split, source.max_row)
            except (OSError, TypeError, KeyError, AttributeError, pa.ArrowException, *ROW_FAULTS) as error:
                reason = f"cannot be read as a folder of datasets.save_to_disk ({error}); save it again"
                yield 0, Broken(" ".join(reason.split()), ends=True)
        else:
            yield 0, Broken("is a folder; name the file in it, or one written by datasets.save_to_disk", ends=True)
    elif is_hub_name(path):
        yield from _hub(source)
    elif not Path(path).exists():
        yield 0, Broken(NOT_THERE.format(Path.cwd()), ends=True)
    elif kind is None:
        yield 0, Broken(_unknown_kind(path), ends=True)
    else:
        yield from _file(path, kind, source.max_row)


def rows(source: Source) -> Iterator[Row]:
    """The rows of a source in order, at most ``source.rows`` after the first ``source.skip``, in bounded memory.

    Yields:
        The line where a row begins (or the row's number), from 1, and the row, or a ``Fault`` for one that cannot be
        read. Nothing follows a ``fatal`` fault. A source without rows is a fatal fault. Faults of skipped rows are
        not reported, but no row after a fatal one can be read.
    """
    empty, number = True, 0
    stop = None if source.rows is None else source.skip + source.rows
    for number, (line, row) in enumerate(islice(_read(source), stop), start=1):
        if number <= source.skip and not (isinstance(row, Broken) and row.ends):
            continue
        empty = False
        place = source.place(line) if line else source.path
        if isinstance(row, Broken):
            # A library's message may quote bytes of a damaged file.
            reason = "".join(c if c.isprintable() else "?" for c in " ".join(str(row).split()))
            yield line, Fault(place, reason, row.column, row.ends)
            if row.ends:
                return
        elif isinstance(row, dict):
            yield line, row
        else:
            yield line, Fault(place, f"the row is {short(row)}, not an object with a value for each column")
    if empty:
        why = (
            f"skip is {source.skip}, but it has {number} rows"
            if number
            else "contains no rows; check that it was written completely"
        )
        yield 0, Fault(source.path, why, fatal=True)
