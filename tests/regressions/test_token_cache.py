"""A token cache that is damaged is recomputed, whichever bit it is, and one that is read-only is used."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_halos import full_disk, write_jsonl

from halos_pl.cli.cache import clear
from halos_pl.data import cache_key, store
from halos_pl.data.example import DataError
from halos_pl.data.layout import SUMS, checksums
from halos_pl.data.source import Source
from halos_pl.data.store import Store, open_store
from halos_pl.testing import tiny_tokenizer

FILES = ["SHA256SUMS", "meta.json", "prompts", "rows", "tokens"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path, Path, Any]:
    """A source, the folder of the cache, the one store in it, and its tokenizer."""
    folder = tmp_path_factory.mktemp("made")
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": "r" * (i + 1), "id": i} for i in range(20)]
    source, tokenizer = Source(write_jsonl(folder / "a.jsonl", rows)), tiny_tokenizer()
    found = open_store(source, tokenizer, folder / "cache")
    assert found.folder
    return source, folder / "cache", found.folder, tokenizer


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were read."""
    real, seen = store.build, []

    def counted(source: Source, *rest: Any) -> None:
        seen.append(source.path)
        real(source, *rest)

    monkeypatch.setattr(store, "build", counted)
    return seen


def same(one: Store, other: Store) -> bool:
    arrays = all(np.array_equal(getattr(one, n), getattr(other, n)) for n in ("tokens", "prompts"))
    rows = one.rows.tobytes() == other.rows.tobytes()
    return arrays and rows and (one.digest, one.examples, one.unused) == (other.digest, other.examples, other.unused)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(made: Any, builds: list[str], name: str, tmp_path: Path) -> None:
    source, _, _, tokenizer = made
    wanted = open_store(source, tokenizer, tmp_path)
    builds.clear()
    file = wanted.folder / name  # type: ignore[operator]
    whole = file.read_bytes()
    places = random.Random(name).sample(range(8 * len(whole)), 12)
    for count, place in enumerate(places, start=1):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        assert same(open_store(source, tokenizer, tmp_path), open_store(made[0], tokenizer, made[1]))
        assert len(builds) == count
        assert file.read_bytes() == whole


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"sizes": {}}', '{"digest": 1, "suffixes": 3}', "\udcff"])
def test_any_meta_is_recomputed(made: Any, builds: list[str], tmp_path: Path, content: str) -> None:
    source, _, folder, tokenizer = made
    there = tmp_path / folder.name
    shutil.copytree(folder, there)
    (there / "meta.json").write_bytes(content.encode(errors="surrogateescape"))
    assert same(open_store(source, tokenizer, tmp_path), open_store(source, tokenizer, made[1]))
    assert len(builds) == 1
    # Consistent with its sums, it is still no store.
    (there / "meta.json").write_bytes(content.encode(errors="surrogateescape"))
    (there / SUMS).write_text(checksums(there))
    assert open_store(source, tokenizer, tmp_path).examples == 20
    assert len(builds) == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "longer", "missing", "folder"])
def test_a_file_that_is_not_whole(made: Any, builds: list[str], tmp_path: Path, name: str, damage: str) -> None:
    source, _, folder, tokenizer = made
    there = tmp_path / folder.name
    shutil.copytree(folder, there)
    content = (there / name).read_bytes()
    (there / name).unlink()
    if damage == "folder":
        (there / name).mkdir()
    elif damage != "missing":
        (there / name).write_bytes(content[:-1] if damage == "cut" else content + b"\n")
    assert open_store(source, tokenizer, tmp_path).examples == 20
    assert len(builds) == 1


def test_a_whole_store_is_used_without_writing(made: Any, builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a read-only cache."""
    source, cache, _, tokenizer = made

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("mkdir", "touch"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(store, "Lease", refuse)
    assert open_store(source, tokenizer, cache).examples == 20
    assert not builds
    other = Source(source.path, rows=3)  # which the cache does not hold
    with pytest.raises(DataError, match="cannot be written"):
        open_store(other, tokenizer, cache)


def test_what_is_left_of_an_earlier_version_is_no_store(made: Any, builds: list[str], tmp_path: Path) -> None:
    source, _, folder, tokenizer = made
    there = tmp_path / folder.name
    shutil.copytree(folder, there)
    (there / SUMS).unlink()  # there were sizes in their place
    meta = json.loads((there / "meta.json").read_text())
    sizes = {name: (there / name).stat().st_size for name in ("tokens", "prompts", "rows")}
    (there / "meta.json").write_text(json.dumps({"sizes": sizes, **meta}))
    assert same(open_store(source, tokenizer, tmp_path), open_store(source, tokenizer, made[1]))
    assert len(builds) == 1


def test_a_file_that_may_not_be_read_is_named(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, _, tokenizer = made

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache_key, "content_hash", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read"):
        open_store(source, tokenizer, tmp_path)


def test_clear_leaves_nothing(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path))
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "a").touch()
    open_store(made[0], made[3])
    assert os.listdir(tmp_path / "data")
    clear()
    assert os.listdir(tmp_path) == []
    assert "data: " in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["", ".part"])
@pytest.mark.parametrize("what", ["file", "link", "pipe"])
def test_what_is_no_folder_is_replaced(tmp_path: Path, ending: str, what: str) -> None:
    source = Source(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c", "label": True}]))
    tokenizer, cache = tiny_tokenizer(), tmp_path / "stores"
    place = open_store(source, tokenizer, cache).folder
    assert place is not None
    shutil.rmtree(place)
    other = place.with_name(place.name + ending)
    make = {"file": other.touch, "link": lambda: other.symlink_to(other), "pipe": lambda: os.mkfifo(other)}
    make[what]()
    assert len(open_store(source, tokenizer, cache).rows) == 1


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """And the cache is as empty as before."""
    source = Source(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c" * 9000, "label": True}]))
    with full_disk(1000), pytest.raises(OSError, match=re.escape(str(tmp_path / "cache"))):
        open_store(source, tiny_tokenizer(), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and any(path.iterdir())]
