"""The cache keeps to a limit: what was used longest ago is removed, what a running command uses is not."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import binary_data, fit

from halos_pl import cache
from halos_pl.cache import Use, entries, limit, make_room
from halos_pl.cli.cache import clear, info
from halos_pl.cli.main import main
from halos_pl.data.source import Source
from halos_pl.data.store import open_store
from halos_pl.policy.store import ReferenceStore
from halos_pl.testing import tiny_tokenizer


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(root: Path, kind: str, number: int, days: float, size: int = 1000) -> Path:
    """An entry of ``size`` bytes that was last used so many days ago."""
    folders = {"models": f"gguf-{number:032x}", "data": f"data/{number:032x}", "reference": cache.REFERENCE}
    path = root / folders[kind]
    path.mkdir(parents=True)
    (path / "file").write_bytes(bytes(size))
    mark = cache.mark_of(path)
    mark.touch()
    os.utime(mark, (time.time() - days * 86400,) * 2)
    return path


SIZES = {"50GB": 50e9, "1.5 kb": 1500, "100": 100, "2MiB": 2e6, "none": float("inf"), "": None, "10%": None}


@pytest.mark.parametrize("given", SIZES)
def test_limits(given: str, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("HALOS_CACHE_LIMIT", given)
    share = {"": 0.2, "10%": 0.1}.get(given)
    total = cache.shutil.disk_usage(root.parent).total
    assert limit() == (SIZES[given] if share is None else pytest.approx(share * total))


@pytest.mark.parametrize("given", ["lots", "-1GB", "120%", "5 GBs", "nan"])
def test_what_is_no_limit_is_refused_before_any_work(given: str, monkeypatch: Any, tmp_path: Path, capfd: Any) -> None:
    monkeypatch.setenv("HALOS_CACHE_LIMIT", given)
    with pytest.raises(SystemExit) as stopped:
        main(["cache"])
    assert stopped.value.code == 1
    assert "HALOS_CACHE_LIMIT" in capfd.readouterr().err
    with pytest.raises(ValueError, match="HALOS_CACHE_LIMIT"):
        open_store(Source(str(binary_data(tmp_path / "a.jsonl"))), tiny_tokenizer())


def test_of_all_kinds_the_oldest_go_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ages = {("data", 1): 5.0, ("models", 2): 4.0, ("reference", 3): 3.0, ("data", 4): 2.0, ("models", 5): 1.0}
    paths = [put(root, kind, number, days) for (kind, number), days in ages.items()]
    assert [entry.path for entry in entries()] == paths
    for kept in (5, 3, 1, 0):
        monkeypatch.setenv("HALOS_CACHE_LIMIT", str(kept * 1000))
        make_room()
        assert [path.exists() for path in paths] == [False] * (5 - kept) + [True] * kept
    assert not list(root.rglob("*.removed"))


def test_what_is_in_use_stays_whoever_uses_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOS_CACHE_LIMIT", "1")
    here, there, free = (put(root, "data", number, days=9 - number) for number in range(3))
    use = Use(here)
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH); print('held', flush=True)"
    words = [sys.executable, "-c", f"{code}; sys.stdin.read()", str(cache.mark_of(there))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        make_room()
        assert [path.exists() for path in (here, there, free)] == [True, True, False]
        clear()
        assert [path.exists() for path in (here, there)] == [True, True]
        other.kill()
    make_room()
    assert [path.exists() for path in (here, there)] == [True, False]
    use.end()
    make_room()
    assert entries() == []


def test_what_a_killed_command_left_counts_and_goes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = put(root, "data", 1, days=0)
    for name in (f"data/{2:032x}.part", f"gguf-{3:032x}.x8s2", f"data/{4:032x}.removed"):
        (root / name).mkdir()
        (root / name / "file").write_bytes(bytes(1000))
        os.utime(root / name, (1, 1))
    assert sum(entry.size for entry in entries()) == 4000
    monkeypatch.setenv("HALOS_CACHE_LIMIT", "1000")
    make_room()
    assert [entry.path for entry in entries()] == [whole]


def test_the_reference_store_of_an_earlier_version_goes_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, "reference", 0, days=0)
    earlier = [root / "reference" / f"logps.sqlite{ending}" for ending in ("", "-journal")]
    for file in earlier:
        file.write_bytes(bytes(1000))
        os.utime(file, (1, 1))
    assert sum(entry.size for entry in entries()) == 3000
    monkeypatch.setenv("HALOS_CACHE_LIMIT", "1000")
    make_room()
    assert not any(file.exists() for file in earlier)
    assert [entry.path for entry in entries()] == [root / cache.REFERENCE]


def test_a_source_that_is_used_again_is_newer(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading counts as use, also where nothing is written; looking at the cache does not."""
    sources = [Source(str(binary_data(tmp_path / f"{i}.jsonl", 30, seed=i))) for i in range(3)]
    tokenizer = tiny_tokenizer()
    stores = [open_store(source, tokenizer) for source in sources[:2]]
    folders = [store.folder for store in stores]
    for days, folder in zip((2, 1), folders, strict=True):
        os.utime(cache.mark_of(folder), (time.time() - days * 86400,) * 2)
    stores = [open_store(sources[0], tokenizer)]
    info()
    gc.collect()
    monkeypatch.setenv("HALOS_CACHE_LIMIT", str(int(2.5 * entries()[0].size)))
    third = open_store(sources[2], tokenizer)
    assert [entry.path for entry in entries()] == [folders[0], third.folder]
    assert third.completion(0).tolist()


def test_a_fit_keeps_its_own_data_though_they_exceed_the_limit(
    root: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = put(root, "models", 1, days=1)
    monkeypatch.setenv("HALOS_CACHE_LIMIT", "10")
    main(fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl"), tmp_path / "run", "--trainer.max_steps=1"))
    assert not old.exists()
    assert [entry.kind for entry in entries()] == ["data"]


def test_the_reference_store_keeps_to_the_limit_and_gives_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {i.to_bytes(16, "big"): torch.full((256,), -1.0) for i in range(400)}
    with closing(ReferenceStore()) as store:
        store.put(rows)
        (size,) = (entry.size for entry in entries())
    monkeypatch.setenv("HALOS_CACHE_LIMIT", "100kB")
    with closing(ReferenceStore()) as store:
        new = b"new".ljust(16)
        store.put({new: torch.ones(1)})
        assert entries()[0].size <= 110_000 < size
        assert new in store.get([new])
        make_room()  # it is in use
        assert 50 < len(store) < 100


def test_the_command_shows_sizes_ages_and_the_limit(root: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("HALOS_CACHE_LIMIT", "3GB")
    monkeypatch.setenv("COLUMNS", "200")
    put(root, "data", 1, days=7, size=2_000_000)
    put(root, "data", 2, days=3, size=1_000_000)
    main(["cache"])
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if "feedback" in line)
    for part in (" 2 ", "3.0", "7 days ago", "3 days ago"):
        assert part in line
    assert "3.0 MB of 3.0 GB" in shown
    assert "HALOS_CACHE_LIMIT" in shown
