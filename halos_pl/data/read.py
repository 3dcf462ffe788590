"""A source as checked examples. Every fault names file, line and column, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from halos_pl.data import formats
from halos_pl.data.broken import too_large
from halos_pl.data.columns import Columns, is_read, without
from halos_pl.data.example import Example, Fault, Skipped
from halos_pl.data.loss_on import judged
from halos_pl.data.parsers import Parse
from halos_pl.data.prompts import TextPrompts, asked
from halos_pl.data.schemas import SCHEMAS, check, find
from halos_pl.data.source import Source
from halos_pl.data.spans import LossOn
from halos_pl.data.values import BadRow, has_value
from halos_pl.data.weights import WEIGHTS


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row with ``columns`` (schema's name: name in the file) renamed."""
    if not columns:
        return row
    moved = {new: row[old] for new, old in columns.items() if old in row}
    taken = {*columns, *columns.values()}
    return {name: value for name, value in row.items() if name not in taken} | moved


def _asked(item: Example | Skipped, text_prompts: TextPrompts) -> Example | Skipped:
    if isinstance(item, Skipped) or not isinstance(item.prompt, str):
        return item
    return replace(item, prompt=asked(item.prompt, text_prompts), text_prompt=True)


def _items(
    parse: Parse,
    row: dict[str, Any],
    place: str,
    source: Source,
    columns: Columns,
    text_prompts: TextPrompts,
    loss_on: LossOn,
) -> Iterator[Example | Fault | Skipped]:
    try:
        # All examples of a row or none: a fault in its second answer discards the first.
        items = list(columns.in_context([_asked(item, text_prompts) for item in parse(row, place)], row, place))
        for item in items:
            if isinstance(item, Example) and item.size > source.max_row:  # a tree's prompt is many rows
                raise BadRow(str(too_large(source.max_row, item.size)))
        for item in items:
            yield from [item] if isinstance(item, Skipped) else judged(item, columns.schema, loss_on)
    except BadRow as bad:
        yield bad.fault(place, source.columns)


def _wrong_settings(source: Source) -> str | None:
    if source.schema is not None and source.schema not in SCHEMAS:
        return f"there is no schema '{source.schema}'; choose one of {', '.join(SCHEMAS)}"
    if new := [name for name in source.columns if not is_read(name)]:
        return f"'columns' names '{new[0]}', which no schema reads; write {{schema's name: your name}}"
    return None


def read(
    source: Source,
    unused: dict[str, None] | None = None,
    text_prompts: TextPrompts = "plain",
    loss_on: LossOn = "last",
) -> Iterator[Example | Fault | Skipped]:
    """The examples, faults and skipped rows of a source, in order.

    Memory is bounded by the largest row (``oasst``: by the texts of the whole source, as its trees need all rows).

    The schema is ``source.schema``, or that of the first row that fits one; a row of another schema is a fault. For
    further columns see :mod:`halos_pl.data.columns`. Nothing follows a ``fatal`` fault.

    Args:
        source: source to read.
        unused: receives the names of columns that have values but are not read.
        text_prompts: encoding of plain-text prompts, see :mod:`halos_pl.data.prompts`.
        loss_on: assistant turns that carry the loss, see :mod:`halos_pl.data.loss_on`.
    """
    if wrong := _wrong_settings(source):
        yield Fault(source.path, wrong, fatal=True)
        return
    schema = SCHEMAS[source.schema] if source.schema else None
    unused = {} if unused is None else unused
    columns = Columns(source, schema, unused) if schema else None
    missing = set(source.columns.values())  # until a row has them
    idle = {name for name in source.ignore if name.isidentifier()}  # until a row has them; without placeholders
    first: str | None = None  # the row that the schema was detected from
    kept: list[tuple[str, dict[str, Any] | Fault]] = []  # for a schema that needs the whole source
    ended = False  # by a fatal fault
    for line, row in formats.rows(source):
        place = source.place(line)
        item: dict[str, Any] | Fault = row
        if isinstance(row, dict):
            row = without(row, source.ignore, idle) if source.ignore else row
            item = _renamed(row, source.columns)
            missing -= row.keys()
            for new, old in source.columns.items():
                if new in row and new not in source.columns.values() and has_value(row[new]):
                    unused[f"{new} ({old} is read as {new})"] = None
            try:
                if schema is None:
                    schema, first = find(item, source.columns), place
                    columns = Columns(source, schema, unused)
                else:
                    check(item, schema, first, source.columns)
                assert columns is not None
                item = columns.checked(item)
            except BadRow as bad:
                item = bad.fault(place, source.columns)
        else:
            ended = row.fatal
        if schema is not None and schema.prepare:
            if isinstance(item, dict):
                item = {name: item[name] for name in (*schema.reads, *WEIGHTS) if name in item}
            kept.append((place, item))
        elif isinstance(item, Fault):
            yield item
        else:
            assert schema is not None
            assert schema.parse is not None
            assert columns is not None
            yield from _items(schema.parse, item, place, source, columns, text_prompts, loss_on)
    if missing and columns is not None and not ended:
        name = min(missing)
        yield Fault(source.path, f"'columns' names the column '{name}', which no row has; correct the name", fatal=True)
        return
    unused |= dict.fromkeys(f"{name} (ignored, but no row has it)" for name in sorted(idle))
    if schema is not None and schema.prepare:
        assert columns is not None
        parse = schema.prepare(item for _, item in kept if isinstance(item, dict))
        for place, item in kept:
            if isinstance(item, Fault):
                yield item
            else:
                yield from _items(parse, item, place, source, columns, text_prompts, loss_on)
