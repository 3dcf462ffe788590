"""A source as checked examples: every fault names its file, line and column, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from halos_pl.data import formats
from halos_pl.data.example import Example, Fault, Skipped
from halos_pl.data.schemas import SCHEMAS, BadRow, Parse, Schema, check, find, refuse_lost
from halos_pl.data.source import Source


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row with ``columns`` (new name: name in the file) under their new names."""
    if not columns:
        return row
    moved = {new: row[old] for new, old in columns.items() if old in row}
    taken = {*columns, *columns.values()}
    return {name: value for name, value in row.items() if name not in taken} | moved


def _items(parse: Parse, row: dict[str, Any], place: str, source: Source) -> Iterator[Example | Fault | Skipped]:
    try:
        yield from parse(row, place)
    except BadRow as bad:
        yield bad.fault(place, source.columns)


def read(source: Source) -> Iterator[Example | Fault | Skipped]:
    """What each row of a source says, in its order: one example or several, a fault, or that it was skipped and why.

    Memory is bounded by the largest row (``oasst``: by the texts of the source, whose trees need all of it).

    The schema is the one named by ``source.schema``, or that of the first row that has the columns of one. Extra
    columns are ignored; a row of another schema is a fault. A fault with ``fatal`` is the last of the source.
    """
    schema: Schema | None = None
    first: int | None = None  # the line that the schema was found by
    if source.schema is not None:
        schema = SCHEMAS.get(source.schema)
        if schema is None:
            known = ", ".join(SCHEMAS)
            yield Fault(source.path, f"there is no schema '{source.schema}'; there are {known}", fatal=True)
            return
    kept: list[tuple[str, dict[str, Any] | Fault]] = []  # where a row needs the whole source
    for line, found in formats.rows(source):
        place = f"{source.path}:{line}"
        item: dict[str, Any] | Fault = found
        if isinstance(found, dict):
            item = _renamed(found, source.columns)
            try:
                if schema is None:
                    schema, first = find(item, source.columns), line
                else:
                    check(item, schema, first, source.columns)
                refuse_lost(item)
            except BadRow as bad:
                item = bad.fault(place, source.columns)
        if schema is not None and schema.prepare:
            if isinstance(item, dict):
                item = {name: item[name] for name in schema.reads if name in item}
            kept.append((place, item))
        elif isinstance(item, Fault):
            yield item
        else:
            assert schema is not None
            assert schema.parse is not None
            yield from _items(schema.parse, item, place, source)
    if schema is not None and schema.prepare:
        parse = schema.prepare(item for _, item in kept if isinstance(item, dict))
        for place, item in kept:
            if isinstance(item, Fault):
                yield item
            else:
                yield from _items(parse, item, place, source)
