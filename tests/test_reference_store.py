"""The reference store: what it holds is what a live reference says, whoever wrote it and whatever became of it."""

from __future__ import annotations

import gc
import json
import multiprocessing
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_halos import OBJECTIVES, ROOT, binary_data, fit, metrics, pair_data

from halos_pl.batch import Labels, TokenBatch
from halos_pl.cache import REFERENCE, cache_root
from halos_pl.cli.main import main
from halos_pl.policy import reference as references
from halos_pl.policy.loading import ModelError
from halos_pl.policy.store import ReferenceStore, fingerprint, keys

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
        ("dpo", ()),
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


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    with closing(ReferenceStore(tmp_path / "s.sqlite")) as store:
        store.put({b"a": torch.tensor([-1.0, torch.nan]), b"b": torch.tensor([-1.0])})
        assert store.get([b"a", b"b"]).keys() == {b"b"}


def test_a_damaged_entry_is_reported_and_never_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "s.sqlite"
    logps = some(4, 3)
    with closing(ReferenceStore(path)) as store:
        store.put(dict(zip((b"a", b"b"), logps, strict=True)))
    for change in (
        "logps = x'00000000'",
        "logps = substr(logps, 1, 8)",
        "sum = sum + 1",
        "key = x'63'",
        "logps = NULL",
        "used = 'a'",
    ):
        with closing(sqlite3.connect(path)) as db, db:
            db.execute(f"UPDATE logps SET {change} WHERE key = ?", (b"a",))
        with closing(ReferenceStore(path)) as store:
            assert store.get([b"a", b"b", b"c"]).keys() == {b"b"}
            assert store.damaged == 1
            assert "1 damaged entries" in caplog.text
            assert len(store) == 1
            store.put({b"a": logps[0]})
            assert torch.equal(store.get([b"a"])[b"a"], logps[0])
        caplog.clear()


def test_a_damaged_file_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"this is no database, and longer than its header would be" * 20)
    with closing(ReferenceStore(path)) as store:
        assert "is damaged" in caplog.text
        store.put({b"a": torch.ones(1)})
        assert len(store) == 1


def test_one_that_another_process_has_replaced_is_not_deleted_again(tmp_path: Path) -> None:
    """Both had it open when it was damaged; what the first one keeps, the second one finds."""
    path = tmp_path / "s.sqlite"
    names = [bytes([i, j]) for i in range(50) for j in range(50)]
    with closing(ReferenceStore(path)) as store:
        store.put({name: torch.ones(30) for name in names})
    two = ReferenceStore(path)
    whole = bytearray(path.read_bytes())
    whole[4096:-1] = bytes(len(whole) - 4097)
    path.write_bytes(whole)
    one = ReferenceStore(path)
    with closing(one), closing(two):
        one.put({b"a": torch.ones(1)})
        assert two.get(names) == {}
        assert two.get([b"a"])
        two.put({b"b": torch.ones(1)})
        for store in (one, two):
            assert store.get([b"a", b"b"]).keys() == {b"a", b"b"}


def test_a_store_that_fails_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(ReferenceStore(tmp_path / "s.sqlite")) as store:
        store.put({b"a": torch.ones(1)})
        with closing(sqlite3.connect(tmp_path / "s.sqlite")) as other:
            other.execute("BEGIN EXCLUSIVE")
            store._connection = lambda: sqlite3.connect(tmp_path / "s.sqlite", timeout=0)  # type: ignore[method-assign]
            store._db.execute("PRAGMA busy_timeout = 0")
            with pytest.warns(UserWarning, match="continuing without it"):
                store.put({b"b": torch.ones(1)})
            assert store.get([b"a"]) == {}
            other.rollback()
        assert store.get([b"a", b"b"]).keys() == {b"a"}


def test_a_file_damaged_in_the_middle_is_deleted_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    names = [bytes([i, j]) for i in range(50) for j in range(50)]
    with closing(ReferenceStore(path)) as store:
        store.put({name: torch.ones(30) for name in names})
    whole = bytearray(path.read_bytes())
    whole[4096:-1] = bytes(len(whole) - 4097)
    path.write_bytes(whole)
    with closing(ReferenceStore(path)) as store:
        assert store.get(names) == {}
        store.put({b"a": torch.ones(1)})
        assert store.get([b"a"])[b"a"] == 1


def test_a_file_damaged_in_the_middle_is_deleted_when_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with closing(ReferenceStore(path)) as store:
        store.put({bytes([i, j]): torch.ones(30) for i in range(50) for j in range(50)})
    whole = bytearray(path.read_bytes())
    whole[4096:-1] = bytes(len(whole) - 4097)
    path.write_bytes(whole)
    with closing(ReferenceStore(path)) as store:
        store.put({b"a": torch.ones(1)})
        assert store.get([b"a"])[b"a"] == 1


def test_it_is_refused_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="HALOS_CACHE"):
        ReferenceStore(tmp_path / "file" / "s.sqlite")


def test_its_size_is_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    path, largest = tmp_path / "s.sqlite", 200_000
    with closing(ReferenceStore(path, largest)) as store:
        for step in range(100):
            store.put({bytes([step, row]): torch.ones(100) for row in range(20)})
        assert path.stat().st_size < 1.5 * largest
        assert not store.get([bytes([0, row]) for row in range(20)])
        assert len(store.get([bytes([99, row]) for row in range(20)])) == 20


def _write(path: str, number: int) -> None:
    with closing(ReferenceStore(Path(path))) as store:
        for step in range(30):
            found = store.get([bytes([step, row]) for row in range(8)])
            assert all(bool((logps == step).all()) for logps in found.values())
            store.put({bytes([step, row]): torch.full((row + 1,), float(step)) for row in range(8)})


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    forked = multiprocessing.get_context("fork")  # a new interpreter would take seconds to import torch
    processes = [forked.Process(target=_write, args=(str(path), number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    with closing(ReferenceStore(path)) as store:
        assert len(store) == 30 * 8
        assert store.damaged == 0


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
        assert getattr(references, name.rpartition(".")[2]).storable == ("SyncedCopy" not in name), path
