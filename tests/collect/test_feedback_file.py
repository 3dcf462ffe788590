"""The file of ``halos collect``: no click is lost, and ``halos fit`` reads it at any moment."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from run_halos import full_disk, write_jsonl

from halos_pl.cli.main import main
from halos_pl.collect.feedback_file import FeedbackFile
from halos_pl.data.example import DataError, Example
from halos_pl.data.read import read
from halos_pl.data.source import Source


def row(i: int, label: bool = True, **more: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"question {i}"}]
    facts = {
        "annotator": "Ada",
        "time": "2026-01-01T00:00:00.000Z",
        "model": {"name": "m"},
        "seed": i,
        "id": f"id{i:04}",
    }
    return {"prompt": prompt, "completion": f"answer {i}", "label": label, "finished": True, **facts, **more}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Any:
    file = FeedbackFile(tmp_path / "a.jsonl", "thumbs")
    yield file
    file.close()


def test_the_number_of_rows_is_that_of_the_file_whoever_changes_it(file: FeedbackFile) -> None:
    for i in range(3):
        file.add(row(i))
    file.path.rename(file.path.with_name("moved.jsonl"))
    file.add(row(3))
    assert file.rows == len(rows_of(file.path)) == 1
    write_jsonl(file.path, [row(i) for i in range(5)])  # in place
    file.replace("id0002", None)
    assert file.rows == len(rows_of(file.path)) == 4


def test_a_file_of_another_kind_that_takes_its_place_is_left_alone(file: FeedbackFile) -> None:
    file.add(row(1))
    write_jsonl(file.path, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    other = file.path.read_bytes()
    with pytest.raises(DataError, match="--kind choices"):
        file.add(row(2))
    assert file.path.read_bytes() == other


def test_threads_lose_nothing(file: FeedbackFile) -> None:
    def click(start: int) -> None:
        for i in range(start, start + 8):
            file.add(row(i))
            if i % 4 == 0:
                file.replace(f"id{i:04}", row(i, False))
            elif i % 4 == 1:
                file.replace(f"id{i:04}", None)

    threads = [threading.Thread(target=click, args=(100 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = {each["id"]: each["label"] for each in rows_of(file.path)}
    expected = {f"id{100 * k + i:04}": i % 4 != 0 for k in range(4) for i in range(8) if i % 4 != 1}
    assert kept == expected
    assert file.rows == len(expected)
    examples = list(read(Source(str(file.path))))
    assert all(isinstance(each, Example) for each in examples)
    assert [each.labels[0] for each in examples] == list(kept.values())  # type: ignore[union-attr]


def test_a_row_is_on_the_disk_before_it_counts(file: FeedbackFile, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_size, file.rows))

    monkeypatch.setattr(os, "fsync", recorded)
    file.add(row(0))
    assert synced[0] == (file.path.stat().st_size, 0)
    before = file.path.stat()
    file.replace("id0000", row(0, False))
    assert file.path.stat().st_ino != before.st_ino  # a reader keeps the old file, or gets the new one
    assert file.path.stat().st_size in [size for size, _ in synced]
    assert rows_of(file.path)[0]["label"] is False


def test_a_correction_leaves_the_other_lines_alone(file: FeedbackFile) -> None:
    for i in range(3):
        file.add(row(i))
    lines = file.path.read_bytes().split(b"\n")
    lines[0] = b'{"label": 0,  "completion": "edited",   "prompt": "by hand"}'
    lines.insert(1, b"")
    file.path.write_bytes(b"\n".join(lines)[:-1])  # and no line break at the end
    file.replace("id0001", row(1, False))
    after = file.path.read_bytes().split(b"\n")
    assert [line for line in after if b"id0001" not in line] == [line for line in lines[:-1] if b"id0001" not in line]
    assert json.loads(after[2])["label"] is False
    file.add(row(7))
    assert file.path.read_bytes().split(b"\n")[-2:] == [json.dumps(row(7)).encode(), b""]
    file.replace("gone", row(8))  # removed by hand meanwhile
    file.replace("gone", None)
    assert json.loads(file.path.read_bytes().split(b"\n")[-2]) == row(8)


def test_the_mode_and_a_link_are_kept(tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_text(json.dumps(row(0)) + "\n")
    (tmp_path / "real.jsonl").chmod(0o640)
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    file = FeedbackFile(tmp_path / "link.jsonl", "thumbs")
    file.replace("id0000", row(0, False))
    file.close()
    assert (tmp_path / "link.jsonl").is_symlink()
    assert (tmp_path / "real.jsonl").stat().st_mode & 0o777 == 0o640
    assert rows_of(tmp_path / "real.jsonl")[0]["label"] is False


def test_a_full_disk_changes_nothing(file: FeedbackFile) -> None:
    file.add(row(0))
    before = file.path.read_bytes()
    for write in (lambda: file.add(row(1)), lambda: file.replace("id0000", row(0, note="x" * 99))):
        with full_disk(len(before) + 10), pytest.raises(OSError, match=r"a\.jsonl"):
            write()
        assert file.path.read_bytes() == before
    assert file.rows == 1
    assert [path.name for path in file.path.parent.iterdir() if "part" in path.name] == []
    file.add(row(1))
    assert len(rows_of(file.path)) == 2


@pytest.mark.parametrize(
    ("bad", "column"),
    [({"completion": " "}, "completion"), ({"completion": "a <image> b"}, "completion"), ({"prompt": ""}, "prompt")],
)
def test_a_row_that_fit_would_refuse_is_refused(file: FeedbackFile, bad: dict[str, Any], column: str) -> None:
    with pytest.raises(DataError, match=column):
        file.add(row(0) | bad)
    assert not file.path.exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pairs = Path(write_jsonl(tmp_path / "pairs.jsonl", [pair]))
    thumbs = Path(write_jsonl(tmp_path / "thumbs.jsonl", [row(0)]))
    scored = Path(write_jsonl(tmp_path / "scored.jsonl", [{"prompt": "a", "completion": "b", "score": 1}]))
    torn = tmp_path / "torn.jsonl"
    torn.write_text(json.dumps(row(0)) + "\n" + json.dumps(row(1))[:50])
    for path, kind, error, words in (
        (pairs, "thumbs", DataError, r"pairs\.jsonl:1.*--kind choices"),
        (thumbs, "choices", DataError, r"thumbs\.jsonl:1.*--kind thumbs"),
        (scored, "thumbs", DataError, r"scored\.jsonl:1.*--out"),
        (torn, "thumbs", DataError, r"torn\.jsonl:2.*--out"),
        (tmp_path / "a.json", "thumbs", DataError, r"\.jsonl"),
        (tmp_path, "thumbs", DataError, r"\.jsonl"),
        (tmp_path / "no" / "a.jsonl", "thumbs", FileNotFoundError, "no folder"),
    ):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(error, match=words):
            FeedbackFile(path, kind)  # type: ignore[arg-type]
        assert (path.read_bytes() if path.is_file() else None) == before
    FeedbackFile(pairs, "choices").close()


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write_jsonl(tmp_path / "a.jsonl", [row(0)]))
    opened = Path.open

    def refusing(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if self == path and "a" in mode:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", refusing)  # root may write to any file
    with pytest.raises(PermissionError, match=r"a\.jsonl"):
        FeedbackFile(path, "thumbs")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = FeedbackFile(tmp_path / "a.jsonl", "thumbs")
    with pytest.raises(FileExistsError, match=r"a\.jsonl"):
        FeedbackFile(tmp_path / "a.jsonl", "thumbs")
    first.close()
    FeedbackFile(tmp_path / "a.jsonl", "thumbs").close()


def test_data_inspect_reads_the_file(file: FeedbackFile, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        file.add(row(i, i == 0))
    main(["data", "inspect", str(file.path), f"--tokenizer={tiny_folder}", f"--json_file={file.path}.json"])
    capsys.readouterr()
    inspection = json.loads(Path(f"{file.path}.json").read_text())
    assert inspection["figures"]["desirable"] == 1
    assert inspection["figures"]["undesirable"] == 2
    assert inspection["faults"] == []
    assert sorted(inspection["unused"]) == ["annotator", "id", "model", "seed", "time"]
