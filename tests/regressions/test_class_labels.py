"""The names of a ClassLabel say what its integers mean: datasets#2207 (labels came out the wrong way round)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halos_pl.data.example import Example, Fault
from halos_pl.data.read import read
from halos_pl.data.source import Source


def written(folder: Path, kind: str, columns: dict[str, Any], classes: dict[str, list[str]]) -> str:
    found = datasets.Dataset.from_dict(columns)
    for column, names in classes.items():
        found = found.cast_column(column, datasets.ClassLabel(names=names))
    path = folder / f"a.{kind}"
    if kind == "parquet":
        found.to_parquet(path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, found.data.table.schema) as stream:
            stream.write_table(found.data.table)
    elif kind == "dict":
        datasets.DatasetDict(train=found).save_to_disk(path)
    else:
        found.save_to_disk(path)
    return str(path)


def labels(path: str, **settings: Any) -> list[Any]:
    return [item.labels[0] if isinstance(item, Example) else type(item) for item in read(Source(path, **settings))]


ONE = {"prompt": ["p", "q"], "completion": ["c", "d"], "label": [0, 1]}


@pytest.mark.parametrize("kind", ["parquet", "arrow", "folder", "dict"])
@pytest.mark.parametrize(
    ("names", "first"),
    [(["good", "bad"], True), (["bad", "good"], False), (["LABEL_0", "LABEL_1"], None)],
)
def test_names_decide(tmp_path: Path, kind: str, names: list[str], first: bool | None) -> None:
    found = labels(written(tmp_path, kind, ONE, {"label": names}))
    assert found == ([Fault, Fault] if first is None else [first, not first])


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["rejected", "chosen"], False),
        (["chosen", "rejected"], True),
        (["0", "1"], False),
        (["1", "0"], True),
        (["no", "yes"], False),
        (["Yes", "No"], True),
        (["False", "True"], False),
        (["thumbs up", "thumbs-down"], True),
        (["Undesirable", "Desirable"], False),
        (["1", "2"], None),  # is 2 better?
        (["a", "b"], None),
        (["-1", "+1"], None),
    ],
)
def test_more_names(tmp_path: Path, names: list[str], first: bool | None) -> None:
    found = labels(written(tmp_path, "parquet", ONE, {"label": names}))
    if first is None:
        assert Fault in found
        assert (not first) not in found or names == ["1", "2"]
    else:
        assert found == [first, not first]


def test_integers_without_names_and_without_a_class(tmp_path: Path) -> None:
    assert labels(written(tmp_path, "parquet", ONE, {})) == [False, True]
    columns = {**ONE, "label": [-1, 1]}  # -1: no label
    assert labels(written(tmp_path, "folder", columns, {"label": ["bad", "good"]})) == [Fault, True]


@pytest.mark.parametrize(
    ("names", "first"), [(["a", "b"], True), (["output_B", "output_A"], False), (["x", "y"], None)]
)
def test_which_answer_is_preferred(tmp_path: Path, names: list[str], first: bool | None) -> None:
    columns = {"prompt": ["p"], "output_A": ["one"], "output_B": ["two"], "label": [0]}
    [found] = read(Source(written(tmp_path, "parquet", columns, {"label": names})))
    if first is None:
        assert isinstance(found, Fault)
        assert found.column == "label"
    else:
        assert isinstance(found, Example)
        assert found.completions == (("one", "two") if first else ("two", "one"))


def test_a_rating_is_what_its_name_says(tmp_path: Path) -> None:
    columns = {"prompt": ["p"], "completion": ["c"], "rating": [0]}
    [found] = read(Source(written(tmp_path, "parquet", columns, {"rating": ["5", "4", "3"]})))
    assert isinstance(found, Example)
    assert found.scores == (5.0,)


@pytest.mark.parametrize("streaming", [False, True])
def test_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    found = datasets.Dataset.from_dict(ONE).cast_column("label", datasets.ClassLabel(names=["good", "bad"]))
    answer = found.to_iterable_dataset() if streaming else found
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: answer)
    assert labels("owner/name", streaming=streaming) == [True, False]


def test_damaged_names_are_no_names(tmp_path: Path) -> None:
    table = pa.table(ONE).replace_schema_metadata({"huggingface": '{"info": {"features": '})
    pq.write_table(table, tmp_path / "a.parquet")
    [found] = read(Source(str(tmp_path / "a.parquet")))
    assert isinstance(found, Fault)
    assert found.fatal


@pytest.mark.parametrize(
    ("label", "meaning"),
    [
        *(("chosen", True), ("Rejected", False), ("GOOD", True), ("thumbs_down", False), ("True", True), ("0", False)),
        *((1.0, True), (2, None), (-1, None), ("+1", None), ("2", None), (0.5, None), ("maybe", None), ([1], None)),
    ],
)
def test_labels_as_text(tmp_path: Path, label: Any, meaning: bool | None) -> None:
    pq.write_table(pa.table({**{k: v[:1] for k, v in ONE.items()}, "label": [label]}), tmp_path / "a.parquet")
    assert labels(str(tmp_path / "a.parquet")) == [Fault if meaning is None else meaning]


def test_names_decide_in_lists_and_objects(tmp_path: Path) -> None:
    """Integers of a ClassLabel inside a list were taken for scores."""
    path = str(tmp_path / "a.parquet")
    text, grade = datasets.Value("string"), datasets.ClassLabel(names=["5", "1"])
    features = datasets.Features({"prompt": text, "completions": [text], "scores": [grade]})
    rows = {"prompt": ["p"], "completions": [["a", "b"]], "scores": [[0, 1]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    [found] = read(Source(path))
    assert isinstance(found, Example)
    assert found.scores == (5.0, 1.0)
    role = datasets.ClassLabel(names=["user", "assistant"])
    features = datasets.Features({"messages": [{"role": role, "content": text}], "label": datasets.Value("bool")})
    said = [{"role": 0, "content": "p"}, {"role": 1, "content": "c"}]
    saved = datasets.Dataset.from_dict({"messages": [said], "label": [True]}, features=features)
    saved.to_parquet(path)
    saved.save_to_disk(str(tmp_path / "saved"))
    for place in (path, str(tmp_path / "saved")):
        [found] = read(Source(place))
        assert isinstance(found, Example), found
        assert found.prompt == [{"role": "user", "content": "p"}]
