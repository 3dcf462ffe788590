"""What a reader of files gives in place of a row that it cannot read, and what all readers share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from halos_pl.data.example import short

#: Line (row, where there are no lines; from 1, 0 for the source as a whole), and the row or a ``Broken``.
Read = Iterator[tuple[int, Any]]

CHUNK = 1 << 20  # bytes read at a time


class Broken(Exception):
    """A row that cannot be read. ``ends``: nor can any that follows."""

    def __init__(self, reason: str, column: str | None = None, ends: bool = False) -> None:
        super().__init__(reason)
        self.column, self.ends = column, ends


def too_large(most: int, size: int | None = None, ends: bool = False) -> Broken:
    """A row of more than ``most`` bytes; ``size`` is how many, where that is known."""
    what = f"takes {size / 1e6:,.1f} MB, more than" if size else "takes more than"
    rest = "; no row from here on can be read" if ends else ""
    return Broken(
        f"the row {what} max_row_mb: {most / 1e6:g}; remove it, or raise max_row_mb of the source{rest}", ends=ends
    )


def split_of(known: Sequence[str], wanted: str | None, what: str) -> str | Broken:
    """The split to read: the one that is wanted, or the only one there is; a Broken where that is none of ``known``."""
    if wanted is None and len(known) == 1:
        return known[0]
    if wanted in known:
        return str(wanted)
    wrong = f"has no split {short(wanted)}" if wanted else "has several splits"
    return Broken(f"the {what} {wrong}; name one of {', '.join(map(str, known))} as 'split'", ends=True)


def twice(names: Sequence[str]) -> str | None:
    """The first name that is there twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
