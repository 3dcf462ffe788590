"""Whatever a file holds, each of its rows ends as an example, a fault that names it, or skipped and counted."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
from fuzz_cases import COLUMNS, LIMITS, Case, cases
from hypothesis import event, given, settings
from schema_rows import ROWS

from halos_pl.data.example import Example, Fault, Skipped
from halos_pl.data.read import read
from halos_pl.data.source import Source


def _sound(example: Example) -> None:
    assert example.completions
    assert len(example.completions) == len(example.labels) == len(example.scores)
    assert not example.paired or example.labels == (True, False, True)[: 2 + example.gold]
    assert example.paired or not example.gold
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
