"""The reference store: what it holds is what a live reference says, whoever wrote it and whatever became of it."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import tempfile
import time
import warnings
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import SoftFileLease
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_steps import batch
from run_halos import OBJECTIVES, ROOT, binary_data, fit, full_disk, metrics, pair_data

import halos_pl
from halos_pl.batch import TokenBatch
from halos_pl.cache import REFERENCE, cache_root
from halos_pl.cli.main import main
from halos_pl.common.files import PART
from halos_pl.labels import Labels
from halos_pl.policy import reference as references
from halos_pl.policy import segments
from halos_pl.policy.loading import ModelError
from halos_pl.policy.moving_reference import MovingReference
from halos_pl.policy.segments import SUFFIX, Segments
from halos_pl.policy.store import ReferenceStore, StoredReference, fingerprint, keys

STORED = "--model.reference_store=true"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))


def rows_of(run: Path) -> dict[str, int]:
    counts: dict[str, int] = json.loads((run / "summary.json").read_text())["reference_rows"]
    return counts


def numbers(run: Path) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in row.items()} for row in metrics(run)]


def assert_close(a: Path, b: Path, tolerance: float = 1e-5, but: str = "none") -> None:
    """All figures of the log but the one named ``but``."""
    one, other = ([{k: v for k, v in row.items() if k != but} for row in numbers(run)] for run in (a, b))
    assert len(one) == len(other) > 0
    for x, y in zip(one, other, strict=True):
        assert x == pytest.approx(y, rel=tolerance, abs=tolerance)


def some(*shapes: int, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=draw) - 1 for n in shapes]


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("kto", ()),
        pytest.param("dpo", (), marks=pytest.mark.slow),
        pytest.param("kto", ("--trainer.precision=bf16-mixed",), marks=pytest.mark.slow),
        pytest.param("kto", ("--model.policy.lora.r=4",), marks=pytest.mark.slow),
        pytest.param("bco", ("--model.micro_batch_rows=2",), marks=pytest.mark.slow),
    ],
)
def test_stored_is_live(objective: str, options: tuple[str, ...], tiny_folder: Path, tmp_path: Path) -> None:
    """Also with another batch size and order, so with other mismatches, than the run that stored it."""
    data = (pair_data if objective == "dpo" else binary_data)(tmp_path / "data.jsonl", 12)

    def run(name: str, *more: str) -> Path:
        main(fit(tiny_folder, objective, data, tmp_path / name, *options, "--trainer.max_epochs=2", *more))
        return tmp_path / name

    live = run("live")
    first = run("first", STORED)
    other = run("other", STORED, "--data.batch_size=6", "--data.seed=7")
    second = run("second", STORED)
    # In bfloat16 a sum depends on what is in the batch beside it, to its three digits. Shares of outcomes that are
    # gains are counts of signs: an outcome that is 0 with a live reference may have either sign with a stored one.
    bf16 = "bf16" in str(options)
    tolerance, but = (2e-2, "outcome/gains") if bf16 else (1e-5, "none")
    assert_close(live, first, tolerance, but)
    assert_close(live, second, tolerance, but)
    assert rows_of(live)["stored"] == 0
    assert rows_of(second)["computed"] == 0
    assert rows_of(second)["stored"] == rows_of(live)["computed"]
    if objective == "dpo":  # no mismatches: whatever the order, all was there
        assert rows_of(other)["computed"] == 0
    else:
        assert rows_of(other)["stored"] > 0


def test_a_frozen_copy_is_not_loaded_where_all_is_stored(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pair_data(tmp_path / "data.jsonl", 8)
    main(fit(tiny_folder, "dpo", data, tmp_path / "a", STORED))

    def never(*args: Any) -> Any:
        raise AssertionError("the reference was loaded")

    monkeypatch.setattr(references, "load_reference", never)
    main(fit(tiny_folder, "dpo", data, tmp_path / "b", STORED))
    assert rows_of(tmp_path / "b")["computed"] == 0


def test_a_study_computes_the_reference_once(tiny_folder: Path, tmp_path: Path) -> None:
    """Four objectives over the same pairs: one of them computes the reference, three find it."""
    data = pair_data(tmp_path / "data.jsonl", 8)
    computed = {}
    for name in ("dpo", "ipo", "bco_pair", "apo_down"):
        main(fit(tiny_folder, name, data, tmp_path / name, STORED, "--data.batch_size=8"))
        computed[name] = rows_of(tmp_path / name)["computed"]
    # 8 pairs are 16 rows.
    assert sum(computed.values()) == 16, computed
    assert computed["dpo"] == 16


@pytest.mark.parametrize("objective", ["kto", "grpo"])
def test_a_step_in_parts_asks_the_reference_once(objective: str, tiny_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {p}", "completion": f"answer {p} {i}", "score": float(i)}
        for p in range(2)
        for i in range(4)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = []
    for name, options in (("whole", []), ("parts", ["--model.micro_batch_rows=2"])):
        main(fit(tiny_folder, objective, data, tmp_path / name, *options, "--trainer.max_steps=2"))
        counts.append(rows_of(tmp_path / name)["computed"])
    assert counts[0] == counts[1] > 0


def test_another_model_dtype_or_precision_is_another_entry(tiny_folder: Path, tmp_path: Path) -> None:
    data = pair_data(tmp_path / "data.jsonl", 4)
    for name, option in (("a", ""), ("b", "--model.policy.dtype=bfloat16"), ("c", "--trainer.precision=bf16-mixed")):
        main(fit(tiny_folder, "dpo", data, tmp_path / name, STORED, *([option] if option else [])))
        assert rows_of(tmp_path / name)["stored"] == 0, name


def test_one_that_moves_is_refused(tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = pair_data(tmp_path / "data.jsonl", 4)
    with pytest.raises(SystemExit):
        main(fit(tiny_folder, "tr_dpo", data, tmp_path / "run", STORED))
    assert "log-probs of SyncedCopy cannot be stored" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_changed_files_are_found_when_the_reference_has_to_be_loaded(tiny_folder: Path) -> None:
    from halos_pl.policy.loading import ModelSpec, load_model
    from halos_pl.policy.scorer import Scorer

    spec = ModelSpec(str(tiny_folder))
    policy = Scorer(load_model(spec))
    reference = references.FrozenCopy()
    with torch.no_grad():
        next(policy.parameters()).add_(1)
    reference.bind(policy, spec, stored=True)
    with pytest.raises(ModelError, match="have changed since"), reference.scoring():
        pass


# -- the file ----------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_key_is_of_the_row_and_nothing_else(lengths: list[tuple[int, int]], seed: int) -> None:
    draw = random.Random(seed)
    texts = [([draw.randrange(3) for _ in range(p)], [draw.randrange(3) for _ in range(c)]) for p, c in lengths]
    n = len(texts)
    batch = TokenBatch(
        prompts=[torch.tensor(p) for p, _ in texts],
        completions=[torch.tensor(c) for _, c in texts],
        prompt=torch.arange(n),
        labels=Labels(desirable=torch.ones(n, dtype=torch.bool)),
    )
    found = keys("model", batch)
    for i in range(n):
        for j in range(n):
            assert (found[i] == found[j]) == (texts[i] == texts[j])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert keys("model", batch.select(order)) == [found[i] for i in order.tolist()]
    assert not set(keys("another", batch)) & set(found)


def test_a_fingerprint_is_of_names_dtypes_shapes_values_and_config() -> None:
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    names = {fingerprint(base.items(), {"eps": 1}), fingerprint(reversed(list(base.items())), {"eps": 1})}
    names.add(fingerprint(base.items(), {"use_cache": False, "eps": 1, "_attn_implementation": "sdpa"}))
    assert len(names) == 1
    for other in (
        base | {"a": base["a"].view(3, 2)},
        base | {"a": base["a"].double()},
        base | {"b": torch.tensor([1.0, 1.0000001])},
        {"c": base["a"], "b": base["b"]},
    ):
        names.add(fingerprint(other.items(), {"eps": 1}))
    names.add(fingerprint(base.items(), {"eps": 2}))
    assert len(names) == 6


def key(*numbers: int) -> bytes:
    return hashlib.blake2b(bytes(numbers), digest_size=16).digest()


A, B, C = key(1), key(2), key(3)


def segments_of(path: Path) -> list[Path]:
    return sorted(path.glob(f"*{SUFFIX}"))


def size_of(path: Path) -> int:
    return sum(segment.stat().st_size for segment in segments_of(path))


def age(path: Path, seconds: float) -> None:
    """As if nothing had happened in the folder for so long."""
    for segment in segments_of(path):
        os.utime(segment, (segment.stat().st_mtime - seconds,) * 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_what_is_not_finite_is_not_kept(path: Path) -> None:
    with closing(ReferenceStore(path)) as store:
        store.put({A: torch.tensor([-1.0, torch.nan]), B: torch.tensor([-1.0])})
        assert store.get([A, B]).keys() == {B}


def test_every_flipped_bit_is_found_and_costs_no_other_block(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a value only this one is lost, elsewhere the block. It is reported, recomputed, and right from then on."""
    logps = dict(zip((A, B, C), some(4, 3, 2), strict=True))
    with closing(ReferenceStore(path)) as store:
        store.put({A: logps[A], B: logps[B]})
        first = size_of(path)
        store.put({C: logps[C]})
    (segment,) = segments_of(path)
    whole = segment.read_bytes()
    for place in random.Random(0).sample(range(8 * first), 60):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        segment.write_bytes(damaged)
        caplog.clear()
        with closing(ReferenceStore(path)) as store:
            stored = store.get([A, B, C])
            in_values = place // 8 >= first - 4 * 7
            assert len(stored) == (2 if in_values else 1)
            assert all(torch.equal(value, logps[name]) for name, value in stored.items())
            assert C in stored
            assert store.damaged == 1
            assert len(store) == len(stored)
            assert "1 damaged" in caplog.text
            store.put({name: value for name, value in logps.items() if name not in stored})
        with closing(ReferenceStore(path)) as store:
            stored = store.get([A, B, C])
            assert all(torch.equal(stored[name], value) for name, value in logps.items())
        for other in set(segments_of(path)) - {segment}:
            other.unlink()


def test_a_killed_writer_loses_only_its_last_entries(path: Path) -> None:
    """Wherever its file was cut; nothing is reported as damaged."""
    with closing(ReferenceStore(path)) as store:
        store.put({A: torch.ones(3)})
        first = size_of(path)
        store.put({B: torch.ones(5), C: torch.ones(2)})
    (segment,) = segments_of(path)
    whole = segment.read_bytes()
    for size in range(len(whole)):
        segment.write_bytes(whole[:size])
        with closing(ReferenceStore(path)) as store:
            assert store.get([A, B, C]).keys() == ({A} if size >= first else set())
            assert store.damaged == 0


@pytest.mark.parametrize("content", [b"", b"this is no segment" * 400, b"halosV1\n" * 400])
def test_a_file_without_entries_does_no_harm(path: Path, content: bytes) -> None:
    path.mkdir()
    (path / f"0{SUFFIX}").write_bytes(content)
    with closing(ReferenceStore(path)) as store:
        store.put({A: torch.ones(1)})
        assert len(store) == 1


def test_other_processes_see_entries_within_the_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(ReferenceStore(path)) as one, closing(ReferenceStore(path)) as other:
        one.put({A: torch.ones(1)})
        assert not other.get([A])  # the folder has just been listed
        monkeypatch.setitem(segments.LIST_AGAIN, "an entry is missing", 0.0)
        assert other.get([A])[A] == 1
        one.put({B: torch.ones(2)})
        assert other.get([A, B]).keys() == {A, B}


def test_a_folder_that_is_removed_begins_anew(path: Path) -> None:
    """What one process keeps afterwards, the other finds."""
    with closing(ReferenceStore(path)) as one, closing(ReferenceStore(path)) as other:
        one.put({A: torch.ones(1)})
        other.put({B: torch.ones(1)})
        shutil.rmtree(path)
        for store, name in ((one, A), (other, B)):
            assert not store.get([name])
            store.put({name: torch.ones(2)})
            assert store.get([name])[name].tolist() == [1, 1]
    with closing(ReferenceStore(path)) as store:
        assert len(store) == 2


def test_a_full_disk_does_not_end_a_run(path: Path) -> None:
    """It warns once, keeps what was stored, and goes on storing when there is room again."""
    names = [key(9, i) for i in range(20)]
    with closing(ReferenceStore(path)) as store:
        store.put({A: torch.ones(10)})
        with full_disk(size_of(path) + 50), warnings.catch_warnings(record=True, action="always") as warned:
            for name in names:
                store.put({name: torch.ones(100)})
        assert [str(path) in str(warning.message) for warning in warned] == [True]
        assert store.get([A, *names]).keys() == {A}
        assert size_of(path) < 1000  # no incomplete blocks
        store.put({B: torch.ones(100)})
    with closing(ReferenceStore(path)) as store:
        assert store.get([A, B, *names]).keys() == {A, B}
        assert store.damaged == 0


def test_rows_of_a_sharded_reference_are_either_stored_or_computed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another rank lacks a row, this rank computes all of its own, too."""
    most = [0]
    monkeypatch.setattr("halos_pl.policy.store.most_over_ranks", lambda number: [max(most[0], number)])
    rows = batch(2)
    reference = SimpleNamespace(fingerprint="f", rows_computed=0)

    def logps(rows: Any) -> torch.Tensor:
        reference.rows_computed += len(rows)
        return torch.zeros(len(rows), max(map(len, rows.completions)))

    reference.logps = logps
    with closing(ReferenceStore(path)) as store:
        stored = StoredReference(reference, store, lambda: (), sharded=True)
        for number, of_others in enumerate((0, 0, 1)):
            most[0] = of_others
            stored.logps(rows)
            assert stored.rows_stored + stored.rows_computed == (number + 1) * len(rows)
        assert stored.rows_stored == len(rows)


def test_it_is_refused_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="HALOS_CACHE"):
        ReferenceStore(tmp_path / "file" / "store")


def test_its_size_is_bounded_and_the_oldest_go_first(path: Path) -> None:
    largest = 200_000
    with closing(ReferenceStore(path, largest)) as store:
        for step in range(100):
            store.put({key(step, row): torch.ones(100) for row in range(20)})
            assert size_of(path) < 1.1 * largest
        assert size_of(path) > 0.7 * largest
        assert not store.get([key(0, row) for row in range(20)])
        assert len(store.get([key(99, row) for row in range(20)])) == 20


def test_an_entry_is_stored_once(path: Path) -> None:
    """Ranks that share a reference compute all rows of a step if one of them lacks one."""
    with closing(ReferenceStore(path)) as store:
        store.put({A: torch.ones(100)})
        size = size_of(path)
        store.put({A: torch.ones(100), B: torch.ones(1)})
        assert size_of(path) < size + 100
        assert len(store) == 2


def test_what_is_used_stays_longer_than_what_was_written_later(path: Path) -> None:
    for name in (A, B):
        with closing(ReferenceStore(path)) as store:
            store.put({name: torch.ones(300)})
    age(path, 3 * 86400)
    with closing(ReferenceStore(path, 3000)) as store:
        assert A in store.get([A])
        store.put({C: torch.ones(300)})
        assert store.get([A, B, C]).keys() == {A, C}


def test_segments_of_ended_runs_are_merged(path: Path) -> None:
    """All entries are kept, whoever has the old segments open; those of running processes stay."""
    values = {key(9, i): torch.full((i + 1,), float(i)) for i in range(segments.SMALL + 5)}
    for name, value in values.items():
        with closing(ReferenceStore(path)) as store:
            store.put({A: torch.ones(1), name: value})  # A is stored by all of them
    with closing(ReferenceStore(path)) as running:
        age(path, 2 * segments.IDLE)
        running.put({B: torch.ones(1)})
        (path / f"left{PART}").touch()
        os.utime(path / f"left{PART}", (1, 1))
        with closing(ReferenceStore(path)) as store:
            assert len(segments_of(path)) == 2
            assert not list(path.glob(f"*{PART}"))
            for each in (store, running):
                stored = each.get([*values])
                assert all(torch.equal(stored[name], value) for name, value in values.items())
            assert len(store) == len(values) + 2
    with closing(ReferenceStore(path)) as store:
        assert len(store) == len(values) + 2
        assert store.damaged == 0


def test_two_that_compact_at_once_lose_nothing(path: Path) -> None:
    """As if the lock of one had expired: the second one merges what the first one has just replaced."""
    values = {key(i): torch.full((3,), float(i)) for i in range(segments.SMALL + 1)}
    for name, value in values.items():
        with closing(ReferenceStore(path)) as store:
            store.put({name: value})
    with closing(ReferenceStore(path)) as first:
        age(path, 2 * segments.IDLE)
        with closing(Segments(path, read_only=True)) as second:
            small = second._small()
            with closing(ReferenceStore(path)):
                assert len(segments_of(path)) == 1
            second._merge(small)
        assert first.get([*values]).keys() == values.keys()
    with closing(ReferenceStore(path)) as store:
        assert len(store) == len(values)


def test_a_compaction_that_a_dead_machine_began_does_not_block(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(ReferenceStore(path, 20_000)) as store, monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "dead-node")
        begun = SoftFileLease(path / ".compacting", lease_duration=30.0)
        begun.acquire()
        shutil.copy(path / ".compacting", path / "left")
        begun.release()
        os.replace(path / "left", path / ".compacting")
        for step in range(10):
            store.put({key(step): torch.ones(1000)})
        assert size_of(path) > 20_000  # somebody else is at it
        now = time.monotonic
        elsewhere.setattr(time, "monotonic", lambda: now() + 31)
        for step in range(10, 12):
            store.put({key(step): torch.ones(1000)})
        assert size_of(path) <= 20_000


def _write(path: str, number: int, largest: int) -> None:
    with closing(ReferenceStore(Path(path), largest)) as store:
        for step in range(30):
            stored = store.get([key(step, row) for row in range(8)])
            assert all(bool((logps == step).all()) for logps in stored.values())
            store.put({key(step, row): torch.full((row + 1,), float(step)) for row in range(8)})
        assert store.damaged == 0


@pytest.mark.parametrize("largest", [1 << 20, 4000])
def test_several_processes_write_at_once(path: Path, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each of them drops the others' entries all the time."""
    monkeypatch.setitem(segments.LIST_AGAIN, "an entry is missing", 0.0)
    forked = multiprocessing.get_context("fork")  # a new interpreter would take seconds to import torch
    processes = [forked.Process(target=_write, args=(str(path), number, largest)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    with closing(ReferenceStore(path, largest)) as store:
        assert size_of(path) < 1.5 * largest
        assert largest < 1 << 20 or len(store) == 30 * 8
        assert store.damaged == 0


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.tuples(st.integers(0, 300), st.integers(1, 9)), max_size=6)),
        max_size=30,
    )
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_it_is_a_dict_of_two_writers(steps: list[tuple[int, list[tuple[int, int]]]]) -> None:
    """A value is one that was stored under its key, and every key that was stored is there, also for a third one."""
    stored: dict[bytes, set[int]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closed:
        writers = [closed.enter_context(closing(Segments(Path(folder)))) for _ in range(2)]
        for writer, entries in steps:
            values = {key(number % 256, number // 256): bytes(length) for number, length in entries}
            writers[writer].put(values)
            for name, value in values.items():
                stored.setdefault(name, set()).add(len(value))
            assert {*writers[writer].get([*values])} == {*values}
        third = closed.enter_context(closing(Segments(Path(folder), read_only=True)))
        read = third.get([*stored])
        assert len(third) == len(stored) == len(read)
        assert all(len(value) in stored[name] for name, value in read.items())


def test_cache_info_and_clear(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["cache", "info"])
    main(fit(tiny_folder, "dpo", pair_data(tmp_path / "data.jsonl", 4), tmp_path / "run", STORED))
    capsys.readouterr()
    main(["cache", "info"])
    shown = capsys.readouterr().out
    assert "reference" in shown
    assert " 8 " in shown  # rows of four pairs
    gc.collect()  # the fit's process ends otherwise
    with closing(ReferenceStore()) as store:
        main(["cache", "clear", "--kind=reference"])
        assert len(store) == 8  # it is in use
    main(["cache", "clear", "--kind=reference"])
    assert not (cache_root() / REFERENCE).exists()
    assert any((cache_root() / "data").iterdir())
    main(["cache", "clear"])
    assert not (cache_root() / "data").exists()


def test_every_objective_that_needs_a_reference_can_use_the_store_or_says_why() -> None:
    """By the one thing that decides it."""
    import yaml

    for stem in OBJECTIVES:
        path = ROOT / "experiments/objectives" / f"{stem}.yaml"
        given = yaml.safe_load(path.read_text())["model"].get("reference_model")
        name = given["class_path"] if isinstance(given, dict) else given or "FrozenCopy"
        moves = issubclass(getattr(halos_pl, name.rpartition(".")[2]), MovingReference)
        assert getattr(halos_pl, name.rpartition(".")[2]).storable != moves, path
