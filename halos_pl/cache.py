"""Where things are kept that can be computed again, and how much room they may take."""

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
#: Of the disk that the cache is on, where HALOS_CACHE_LIMIT says nothing.
DEFAULT_LIMIT = "20%"
_UNITS = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_KEY = re.compile(r"(gguf-)?[0-9a-f]{32}(?![0-9a-f])")
_REMOVED = ".removed"


class NoHomeError(OSError):
    """There is no home folder, as for a user ID without an entry in a container."""


class CacheLimitError(ValueError):
    """HALOS_CACHE_LIMIT is neither a size nor a share of the disk."""


def cache_root() -> Path:
    """``$HALOS_CACHE``, else ``~/.cache/halos_pl``: converted models and tokenised data. It may be deleted.

    Raises:
        NoHomeError: where neither is known.
    """
    place = os.environ.get("HALOS_CACHE") or "~/.cache/halos_pl"
    try:
        if place.startswith("~") and not os.environ.get("HOME", "unset"):  # it would be the root of the disk
            raise RuntimeError("HOME is empty")
        return Path(place).expanduser()
    except RuntimeError as error:
        raise NoHomeError("the user has no home folder to keep a cache in; HALOS_CACHE names another one") from error


def limit_setting() -> str:
    """The limit of the cache as it was set: ``20%``, ``50GB`` or ``none``."""
    return os.environ.get("HALOS_CACHE_LIMIT", "").strip() or DEFAULT_LIMIT


def limit() -> float:
    """Bytes that the cache may take; infinite without a limit.

    Raises:
        CacheLimitError: where ``$HALOS_CACHE_LIMIT`` is no size.
    """
    given = limit_setting()
    if given.lower() == "none":
        return float("inf")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]?i?B?)", given, re.IGNORECASE)
    if not found or (found[2] == "%" and float(found[1]) > 100):
        raise CacheLimitError(
            f"HALOS_CACHE_LIMIT is {given!r}; it takes a size (50GB), a share of the disk (20%) or none"
        )
    if found[2] != "%":
        unit = found[2].upper().replace("I", "")
        return float(found[1]) * _UNITS[unit if unit.endswith("B") or not unit else f"{unit}B"]
    place = cache_root().absolute()
    there = next(folder for folder in (place, *place.parents) if folder.is_dir())
    return float(found[1]) / 100 * shutil.disk_usage(there).total


def size_text(size: float) -> str:
    """A size as people read it."""
    if size == float("inf"):
        return "any size"
    unit, scale = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6) if size >= 1e5 else ("KB", 1e3)
    return f"{size / scale:,.1f} {unit}"


# -- entries --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One thing in the cache: a tokenised source, a converted model, the reference store, or the answers of a model.

    Attributes:
        kind: which of them.
        path: its folder or file.
        parts: that, and what a killed command has left of it.
        size: bytes of all parts.
        used: when it was last used, seconds since the epoch.
    """

    kind: Kind
    path: Path
    parts: tuple[Path, ...]
    size: int
    used: float


def _mark(path: Path) -> Path:
    """The file beside an entry whose time is that of its last use, and that is locked while it is used."""
    return path.with_name(f"{path.name}.used")


def _size(path: Path) -> int:
    size = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        with suppress(OSError):  # gone meanwhile
            size += file.stat().st_size if file.is_file() else 0
    return size


def _used(path: Path, parts: list[Path]) -> float:
    for place in (_mark(path), *parts):
        with suppress(OSError):
            return place.stat().st_mtime
    return 0.0


def entries(data: Path | None = None) -> list[Entry]:
    """What the cache holds, that which was used longest ago first.

    Args:
        data: the folder of tokenised sources, by default the one in :func:`cache_root`.
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
    if there := [path for path in files if path.is_file()]:
        parts["reference", file] = there
    for path in sorted((root / ANSWERS).glob("*.json*")):  # with what a killed command has left of one
        if path != _mark(path.with_suffix("")):
            parts.setdefault(("answers", path.with_name(f"{path.name.partition('.')[0]}.json")), []).append(path)
    found = []
    for (kind, path), own in parts.items():
        found.append(Entry(kind, path, tuple(own), sum(map(_size, own)), _used(path, own)))
    return sorted(found, key=lambda entry: entry.used)


# -- use ------------------------------------------------------------------------------------------------


class Use:
    """Keeps an entry from being removed for as long as this object or its process lives, and notes that it is used.

    A shared POSIX lock on the file beside the entry, which other machines see where the file system has such locks. In
    a cache that is only read, or where there are no locks, it does nothing.

    Args:
        path: of the entry, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[str] | None = None
        with suppress(OSError, ImportError):
            import fcntl

            while True:
                file = _mark(path).open("a", encoding="utf-8")
                fcntl.flock(file, fcntl.LOCK_SH)  # waits while the entry is removed
                if _is(file, _mark(path)):
                    break
                file.close()
            self._file = file
            os.utime(_mark(path))

    def end(self) -> None:
        """Lets the entry be removed."""
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
    """Whether nobody uses an entry; while entered nobody begins to."""
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
    """Removes an entry, unless a running command uses it; whether it did."""
    with _unused(entry.path) as free:
        try:
            for part in reversed(entry.parts) if free else ():  # first what was left under that other name
                # Under another name first: nobody finds half of it.
                aside = part if part.name.endswith(_REMOVED) else part.with_name(part.name + _REMOVED)
                os.replace(part, aside)
                shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        except OSError:  # of a cache that may only be read
            return False
    return free


def in_use(folder: Path) -> bool:
    """Whether a running command uses an entry of a folder, or makes one."""
    for mark in folder.glob("*.used"):
        with _unused(mark.with_suffix("")) as free:
            if not free:
                return True
    return False


def make_room(data: Path | None = None) -> None:
    """Removes what was used longest ago until the cache is within its limit; what a command uses stays.

    Args:
        data: as for :func:`entries`.
    """
    most = limit()
    found = entries(data)
    size = sum(entry.size for entry in found)
    if size <= most:
        return
    from lightning.pytorch.utilities import rank_zero_info  # here, as it takes seconds to import

    removed: list[Entry] = []
    for entry in found:
        if size > most and remove(entry):
            size -= entry.size
            removed.append(entry)
    said = f"the cache may take {size_text(most)} (HALOS_CACHE_LIMIT is {limit_setting()})"
    if removed:
        days = (time.time() - removed[-1].used) / 86400
        rank_zero_info(
            f"halos: {said}: what was used longest ago, at least {days:.1f} days, was removed"
            f" ({size_text(sum(entry.size for entry in removed))} in {len(removed)} of {len(found)} entries)"
        )
    if size > most:
        rank_zero_info(f"halos: {said}, but what is in use takes {size_text(size)}")
