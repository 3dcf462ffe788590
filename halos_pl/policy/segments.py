"""A server-free key-value store in a folder, for many writers on many machines.

Each process appends to files of its own, the segments, so it needs no lock of the file system: the folder may be on NFS
or Lustre. A segment is a sequence of blocks, one per :meth:`Segments.put`: a header, the keys with the lengths and
checksums of their values, and the values. What a killed writer left incomplete is ignored. Segments are never changed
once their writer stops, only replaced by shorter or merged ones; no race can do more than lose entries.
"""

from __future__ import annotations

import errno
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halos_pl.common.files import PART, unique_name
from halos_pl.common.leases import Lease
from halos_pl.policy.segment_blocks import ENTRY, HEADER, Block, block_at, encoded, next_block
from halos_pl.policy.segment_index import KEY, Index

SUFFIX = ".seg"
#: Maximum size of a segment in bytes, unless the store's limit is small.
LARGEST_SEGMENT = 64 << 20
#: Seconds after which the folder is listed again, for the entries of other processes.
LIST_AGAIN = {"an entry is missing": 10.0, "all entries are there": 600.0}
#: A segment that has not grown for so many seconds has no writer.
IDLE = 3600.0
#: Number of small segments of ended writers that are merged.
SMALL = 32
_DAY = 86400
_OPEN_FILES = 64


@dataclass
class _Segment:
    """A file: its number in the index, its size and age when last listed, and up to where it has been read."""

    number: int
    path: Path
    size: int = 0
    used: float = 0.0  # time of the last write or use, in seconds since the epoch
    read: int = 0


class Segments:
    """Values of up to 4 GB under keys of 16 bytes, in the segments of a folder.

    Args:
        folder: the folder, created if it is missing.
        largest: maximum size of the folder in bytes; the least recently used segments make room for new entries.
        read_only: whether the folder is only read; :meth:`put` must not be called then.

    Attributes:
        damaged: number of damaged values and blocks that were found.

    Raises:
        OSError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path, largest: float = float("inf"), *, read_only: bool = False) -> None:
        self.folder, self.largest, self.damaged = folder, largest, 0
        self._segment_size = min(LARGEST_SEGMENT, largest / 16)
        self._index, self._segments = Index(), dict[str, _Segment]()
        self._by_number: dict[int, _Segment] = {}
        self._files: dict[int, int] = {}
        self._number = self._pid = 0
        self._listed = 0.0
        self._writing: _Segment | None = None
        if read_only:
            return self._list()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        self._lease = Lease(folder / ".compacting")
        self._list()
        if self._size > self.largest or len(self._small()) > SMALL:
            self._compact()

    # Reading -----------------------------------------------------------------------------------------

    def get(self, wanted: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that are in the store, checked against their checksums.

        Raises:
            OSError: the folder cannot be read.
        """
        wanted = list(dict.fromkeys(wanted))
        stored, lost = self._read(wanted)
        missing = [key for key in wanted if key not in stored]
        after = LIST_AGAIN["an entry is missing" if missing else "all entries are there"]
        if lost or time.monotonic() - self._listed > after:
            self._list()
            stored |= self._read(missing)[0]
        return stored

    def _read(self, wanted: Sequence[bytes]) -> tuple[dict[bytes, bytes], bool]:
        """The values, and whether a segment has been removed by another process."""
        stored: dict[bytes, bytes] = {}
        lost = False
        for key, place in sorted(self._index.find(wanted).items(), key=lambda item: item[1]):
            segment = self._by_number.get(place.segment)
            if segment is None:
                continue
            try:
                value = os.pread(self._open(segment), place.length, place.offset)
            except OSError:  # also ESTALE
                self._forget(segment)
                lost = True
                continue
            if len(value) == place.length and zlib.crc32(key + value) == place.sum:
                stored[key] = value
                self._touch(segment)
            else:
                self.damaged += 1
                self._index.drop(key)
                self._writing = None  # a new segment is read after the damaged one
        return stored, lost

    def _open(self, segment: _Segment) -> int:
        if segment.number not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[segment.number] = os.open(segment.path, os.O_RDONLY)
        return self._files[segment.number]

    def _touch(self, segment: _Segment) -> None:
        """Records the use of a segment, once a day."""
        now = time.time()
        if now - segment.used > _DAY:
            segment.used = now
            with suppress(OSError):  # of another user
                os.utime(segment.path)

    def _forget(self, segment: _Segment) -> None:
        self._segments.pop(segment.path.name, None)
        self._by_number.pop(segment.number, None)
        if (fd := self._files.pop(segment.number, None)) is not None:
            os.close(fd)
        if segment is self._writing:
            self._writing = None

    def _list(self) -> None:
        """Reads what has been written since the last time, and forgets what has been removed."""
        names = sorted(path.name for path in self.folder.glob(f"*{SUFFIX}"))
        for name in self._segments.keys() - set(names):
            self._forget(self._segments[name])
        keys: list[NDArray[Any]] = []
        places: list[NDArray[Any]] = []
        for name in names:  # the order in which they were begun
            segment = self._segments.get(name) or self._add(self.folder / name)
            try:
                state = segment.path.stat()
                if state.st_size != segment.size:
                    if (fd := self._files.pop(segment.number, None)) is not None:
                        os.close(fd)  # on NFS, only a file opened anew shows what others have written
                    for block in self._blocks(segment, state.st_size):
                        keys.append(block.entries["key"])
                        places.append(block.places(segment.number))
                segment.size, segment.used = state.st_size, state.st_mtime
            except OSError:
                self._forget(segment)
        if keys:
            self._index.add(np.concatenate(keys), np.concatenate(places))
        self._listed = time.monotonic()

    def _add(self, path: Path) -> _Segment:
        self._number += 1
        segment = self._segments[path.name] = self._by_number[self._number] = _Segment(self._number, path)
        return segment

    def _blocks(self, segment: _Segment, size: int) -> Iterator[Block]:
        """The blocks from where the segment has been read; a damaged one is skipped."""
        fd = self._open(segment)
        while segment.read < size:
            block = block_at(fd, segment.read, size)
            if block is None:
                # Damaged if an intact one follows; else its writer was killed, or is writing.
                place = next_block(fd, segment.read + 1, size)
                if place is None:
                    return
                self.damaged += 1
                segment.read = place
                continue
            yield block
            segment.read = block.end

    # Writing -----------------------------------------------------------------------------------------

    def put(self, values: Mapping[bytes, bytes]) -> None:
        """Stores values; other processes see them the next time that they list the folder.

        A key that is in the store already keeps its value.

        Raises:
            OSError: the values cannot be written, as on a full disk.
        """
        stored = self._index.find(list(values))
        new = {k: v for k, v in values.items() if k not in stored or stored[k].segment not in self._by_number}
        if not new:
            return
        try:
            self._append(new)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            self.folder.mkdir(parents=True, exist_ok=True)  # another process has removed the segment or the folder
            self._append(new)
        if self._size > self.largest:
            self._compact()

    def _append(self, values: Mapping[bytes, bytes]) -> None:
        now, segment = time.time(), self._writing
        if (
            segment is None
            or self._pid != os.getpid()
            or segment.size >= self._segment_size
            or now - segment.used > IDLE / 2
        ):
            segment = self._add(self._new_path())
            self._pid = os.getpid()
        self._writing = None  # unless all goes well
        block, start = encoded(values), segment.size
        fd = os.open(segment.path, os.O_WRONLY | os.O_APPEND | (0 if start else os.O_CREAT | os.O_EXCL), 0o666)
        try:
            if os.fstat(fd).st_size != start:
                raise OSError(errno.ESTALE, "changed by another program", str(segment.path))
            _write(fd, block)
        except OSError:
            with suppress(OSError):
                os.ftruncate(fd, start) if start else segment.path.unlink()
            raise
        finally:
            os.close(fd)  # on NFS, this shows it to other machines, or fails
        segment.used = now
        segment.size = segment.read = start + len(block)
        keys = np.frombuffer(b"".join(values), f"S{KEY}")
        entries = np.frombuffer(block, ENTRY, len(values), HEADER.size)
        first = start + HEADER.size + len(values) * ENTRY.itemsize
        self._index.add(keys, Block(entries, first, segment.size).places(segment.number))
        self._writing = segment

    @property
    def _size(self) -> int:
        return sum(segment.size for segment in self._segments.values())

    # Limits ------------------------------------------------------------------------------------------

    def _small(self) -> list[_Segment]:
        """Segments below half the full size whose writers have ended, the oldest first."""
        now = time.time()
        return [
            segment
            for _, segment in sorted(self._segments.items())
            if segment.size < self._segment_size / 2 and now - segment.used > IDLE
        ]

    def _compact(self) -> None:
        """Drops the least recently used entries beyond the limit, and merges small segments.

        Does nothing while another process does the same. If two do it at once after all, some entries are stored twice.
        """
        with suppress(FileNotFoundError, PermissionError), self._lease.held(wait=False) as held:
            if not held:
                return
            self._list()
            if self._size > self.largest:
                self._drop(0.9 * self.largest)  # so that this is rare
            if len(small := self._small()) > SMALL:
                self._merge(small)
            for path in self.folder.glob(f"*{PART}"):
                if time.time() - path.stat().st_mtime > IDLE:
                    path.unlink()
            self._list()

    def _drop(self, room: float) -> None:
        latest = sorted(self._segments.values(), key=lambda each: (each.used, each.path.name), reverse=True)
        total = np.cumsum([segment.size for segment in latest])
        fits = int((total <= room).sum())
        for segment in reversed(latest[fits + 1 :]):
            self._remove(segment)
        self._replace([latest[fits]], room - int(total[fits]) + latest[fits].size)  # keeps its last entries

    def _merge(self, segments: list[_Segment]) -> None:
        group: list[_Segment] = []
        for segment in [*segments, None]:
            if segment is None or sum(each.size for each in group) + segment.size > self._segment_size:
                if len(group) > 1:
                    self._replace(group, float("inf"))
                group = []
            if segment is not None:
                group.append(segment)

    def _replace(self, segments: list[_Segment], room: float) -> None:
        """Replaces segments by one with their last entries, as many as fit into ``room`` bytes."""
        kept = list(self._index.entries([segment.number for segment in segments]).items())
        sizes = np.cumsum([place.length + ENTRY.itemsize for _, place in reversed(kept)])
        kept = kept[len(kept) - int((sizes + HEADER.size <= room).sum()) :]
        values, _ = self._read([key for key, _ in kept])
        if values:
            path = self._new_path()
            part = path.with_suffix(PART)
            part.write_bytes(encoded({key: values[key] for key, _ in kept if key in values}))
            latest = max(segment.used for segment in segments)
            os.utime(part, (latest, latest))
            os.replace(part, path)
        for segment in segments:
            self._remove(segment)

    def _remove(self, segment: _Segment) -> None:
        segment.path.unlink(missing_ok=True)
        self._forget(segment)

    def _new_path(self) -> Path:
        return self.folder / f"{time.time_ns():016x}.{unique_name()}{SUFFIX}"  # sorted by time

    def __len__(self) -> int:
        """The number of entries."""
        return self._index.count(list(self._by_number))

    def close(self) -> None:
        """Closes the files."""
        for fd in self._files.values():
            os.close(fd)
        self._files = {}


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
