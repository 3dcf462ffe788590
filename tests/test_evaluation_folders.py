"""The folders of evaluations: what an evaluation may replace, and what a comparison takes from two of them."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from halos_pl.data.example import DataError
from halos_pl.data.prompt_files import PromptRow
from halos_pl.evaluation.arguments import inputs_of
from halos_pl.evaluation.compare import compare, differences
from halos_pl.evaluation.files import (
    ANSWERS,
    BENCHMARKS,
    FILE,
    MEASURED,
    OUTPUTS,
    ROWS,
    VERDICTS,
    keep_earlier,
    refuse_loss,
)
from halos_pl.evaluation.measurement import _by_prompt

# What an evaluation replaces


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_no_evaluation_wrote_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    (path / "mine").mkdir(parents=True) if name.startswith(BENCHMARKS) else path.write_text("{}")
    with pytest.raises(DataError, match=f"{name} would be replaced.*--out"):
        refuse_loss(tmp_path, [])


def test_what_an_earlier_evaluation_wrote_is_replaced(tmp_path: Path) -> None:
    for name in OUTPUTS:
        (tmp_path / name).mkdir() if name.startswith(BENCHMARKS) else (tmp_path / name).write_text("{}")
    (tmp_path / MEASURED).write_text('{"evaluate": {}}')
    (tmp_path / BENCHMARKS / "results.json").write_text("{}")
    refuse_loss(tmp_path, [])
    (tmp_path / BENCHMARKS / "results.json").rename(tmp_path / BENCHMARKS / "mine.py")
    with pytest.raises(DataError, match=BENCHMARKS):
        refuse_loss(tmp_path, [])


def test_results_of_another_evaluation_are_kept(tmp_path: Path) -> None:
    """A repetition replaces its own results."""
    wrote = {name: (tmp_path / name) for name in (FILE, MEASURED, ANSWERS, VERDICTS)}
    for number in (1, 2):
        for name, path in wrote.items():
            path.write_text(json.dumps({"evaluate": {"tasks": [number]}, "is": name}))
        assert keep_earlier(tmp_path, {"tasks": (number,)}) is None
        place = keep_earlier(tmp_path, {"tasks": (number,), "limit": 3})
        assert place == tmp_path / f"evaluation.{number}"
        assert {path.name for path in place.iterdir()} == wrote.keys()
        assert json.loads((place / ANSWERS).read_text())["evaluate"] == {"tasks": [number]}
        assert not any(path.exists() for path in wrote.values())
        assert keep_earlier(tmp_path, {}) is None


INPUTS: list[tuple[dict[str, Any], bool]] = [
    ({"prompts": f"loss/{ANSWERS}"}, True),
    ({"prompts": "loss/mine.jsonl"}, False),
    ({"prompts": f"other/{ANSWERS}"}, False),
    ({"held_out": ["mine.jsonl", {"path": f"loss/../loss/{ROWS}"}]}, True),
    ({"held_out": ["loss"]}, True),
    ({"held_out": ["loss/*.jsonl"]}, True),
    ({"held_out": ["*.jsonl", "other"]}, False),
    ({"rule": f"loss/{BENCHMARKS}/rule.py:f"}, True),
    ({"rule": "loss/rule.py:f"}, False),
    ({"reference": f"loss/{BENCHMARKS}"}, True),
    ({"chat_template": "{{ messages }}" * 500, "against": "chosen"}, False),
]


@pytest.mark.parametrize(("arguments", "is_lost"), INPUTS)
def test_an_input_that_would_be_written_over_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], is_lost: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("loss", "other"):
        Path(folder).mkdir()
    expected = pytest.raises(DataError, match=r"loss.* is an input") if is_lost else nullcontext()
    with expected:
        refuse_loss(Path("loss"), inputs_of("loss", arguments))


def test_replies_of_a_judge_are_added_to_no_input_and_are_not_written_over(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    for transcripts in (prompts, tmp_path / VERDICTS):
        with pytest.raises(DataError, match=transcripts.name):
            refuse_loss(tmp_path, [str(prompts)], transcripts)
    refuse_loss(tmp_path, [str(prompts)], tmp_path / "transcripts.jsonl")


# What a comparison takes from two of them


def evaluation(folder: Path, values: Any, prompts: dict[str, Any] | None = None, **measured: Any) -> str:
    folder.mkdir()
    (folder / FILE).write_text(json.dumps(values))
    (folder / MEASURED).write_text(json.dumps({"evaluate": {}, "files": {}, **measured}))
    if prompts:
        lines = [json.dumps({"row": name, "prompt": prompt}) + "\n" for name, prompt in prompts.items()]
        (folder / ANSWERS).write_text("".join(lines))
    return str(folder)


def said(capsys: pytest.CaptureFixture[str], first: str, second: str) -> list[str]:
    compare(first, second)
    return capsys.readouterr().out.splitlines()


def test_answers_are_paired_by_prompt_wherever_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a text or as a user message, in files with other names and in another order."""
    texts = [f"question {i}" for i in range(9)]
    scores = {text: random.Random(text).random() for text in texts}
    one = evaluation(
        tmp_path / "one",
        {"rule": {f"a.jsonl:{i}": scores[text] for i, text in enumerate(texts)}},
        {f"a.jsonl:{i}": text for i, text in enumerate(texts)},
    )
    texts = [*reversed(texts), "another question"]
    other = evaluation(
        tmp_path / "other",
        {"rule": {f"b.jsonl:{i}": scores.get(text, 0) - 0.25 for i, text in enumerate(texts)}},
        {f"b.jsonl:{i}": [{"role": "user", "content": text}] for i, text in enumerate(texts)},
    )
    (line,) = said(capsys, one, other)
    assert "difference +0.25 [+0.25, +0.25], significant" in line
    assert "n = 9" in line
    assert "1 example that only one has" in line


def test_the_value_of_a_prompt_does_not_depend_on_other_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that repeats a prompt agrees with one that does not on the prompts that both have."""
    folders = []
    for texts in (["duck"] * 8 + [f"q {i}" for i in range(8)], [f"q {i}" for i in range(8)]):
        name = f"{len(texts)}.jsonl"
        rows = [PromptRow(f"{name}:{i}", f"{name}:{i}", {}, text, True) for i, text in enumerate(texts, start=1)]
        values = _by_prompt({"rule": [float(text == "duck") for text in texts]}, rows)
        folders.append(evaluation(tmp_path / f"{len(texts)}", values, {row.name: row.prompt for row in rows}))
    assert sorted(values["rule"].values()) == [0.0] * 8
    (line,) = said(capsys, *folders)
    assert "difference +0 [" in line
    assert "not significant" in line
    assert "n = 8" in line


def test_other_prompts_or_held_out_data_in_the_same_place_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"evaluate": {"held_out": [{"path": "h.jsonl"}], "prompts": "p.jsonl"}}
    values = {"rule": {"p.jsonl:1": 1.0}, "reward_accuracy": {"h.jsonl:1": 1.0}, "mmlu": {"mmlu/1:ab": 1.0}}
    files = {"h.jsonl": "1", "p.jsonl": "1"}
    one = evaluation(tmp_path / "one", values, {"p.jsonl:1": "a"}, **how, files=files)
    same = evaluation(tmp_path / "same", values, **how, files=files)
    assert [line.partition(":")[0] for line in said(capsys, one, same)] == ["rule", "reward_accuracy", "mmlu"]
    other = evaluation(tmp_path / "other", values, {"p.jsonl:1": "b"}, **how, files=dict.fromkeys(files, "2"))
    *_, left_out, last = said(capsys, one, other)
    assert "reward_accuracy" in left_out
    assert "held_out" in left_out
    assert last.startswith("mmlu")
    unknown = evaluation(tmp_path / "unknown", values, **how, files=dict.fromkeys(files, "2"))
    assert "rule" in "".join(said(capsys, one, unknown)[:-1]), "without the prompts, the files decide"


def test_settings_that_only_one_has_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"mmlu": {"mmlu/1:ab": 1.0}}
    task = {"version": 1, "chat_template": False}
    one = evaluation(tmp_path / "one", values, evaluate={"prompts": None, "judging": {}}, tasks={"mmlu": task})
    two = evaluation(
        tmp_path / "two",
        values | {"rule": {"p.jsonl:1": 1.0}},
        evaluate={"prompts": "p.jsonl", "system": "Hello", "num_fewshot": 0, "batch_size": 3},
        tasks={"mmlu": task | {"not_scored": {"a": 1}}, "ifeval": {"version": 2}},
    )
    for first, second in ((one, two), (two, one)):
        lines = differences(Path(first), Path(second))
        expected = ["mmlu.not_scored", "num_fewshot", "prompts", "system"]
        assert [line.partition(" differs: ")[0] for line in lines] == expected
        assert all("not set in " + one in line for line in lines)
        assert differences(Path(first), Path(first)) == []
    assert any("only " in line and two in line and "rule" in line for line in said(capsys, one, two))
    (Path(two) / MEASURED).unlink()
    (line,) = differences(Path(one), Path(two))
    assert two in line
    assert MEASURED in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((FILE, content) for content in ('{"rule": 5}', "[]", "{", '{"rule": {"a": NaN}}', '{"rule": {"a": "1"}}')),
        *((MEASURED, content) for content in ("[]", '{"evaluate', '{"evaluate": 1}', '{"tasks": {"mmlu": 1}}')),
        *((ANSWERS, content) for content in ("[]\n", "{}\n", "{\n", '{"row": "b", "prompt": "q"}\n')),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    values = {"rule": {"a": 1.0}}
    one = evaluation(tmp_path / "one", values, {"a": "question"})
    two = evaluation(tmp_path / "two", values, {"a": "question"})
    (Path(two) / name).write_text(content)
    for folders in ((one, two), (two, one)):
        with pytest.raises(DataError, match=str(Path(two) / name)):
            compare(*folders)
