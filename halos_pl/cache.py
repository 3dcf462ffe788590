"""The cache of recomputable data: its location and its size limit."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from halos_pl.common.files import host_name

Kind = Literal["data", "models", "reference", "answers"]
#: The folder of sampled answers.
ANSWERS = "answers"
#: The folder of cached help pages, a few kilobytes.
HELP = "help"
#: The folder of the reference store.
REFERENCE = Path("reference") / "logps"
#: Maximum size of that folder in bytes; the least recently used log-probs make room for new ones.
LARGEST = 4 << 30
#: The limit unless HALOS_CACHE_LIMIT is set: a share of the cache's disk.
DEFAULT_LIMIT = "20%"
_UNITS = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_KEY = re.compile(r"(gguf-)?[0-9a-f]{32}(?![0-9a-f])")
_REMOVED = ".removed"
_MARK = ".used"
#: Seconds after which the marks of entries in use are renewed, and after which another machine's mark expires. Clocks
#: of machines may differ by the rest.
RENEWED, EXPIRES = 600.0, 3600.0


class NoHomeError(OSError):
    """There is no home folder, as for a container's unknown user ID."""


class CacheLimitError(ValueError):
    """HALOS_CACHE_LIMIT is neither a size nor a share of the disk."""


def cache_root() -> Path:
    """The cache folder: ``$HALOS_CACHE``, by default ``~/.cache/halos_pl``. It may be deleted.

    Raises:
        NoHomeError: HALOS_CACHE is not set, and there is no home folder.
    """
    place = os.environ.get("HALOS_CACHE") or "~/.cache/halos_pl"
    try:
        # With an empty HOME, expanduser would return the root of the disk.
        if place.startswith("~") and not os.environ.get("HOME", "unset"):
            raise RuntimeError("HOME is empty")
        return Path(place).expanduser()
    except RuntimeError as error:
        raise NoHomeError("there is no home folder for the cache; set HALOS_CACHE to another folder") from error


def limit_setting() -> str:
    """The limit of the cache as set: ``20%``, ``50GB`` or ``none``."""
    return os.environ.get("HALOS_CACHE_LIMIT", "").strip() or DEFAULT_LIMIT


def size_of(text: str) -> float | None:
    """The bytes of a size such as ``50GB`` or ``500 MB``; None if the text is none."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", text.strip(), re.IGNORECASE)
    if not size:
        return None
    unit = size[2].upper().replace("I", "")
    return float(size[1]) * _UNITS[unit if unit.endswith("B") or not unit else f"{unit}B"]


def limit() -> float:
    """The size limit in bytes; infinite without a limit.

    Raises:
        CacheLimitError: ``$HALOS_CACHE_LIMIT`` is not valid.
    """
    setting = limit_setting()
    if setting.lower() == "none":
        return float("inf")
    size, share = size_of(setting), re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", setting)
    if size is not None:
        return size
    if share is None or float(share[1]) > 100:
        raise CacheLimitError(
            f"HALOS_CACHE_LIMIT is {setting!r}; it must be a size (50GB), a share of the disk (20%) or none"
        )
    place = cache_root().absolute()
    existing = next(folder for folder in (place, *place.parents) if folder.is_dir())
    return float(share[1]) / 100 * shutil.disk_usage(existing).total


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
        kind: kind of entry.
        path: folder or file of the entry.
        parts: ``path``, and leftovers of killed commands.
        size: size of all parts in bytes.
        used: time of the last use, seconds since the epoch.
    """

    kind: Kind
    path: Path
    parts: tuple[Path, ...]
    size: int
    used: float


def mark_of(path: Path) -> Path:
    """The file beside an entry that records its last use on this machine and is locked during use."""
    return path.with_name(f"{path.name}.{host_name()}{_MARK}")


def _marks(path: Path) -> list[Path]:
    """The marks of an entry on all machines."""
    return [mark for mark in path.parent.glob(f"{path.name}.*{_MARK}") if _marked(mark) == path]


def _marked(mark: Path) -> Path:
    return mark.with_name(mark.name.rsplit(".", 2)[0])


def _size(path: Path) -> int:
    size = 0
    files = [path] if path.is_file() else (Path(place, name) for place, _, names in os.walk(path) for name in names)
    for file in files:
        with suppress(OSError):  # removed meanwhile
            size += file.stat().st_size if file.is_file() else 0
    return size


def _time(path: Path) -> float:
    """The time of the last change; 0 if the file has been removed meanwhile."""
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _used(path: Path, parts: list[Path]) -> float:
    return max(map(_time, _marks(path))) if _marks(path) else _time(parts[0])


def entries(data: Path | None = None) -> list[Entry]:
    """The entries of the cache, least recently used first.

    Args:
        data: folder of tokenized sources; default: the one in :func:`cache_root`.
    """
    root = cache_root()
    parts: dict[tuple[Kind, Path], list[Path]] = {}
    places: list[tuple[Kind, Path]] = [("models", path) for path in sorted(root.glob("gguf-*"))]
    places += [("data", path) for path in sorted((data or root / "data").glob("*"))]
    for kind, path in places:
        if (key := _KEY.match(path.name)) and path.is_dir():
            parts.setdefault((kind, path.with_name(key[0])), []).append(path)
    store = root / REFERENCE
    earlier = store.with_suffix(".sqlite")  # an earlier version's store, no longer read
    for path in sorted(store.parent.glob(f"{store.name}*")):
        if path.suffix != _MARK:
            parts.setdefault(("reference", earlier if path.name.startswith(earlier.name) else store), []).append(path)
    for path in sorted((root / ANSWERS).glob("*.json*")):  # and leftovers of killed commands
        if path.suffix != _MARK:
            parts.setdefault(("answers", path.with_name(f"{path.name.partition('.')[0]}.json")), []).append(path)
    every = [Entry(*key, tuple(paths), sum(map(_size, paths)), _used(key[1], paths)) for key, paths in parts.items()]
    return sorted(every, key=lambda entry: entry.used)


# -- use ------------------------------------------------------------------------------------------------


class Use:
    """Protects an entry from removal until :meth:`end` is called or the process ends, and records the use.

    On this machine, a shared POSIX lock on a file beside the entry protects it. To other machines that share the file
    system, which may have no locks, the time of that file tells that the entry is in use; a thread renews it. Does
    nothing if the cache is read-only.

    Args:
        path: path of the entry, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[str] | None = None
        self.mark = mark_of(path)
        with suppress(OSError, ImportError):
            import fcntl

            while True:
                file = self.mark.open("a", encoding="utf-8")
                with suppress(OSError):  # the file system has no locks
                    fcntl.flock(file, fcntl.LOCK_SH)  # waits while the entry is being removed
                if _is(file, self.mark):
                    break
                file.close()
            self._file = file
            os.utime(self.mark)
            _renew(self)

    def end(self) -> None:
        """Allows the entry to be removed."""
        _in_use.discard(self)
        if self._file is not None:
            self._file.close()
            self._file = None


_in_use: weakref.WeakSet[Use] = weakref.WeakSet()
_renewing = threading.Lock()


def _renew(use: Use) -> None:
    """Lets a thread renew the mark until the use ends."""
    _in_use.add(use)
    if _renewing.acquire(blocking=False):
        threading.Thread(target=_renew_all, name="halos cache", daemon=True).start()


def renew_in_forks() -> None:
    """Leaves it to the processes that are forked from this one to renew marks; each must call :func:`renew`."""
    _renewing.acquire()


def renew() -> None:
    """Renews the marks of the entries that were in use when this process was forked."""
    _renewing.release()
    for use in list(_in_use):
        _renew(use)


def _renew_all() -> None:
    while True:
        time.sleep(RENEWED)
        for use in list(_in_use):
            with suppress(OSError):
                os.utime(use.mark)


def _is(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _used_elsewhere(path: Path) -> bool:
    """Whether a command on another machine uses an entry, or used it not long ago."""
    return any(time.time() - _time(mark) < EXPIRES for mark in _marks(path) if mark != mark_of(path))


@contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Whether an entry is unused; no process on this machine can start to use it in this context."""
    mark = mark_of(path)
    try:
        import fcntl

        before = _time(mark)
        file = mark.open("a", encoding="utf-8")
    except (OSError, ImportError):
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = _is(file, mark)
        except BlockingIOError:
            free = False
        except OSError:  # the file system has no locks
            free = time.time() - before > EXPIRES
        free = free and not _used_elsewhere(path)
        yield free
        for each in _marks(path) if free else ():
            each.unlink(missing_ok=True)


def remove(entry: Entry) -> bool:
    """Removes an entry unless a running command uses it; returns whether it did."""
    with _unused(entry.path) as free:
        try:
            for part in reversed(entry.parts) if free else ():  # leftovers first
                # Renamed first, so that no process sees part of it.
                aside = part if part.name.endswith(_REMOVED) else part.with_name(part.name + _REMOVED)
                os.replace(part, aside)
                if part == entry.path and _used_elsewhere(part):  # since then
                    os.replace(aside, part)
                    return False
                shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        except OSError:  # read-only
            return False
    return free


def in_use(folder: Path) -> bool:
    """Whether a running command uses or creates an entry in a folder."""
    for path in {_marked(mark) for mark in folder.glob(f"*{_MARK}")}:
        with _unused(path) as free:
            if not free:
                return True
    return False


def make_room(data: Path | None = None) -> None:
    """Removes the least recently used entries until the cache is within its limit; entries in use stay.

    Args:
        data: as in :func:`entries`.
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
            f"halos: {limited}: removed entries not used for at least {days:.1f} days"
            f" ({size_text(sum(entry.size for entry in removed))} in {len(removed)} of {len(every)} entries)"
        )
    if size > largest:
        rank_zero_info(f"halos: {limited}, but entries in use take {size_text(size)}")
