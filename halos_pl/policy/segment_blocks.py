"""The format of a segment: blocks of a header, the entries (key, length and checksum of a value), and the values."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halos_pl.policy.segment_index import KEY, PLACE

_MAGIC = b"halosV1\n"
HEADER = struct.Struct("<8sIIQ")  # magic, number of entries, checksum of the block but its values, bytes of the values
ENTRY = np.dtype([("key", f"S{KEY}"), ("length", "<u4"), ("sum", "<u4")])


class Block(NamedTuple):
    """The entries of a block, the offset of its first value, and that of the block's end."""

    entries: NDArray[Any]
    values: int
    end: int

    def places(self, segment: int) -> NDArray[Any]:
        """Where the values are, ``PLACE`` [n], in a segment of this number."""
        places = np.empty(len(self.entries), PLACE)
        places["segment"], places["length"], places["sum"] = segment, self.entries["length"], self.entries["sum"]
        ends = np.cumsum(self.entries["length"], dtype=np.uint64)
        places["offset"] = self.values + ends - self.entries["length"]
        return places


def block_at(fd: int, start: int, size: int) -> Block | None:
    """The block that begins at ``start`` of a file of ``size`` bytes; None if it is damaged or incomplete."""
    head = os.pread(fd, HEADER.size + 4096, start)
    if len(head) < HEADER.size:
        return None
    magic, number, checksum, values = HEADER.unpack_from(head)
    first = start + HEADER.size + number * ENTRY.itemsize
    if magic != _MAGIC or first + values > size:
        return None
    raw = head[HEADER.size :][: number * ENTRY.itemsize]
    raw += os.pread(fd, number * ENTRY.itemsize - len(raw), start + HEADER.size + len(raw))
    if _checksum(number, values, raw) != checksum:
        return None
    return Block(np.frombuffer(raw, ENTRY), first, first + values)


def _checksum(number: int, values: int, entries: bytes) -> int:
    return zlib.crc32(entries, zlib.crc32(f"{number} {values}".encode()))


def next_block(fd: int, start: int, size: int) -> int | None:
    """Where the first intact block after ``start`` begins."""
    while start < size:
        if not (chunk := os.pread(fd, 1 << 20, start)):  # the file has become shorter
            return None
        place = chunk.find(_MAGIC)
        if place < 0:
            start += max(1, len(chunk) - len(_MAGIC) + 1)
        elif block_at(fd, start + place, size):
            return start + place
        else:
            start += place + 1
    return None


def encoded(values: Mapping[bytes, bytes]) -> bytes:
    """A block with these values.

    Raises:
        ValueError: a key does not have 16 bytes.
    """
    if any(len(key) != KEY for key in values):
        raise ValueError(f"keys must have {KEY} bytes")
    entries = np.empty(len(values), ENTRY)
    entries["key"] = np.frombuffer(b"".join(values), f"S{KEY}")
    entries["length"] = [len(value) for value in values.values()]
    entries["sum"] = [zlib.crc32(key + value) for key, value in values.items()]
    raw, data = entries.tobytes(), b"".join(values.values())
    return HEADER.pack(_MAGIC, len(values), _checksum(len(values), len(data), raw), len(data)) + raw + data
