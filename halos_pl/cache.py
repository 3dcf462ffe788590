"""The cache of recomputable data: where it is, and its size limit."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

Kind = Literal["data", "models", "reference", "answers"]
#: The folder of sampled answers.
ANSWERS = "answers"
#: The folder of kept help pages, some kilobytes.
HELP = "help"
REFERENCE = Path("reference") / "logps.sqlite"
#: Bytes of that file; the least recently used log-probs make room for new ones.
LARGEST = 4 << 30
#: Share of the cache's disk, unless HALOS_CACHE_LIMIT is set.
DEFAULT_LIMIT = "20%"
_UNITS = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_KEY = re.compile(r"(gguf-)?[0-9a-f]{32}(?![0-9a-f])")
_REMOVED = ".removed"


class NoHomeError(OSError):
    """There is no home folder, as for a user ID unknown to a container."""


class CacheLimitError(ValueError):
    """HALOS_CACHE_LIMIT is neither a size nor a share of the disk."""


def cache_root() -> Path:
    """``$HALOS_CACHE``, by default ``~/.cache/halos_pl``. It may be deleted.

    Raises:
        NoHomeError: without either.
    """
    place = os.environ.get("HALOS_CACHE") or "~/.cache/halos_pl"
    try:
        if place.startswith("~") and not os.environ.get(
            "HOME", "unset"
        ):  # expanduser would return the root of the disk
            raise RuntimeError("HOME is empty")
        return Path(place).expanduser()
    except RuntimeError as error:
        raise NoHomeError("there is no home folder for the cache; set HALOS_CACHE to another folder") from error


def limit_setting() -> str:
    """The limit of the cache as set: ``20%``, ``50GB`` or ``none``."""
    return os.environ.get("HALOS_CACHE_LIMIT", "").strip() or DEFAULT_LIMIT


def limit() -> float:
    """The size limit in bytes; infinite without a limit.

    Raises:
        CacheLimitError: if ``$HALOS_CACHE_LIMIT`` is not valid.
    """
    setting = limit_setting()
    if setting.lower() == "none":
        return float("inf")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]?i?B?)", setting, re.IGNORECASE)
    if not size or (size[2] == "%" and float(size[1]) > 100):
        raise CacheLimitError(
            f"HALOS_CACHE_LIMIT is {setting!r}; it takes a size (50GB), a share of the disk (20%) or none"
        )
    if size[2] != "%":
        unit = size[2].upper().replace("I", "")
        return float(size[1]) * _UNITS[unit if unit.endswith("B") or not unit else f"{unit}B"]
    place = cache_root().absolute()
    existing = next(folder for folder in (place, *place.parents) if folder.is_dir())
    return float(size[1]) / 100 * shutil.disk_usage(existing).total


def size_text(size: float) -> str:
    """A size in readable units."""
    if size == float("inf"):
        return "any size"
    unit, scale = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6) if size >= 1e5 else ("KB", 1e3)
    return f"{size / scale:,.1f} {unit}"


# -- entries --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """An entry of the cache: a tokenized source, a converted model, the reference store, or the answers of a model.

    Attributes:
        kind: which of these.
        path: its folder or file.
        parts: the path, and leftovers of killed commands.
        size: bytes of all parts.
        used: when it was last used, seconds since the epoch.
    """

    kind: Kind
    path: Path
    parts: tuple[Path, ...]
    size: int
    used: float


def _mark(path: Path) -> Path:
    """The file beside an entry that has the time of its last use and is locked during use."""
    return path.with_name(f"{path.name}.used")


def _size(path: Path) -> int:
    size = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        with suppress(OSError):  # removed meanwhile
            size += file.stat().st_size if file.is_file() else 0
    return size


def _used(path: Path, parts: list[Path]) -> float:
    for place in (_mark(path), *parts):
        with suppress(OSError):
            return place.stat().st_mtime
    return 0.0


def entries(data: Path | None = None) -> list[Entry]:
    """The entries of the cache, least recently used first.

    Args:
        data: the folder of tokenized sources; default: the one in :func:`cache_root`.
    """
    root = cache_root()
    parts: dict[tuple[Kind, Path], list[Path]] = {}
    places: list[tuple[Kind, Path]] = [("models", path) for path in sorted(root.glob("gguf-*"))]
    places += [("data", path) for path in sorted((data or root / "data").glob("*"))]
    for kind, path in places:
        if (key := _KEY.match(path.name)) and path.is_dir():
            parts.setdefault((kind, path.with_name(key[0])), []).append(path)
    file = root / REFERENCE
    files = (file, file.with_suffix(".damaged"), *file.parent.glob(f"{file.name}-*"))
    if existing := [path for path in files if path.is_file()]:
        parts["reference", file] = existing
    for path in sorted((root / ANSWERS).glob("*.json*")):  # and leftovers of killed commands
        if path != _mark(path.with_suffix("")):
            parts.setdefault(("answers", path.with_name(f"{path.name.partition('.')[0]}.json")), []).append(path)
    found = [Entry(*key, tuple(own), sum(map(_size, own)), _used(key[1], own)) for key, own in parts.items()]
    return sorted(found, key=lambda entry: entry.used)


# -- use ------------------------------------------------------------------------------------------------


class Use:
    """Protects an entry from removal during the life of this object or its process, and records the use.

    Holds a shared POSIX lock on the file beside the entry, which other machines respect if the file system supports
    locks. Does nothing in a read-only cache, or without locks.

    Args:
        path: of the entry, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[str] | None = None
        with suppress(OSError, ImportError):
            import fcntl

            while True:
                file = _mark(path).open("a", encoding="utf-8")
                fcntl.flock(file, fcntl.LOCK_SH)  # waits while the entry is being removed
                if _is(file, _mark(path)):
                    break
                file.close()
            self._file = file
            os.utime(_mark(path))

    def end(self) -> None:
        """Allows the entry to be removed."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _is(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Whether no process uses an entry; none can begin to while this is entered."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    try:
        file = _mark(path).open("a", encoding="utf-8")
    except OSError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = _is(file, _mark(path))
        except OSError:
            free = False
        yield free
        if free:
            _mark(path).unlink(missing_ok=True)


def remove(entry: Entry) -> bool:
    """Removes an entry unless a running command uses it; returns whether it did."""
    with _unused(entry.path) as free:
        try:
            for part in reversed(entry.parts) if free else ():  # leftovers first
                # Renamed first, so that no process finds half of it.
                aside = part if part.name.endswith(_REMOVED) else part.with_name(part.name + _REMOVED)
                os.replace(part, aside)
                shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        except OSError:  # read-only
            return False
    return free


def in_use(folder: Path) -> bool:
    """Whether a running command uses or makes an entry of a folder."""
    for mark in folder.glob("*.used"):
        with _unused(mark.with_suffix("")) as free:
            if not free:
                return True
    return False


def make_room(data: Path | None = None) -> None:
    """Removes the least recently used entries until the cache is within its limit; entries in use stay.

    Args:
        data: as for :func:`entries`.
    """
    largest = limit()
    every = entries(data)
    size = sum(entry.size for entry in every)
    if size <= largest:
        return
    from lightning.pytorch.utilities import rank_zero_info  # here, as it takes seconds to import

    removed: list[Entry] = []
    for entry in every:
        if size > largest and remove(entry):
            size -= entry.size
            removed.append(entry)
    limited = f"the cache is limited to {size_text(largest)} (HALOS_CACHE_LIMIT is {limit_setting()})"
    if removed:
        days = (time.time() - removed[-1].used) / 86400
        rank_zero_info(
            f"halos: {limited}: removed entries that were not used for at least {days:.1f} days"
            f" ({size_text(sum(entry.size for entry in removed))} in {len(removed)} of {len(every)} entries)"
        )
    if size > largest:
        rank_zero_info(f"halos: {limited}, but entries in use take {size_text(size)}")
