"""Rows that cannot be read, and other things that all file readers share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from halos_pl.data.example import short

#: The line (or row, in formats without lines; from 1, or 0 for the source as a whole), and the row or a ``Broken``.
Read = Iterator[tuple[int, Any]]

CHUNK = 1 << 20  # bytes read at a time


class Broken(Exception):
    """A row that cannot be read; with ``ends``, nor can any row after it."""

    def __init__(self, reason: str, column: str | None = None, ends: bool = False) -> None:
        super().__init__(reason)
        self.column, self.ends = column, ends


def too_large(most: int, size: int | None = None, ends: bool = False) -> Broken:
    """The fault of a row of more than ``most`` bytes; ``size`` is its size if known."""
    what = f"takes {size / 1e6:,.1f} MB, more than" if size else "takes more than"
    rest = "; no row from here on can be read" if ends else ""
    return Broken(
        f"the row {what} max_row_mb: {most / 1e6:g}; remove it, or raise max_row_mb of the source{rest}", ends=ends
    )


def split_of(splits: Sequence[str], wanted: str | None, what: str) -> str | Broken:
    """The split to read: ``wanted``, or the only one; a Broken if that is none of ``splits``."""
    if wanted is None and len(splits) == 1:
        return splits[0]
    if wanted in splits:
        return str(wanted)
    wrong = f"has no split {short(wanted)}" if wanted else "has several splits"
    return Broken(f"the {what} {wrong}; name one of {', '.join(map(str, splits))} as 'split'", ends=True)


def twice(names: Sequence[str]) -> str | None:
    """The first name that occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
