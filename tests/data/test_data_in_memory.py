"""Feedback in memory gives the batches that the same rows in a file give, and errors that name the row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_halos import write_jsonl

from halos_pl.batch import Needs, TokenBatch
from halos_pl.data import DataError, FeedbackDataModule, store
from halos_pl.data.transforms import FlipLabels
from halos_pl.testing import tiny_tokenizer

pd = pytest.importorskip("pandas")

PLAIN = Needs(undesirable=True)
KTO = Needs(reference=True, mismatched=True, undesirable=True)
TOKENIZER = tiny_tokenizer()
ASK = [{"role": "user", "content": "What is 6 times 7?"}]
BINARY = [{"prompt": f"p{i % 4}", "completion": f"c{i}", "label": i % 3 > 0} for i in range(10)]
CHATS = [
    {"prompt": [*ASK], "completion": [{"role": "assistant", "content": f"c{i}"}], "label": i > 1} for i in range(4)
]
SCORED = [{"prompt": f"p{i // 3}", "completion": f"c{i}", "score": float(i % 3)} for i in range(9)]
PAIRS = [{"prompt": f"p{i}", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(6)]
ROWS: dict[str, list[dict[str, Any]]] = {"binary": BINARY, "chats": CHATS, "scored": SCORED, "pairs": PAIRS}
CONTAINERS = {
    "list": list,
    "Dataset": datasets.Dataset.from_list,
    "DataFrame": pd.DataFrame,
    "Table": pa.Table.from_pylist,
}


def set_up(stage: str = "fit", needs: Needs = PLAIN, **options: Any) -> FeedbackDataModule:
    data = FeedbackDataModule(**{"batch_size": 4, **options})
    data.connect(tokenizer=TOKENIZER, needs=needs)
    data.setup(stage)
    return data


def content(batch: TokenBatch) -> list[Any]:
    labels = (getattr(batch.labels, name).nan_to_num(9.0).tolist() for name in vars(batch.labels))
    return [
        [p.tolist() for p in batch.prompts],
        batch.prompt.tolist(),
        [c.tolist() for c in batch.completions],
        *labels,
    ]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ROWS)
def test_rows_in_memory_make_the_batches_of_a_file(tmp_path: Path, kind: str, container: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[kind])
    rows = CONTAINERS[container](ROWS[kind])
    for stage in ("train", "validation", "test", "predict"):
        loader = "val" if stage == "validation" else stage
        of_file, of_rows = (
            list(
                getattr(
                    set_up({"train": "fit", "validation": "validate"}.get(stage, stage), **{stage: data}),
                    f"{loader}_dataloader",
                )()
            )
            for data in (path, rows)
        )
        assert list(map(content, of_rows)) == list(map(content, of_file))
        names = [[name.replace(f"{path}:", f"{stage}: row ") for name in batch.row_ids] for batch in of_file]
        assert [batch.row_ids for batch in of_rows] == names


def test_a_column_with_gaps_and_arrays_is_read_as_in_parquet(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "prompt": ["p", "p", "q"],
            "completions": [["a", "b"], ["c", "d"], ["e", "f"]],
            "scores": [np.array([1.0, 2.0]), np.array([3.0, 1.0]), np.array([0.0, 1.0])],
            "system": ["Be brief.", None, float("nan")],
        }
    )
    pq.write_table(pa.Table.from_pandas(frame), tmp_path / "a.parquet")
    wanted, read = (
        list(set_up(train=data, text_prompts="chat").train_dataloader())
        for data in (str(tmp_path / "a.parquet"), frame)
    )
    assert list(map(content, read)) == list(map(content, wanted))
    rows = [{k: v for k, v in row.items() if v == v} for row in frame.drop(columns="scores").to_dict("records")]
    rows = [row | {"scores": scores} for row, scores in zip(rows, frame["scores"], strict=True)]  # arrays
    assert list(map(content, set_up(train=rows, text_prompts="chat").train_dataloader())) == list(map(content, wanted))


def test_class_labels_of_a_data_set_are_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "completion": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["yes", "no"]),
        }
    )
    rows = [{"prompt": f"p{i}", "completion": "c", "label": i % 2} for i in range(4)]
    data = set_up(train=datasets.Dataset.from_list(rows, features=features), shuffle=False)
    [batch] = data.train_dataloader()
    assert batch.labels.desirable.tolist() == [True, False, True, False]
    # A selection of rows in another order, as Dataset.shuffle and filter make it.
    chosen = datasets.Dataset.from_list(rows, features=features).select([3, 0])
    [batch] = set_up(train=chosen, shuffle=False).train_dataloader()
    assert batch.labels.desirable.tolist() == [False, True]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_fault_names_split_row_and_column(container: str) -> None:
    rows = CONTAINERS[container]([*BINARY[:6], {"prompt": "p", "completion": "c", "label": None}, BINARY[0]])
    for split, stage in (("train", "fit"), ("test", "test")):
        with pytest.raises(DataError, match=rf"^{split}: row 7: .*'label'") as raised:
            set_up(stage, **{split: rows})
        assert "\n" not in str(raised.value)
    counts = set_up(train=rows, on_bad_rows="skip").counts()["train"]["train"]
    assert (counts["examples"], counts["faulty"]) == (7, 1)
    with pytest.raises(DataError, match=r"^train: row 1: "):
        set_up(train=CONTAINERS[container]([{"text": "a"}]))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({**BINARY[0], "label": object()}, "'label' contains a object"),
        ({**BINARY[0], "prompt": [{"role": "user", "content": {1: "a"}}]}, "'prompt' has the key 1"),
        ({**BINARY[0], 3: "a"}, "column name 3"),
        (7, "the row is 7"),
        ({**BINARY[0], "completion": b"a"}, "'completion'"),
    ],
)
def test_a_value_that_is_no_data_is_a_fault_of_its_row(row: Any, named: str) -> None:
    with pytest.raises(DataError) as raised:
        set_up(train=[BINARY[0], row])
    assert str(raised.value).startswith("train: row 2: ")
    assert named in str(raised.value)


def test_what_cannot_be_read_is_refused_at_once_with_the_cure() -> None:
    hub = datasets.Dataset.from_list(BINARY)
    wrong: list[tuple[Any, str]] = [
        (datasets.DatasetDict({"a": hub, "b": hub}), r"data\['a'\]"),
        (hub.to_iterable_dataset(), "pass a Dataset"),
        (BINARY[0], "pass a list of rows"),
        (hub.to_dict(), "Dataset.from_dict"),
        (pd.DataFrame({"prompt": ["a", 1], "completion": ["a", "b"]}), "prompt"),
        (pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), "'prompt' twice"),
        ([{"path": 3}], "is 3"),
        ({"split": "train"}, "without path"),
    ]
    for data, named in wrong:
        with pytest.raises(ValueError, match=named) as raised:
            FeedbackDataModule(train=data)
        assert str(raised.value).startswith("data.train")
        assert "c1" not in str(raised.value)
    for data in ([{}], hub.select([]), pd.DataFrame(BINARY[:0])):
        with pytest.raises((DataError, ValueError), match="train"):
            set_up(train=data)


def test_rows_in_memory_are_mixed_weighted_and_renamed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", BINARY)
    asked = [{"question": "q", "completion": f"d{i}", "label": True} for i in range(4)]
    data = set_up(train=[path, {"path": asked, "weight": 2, "columns": {"prompt": "question"}}], batch_size=99)
    [batch] = data.train_dataloader()
    assert sorted(name for name in batch.row_ids if name.startswith("train")) == sorted(
        f"train[1]: row {i}" for i in (1, 2, 3, 4) for _ in range(2)
    )
    assert len(batch) == 18
    with pytest.raises(ValueError, match=r"data\.test .*weight"):
        FeedbackDataModule(test={"path": asked, "weight": 2})


def test_equal_rows_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[str] = []
    build = store.build
    monkeypatch.setattr(store, "build", lambda source, *rest: builds.append(source.path) or build(source, *rest))
    folder = str(tmp_path / "cache")
    for container in CONTAINERS.values():
        builds.clear()
        set_up(train=container(BINARY), validation=container(BINARY), cache_dir=folder)
        set_up(train=container([*BINARY]), cache_dir=folder)
        assert builds == ["train"]
        set_up(train=container([*BINARY[1:], BINARY[0]]), cache_dir=folder)
        assert builds == ["train", "train"]


def test_a_run_resumes_with_the_same_rows_and_is_refused_with_others() -> None:
    state = set_up(train=BINARY, needs=KTO).state_dict()
    set_up(train=datasets.Dataset.from_list(BINARY), needs=KTO).load_state_dict(state)
    for change, named in (
        ({"train": BINARY[1:]}, r"data\.train: .*in memory.* -> .*in memory"),
        ({"transforms": [FlipLabels(share=1.0)]}, r"data\.transforms: \[\] -> .*FlipLabels"),
        ({"max_length": 3}, r"data\.max_length: 1024 -> 3"),
    ):
        with pytest.raises(ValueError, match=rf"training data .*{named}"):
            set_up(**{"train": BINARY, "needs": KTO, **change}).load_state_dict(state)


def test_workers_and_pickles_keep_the_names_of_rows() -> None:
    one, two = (list(set_up(train=BINARY, num_workers=n).train_dataloader()) for n in (0, 2))
    assert [batch.row_ids for batch in one] == [batch.row_ids for batch in two]
    assert "train: row 1" in {name for batch in one for name in batch.row_ids}


def test_pandas_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert len(set_up(train=BINARY)._splits["train"].table) == 10
