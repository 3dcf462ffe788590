"""A cache that several machines share: they neither corrupt it nor wait forever, with or without locks."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from run_halos import binary_data

from halos_pl import cache
from halos_pl.common import files, leases
from halos_pl.common.leases import Lease
from halos_pl.data import store
from halos_pl.data.source import Source
from halos_pl.data.store import open_store
from halos_pl.testing import tiny_tokenizer

forked = multiprocessing.get_context("fork")  # a new interpreter would take seconds to import torch


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(leases, "DURATION", 0.6)
    (tmp_path / "cache" / "data").mkdir(parents=True)
    return tmp_path / "cache"


@contextmanager
def on(machine: str) -> Iterator[None]:
    """As if this were another machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: machine)
        yield


def on_machines(number: int, work: Callable[[int], Any]) -> list[Any]:
    """The results of ``work`` in processes that run at once on machines of their own."""
    results, start = forked.Queue(), forked.Barrier(number)

    def one(machine: int) -> None:
        with on(f"node{machine}"):
            start.wait(60)
            results.put(work(machine))

    processes = [forked.Process(target=one, args=(machine,)) for machine in range(number)]
    for process in processes:
        process.start()
    collected = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return collected


def entry(root: Path, number: int = 1) -> Path:
    path = root / "data" / f"{number:032x}"
    path.mkdir()
    (path / "file").write_bytes(bytes(1000))
    return path


def die_with(lock: Path) -> None:
    """Leaves the lock as a machine that loses power does."""
    with on("dead"), Lease(lock).held() as held:
        assert held
        shutil.copy(lock, f"{lock}.copy")
    os.replace(f"{lock}.copy", lock)


# -- tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("excluded", [True, False])
def test_machines_that_start_at_once_share_the_tokens(
    excluded: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One builds them; where the lock fails, all do, and nobody removes what another one has just built."""
    source, tokenizer = Source(str(binary_data(tmp_path / "a.jsonl", 30))), tiny_tokenizer()
    build, builds = store.build, forked.Value("i", 0)

    def slow(*args: Any) -> None:
        with builds.get_lock():
            builds.value += 1
        build(*args)
        time.sleep(0.3)

    @contextmanager
    def no_lock(self: Lease) -> Iterator[bool]:
        yield True

    monkeypatch.setattr(store, "build", slow)
    if not excluded:
        monkeypatch.setattr(Lease, "held", no_lock)

    def use(machine: int) -> tuple[str, int]:
        opened = open_store(source, tokenizer)
        time.sleep(0.5)
        return opened.digest, int(opened.tokens.sum())  # it is still there

    assert len(set(on_machines(3, use))) == 1
    assert builds.value == (1 if excluded else 3)
    (folder,) = (path for path in (root / "data").iterdir() if path.is_dir())
    assert open_store(source, tokenizer).folder == folder


def test_the_lock_of_a_dead_machine_is_taken_over(root: Path, tmp_path: Path) -> None:
    source, tokenizer = Source(str(binary_data(tmp_path / "a.jsonl"))), tiny_tokenizer()
    opened = open_store(source, tokenizer)
    assert opened.folder
    shutil.rmtree(opened.folder)
    die_with(Path(f"{opened.folder}.lock"))
    start = time.monotonic()
    assert open_store(source, tokenizer).digest == opened.digest
    assert 0.5 < time.monotonic() - start < 10


def test_a_lock_that_is_renewed_is_kept(tmp_path: Path) -> None:
    """Longer than the time after which it would expire."""
    with on("elsewhere"), Lease(tmp_path / "lock").held() as held, on("here"):
        other = Lease(tmp_path / "lock")
        for _ in range(8):
            with other.held(wait=False) as too:
                assert held
                assert not too
            time.sleep(0.2)
    with other.held(wait=False) as held:
        assert held


def test_a_lock_that_was_never_written_does_not_block(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    with Lease(lock).held(wait=False) as held:
        assert not held  # its owner may be about to write it
    os.utime(lock, (time.time() - 60,) * 2)
    with Lease(lock).held() as held:
        assert held
    assert not lock.exists()


@pytest.mark.parametrize("intact", [True, False])
def test_a_folder_is_published_unless_there_is_an_intact_one(intact: bool, tmp_path: Path) -> None:
    for name in ("part", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    files.publish(tmp_path / "part", tmp_path / "place", lambda: intact)
    assert (tmp_path / "place" / "content").read_text() == ("place" if intact else "part")
    left = {path.name for path in tmp_path.iterdir()} - {"cache"}
    assert left == ({"part", "place"} if intact else {"place"})


# -- entries in use ----------------------------------------------------------------------------------------


def make_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOS_CACHE_LIMIT", "1")
    cache.make_room()


def age(path: Path, seconds: float) -> None:
    for mark in path.parent.glob(f"{path.name}.*.used"):
        os.utime(mark, (time.time() - seconds,) * 2)


def test_an_entry_stays_while_another_machine_uses_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its mark has not been renewed for long, as when it has died."""
    path = entry(root)
    with on("elsewhere"):
        use = cache.Use(path)
    make_no_room(monkeypatch)
    assert path.exists()
    assert cache.in_use(path.parent)
    age(path, cache.EXPIRES - 60)
    make_no_room(monkeypatch)
    assert path.exists()
    age(path, cache.EXPIRES + 60)
    make_no_room(monkeypatch)
    assert not list(path.parent.iterdir())
    use.end()


def test_marks_of_what_is_in_use_are_renewed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [entry(root, number) for number in range(2)]
    uses = [cache.Use(path) for path in paths]
    uses[1].end()
    for path in paths:
        age(path, 3000)
    sleeps = iter([None])
    monkeypatch.setattr(cache.time, "sleep", lambda seconds: next(sleeps))
    with pytest.raises(StopIteration):
        cache._renew_all()
    assert [time.time() - use.mark.stat().st_mtime < 1000 for use in uses] == [True, False]
    uses[0].end()


def test_an_entry_whose_use_begins_during_its_removal_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace, uses = entry(root), os.replace, []

    def meanwhile(*paths: Path) -> None:
        if not uses:
            with on("elsewhere"):
                uses.append(cache.Use(path))
        replace(*paths)

    monkeypatch.setattr(os, "replace", meanwhile)
    make_no_room(monkeypatch)
    assert (path / "file").stat().st_size == 1000
    assert len(uses) == 1


def test_entries_are_used_and_removed_without_locks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    used, unused = entry(root, 1), entry(root, 2)
    use = cache.Use(used)
    make_no_room(monkeypatch)
    assert used.exists()
    assert not unused.exists()
    use.end()
    age(used, cache.EXPIRES + 60)
    make_no_room(monkeypatch)
    assert not used.exists()
