"""Sources are read whole or their faults name the file, the line, the column and what to do."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_halos import write_jsonl

from halos_pl.data import formats, text
from halos_pl.data.example import Example, Fault, Skipped
from halos_pl.data.formats import files_of
from halos_pl.data.read import read
from halos_pl.data.source import Source

ROW = {"prompt": "p", "completion": "c", "label": True}
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
Item = Example | Fault | Skipped


def examples(path: str | Path, **settings: Any) -> list[Example]:
    """All that a sound source holds."""
    items = list(read(Source(str(path), **settings)))
    assert not [str(item) for item in items if isinstance(item, Fault)]
    return [item for item in items if isinstance(item, Example)]


def faults(path: str | Path, **settings: Any) -> list[Fault]:
    found = [item for item in read(Source(str(path), **settings)) if isinstance(item, Fault)]
    assert all("\n" not in str(fault) for fault in found)
    return found


def refused(path: str | Path, **settings: Any) -> str:
    """The one fault of a source."""
    [fault] = faults(path, **settings)
    return str(fault)


def packed(path: Path, content: bytes) -> Path:
    """Writes ``content`` as the ending of ``path`` says."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(content)
    return path


# What is read


@pytest.mark.parametrize(
    ("label", "meaning"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("False", False), ("1", True)],
)
def test_binary(tmp_path: Path, label: Any, meaning: bool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROW, "label": label, "score": None}])
    assert examples(path) == [Example("p", ("c",), (meaning,), f"{path}:1")]


def test_pairs_of_messages_lose_the_repeated_prompt(tmp_path: Path) -> None:
    other = {"role": "assistant", "content": "no"}
    rows = [{"prompt": [USER], "chosen": [USER, BOT], "rejected": [other], "id": 3}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert examples(path) == [
        Example([USER], ([BOT], [other]), (True, False), f"{path}:1", scores=(None, None), paired=True)
    ]


def test_null_columns_do_not_count(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROW, "chosen": None, "rejected": None}])
    assert examples(path)[0].labels == (True,)


def test_all_formats_give_the_same_rows_and_lines(tmp_path: Path) -> None:
    rows = [{**ROW, "completion": f"c{i}\u2028\n é"} for i in range(3)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    one_list = "[\n" + ",\n".join(json.dumps(row, indent=2) for row in rows) + "\n]\n"
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ROW, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    for ending in ("", ".gz", ".zst"):
        packed(tmp_path / f"a.jsonl{ending}", b"\xef\xbb\xbf" + lines.encode() + b"\r\n\r\n")
        packed(tmp_path / f"lines.json{ending}", lines.encode())
        packed(tmp_path / f"list.json{ending}", one_list.encode())
        packed(tmp_path / f"bom.json{ending}", b"\xef\xbb\xbf" + one_list.encode())
        packed(tmp_path / f"table.csv{ending}", b"\xef\xbb\xbf" + table.getvalue().encode())
    arrow = pa.Table.from_pylist(rows)
    pq.write_table(arrow, tmp_path / "n.parquet", row_group_size=2)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, arrow.schema) as file:
        file.write_table(arrow, max_chunksize=2)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, arrow.schema) as stream:
        stream.write_table(arrow, max_chunksize=2)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"only": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved_dict")
    expected = {"list": [2, 7, 12], "bom": [2, 7, 12], "table": [2, 4, 6]}
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 20
    for path in paths:
        found = examples(path)
        assert [example.completions for example in found] == [(row["completion"],) for row in rows], path
        places = expected.get(path.name.split(".")[0], [1, 2, 3])
        assert [example.row_id for example in found] == [f"{path}:{place}" for place in places]


@pytest.mark.parametrize("ending", ["json", "csv", "jsonl.zst"])
def test_a_long_file_takes_as_many_calls_per_row_as_a_short_one(tmp_path: Path, ending: str) -> None:
    def calls(rows: int) -> int:
        if ending == "csv":
            content = "prompt,completion,label\n" + '"p\n",c,1\n' * rows
        else:
            content = json.dumps([ROW] * rows, indent=1) if ending == "json" else (json.dumps(ROW) + "\n") * rows
        path, count = packed(tmp_path / f"{rows}.{ending}", content.encode()), itertools.count()
        sys.setprofile(lambda *_: next(count) and None)
        try:
            number = len(examples(path))
        finally:
            sys.setprofile(None)
        assert number == rows
        return next(count)

    assert calls(4000) < 4.1 * calls(1000)


def test_a_row_larger_than_the_pieces_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**ROW, "prompt": "é\\\n" * 1_500_000}, {**ROW, "prompt": "12"}]
    path = packed(tmp_path / "a.json", json.dumps(rows).encode())
    assert [example.prompt for example in examples(path)] == [row["prompt"] for row in rows]
    monkeypatch.setattr(text, "CHUNK", 1)  # every place is the end of a piece
    small = [{**ROW, "prompt": 'é\U0001f600\\"', "n": [-1.5e-10, None, {"k": "\U0001f600"}]}, ROW, {**ROW, "n": 12}]
    for ascii_only in (True, False):
        content = json.dumps(small, indent=1, ensure_ascii=ascii_only).encode()
        path = packed(tmp_path / "b.json", content)
        assert [e.row_id for e in examples(path)] == [f"{path}:2", f"{path}:14", f"{path}:19"]


def test_rows_limits_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(ROW) + "\n") * 3 + "{oops\n")
    assert len(examples(path, rows=3)) == 3
    write_jsonl(tmp_path / "b.jsonl", [ROW])
    with pytest.raises(ValueError, match=r"rows is 3, .*there are 2 files"):
        files_of(Source(f"{tmp_path}/*.jsonl", rows=3))
    assert len(faults(path)) == 1


def test_skip_and_rows_are_a_slice(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{oops\n" + "".join(json.dumps(ROW | {"prompt": f"p{i}"}) + "\n" for i in range(4)))
    whole = examples(path, skip=1)
    assert len(whole) == 4
    for skip in range(1, 5):
        for rows in (1, 2, 9, None):
            stop = None if rows is None else skip - 1 + rows
            assert examples(path, skip=skip, rows=rows) == whole[skip - 1 : stop]
    [none_left] = faults(path, skip=5)
    assert none_left.fatal
    assert "skip is 5, but it has 5 rows" in none_left.reason
    write_jsonl(tmp_path / "b.jsonl", [ROW])
    with pytest.raises(ValueError, match=r"skip is 3, .*there are 2 files"):
        files_of(Source(f"{tmp_path}/*.jsonl", skip=3))
    with pytest.raises(ValueError, match=r"skip is -1"):
        Source(str(path), skip=-1)
    for settings in ({"skip": None}, {"skip": 10**30}, {"rows": 10**30}, {"rows": 0}, {"rows": 1.5}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"{name} is .*whole number"):
            Source(str(path), **settings)


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "p", "prompt": 3, "good": "c", "bad": "r"}])
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert examples(path, columns=columns)[0].completions == ("c", "r")
    swapped = write_jsonl(tmp_path / "b.jsonl", [PAIR])
    assert examples(swapped, columns={"chosen": "rejected", "rejected": "chosen"})[0].completions == ("r", "c")
    broken = write_jsonl(tmp_path / "c.jsonl", [{"question": " ", "chosen": "c", "rejected": "r"}, {"chosen": "c"}])
    first, second = faults(broken, columns={"prompt": "question"}, schema="paired")
    assert first.column == "question"
    assert "column 'question' is empty" in str(first)
    assert "lacks 'question', 'rejected'" in str(second)


def test_a_schema_that_is_named_is_not_looked_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROW, **PAIR}] * 2)
    assert "fits 'unpaired' (prompt+completion+label) and 'paired'" in str(faults(path)[0])
    assert all(example.paired for example in examples(path, schema="paired"))
    assert "there is no schema 'pairs'; choose one of unpaired, paired" in refused(path, schema="pairs")


def test_real_data(shared_data: Path) -> None:
    found = examples(shared_data / "feedback" / "hh_rlhf_train.jsonl.gz")
    assert len(found) == 2898
    assert all(example.paired for example in found)


# The hub, which no test reaches


def _hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> list[Any]:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return answer()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ROW, {**ROW, "label": False}]
    asked = _hub(monkeypatch, lambda: datasets.Dataset.from_list(rows))
    settings = {"name": "small", "data_dir": "here", "split": "train", "revision": "abc"}
    found = examples("owner/some-name.v1", **settings)
    assert [example.labels for example in found] == [(True,), (False,)]
    assert found[1].row_id == "owner/some-name.v1:2"
    expected = {"data_dir": "here", "split": "train", "revision": "abc", "streaming": False}
    assert asked == [(("owner/some-name.v1", "small"), expected)]


def test_hub_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.Dataset.from_list([ROW])
    _hub(monkeypatch, lambda: datasets.DatasetDict(train=data, test=data))
    assert "has several splits; name one of train, test as 'split'" in refused("owner/name")
    _hub(monkeypatch, lambda: datasets.DatasetDict(train=data))
    assert len(examples("owner/name")) == 1


def test_streaming_takes_no_more_rows_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def rows() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield ROW

    asked = _hub(monkeypatch, lambda: datasets.IterableDataset.from_generator(rows))
    assert len(examples("owner/name", split="train", streaming=True, rows=5)) == 5
    assert taken <= 6  # datasets looks one row ahead
    assert asked[0][1]["streaming"] is True


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused("owner/name", split="train")  # no test has a network: HF_HUB_OFFLINE
    assert re.match(r"owner/name: no such file or folder .* hub .*revision", message)

    def rows() -> Any:
        yield ROW
        raise ConnectionError("gone\naway")

    _hub(monkeypatch, rows)
    items = list(read(Source("owner/name")))
    assert isinstance(items[0], Example)
    assert re.match(r"owner/name:2: .*ConnectionError: gone away", str(items[1]))
    assert isinstance(items[1], Fault)
    assert items[1].fatal


def test_the_version_of_a_hub_data_set_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert formats.hub_version(Source("owner/name")) == "main"
    assert formats.hub_version(Source("owner/name", revision="v2")) == "v2"
    ref = tmp_path / "datasets--owner--name" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("0123abc\n")
    assert formats.hub_version(Source("owner/name")) == "0123abc"


def test_what_is_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "there").touch()
    for path in (
        "owner/there",
        "owner/a.jsonl",
        "owner/a.csv.gz",
        "name",
        "./owner/name",
        "/owner/name",
        "a/b/c",
        "a/",
    ):
        assert not formats.is_hub_name(path), path
    assert formats.is_hub_name("owner/name-1.5_x")


# What is refused


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ROW, "label": 2}, "column 'label' is 2; it must be true or 1"),
        ({**ROW, "label": "yes"}, "column 'label' is 'yes'"),
        ({**ROW, "label": None}, "column 'label' is None"),
        ({**ROW, "label": 0.5}, r"column 'label' is 0\.5"),
        ({**ROW, "label": float("nan")}, r"column 'label' is nan"),
        ({**ROW, "label": [1]}, r"column 'label' is \[1\]"),
        ({**ROW, "completion": " \n"}, "column 'completion' is empty; give it some text"),
        ({**ROW, "completion": ""}, "column 'completion' is empty"),
        ({**ROW, "prompt": ""}, "column 'prompt' is empty"),
        ({**ROW, "prompt": []}, "column 'prompt' is empty"),
        ({**ROW, "prompt": [{"role": "user", "content": " "}]}, "column 'prompt' is empty"),
        ({**ROW, "prompt": None}, "column 'prompt' is None; .*list of messages"),
        ({**ROW, "completion": 3}, "column 'completion' is 3; .*list of messages"),
        ({**ROW, "prompt": ["hi"]}, "column 'prompt', message 1 is 'hi'; it must be an object"),
        ({**ROW, "prompt": [USER, {"role": "user"}]}, "column 'prompt', message 2 has no 'content'"),
        ({**ROW, "prompt": [{"content": "hi"}]}, "column 'prompt', message 1 has no 'role'"),
        ({**ROW, "prompt": [{"role": "user", "content": 1}]}, "message 1 has the content 1; every message"),
        ({**ROW, "prompt": [{"role": " ", "content": "a"}]}, "message 1 has an empty role"),
        ({**ROW, "completion": [BOT]}, "'completion' .*message list.*'prompt' .*plain text"),
        ({**ROW, "completion": "\ud800"}, "column 'completion' .*surrogate"),
        ({**PAIR, "rejected": " "}, "column 'rejected' is empty"),
        ({**PAIR, "prompt": [USER], "chosen": [USER]}, "column 'chosen' only repeats the prompt"),
        ({**PAIR, "prompt": None}, "column 'prompt' is None"),
        ({"prompt": "p", "completion": "c"}, r"lacks 'label' .*'prompt', 'completion'.*'columns'"),
        ({"prompt": "p", "chosen": "c"}, "lacks 'rejected'"),
        ({"chosen": "c", "rejected": "r"}, r"'implicit' \(chosen\+rejected\).*:1 .*'paired'"),
        ({}, "lacks 'prompt', 'completion', 'label'"),
        (["a"], r"the row is \['a'\], not an object"),
        (None, "the row is None, not an object"),
        ({**ROW, "x": 1, **dict.fromkeys(["completion", "label"]), "chosen": "c", "rejected": "r"}, "two files"),
    ],
)
def test_a_faulty_row_is_named(tmp_path: Path, row: Any, reason: str) -> None:
    first = PAIR if {"chosen", "rejected"} & set(row or ()) and "x" not in row else ROW
    path = write_jsonl(tmp_path / "a.jsonl", [first, row, first])
    items = list(read(Source(path)))
    assert [type(item) for item in items] == [Example, Fault, Example]
    message = str(items[1])
    assert message.startswith(f"{path}:2: ")
    assert re.search(reason, message)
    assert "\n" not in message


def test_a_file_of_two_kinds_of_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": 1}, ROW, PAIR])
    first, second = faults(path)
    assert "lacks" in str(first)
    assert str(second).startswith(f"{path}:3: ")
    assert re.search(r"'paired' \(prompt\+chosen\+rejected\).*:2 .*'unpaired'", str(second))


@pytest.mark.parametrize(
    "rows",
    [
        [{**ROW, "label": None, "score": 0.7}, {**ROW, "score": 0.1}],
        [{**PAIR, "prompt": None, "chosen": "A b", "rejected": "A c"}, {**PAIR, "chosen": "A b", "rejected": "A c"}],
    ],
)
def test_a_hole_in_the_first_row_does_not_choose_for_the_others(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    [found] = faults(path)
    assert f"but {path}:1 fits" in str(found)


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b'{"prompt": "p"', 1, "invalid JSON .*one JSON object"),
        (json.dumps(ROW).encode() + b"\n{oops}\n", 2, "invalid JSON .* at column 2"),
        (b'{"prompt": "p", "label":\n', 1, "invalid JSON .* at column 25"),
        (b'{"label": ' + b"9" * 5000 + b"}", 1, "invalid JSON"),
        (b"[" * 100_000, 1, "invalid JSON"),
        (b"\xff\xfe", 1, "not UTF-8 text .*; save it as UTF-8"),
        (b'{"prompt": "p", "label": 1, "prompt": "q"}', 1, "the key 'prompt' appears twice in one object"),
        (b'{"prompt": [{"role": "a", "role": "b"}]}', 1, "the key 'role' appears twice"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, content: bytes, line: int, reason: str) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        path = packed(tmp_path / name, content + b"\n" + json.dumps(ROW).encode())
        assert re.match(re.escape(f"{path}:{line}: ") + reason, refused(path))
        assert len([item for item in read(Source(str(path))) if isinstance(item, Example)]) == line  # it goes on


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('[{"prompt": 1}\n', 1, "no ',' or '\\]' after this row"),
        ('[\n{"prompt": "p"},\n{oops}]', 3, "invalid JSON .* no row from here on can be read"),
        ("[]x", 1, "more text after the closing"),
        ("[\n1]", 2, "not an object"),
        ("[" * 100_000, 1, "invalid JSON"),
        ('[\n\n{"prompt": "', 3, "invalid JSON"),
        ("[\n{},", 2, "invalid JSON"),
        ('[\n{"a": {"b": 1, "b": 2}}]', 2, "the key 'b' appears twice"),
        ('[\n{"a": 1,\n  "b": oops}]', 2, "invalid JSON .* at column 8 of line 3"),
        ("[\n{},\n\n{} \n {}]", 4, "no ',' or"),
    ],
)
def test_a_faulty_list_is_named(tmp_path: Path, content: str, line: int, reason: str) -> None:
    (tmp_path / "a.json").write_text(content)
    message = str(faults(tmp_path / "a.json")[-1])
    assert message.startswith(f"{tmp_path / 'a.json'}:{line}: ")
    assert re.search(reason, message)


def test_a_list_goes_on_after_a_key_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "p", "prompt": "q"},\n' + json.dumps(ROW) + "]")
    first, second = read(Source(str(path)))
    assert isinstance(first, Fault)
    assert not first.fatal
    assert first.column == "prompt"
    assert isinstance(second, Example)
    (tmp_path / "b.json").write_bytes(b"[\n{},\n\xff{}]")
    assert str(faults(tmp_path / "b.json")[-1]).startswith(f"{tmp_path / 'b.json'}:3: not UTF-8 text")


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b"prompt,completion,label\np,c,1\np,c\n", 3, "has 2 values but the header has 3 columns; quote"),
        (b'prompt,completion,label\n"p\np",c,1\np,\xff,1\n', 4, "column 'completion' is not UTF-8 text"),
        (b'prompt,completion,label\np,"c,1\np,c,1\n', 2, r"invalid CSV \(unexpected end of data\); check the quotes"),
        (b"prompt,label,label\np,c,1\n", 1, "column 'label' appears twice in the header"),
        (b"prompt,completion,label\np,,1\n", 2, "column 'completion' is None"),
        (b"prompt;completion;label\np;c;1\n", 2, "'prompt;completion;label'"),
    ],
)
def test_a_faulty_csv_is_named(tmp_path: Path, content: bytes, line: int, reason: str) -> None:
    path = packed(tmp_path / "a.csv", content)
    assert re.match(re.escape(f"{path}:{line}: ") + ".*" + reason, refused(path))


def test_csv_with_messages_and_large_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    large = "[1, 2] " * 100_000
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["", "prompt", "completion", "label"], [0, json.dumps([USER]), large, "True"]])
    assert examples(path) == [Example([USER], (large,), (True,), f"{path}:2")]


def test_messages_in_a_csv_are_messages_however_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    said = [{"role": "user", "content": 'it\'s "so"\n'}]
    cells = [json.dumps(said), json.dumps(said, indent=1), str(said), f" {said}"]
    texts = ["[1] as in the paper", '[{"name": "Ann"}]', "[{", "{'role': 'none'}"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion", "label"])
        writer.writerows([[cell, "c", "1"] for cell in cells] + [[text, "c", "0"] for text in texts])
    assert [example.prompt for example in examples(path)] == [said] * len(cells) + texts
    path.write_text("prompt,completion,label\n\"[{'role': 'user', 'content': 'cut o\",c,1\n")
    assert re.search(r"a\.csv:2: column 'prompt' .*list of messages.*not valid JSON", refused(path))


def test_faulty_files(tmp_path: Path) -> None:
    assert re.search(r"nope\.jsonl: no such file .*; check the path", refused(tmp_path / "nope.jsonl"))
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "a.txt").touch()
    assert re.search(r"unknown file .*supported are \.jsonl", refused(tmp_path / "a.txt"))
    for name, content in (
        ("a.jsonl", ""),
        ("b.jsonl", "\n \n"),
        ("c.json", "[]"),
        ("d.json", " [ ] "),
        ("e.csv", "a,b"),
    ):
        (tmp_path / name).write_text(content)
        assert re.match(re.escape(str(tmp_path / name)) + ": .*no rows", refused(tmp_path / name))
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "f.parquet")
    assert "no rows" in refused(tmp_path / "f.parquet")
    for ending, what in ((".gz", "gzip"), (".zst", "Zstandard")):
        path = tmp_path / f"plain.jsonl{ending}"
        path.write_text(json.dumps(ROW))
        assert re.search(rf"plain\.jsonl{ending}:1: cannot be read .*no {what} file", refused(path))
    for name in ("a.parquet", "a.arrow"):
        for content in (b"", b"not that", b"ARROW1\0\0 no", b"PAR1 no PAR1"):
            (tmp_path / name).write_bytes(content)
            assert "it may be truncated" in refused(tmp_path / name)
            assert faults(tmp_path / name)[0].fatal


def test_settings_of_the_hub_are_refused_for_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [ROW])
    assert re.search("'revision', 'split' .*hub.*file", refused(path, split="train", revision="x"))
    datasets.DatasetDict(
        train=datasets.Dataset.from_list([ROW]), test=datasets.Dataset.from_list([ROW, ROW])
    ).save_to_disk(tmp_path / "saved")
    assert "name one of train, test as 'split'" in refused(tmp_path / "saved")
    assert "has no split 'dev'; name one of train, test" in refused(tmp_path / "saved", split="dev")
    assert re.search("'streaming' .*hub", refused(tmp_path / "saved", split="test", streaming=True))
    assert len(examples(tmp_path / "saved", split="test")) == 2
    datasets.Dataset.from_list([ROW]).save_to_disk(tmp_path / "plain")
    assert "remove 'split: test'" in refused(tmp_path / "plain", split="test")
    (tmp_path / "saved" / "test" / "state.json").write_text("{")
    assert re.search(r"cannot be read .*save_to_disk", refused(tmp_path / "saved", split="test"))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_truncated(tmp_path: Path, ending: str) -> None:
    lines = [json.dumps({**ROW, "prompt": str(zlib.crc32(b"%d" % i))}) for i in range(20_000)]
    for name, content in (("a.jsonl", "\n".join(lines)), ("a.json", "[\n" + ",\n".join(lines) + "]")):
        path = packed(tmp_path / f"{name}{ending}", content.encode())
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        items = list(read(Source(str(path))))
        last = items[-1]
        assert isinstance(last, Fault)
        assert last.fatal
        match = re.search(r":(\d+): the \w+ stream ends early.*copy or download it again", str(last))
        assert match
        assert 5_000 < int(match[1]) < 15_000
        assert all(isinstance(item, Example) for item in items[:-1])
        path.write_bytes(whole[: len(whole) // 2] + b"\0" * 200)
        assert re.search(rf"a\.jsonl?{ending}:\d+: ", str(faults(path)[-1]))


def test_text_that_is_not_utf8_in_parquet(tmp_path: Path) -> None:
    bad = pa.array([b"p", b"\xff", b"p"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": bad, "completion": ["c"] * 3, "label": [True] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    items = list(read(Source(str(tmp_path / "a.parquet"))))
    assert [type(item) for item in items] == [Example, Fault, Example]
    assert f"{tmp_path / 'a.parquet'}:2: the row cannot be decoded" in str(items[1])


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Of a list in one line and of a table in one row group, no more than pieces are held."""
    import tracemalloc

    rows = [{**ROW, "prompt": f"{i} " * 200} for i in range(12_000)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    size = (tmp_path / "a.json").stat().st_size
    assert size > 12_000_000
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    for name in ("a.json", "a.parquet"):
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        most = 0
        for item in read(Source(str(tmp_path / name))):
            assert isinstance(item, Example)
            most = max(most, pa.total_allocated_bytes() - before)
        most += tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < size / 2
