"""Gold answers from a file to the batch: they follow the chosen row of their pair, and nothing else knows of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halos_pl import testing
from halos_pl.batch import Needs, TokenBatch
from halos_pl.cli.inspect import inspect
from halos_pl.data import FeedbackDataModule, Source
from halos_pl.data.example import DataError
from halos_pl.data.resume import refuse_other_data
from halos_pl.data.split import Split
from halos_pl.data.store import open_store
from halos_pl.data.table import Table
from halos_pl.data.transforms import (
    Agreement,
    Contradict,
    FlipLabels,
    KeepFraction,
    OnePerPrompt,
    Pair,
    Transform,
    Unpair,
)
from halos_pl.objective.build import load_objective

TPO = load_objective("tpo").needs
USER, BOT, OTHER, BEST = (
    {"role": role, "content": text}
    for role, text in (("user", "hi"), ("assistant", "yo"), ("assistant", "no"), ("assistant", "hello"))
)
ROW: dict[str, Any] = {"prompt": "a question", "chosen": "good", "rejected": "bad", "reference": "the best"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return testing.tiny_tokenizer()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def triples(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"question {i}" + " why" * (i % 4),
            "chosen": f"yes {i}" + " so" * (i % 3),
            "rejected": "no" + " wait" * (i % 5),
            "reference": f"gold {i}" + " bread" * (i % 6),
        }
        for i in range(count)
    ]


def module(tokenizer: Any, train: Any, needs: Needs = TPO, **options: Any) -> FeedbackDataModule:
    data = FeedbackDataModule(**({"train": train, "batch_size": 4, "seed": 0} | options))
    data.connect(tokenizer=tokenizer, needs=needs)
    data.setup("fit")
    return data


def text(tokenizer: Any, batch: TokenBatch, row: int) -> tuple[str, str]:
    prompt, completion = batch.prompts[batch.prompt[row]], batch.completions[row]
    return tokenizer.decode(prompt), tokenizer.decode(completion, skip_special_tokens=True)


@pytest.mark.parametrize("needs", [TPO, Needs(undesirable=True, mismatched=True, gold=True)], ids=["pairs", "rows"])
def test_a_step_has_the_gold_answer_after_its_example(tokenizer: Any, tmp_path: Path, needs: Needs) -> None:
    rows = triples()
    path = write(tmp_path / "t.jsonl", rows)
    seen = set()
    for batch in module(tokenizer, str(path), needs).train_dataloader():
        labels = batch.labels
        for i in labels.gold.nonzero().squeeze(1).tolist():
            place, _, side = batch.row_ids[i].partition("#")
            row = rows[int(place.rpartition(":")[2]) - 1]
            assert side == "gold"
            assert text(tokenizer, batch, i) == (row["prompt"], row["reference"])
            chosen = batch.row_ids.index(f"{place}#chosen")
            assert i == (max(chosen, int(labels.pair[chosen])) if needs.pairs else chosen) + 1
            assert labels.group[i] == labels.group[chosen]
            assert bool(labels.desirable[i])
            seen.add(place)
        if needs.mismatched:
            assert int(labels.mismatched.sum()) == len(batch) - int(labels.gold.sum() + labels.mismatched.sum())
            mismatched = labels.mismatched.nonzero().squeeze(1).tolist()
            assert not any("#gold" in batch.row_ids[i] for i in mismatched)
    assert len(seen) == len(rows)


def test_cutting_counts_and_lengths_include_gold_answers(tokenizer: Any, tmp_path: Path) -> None:
    long = ROW | {"prompt": "why " * 30, "reference": "bread " * 9}
    path = write(tmp_path / "t.jsonl", [long, ROW])
    store = open_store(Source(str(path)), tokenizer, tmp_path / "cache")
    table = Table.of([store])
    assert len(store.rows) == 6
    assert len(table) == 4
    for most in (24, 12, 6):
        split = Split(table, TPO, max_length=most)
        row = split.rows[0]
        kept = row.gold.completion
        assert len(kept) == min(int(table.gold_answers.of_rows("length")[0]), most - 1) == split.cut.gold_length[0]
        # The prompt is cut alike for all three.
        assert split.rows[1].prompt_length == row.prompt_length == row.gold.prompt_length == most - len(kept)
        assert split.longest == most
        of_gold = [len(ids) for name, ids in split.tokens() if name.endswith("#gold")]
        assert split.row_tokens.sum() == sum(len(ids) for _, ids in split.tokens())
        assert of_gold == [most, int(split.cut.prompt_length[2] + split.cut.gold_length[2])]
        assert split.counts[store.path].gold == 2
        assert (split.counts[store.path].completions_cut > 0) == (len(kept) == most - 1)
    without = Split(table, TPO, max_length=9, truncate_completions=False)
    assert [without.table.name(i).partition("#")[0] for i in range(2)] == [f"{path}:2"] * 2
    assert without.counts[store.path].dropped_too_long == 2


@given(
    transforms=st.lists(
        st.sampled_from(
            [
                FlipLabels(share=0.5),
                Contradict(share=0.5),
                OnePerPrompt(),
                Unpair(),
                Pair(),
                Agreement(),
                KeepFraction(desirable=0.7, undesirable=0.7),
            ]
        ),
        max_size=3,
    ),
    seed=st.integers(0, 999),
)
def test_each_example_in_use_has_its_own_gold_answer_once_whatever_the_transforms(
    made: Table, transforms: list[Transform], seed: int
) -> None:
    table, draw = made, Random(seed)
    for transform in transforms:
        table, _ = transform(table, draw)
    needs = TPO if bool((table.pair >= 0).all()) else Needs(undesirable=True, gold=True)
    if not len(table) or bool((table.label < 0).any()):
        return
    split = Split(table, needs, max_length=64)
    rows = [split.rows[i] for i in range(len(split.table))]
    of_examples = {row.row_id.partition("#")[0]: [] for row in rows}
    for row in rows:
        if row.gold:
            assert row.gold.row_id.startswith(row.row_id.partition("#")[0] + "#gold")
            of_examples[row.row_id.partition("#")[0]].append(row)
    for line, carriers in of_examples.items():
        assert len(carriers) == 1, line
        desirable = any(row.desirable for row in rows if row.row_id.partition("#")[0] == line)
        assert carriers[0].desirable == desirable


@pytest.fixture(scope="module")
def made(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("table")
    one_prompt = [ROW | {"chosen": f"c{i}", "rejected": f"d{i}", "reference": f"gold of {i}"} for i in range(3)]
    path = write(folder / "t.jsonl", [*triples(), *triples(3), *one_prompt])
    return Table.of([open_store(Source(str(path)), tokenizer, folder / "cache")])


def test_what_the_objective_does_not_use_is_left_out_and_said(tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    path = write(tmp_path / "t.jsonl", triples())
    plain = write(tmp_path / "p.jsonl", [{k: v for k, v in row.items() if k != "reference"} for row in triples()])
    needs = Needs(pairs=True, undesirable=True)
    with caplog.at_level(logging.INFO):
        data = module(tokenizer, str(path), needs)
    assert data.counts()["train"][str(path)]["dropped_gold"] == 6
    assert "6 gold answers" in caplog.text
    batches = [
        [b.completions for b in each.train_dataloader()] for each in (data, module(tokenizer, str(plain), needs))
    ]
    for one, other in zip(*batches, strict=True):
        assert [ids.tolist() for ids in one] == [ids.tolist() for ids in other]


@pytest.mark.parametrize("train", [[{k: v for k, v in ROW.items() if k != "reference"}], testing.binary_rows(4)])
def test_rows_without_a_gold_answer_are_refused_by_name(tokenizer: Any, tmp_path: Path, train: Any) -> None:
    path = write(tmp_path / "t.jsonl", train)
    needs = TPO if "chosen" in train[0] else Needs(undesirable=True, gold=True)
    with pytest.raises(DataError, match=r"t\.jsonl:[12]") as error:
        module(tokenizer, str(path), needs)
    assert "\n" not in str(error.value)
    assert "reference" in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"reference": None},
        {"reference": ""},
        {"reference": " \n"},
        {"reference": 3},
        {"reference": [BEST]},  # the prompt is text
        {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER], "reference": [BEST, USER]},
        {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER], "reference": [USER]},
        {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER], "reference": [{"role": "assistant"}]},
        {"gold": "another"},
    ],
)
def test_a_faulty_gold_answer_is_one_line(tokenizer: Any, tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = write(tmp_path / "t.jsonl", [ROW, ROW | wrong])
    store = open_store(Source(str(path)), tokenizer, tmp_path / "cache")
    assert store.fault_count == 1
    [line] = store.faults
    assert line.startswith(f"{path}:2: column 'reference'")
    assert "\n" not in line


def test_the_column_may_be_named_otherwise(tokenizer: Any, tmp_path: Path) -> None:
    others = {"gold": {}, "best": {"columns": {"reference": "best"}}}
    digests = set()
    for name, settings in {"reference": {}, **others}.items():
        row = {(name if k == "reference" else k): v for k, v in ROW.items()}
        path = write(tmp_path / f"{name}.jsonl", [row])
        digests.add(open_store(Source(str(path), **settings), tokenizer, tmp_path / "cache").digest)
    assert len(digests) == 1
    paired = open_store(Source(str(tmp_path / "reference.jsonl"), schema="paired"), tokenizer, tmp_path / "cache")
    assert paired.unused == ["reference"]
    assert len(paired.rows) == 2
    assert paired.digest not in digests


def test_a_gold_answer_of_messages_may_repeat_the_conversation(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "chosen": [BOT], "rejected": [OTHER], "reference": of} for of in ([BEST], [USER, BEST])]
    table = Table.of([open_store(Source(str(write(tmp_path / "t.jsonl", rows))), tokenizer, tmp_path / "cache")])
    gold = table.gold_answers
    assert gold.completion_ids(0).tolist() == gold.completion_ids(2).tolist() != table.completion_ids(0).tolist()
    same = write(tmp_path / "same.jsonl", [ROW | {"reference": ROW["chosen"]}])  # which is fine
    assert len(module(tokenizer, str(same)).row_names("train")) == 2


def test_the_content_decides_the_digest(tokenizer: Any, tmp_path: Path) -> None:
    """Another gold answer is another run for an objective that reads it; its split has the same digest otherwise."""
    rows = [ROW, ROW | {"prompt": "b"}]
    tables = [
        Table.of([open_store(Source(str(write(tmp_path / f"{i}.jsonl", made))), tokenizer, tmp_path / "cache")])
        for i, made in enumerate((rows, [rows[0], rows[1] | {"reference": "else"}]))
    ]
    assert len({Split(table, TPO, max_length=32).digest for table in tables}) == 2


def test_inspect_shows_gold_answers(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", triples())
    found = inspect(Source(str(path)), tokenizer, examples=12, cache_dir=tmp_path / "cache")
    assert found.figures["gold answers"] == 6
    assert found.figures["completions cut at max_length"] == 0
    cut = inspect(Source(str(path)), tokenizer, max_length=4, cache_dir=tmp_path / "cache").figures
    table = Table.of([open_store(Source(str(path)), tokenizer, tmp_path / "cache")])
    has_gold = table.of_rows("gold") >= 0
    lengths = [*table.of_rows("length"), *table.gold_answers.of_rows("length")[has_gold]]
    assert cut["completions cut at max_length"] == sum(length > 3 for length in lengths)
    assert any(length > 3 for length in lengths[len(table) :])
    assert len(found.percentiles["gold answer"]) == len(found.percentiles["prompt"])
    shown = {row.name: "".join(row.completion) for row in found.examples}
    assert len(shown) == 18
    assert all(f"gold {i}" in shown[f"{path}:{i + 1}#gold"] for i in range(6))


def test_a_checkpoint_of_a_version_that_knew_fewer_needs_can_be_resumed() -> None:
    old, new = ({"objective's needs": json.dumps(needs)} for needs in ({"pairs": True}, {"pairs": True, "gold": False}))
    refuse_other_data(old, new, {}, {})
    with pytest.raises(ValueError, match="gold: None -> True"):
        refuse_other_data(old, {"objective's needs": json.dumps({"pairs": True, "gold": True})}, {}, {})
