"""The folders of evaluations: what an evaluation may replace."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from halos_pl.data.example import DataError
from halos_pl.evaluation.arguments import inputs_of
from halos_pl.evaluation.files import ANSWERS, BENCHMARKS, MEASURED, OUTPUTS, ROWS, VERDICTS, refuse_loss

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
