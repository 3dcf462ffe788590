"""Whatever a file holds, each of its rows ends as an example, a fault that names it, or skipped and counted."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from test_schemas import HH, ROWS

from halos_pl.data.example import Example, Fault, Skipped
from halos_pl.data.read import read
from halos_pl.data.schemas import SCHEMAS
from halos_pl.data.source import Source

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


def _sound(example: Example) -> None:
    assert example.completions
    assert len(example.completions) == len(example.labels) == len(example.scores)
    assert not example.paired or example.labels == (True, False)
    for text in (example.prompt, *example.completions):
        parts = [text] if isinstance(text, str) else [m[key] for m in text for key in ("role", "content")]
        assert "".join(parts).strip()
        "".join(parts).encode()
    for label, score in zip(example.labels, example.scores, strict=True):
        assert label is True or label is False or (label is None and score is not None)
        assert score is None or math.isfinite(score)


def check(case: Case, folder: Path) -> None:
    path = str(folder / case.name)
    if case.content is None:
        Path(path).mkdir()
    else:
        Path(path).write_bytes(case.content)
    items = list(read(Source(path)))
    assert items
    places = set()
    for item in items:
        if isinstance(item, Example):
            _sound(item)
        elif isinstance(item, Fault):
            assert str(item).isprintable()
            assert len(str(item)) < 1500
        else:
            assert isinstance(item, Skipped)
        place = item.row_id if isinstance(item, Example) else item.place
        event(type(item).__name__)
        assert re.fullmatch(re.escape(path) + r"(:\d+(#\w+)?)?", place)
        places.add(place.split("#")[0])
    fatal = [i for i, item in enumerate(items) if isinstance(item, Fault) and item.fatal]
    assert fatal in ([], [len(items) - 1])
    if case.content is None or case.cut:
        assert fatal
    elif case.rows == 0:
        assert str(items[0]).startswith(f"{path}: ")
        assert "no rows" in str(items[0])
    elif case.rows is not None and fatal:  # only a row that is larger than the bound ends a whole file
        assert len(case.content) > Source(path).max_row
        assert "max_row_mb" in str(items[-1])
    elif case.rows is not None:
        assert len(places) == case.rows


_numbers = itertools.count()


def _fuzz(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / f"fuzz{next(_numbers)}"
    folder.mkdir()
    check(case, folder)
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


# A case that takes a minute hangs; the machines that run this are shared.
LIMITS = settings(
    deadline=timedelta(minutes=1),
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@given(case=cases())
@settings(LIMITS, max_examples=80)
def test_any_file_is_accounted_for(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    _fuzz(case, tmp_path_factory)


@pytest.mark.slow
@given(case=cases())
@settings(LIMITS, max_examples=5000)
def test_any_of_5000_files_is_accounted_for(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    _fuzz(case, tmp_path_factory)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_value_of_megabytes(tmp_path: Path, column: str) -> None:
    """In any column of any schema: read, or refused in a short line."""
    for i, row in enumerate(row for row in ROWS.values() if column in row):
        for j, value in enumerate(("é " * 500_000, [{"role": "user", "content": "p"}] * 4_000, "[" * 100_000)):
            path = tmp_path / f"{i}.{j}.jsonl"
            path.write_text(json.dumps({**row, column: value}) + "\n")
            items = list(read(Source(str(path))))
            assert len(items) >= 1
            assert all(len(str(item)) < 1500 for item in items if isinstance(item, Fault))


def test_nested_as_deep_as_json_can_be(tmp_path: Path) -> None:
    for depth in (10, 900, 960, 980, 990, 1000, 100_000):
        nested = "[" * depth + "]" * depth
        for i, row in enumerate(ROWS.values()):
            for column in row:
                text = json.dumps({**row, column: "here"}).replace('"here"', nested)
                (tmp_path / "a.jsonl").write_text(text + "\n")
                (tmp_path / "a.json").write_text(f"[{text}]")
                for name in ("a.jsonl", "a.json"):
                    assert list(read(Source(str(tmp_path / name)))), (depth, i, column)
