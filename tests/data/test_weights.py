"""The weights of rows: from every schema into the batch, refused where they are not weights, and made by transforms."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from data_modules import DPO, KTO, set_up, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tables import pairs, singles
from run_halos import write_jsonl
from schema_rows import ROWS

from halos_pl.batch import Needs
from halos_pl.cli.inspect import inspect
from halos_pl.collect.feedback_file import FeedbackFile
from halos_pl.data.example import DataError, Example, Fault
from halos_pl.data.prompt_files import kept_columns
from halos_pl.data.read import read
from halos_pl.data.source import Source
from halos_pl.data.split import Split
from halos_pl.data.table import Table
from halos_pl.data.transforms import Agreement, Contradict, FlipLabels, Pair, Unpair

ONE = {"prompt": "p", "completion": "c", "label": True}


def found(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> list[Any]:
    return list(read(Source(write_jsonl(tmp_path / "a.jsonl", rows), **settings)))


def fault(tmp_path: Path, rows: list[dict[str, Any]], line: int = 1, column: str = "weight", **settings: Any):
    [first, *_] = [each for each in found(tmp_path, rows, **settings) if isinstance(each, Fault)]
    assert str(first).startswith(f"{tmp_path / 'a.jsonl'}:{line}: column '{column}'")
    assert "\n" not in str(first)
    return str(first)


@pytest.mark.parametrize("column", ["weight", "confidence"])
@pytest.mark.parametrize("schema", ROWS)
def test_a_weight_of_every_schema_reaches_its_examples(tmp_path: Path, schema: str, column: str) -> None:
    row = {**ROWS[schema], column: 0.25}
    rows = [row]
    if schema == "oasst":
        rows = [row, {**row, "message_id": "n", "parent_id": "m", "role": "assistant", "rank": 0, column: 0.25}]
    unused: dict[str, None] = {}
    examples = [each for each in read(Source(write_jsonl(tmp_path / "a.jsonl", rows)), unused)]
    examples = [each for each in examples if isinstance(each, Example)]
    assert examples
    assert {(each.weight, each.weighted_by) for each in examples} == {(0.25, column)}
    assert column not in unused


def test_without_a_column_every_weight_is_1(tmp_path: Path) -> None:
    for row in (ONE, {**ONE, "weight": None}):
        [example] = found(tmp_path, [row])
        assert (example.weight, example.weighted_by) == (1.0, None)


@pytest.mark.parametrize(
    "value", [-0.5, "high", "0.5", True, False, [1], {"w": 1}, float("nan"), float("inf"), 10**400]
)
def test_what_is_no_weight_is_refused(tmp_path: Path, value: Any) -> None:
    assert "ignore" in fault(tmp_path, [{**ONE, "weight": value}])
    fault(tmp_path, [{**ONE, "confidence": value}], column="confidence")
    fault(tmp_path, [{**ONE, "sure": value}], column="sure", columns={"weight": "sure"})
    assert isinstance(found(tmp_path, [{**ONE, "weight": value}], ignore=["weight"])[0], Example)


def test_a_confidence_is_at_most_1(tmp_path: Path) -> None:
    fault(tmp_path, [{**ONE, "confidence": 1.5}], column="confidence")
    assert found(tmp_path, [{**ONE, "confidence": 1.5}], columns={"weight": "confidence"})[0].weight == 1.5
    assert found(tmp_path, [{**ONE, "weight": 1.5}])[0].weight == 1.5


def test_all_rows_have_a_weight_or_none(tmp_path: Path) -> None:
    """In the same column; a null is none, and so is a missing key."""
    other = {**ONE, "completion": "d"}
    for last, line in ((other, 2), ({**other, "weight": None}, 2)):
        assert "a.jsonl:1" in fault(tmp_path, [{**ONE, "weight": 2}, last], line)
    fault(tmp_path, [ONE, {**other, "weight": 2}], 2)
    fault(tmp_path, [{**ONE, "weight": 1}, {**other, "confidence": 1}], 2, "confidence")
    fault(tmp_path, [{**ONE, "weight": 1, "confidence": 1}], column="confidence")
    fault(tmp_path, [{**ONE, "w": 1, "confidence": 1}], column="confidence", columns={"weight": "w"})


def test_a_skipped_row_needs_no_weight(tmp_path: Path) -> None:
    tie = {"prompt": "p", "chosen": "c", "rejected": "c"}
    kept = found(tmp_path, [tie, {**tie, "rejected": "r", "weight": 2}])
    assert [each.weight for each in kept if isinstance(each, Example)] == [2.0]


def test_weights_that_are_all_0_are_refused(tmp_path: Path) -> None:
    other, cache = {**ONE, "prompt": "q", "label": False}, str(tmp_path / "cache")
    path = write_jsonl(tmp_path / "a.jsonl", [{**ONE, "weight": 0}, {**other, "weight": 0}])
    for train in (path, [path, {"path": write_jsonl(tmp_path / "b.jsonl", [other])}]):
        with pytest.raises(DataError, match=rf"^{path}: column 'weight'"):
            set_up(KTO, train=train, cache_dir=cache)
    set_up(KTO, train=[{**ONE, "weight": 0}, {**other, "weight": 1e-9}], cache_dir=cache)


def test_weights_of_the_rows_in_use_are_not_all_0() -> None:
    """The rows that count may all be dropped: here, by an objective that only imitates."""
    table = reweighted(singles([1, 0]), [0.0, 1.0])
    with pytest.raises(DataError, match=r"^f\.jsonl: "):
        Split(table, Needs(), max_length=10)
    Split(table, Needs(undesirable=True), max_length=10)
    Split(reweighted(singles([1, 0]), [1.0, 0.0]), Needs(), max_length=10)


def test_other_names_of_weights_say_what_to_do(tmp_path: Path) -> None:
    for name in ("sample_weight", "Weight", "pairWeight", "Confidence", "weights", "confidences"):
        assert "columns: {weight:" in fault(tmp_path, [{**ONE, name: 0.5}], column=name)
        assert found(tmp_path, [{**ONE, name: 0.5}], columns={"weight": name})[0].weighted_by == name


def test_csv_has_weights_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label,weight\np,c,1,0.5\np,d,1,\np,e,1,high\np,f,0,2\n")
    first, missing, text, last = read(Source(str(path)))
    assert (first.weight, last.weight) == (0.5, 2.0)
    assert str(missing).startswith(f"{path}:3: column 'weight'")
    assert str(text).startswith(f"{path}:4: column 'weight'")


def weighted_pairs(n: int = 8) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}", "weight": i / 2} for i in range(n)]


def test_weights_reach_the_batch_and_both_rows_of_a_pair(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", weighted_pairs())
    for needs in (DPO, KTO, Needs()):
        data = set_up(needs, train=path, batch_size=4, cache_dir=str(tmp_path / "cache"))
        for batch in data.train_dataloader():
            for name, weight in zip(batch.row_ids, batch.labels.weight.tolist(), strict=True):
                line = int(name.split(" with ")[0].partition("#")[0].rpartition(":")[2])
                assert weight == (line - 1) / 2
    one = set_up(KTO, train=path, batch_size=4, num_workers=1, cache_dir=str(tmp_path / "cache"))
    batch = next(iter(one.train_dataloader()))  # through a worker's pickle
    assert batch.labels.weight.unique().numel() > 1


def test_other_weights_are_other_data(tmp_path: Path) -> None:
    rows = weighted_pairs()
    digests = set()
    for last in (1.0, 2.0, 1.0):
        data = set_up(DPO, train=[*rows[:-1], {**rows[-1], "weight": last}], cache_dir=str(tmp_path / "cache"))
        digests.add((data.digests("train")["train"], data._splits["train"].digest))
    assert len(digests) == 2


def test_what_is_used_is_said(tmp_path: Path, caplog: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**row, "sure": row.pop("weight")} for row in weighted_pairs()])
    source = {"path": path, "columns": {"weight": "sure"}}
    said = set_up(DPO, train=source, cache_dir=str(tmp_path / "cache")).counts()["train"][path]["weights"]
    for part in ("'sure'", "0 to 3.5", "mean 1.75"):
        assert part in said
    shown = inspect(Source(**source), tokenizer(), cache_dir=tmp_path / "cache", examples=16)
    assert shown.weights == said
    assert "undesirable, weight 3.5" in {row.verdict for row in shown.examples}
    bare = inspect(Source(write_jsonl(tmp_path / "b.jsonl", [ONE])), tokenizer(), cache_dir=tmp_path / "cache")
    assert bare.weights is None


def reweighted(made: Table, weight: Any) -> Table:
    return replace(made, weight=np.asarray(weight, float))


@pytest.mark.parametrize("weight", [np.nan, -1.0, 1e60, 1e30, 1e-60, np.inf])
def test_a_weight_that_float32_cannot_train_with_is_refused(weight: float) -> None:
    with pytest.raises(DataError, match=r"^f\.jsonl:2: "):
        Split(reweighted(singles([1, 0]), [1.0, weight]), Needs(undesirable=True), max_length=10)


# -- transforms ---------------------------------------------------------------------------------------------


@given(weight=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_rows_keep_their_weight(weight: list[int], seed: int) -> None:
    table = reweighted(pairs(len(weight)), np.repeat(weight, 2))
    for transform in (FlipLabels(share=0.5), Contradict(share=0.5), Unpair()):
        made, _ = transform(table, Random(seed))
        assert np.array_equal(made.weight, np.repeat(weight, 2)[made.row])


def test_a_pair_weighs_the_product_of_its_rows() -> None:
    """As many pairs as there would be of rows that are repeated as often as their weights say."""
    table = reweighted(singles([1, 0, 0], [0, 0, 0]), [2, 3, 5])
    made, _ = Pair(which="all")(table, Random(0))
    assert sorted(zip(made.row[made.label == 1], made.weight[made.label == 1], strict=True)) == [(0, 6), (0, 10)]
    assert np.array_equal(made.weight, made.weight[made.pair])


def test_a_list_of_completions_has_one_weight(tmp_path: Path) -> None:
    row = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 2, 3], "weight": 3}
    other = {**row, "prompt": "q", "weight": 0.5}
    path = write_jsonl(tmp_path / "a.jsonl", [row, other])
    data = set_up(DPO, train=path, transforms=[Pair()], batch_size=2, cache_dir=str(tmp_path / "cache"))
    [batch] = data.train_dataloader()
    assert sorted(batch.labels.weight.tolist()) == [0.5, 0.5, 3, 3]


def transformed(tmp_path: Path, rows: list[dict[str, Any]]) -> dict[Any, Any]:
    """Weight and label of each row that is left after :class:`Agreement`, by prompt and completion, and its counts."""
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = set_up(
        Needs(undesirable=True), train=path, transforms=[Agreement()], batch_size=99, cache_dir=str(tmp_path / "cache")
    )
    [batch] = data.train_dataloader()
    words = [tokenizer().decode(ids[:-1]) for ids in batch.completions]
    prompts = [tokenizer().decode(batch.prompts[i]) for i in batch.prompt.tolist()]
    columns = zip(batch.labels.weight.tolist(), batch.labels.desirable.tolist(), strict=True)
    counts = data.counts()["train"]["transforms"][0]
    return dict(zip(zip(prompts, words, strict=True), columns, strict=True)) | {"counts": counts}


votes = st.lists(st.booleans(), min_size=1, max_size=7)


@settings(max_examples=20)
@given(each=st.lists(votes, min_size=1, max_size=4), form=st.sampled_from(["rows", "votes", "counts"]))
def test_agreement_is_the_majoritys_share(tmp_path_factory: Any, each: list[list[bool]], form: str) -> None:
    """Whether each judge has a row, or a row has a list of labels or two numbers of them."""
    rows: list[dict[str, Any]] = [{"prompt": "other", "completion": "z", "label": True}]
    for i, labels in enumerate(each):
        row = {"prompt": f"p{i}", "completion": f"c{i}", "label": True}
        if form == "rows":
            rows += [{**row, "label": label} for label in labels]
        elif form == "votes":
            rows.append({**row, "votes": [*map(int, labels), None]})
        else:
            rows.append({**row, "votes_for": sum(labels), "votes_against": len(labels) - sum(labels)})
    found = transformed(tmp_path_factory.mktemp("votes"), rows)
    assert found.pop(("other", "z")) == (1.0, True)
    ties = 0
    for i, labels in enumerate(each):
        share = Fraction(sum(labels), len(labels))
        if share == Fraction(1, 2):
            ties += 1
        else:
            weight, desirable = found.pop((f"p{i}", f"c{i}"))
            assert desirable == (share > Fraction(1, 2))
            assert weight == pytest.approx(float(max(share, 1 - share)))
    assert found.pop("counts")["dropped_ties"] == ties
    assert not found


def test_agreement_on_pairs_in_either_order(tmp_path: Path) -> None:
    def pair(chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
        return {"prompt": "p", "chosen": chosen, "rejected": rejected, **more}

    rows = [pair("b", "a"), pair("a", "b"), pair("a", "b"), pair("a", "c", votes=[0, 0, 0, 1])]
    rows += [pair("d", "e", votes=["chosen", "rejected"])]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = set_up(DPO, train=path, transforms=[Agreement()], batch_size=99, cache_dir=str(tmp_path / "cache"))
    [batch] = data.train_dataloader()
    words = [tokenizer().decode(ids[:-1]) for ids in batch.completions]
    chosen = {
        (words[i], words[int(batch.labels.pair[i])]): float(batch.labels.weight[i])
        for i in batch.labels.desirable.nonzero()[:, 0].tolist()
    }
    assert chosen == {("a", "b"): pytest.approx(2 / 3), ("c", "a"): pytest.approx(3 / 4)}


def test_a_judges_weight_is_that_of_his_votes(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c"}
    sure, unsure = {**row, "label": False, "confidence": 0.9}, {**row, "label": True, "confidence": 0.3}
    found = transformed(tmp_path, [unsure, sure, {**unsure, "prompt": "q"}])
    assert found["p", "c"] == (pytest.approx(0.9 / 2), False)
    assert found["q", "c"] == (pytest.approx(0.3), True)


@pytest.mark.parametrize(
    "more", [{"votes": [2]}, {"votes": [1], "votes_for": 1}, {"votes_for": 2}, {"votes_for": -1, "votes_against": 1}]
)
def test_what_is_no_vote_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    [bad] = found(tmp_path, [{**ONE, **more}])
    assert isinstance(bad, Fault)
    assert (bad.column or "").startswith("votes")


def test_votes_that_nothing_reads_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("halos_pl.data.report.rank_zero_info", said.append)
    path = write_jsonl(tmp_path / "a.jsonl", [{**ONE, "votes": [1, 1, 0]}, {**ONE, "prompt": "q", "votes": [1]}])
    for transforms, silent in (([], False), ([Agreement()], True)):
        said.clear()
        set_up(KTO, train=path, transforms=transforms, cache_dir=str(tmp_path / "cache"))
        assert silent == (not [line for line in said if "not used" in line and "votes" in line])
    unused: dict[str, None] = {}
    path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c", "score": 1, "votes": [1]}])
    list(read(Source(path), unused))
    path = write_jsonl(tmp_path / "c.jsonl", [{**ONE, "votes": 12}])
    list(read(Source(path), counted := {}))
    assert list(unused) == list(counted) == ["votes"]


# -- files that other commands write ------------------------------------------------------------------------


def test_a_weight_goes_with_new_answers_but_no_judgement_of_others() -> None:
    row = {"prompt": "p", "weight": 2, "confidence": 0.5, "votes": [1], "votes_for": 1, "votes_against": 0, "id": 3}
    assert kept_columns(row) == {"weight": 2, "id": 3}


def test_collected_rows_do_not_join_rows_with_weights(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**ONE, "weight": 2}])
    with pytest.raises(DataError, match=rf"^{path}:1: .*'weight'"):
        FeedbackFile(Path(path), "thumbs")
