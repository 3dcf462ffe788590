"""Files that are damaged, endless or no files end in a line that names them.

No signal, no traceback, and bounded memory.
"""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import random
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_halos import write_jsonl

from halos_pl.data.example import DataError, Example, Fault, Skipped
from halos_pl.data.prompt_files import read_prompts
from halos_pl.data.read import read
from halos_pl.data.source import Source
from halos_pl.data.store import open_store
from halos_pl.evaluation.evaluate import evaluate
from halos_pl.testing import tiny_tokenizer

ROW = {"prompt": "p", "completion": "c", "label": True}
LARGE = {**ROW, "completion": "a" * 1_500_000}


def refused(path: Path, **settings: Any) -> Fault:
    [found] = read(Source(str(path), **settings))
    assert isinstance(found, Fault), found
    assert str(found).startswith(str(path))
    assert str(found).isprintable()
    return found


# Damaged


def _table() -> pa.Table:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {"prompt": said("user", f"q {i} é"), "completion": said("assistant", "a" * (i % 5 + 1)), "label": i % 3 > 0,
         "score": i / 2 if i % 4 else None, "model": "abc"[i % 3]}
        for i in range(60)
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows)
    return table.set_column(4, "model", table["model"].dictionary_encode())


def _content(kind: str) -> bytes:
    table, sink = _table(), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink, row_group_size=20)
        return sink.getvalue()
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    options = pa.ipc.IpcWriteOptions(compression="lz4" if kind == "packed" else None)
    with new(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=20)
    return sink.getvalue()


def _damage(path: Path, count: int, faulty: Path) -> None:
    """Reads ``count`` damaged copies; writes how many of them have a fault."""
    whole, faults = path.read_bytes(), 0
    for seed in range(count):
        draw, damaged = random.Random(seed), bytearray(whole)
        place = draw.randrange(8 * len(whole))
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged[: draw.randrange(len(damaged))] if seed % 8 == 0 else damaged)
        items = list(read(Source(str(path))))
        assert items
        for item in items:
            if isinstance(item, Fault):
                assert str(item).startswith(str(path))
                assert str(item).isprintable()
            elif isinstance(item, Example):  # what passes is text
                json.dumps([item.prompt, item.completions, item.scores], ensure_ascii=False).encode()
        faults += any(isinstance(item, Fault) for item in items)
    faulty.write_text(str(faults))


def _fuzz(tmp_path: Path, kind: str, count: int) -> None:
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    path.write_bytes(_content(kind))
    assert kind == "parquet" or all(isinstance(item, Example) for item in read(Source(str(path))))
    child = multiprocessing.get_context("fork").Process(target=_damage, args=(path, count, tmp_path / "faulty"))
    child.start()
    child.join()
    assert child.exitcode == 0  # a signal's is below 0
    assert int((tmp_path / "faulty").read_text()) > count / 4


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_flipped_bits_end_no_process(tmp_path: Path, kind: str) -> None:
    _fuzz(tmp_path, kind, 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stream", "file", "packed", "parquet"])
def test_many_flipped_bits_end_no_process(tmp_path: Path, kind: str) -> None:
    _fuzz(tmp_path, kind, 1000)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_offsets_out_of_bounds(tmp_path: Path, kind: str) -> None:
    """Read unvalidated, this one ends the process by SIGSEGV, or gives text of other memory."""
    good, bad = (b"".join(n.to_bytes(4, "little") for n in to) for to in ((0, 2, 8), (0, 2**30, 2**30 + 4)))
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    sink = io.BytesIO()
    sound = pa.record_batch({"prompt": ["ab", "cdefgh"], "completion": ["c", "d"], "label": [True, True]})
    with new(sink, sound.schema) as writer:
        writer.write_batch(sound)
    assert sink.getvalue().count(good) == 1
    path = tmp_path / "a.arrow"
    path.write_bytes(sink.getvalue().replace(good, bad))
    assert refused(path).fatal


def test_text_that_is_not_utf8_is_its_rows_fault(tmp_path: Path) -> None:
    text = pa.array([b"p", b"\xff", b"p"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": text, "completion": ["c"] * 3, "label": [True] * 3})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    items = list(read(Source(str(tmp_path / "a.arrow"))))
    assert [type(item) for item in items] == [Example, Fault, Example]


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "dataset_dict.json"])
@pytest.mark.parametrize("content", ["[]", "null", "{", "", "{}", '{"splits": 3, "_data_files": 3}', "\udcff"])
def test_odd_files_of_a_saved_folder(tmp_path: Path, name: str, content: str) -> None:
    folder = tmp_path / "saved"
    found = datasets.Dataset.from_list([ROW])
    (datasets.DatasetDict(train=found) if name == "dataset_dict.json" else found).save_to_disk(folder)
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    if (name, content[:1]) == ("dataset_info.json", "{") and content != "{":
        assert [type(item) for item in read(Source(str(folder)))] == [Example]  # it says nothing that a row needs
    else:
        assert refused(folder).fatal


def test_a_saved_folder_with_damaged_rows(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([ROW] * 50).save_to_disk(folder)
    [file] = folder.glob("*.arrow")
    whole = file.read_bytes()
    for seed in range(40):
        damaged = bytearray(whole)
        place = random.Random(seed).randrange(8 * len(whole))
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged[: len(whole) // 2] if seed == 0 else damaged)
        assert all(isinstance(item, Example | Fault | Skipped) for item in read(Source(str(folder))))
    file.unlink()
    assert refused(folder).fatal


# No files


@pytest.mark.parametrize("name", ["a.jsonl", "a.arrow", "a.jsonl.gz", "a"])
def test_a_pipe_is_not_opened(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    assert refused(path).fatal
    (tmp_path / "link.jsonl").symlink_to(path)
    assert refused(tmp_path / "link.jsonl").fatal
    with pytest.raises(DataError, match="is a pipe"):
        open_store(Source(str(path)), tiny_tokenizer(), tmp_path / "cache")


def test_what_else_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s.jsonl")
        assert "is a socket" in refused(Path("s.jsonl")).reason
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    assert "is a device" in refused(tmp_path / "zero.jsonl").reason
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert refused(tmp_path / "loop.jsonl").fatal
    (tmp_path / "folder.parquet").mkdir()
    assert refused(tmp_path / "folder.parquet").fatal


# Rows without end


def _write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
    elif path.suffix == ".csv":
        lines = ["prompt,completion,label", *(f'{r["prompt"]},"{r["completion"]}",{r["label"]}' for r in rows)]
        path.write_text("\n".join(lines))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    else:
        write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "a.arrow", "saved"])
def test_a_large_row_is_named_and_the_bound_can_be_raised(tmp_path: Path, name: str) -> None:
    rows = [ROW, LARGE, ROW]
    if name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    else:
        _write(tmp_path / name, rows)
    path = str(tmp_path / name)
    items = list(read(Source(path, max_row_mb=1)))
    [fault] = [item for item in items if isinstance(item, Fault)]
    line = {"a.json": 7, "a.csv": 3}.get(name, 2)
    assert fault.place == f"{path}:{line}"
    assert "max_row_mb" in fault.reason
    assert "1.5 MB" in fault.reason or fault.fatal
    assert sum(isinstance(item, Example) for item in items) == (1 if fault.fatal else 2)
    assert len([item for item in read(Source(path, max_row_mb=2)) if isinstance(item, Example)]) == 3


def test_a_cell_of_many_lines_is_a_large_row(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", [ROW, {**ROW, "completion": "line\n" * 300_000}])
    assert [type(item) for item in read(Source(str(path), max_row_mb=1))] == [Example, Fault]
    assert [type(item) for item in read(Source(str(path)))] == [Example, Example]


def test_rows_at_the_bound(tmp_path: Path) -> None:
    size = len(json.dumps(LARGE))
    path = write_jsonl(tmp_path / "a.jsonl", [LARGE])
    assert len(refused(Path(path), max_row_mb=(size - 1) / 1e6).reason) < 200
    assert isinstance(next(iter(read(Source(path, max_row_mb=size / 1e6)))), Example)


BOMB = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from halos_pl.data.read import read
from halos_pl.data.source import Source
items = list(read(Source(sys.argv[1])))
print(len(items), items[-1])
"""


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_a_bomb_takes_no_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    start = {"a.json.gz": b'[{"prompt": "', "a.csv.gz": b'prompt,completion,label\n"'}.get(name, b'{"prompt": "')
    megabyte = gzip.compress(b"a" * (1 << 20), 1)
    path.write_bytes(gzip.compress(start) + megabyte * (150 if name == "a.jsonl.gz" else 40) + gzip.compress(b'"'))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fault = refused(path)
    assert "max_row_mb: 16" in fault.reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000  # KB


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.parquet"])
def test_a_bomb_of_gigabytes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        table = pa.table({"prompt": ["a" * 300_000_000], "completion": ["c"], "label": [True]})
        pq.write_table(table, path, compression="zstd")
    else:
        start = b'{"prompt": "' if name == "a.jsonl.gz" else b'prompt,completion,label\n"'
        path.write_bytes(gzip.compress(start) + gzip.compress(b"a" * (1 << 20), 1) * 6000)
    ran = subprocess.run([sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-1000:]
    assert ran.stdout.startswith("1 ")
    assert "max_row_mb" in ran.stdout


def test_large_rows_are_tokenised_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halos_pl.data import build_store

    monkeypatch.setattr(build_store, "CHUNK_SIZE", 2_000_000)
    examples = [Example("p", ("a" * 700_000,), (True,), f"a:{i}") for i in range(10)]
    assert [len(chunk) for chunk in build_store._chunks(examples)] == [3, 3, 3, 1]
    assert [len(chunk) for chunk in build_store._chunks([Example("p", ("c",), (True,), "a:1")] * 1500)] == [1024, 476]


# Text that is none


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "gbk"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_other_encodings(tmp_path: Path, encoding: str, name: str) -> None:
    text = "中文" if encoding == "gbk" else "é" * 3
    rows = {
        "a.jsonl": "\n".join([json.dumps({**ROW, "prompt": text}, ensure_ascii=False)] * 3),
        "a.json": json.dumps([{**ROW, "prompt": text}], ensure_ascii=False),
        "a.csv": f"prompt,completion,label\n{text},c,1\n",
    }
    (tmp_path / name).write_bytes(rows[name].encode(encoding))
    items = list(read(Source(str(tmp_path / name))))
    assert items
    assert all(isinstance(item, Fault) and str(item).isprintable() for item in items)
    if encoding == "utf-16" and name != "a.csv":
        assert len(items) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst"])
def test_zeros_as_a_crash_leaves_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\0" * 5000)
    assert isinstance(next(iter(read(Source(str(tmp_path / name))))), Fault)


def test_a_json_file_of_one_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": [ROW]}))
    assert refused(tmp_path / "a.json").place.endswith("a.json:1")


# A chain


def test_a_long_chain_of_messages(tmp_path: Path) -> None:
    """Each message's prompt is all that is above it: to follow the way anew for each takes minutes."""
    rows = [
        {"message_id": str(i), "parent_id": str(i - 1) if i else None, "text": "t", "rank": 0,
         "role": "assistant" if i % 2 else "prompter"}
        for i in range(4_000)
    ]  # fmt: skip
    items = list(read(Source(write_jsonl(tmp_path / "a.jsonl", rows))))
    assert len(items) == 4_000
    examples = [item for item in items if isinstance(item, Example)]
    assert [len(example.prompt) for example in examples] == list(range(1, 1001, 2))
    assert sum(isinstance(item, Fault) for item in items) == 2_000 - len(examples)
    rows[0]["parent_id"] = "3999"  # a circle
    items = list(read(Source(write_jsonl(tmp_path / "a.jsonl", rows))))
    assert not any(isinstance(item, Example) for item in items)


# Found by trying more


def test_text_and_offsets_that_are_both_wrong(tmp_path: Path) -> None:
    """Validation ends at its first error: what it says of text hid offsets that ended the process by SIGSEGV."""
    text = pa.array([b"p", b"\xff"], pa.binary()).view(pa.string())
    parts = pa.array([[{"content": "ab"}], [{"content": "cdefgh"}]])
    table = pa.table({"prompt": text, "completion": parts, "label": [True, True]})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    good, bad = (b"".join(n.to_bytes(4, "little") for n in to) for to in ((0, 2, 8), (0, 2**30, 2**30 + 4)))
    assert sink.getvalue().count(good) == 1
    path = tmp_path / "a.arrow"
    path.write_bytes(sink.getvalue().replace(good, bad))
    assert refused(path).fatal


def test_nested_text_that_is_not_utf8_is_its_rows_fault(tmp_path: Path) -> None:
    said = pa.array([b"p", b"\xff", b"p"], pa.binary()).view(pa.string())
    messages = pa.StructArray.from_arrays([pa.array(["user"] * 3), said], ["role", "content"])
    prompt = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), messages)
    table = pa.table({"prompt": prompt, "completion": ["c"] * 3, "label": [True] * 3})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    assert [type(item) for item in read(Source(str(tmp_path / "a.arrow")))] == [Example, Fault, Example]


def test_rows_that_share_a_value_take_little_memory(tmp_path: Path) -> None:
    """A dictionary stores a text once; 1,024 rows decoded together took gigabytes."""
    text, rows = "x" * 1_000_000, 1024
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([rows], pa.int32()), pa.array([text]))
    for prompt in (shared, runs):
        table = pa.table({"prompt": prompt, "completion": ["c"] * rows, "label": [True] * rows})
        with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        items = read(Source(str(tmp_path / "a.arrow")))
        assert all(isinstance(next(items), Example) for _ in range(3))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
def test_line_breaks_without_end(tmp_path: Path, name: str) -> None:
    header = b"prompt,completion,label\n" if "csv" in name else b""
    with gzip.open(tmp_path / name, "wb", 1) as file:
        file.write(header + b"\n" * 2_000_000)
    assert "max_row_mb" in refused(tmp_path / name, max_row_mb=1.0).reason
    with gzip.open(tmp_path / name, "wb", 1) as file:
        row = b"p,c,1\n" if header else json.dumps(ROW).encode() + b"\n"
        file.write(header + (b"\n" * 1000 + row) * 3)
    assert [type(item) for item in read(Source(str(tmp_path / name)))] == [Example] * 3


def test_prompts_to_be_answered_are_files_of_lines_that_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n\n" + "b" * 17_000_000)
    with pytest.raises(DataError, match=r"a\.txt:3: "):
        read_prompts(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt:3: "):  # before the run is loaded
        evaluate(str(tmp_path / "run"), prompts=str(tmp_path / "a.txt"))
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match="a pipe"):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("name", ["state.json", "data-00000-of-00001.arrow"])
def test_a_pipe_in_a_saved_folder_is_not_opened(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([ROW]).save_to_disk(str(folder))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert name in refused(folder).reason


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300 + ".jsonl"), tmp_path / ("x" * 300) / "a.jsonl"):
        with pytest.raises(ValueError, match="cannot be looked up"):
            Source(str(path))
