"""What was computed of each row, and where it is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from parity.batch import fixed_batch
from parity.compare import difference, uses_reference, value_of
from parity.table import FOLDER, Row, libraries

FILE = FOLDER / "numbers.json"


def computed(row: Row) -> dict[str, Any]:
    """The numbers of a row, with five digits, and what they were computed from.

    Raises:
        ValueError: a loss is not finite; names the row.
    """
    batch = fixed_batch()
    after = batch.halves()[0] if row.later else None
    try:
        theirs = value_of(row.theirs(after), batch)
        against = [difference(theirs, value_of(ours.loss(after), batch)) for ours in row.ours]
        reference = uses_reference(row.theirs(after), batch)
    except ValueError as error:
        raise ValueError(f"{row.key}: {error}") from error
    return origin(row) | {
        "reference": reference,
        "against": [{name: _short(value) for name, value in asdict(each).items()} for each in against],
    }


def origin(row: Row) -> dict[str, Any]:
    """What the numbers of a row depend on: if the table has changed, they are not the row's any more."""
    ours = [[ours.objective, dict(ours.changes)] for ours in row.ours]
    return {"function": row.function, "arguments": dict(row.arguments), "later": row.later, "ours": ours}


def is_of(row: Row, numbers: dict[str, Any]) -> bool:
    """Whether numbers are those of a row."""
    return all(numbers.get(name) == value for name, value in origin(row).items())


def _short(value: float | str) -> float | str:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read() -> dict[str, dict[str, Any]]:
    """The kept numbers, by the row's key."""
    content: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    return content


def updated(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The numbers of all rows: computed, or kept where the library is not installed.

    Raises:
        ValueError: a row of a library that is not installed has no numbers, or those of another loss; says which
            version is needed.
    """
    kept, found = read(), {}
    for row in rows:
        missing = libraries()[row.library].missing
        if not missing:
            found[row.key] = computed(row)
            continue
        if not is_of(row, kept.get(row.key, {})):
            raise ValueError(f"{row.key} is new or has changed, but {missing}: install it and run this again")
        found[row.key] = kept[row.key]
    return found


def write(numbers: dict[str, dict[str, Any]]) -> None:
    """Keeps the numbers, a line for each row."""
    lines = [f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value)}" for key, value in numbers.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
