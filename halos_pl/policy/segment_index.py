"""Where the values of a store of segments are: an index of their keys in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Bytes of a key.
KEY = 16
PLACE = np.dtype([("segment", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("sum", "<u4")])


class Place(NamedTuple):
    """Where a value is; the segment 0 does not exist."""

    segment: int
    offset: int
    length: int
    sum: int


_NOWHERE = Place(0, 0, 0, 0)


class Index:
    """The place of each key: sorted arrays of 36 bytes per key, and a dict of those added last."""

    def __init__(self) -> None:
        self._keys: NDArray[Any] = np.empty(0, f"S{KEY}")
        self._places: NDArray[Any] = np.empty(0, PLACE)
        self._recent: dict[bytes, Place] = {}

    def add(self, keys: NDArray[Any], places: NDArray[Any]) -> None:
        """Adds entries, which replace earlier ones of the same keys."""
        if len(keys) > max(1024, len(self._keys) // 8):
            self._merge()
            self._sort(keys, places)
            return
        raw = keys.tobytes()
        for i, place in enumerate(places.tolist()):
            self._recent[raw[KEY * i : KEY * (i + 1)]] = Place(*place)
        if len(self._recent) > max(4096, len(self._keys) // 8):
            self._merge()

    def drop(self, key: bytes) -> None:
        """Removes an entry."""
        self._recent[key] = _NOWHERE

    def find(self, wanted: Sequence[bytes]) -> dict[bytes, Place]:
        """The places of those keys that are in the index, including those in segments that have been removed."""
        places = {key: self._recent[key] for key in wanted if key in self._recent}
        rest = [key for key in wanted if key not in places]
        if rest and len(self._keys):
            keys = np.frombuffer(b"".join(rest), f"S{KEY}")
            index = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
            for i in (self._keys[index] == keys).nonzero()[0].tolist():
                places[rest[i]] = Place(*self._places[index[i]].item())
        return {key: place for key, place in places.items() if place.segment}

    def entries(self, segments: Sequence[int]) -> dict[bytes, Place]:
        """The entries in these segments, by segment and offset."""
        self._merge()
        chosen = np.isin(self._places["segment"], segments).nonzero()[0]
        raw = self._keys[chosen].tobytes()
        every = {raw[KEY * i : KEY * (i + 1)]: Place(*p) for i, p in enumerate(self._places[chosen].tolist())}
        return dict(sorted(every.items(), key=lambda entry: (segments.index(entry[1].segment), entry[1].offset)))

    def count(self, segments: Sequence[int]) -> int:
        """The number of entries in these segments."""
        self._merge()
        return int(np.isin(self._places["segment"], segments).sum())

    def _merge(self) -> None:
        if self._recent:
            keys = np.frombuffer(b"".join(self._recent), f"S{KEY}")
            self._sort(keys, np.array(list(self._recent.values()), PLACE))
            self._recent = {}

    def _sort(self, keys: NDArray[Any], places: NDArray[Any]) -> None:
        keys, places = np.concatenate([self._keys, keys]), np.concatenate([self._places, places])
        order = np.argsort(keys, kind="stable")
        last = np.append(keys[order][1:] != keys[order][:-1], True) if len(order) else order
        self._keys, self._places = keys[order][last], places[order][last]
