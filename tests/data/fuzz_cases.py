"""Random files of feedback, for Hypothesis."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from schema_rows import HH, ROWS

from halos_pl.data.schemas import SCHEMAS

any_text = st.text(st.characters(exclude_categories=()), max_size=6)  # with control characters and half surrogates


strings = (
    any_text
    | st.sampled_from(["", " ", "\x00", "\u2028", "\ufeff", "p", "p\ud800", "true", "nan", "1", HH, HH + " a", '[{"'])
    | st.builds(lambda text, n: text * n, any_text, st.sampled_from([1, 1000, 300_000]))
)


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([10**30, 0, 1, 2, -math.inf]) | strings
)


anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3), max_leaves=6
)


messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", " "]) | anything,
            "content": strings | anything,
            "from": st.sampled_from(["human", "gpt"]) | anything,
            "value": strings | anything,
        },
    ),
    max_size=3,
)


COLUMNS = sorted({c for schema in SCHEMAS.values() for names in schema.columns for c in names.split("|")})


OPTIONAL = ["input", "annotator2", "score_chosen", "reward", "score_A", "parent_id", "rank", "deleted", "system", "x"]


values = anything | messages | strings


@st.composite
def one_row(draw: st.DrawFn) -> Any:
    """Anything; or a sound row; or one with other columns, or other values in some of them."""
    if draw(st.integers(0, 9)) == 0:
        return draw(anything)
    row = dict(draw(st.sampled_from([{}, *ROWS.values(), *ROWS.values()])))
    for column in draw(st.lists(st.sampled_from([*COLUMNS, *OPTIONAL, *row, *row]), max_size=3)):
        row[column] = draw(values | st.sampled_from([row.get(name) for row in ROWS.values() for name in row]))
    for column in draw(st.lists(st.sampled_from([*row, "x"]), max_size=1)):
        row.pop(column, None)
    return row


@dataclass
class Case:
    """A file.

    Attributes:
        name: its ending says what it is.
        content: None for a folder.
        rows: how many it holds; None where only a fatal fault may leave any out.
        cut: it is not whole.
    """

    name: str
    content: bytes | None
    rows: int | None
    cut: bool = False


def _json(row: Any) -> str:
    return json.dumps(row)


def _twice(row: Any) -> str:
    """The row with its first key twice."""
    text = json.dumps(row)
    if not isinstance(row, dict) or not row:
        return text
    return "{" + json.dumps(next(iter(row))) + ": 1, " + text[1:]


def _csv(rows: list[Any]) -> bytes:
    columns = sorted({column for row in rows if isinstance(row, dict) for column in row if column} | {"x", "prompt"})
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(columns)
    for row in rows:
        cells = row if isinstance(row, dict) else {}
        writer.writerow([json.dumps(v) if isinstance(v, list) else v for v in (cells.get(c, "-") for c in columns)])
    return table.getvalue().encode("utf-8", "surrogatepass")


def _arrow(rows: list[Any], ending: str) -> bytes | None:
    """None where Arrow has no type for the rows."""
    sink = io.BytesIO()
    try:
        table = pa.Table.from_pylist([row if isinstance(row, dict) else {} for row in rows])
        if not table.num_columns or table.num_rows != len(rows):
            return None
        if ending == "parquet":
            pq.write_table(table, sink, row_group_size=2)
        else:
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError):
        return None
    return sink.getvalue()


def _zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(st.lists(one_row(), max_size=5))
    kind = draw(
        st.sampled_from(["lines", "lines", "list", "csv", "parquet", "arrow", "damaged", "cut", "noise", "folder"])
    )
    event(kind)
    if kind == "folder":
        return Case(draw(st.sampled_from(["a.jsonl", "a.parquet", "a"])), None, None)
    if kind == "noise":
        ending = draw(st.sampled_from(["jsonl", "json", "csv", "parquet", "arrow", "json.gz", "csv.zst", "x"]))
        return Case(f"a.{ending}", draw(st.binary(max_size=200)), None)
    if kind in ("parquet", "arrow"):
        content = _arrow(rows, kind)
        if content is not None:
            return Case(f"a.{kind}", content, len(rows))
        kind = "lines"
    if kind == "csv":
        return Case("a.csv", _csv(rows), len(rows))
    texts = [draw(st.sampled_from([_json, _json, _json, _twice]))(row) for row in rows]
    if kind == "list":
        return Case("a.json", ("[\n" + ",\n".join(texts) + "\n]").encode(), len(rows))
    blank = draw(st.sampled_from(["", "\n", " \r\n\n"]))
    content = ("\n".join(texts) + "\n" + blank).encode()
    if kind == "damaged":
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(content)))
            content = content[:at] + draw(st.binary(max_size=3)) + content[at + draw(st.integers(0, 3)) :]
        rows = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    if kind == "cut":
        ending, pack = draw(st.sampled_from([("gz", gzip.compress), ("zst", _zstd)]))
        whole = pack(content)
        return Case(f"a.jsonl.{ending}", whole[: draw(st.integers(0, len(whole) - 1))], None, cut=True)
    return Case("a.jsonl", content, len(rows))


# A case that takes a minute hangs; the machines that run this are shared.
LIMITS = settings(
    deadline=timedelta(minutes=1),
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
