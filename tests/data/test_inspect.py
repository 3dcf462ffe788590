"""What ``halos data inspect`` counts, against counting by hand, and how it looks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import shipped
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from run_halos import write_jsonl

from halos_pl.cli.inspect import PERCENTILES, Inspection, inspect, lambdas, show
from halos_pl.cli.main import main
from halos_pl.data import Source
from halos_pl.data.prompts import counted
from halos_pl.testing import tiny_tokenizer


def inspected(path: str, tmp_path: Path, **options: Any) -> Inspection:
    return inspect(Source(path), tiny_tokenizer(), cache_dir=tmp_path / "cache", **options)


def test_counts(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "x", "label": True},
        {"prompt": "a", "completion": "x", "label": False},  # a contradiction
        {"prompt": "a", "completion": "y", "label": False},
        {"prompt": "b" * 30, "completion": "z" * 30, "label": False},
        {"prompt": "c" * 30, "completion": "z", "label": False},
        {"prompt": "c", "completion": "", "label": False},
    ]
    found = inspected(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path, max_length=20)
    assert found.figures == {
        "examples": 5,
        "rows": 5,
        "pairs": 0,
        "desirable": 1,
        "undesirable": 4,
        "desirable to one undesirable": 0.25,
        "distinct prompts": 3,
        "prompts that repeat": 1,
        "contradictory labels": 1,
        "prompts cut at max_length": 2,
        "completions cut at max_length": 1,
        "rows dropped with truncate_completions false": 1,
        "faulty rows": 1,
    }
    assert found.lambdas == {
        "arXiv v1": "lambda_U = 1, lambda_D from 4 to 5.33",
        "v4 and v5": "lambda_U = 1, lambda_D from 4 to 6",
    }
    assert "a.jsonl:6: column 'completion' is empty" in found.faults[0]
    lengths = [len(tiny_tokenizer()(row["completion"])["input_ids"]) + 1 for row in rows[:5]]
    assert found.percentiles["completion"] == np.percentile(lengths, PERCENTILES).round().astype(int).tolist()
    assert sum(number for *_, number in found.histogram) == 5


def test_pairs_preferred_both_ways_contradict_each_other(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": c, "rejected": r} for c, r in (("a", "b"), ("b", "a"), ("a", "c"), ("a", "b"))]
    found = inspected(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path)
    assert (found.figures["pairs"], found.figures["contradictory labels"]) == (4, 1)
    assert found.figures["prompts that repeat"] == 1


def test_scores_and_skipped_rows_are_shown(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "p", "completion": f"c{i}", "score": s} for i, s in enumerate([1, 2, 3])]
    rows.append({"prompt": "p", "completion": "d", "score": None})
    found = inspected(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path)
    wanted = {"skipped: no score": 1, "rows with a score": 3, "lowest score": 1.0, "highest score": 3.0}
    assert found.figures.items() >= (wanted | {"dropped at the prompt's mean": 1, "desirable": 1}).items()
    assert {row.verdict for row in found.examples} == {"score 1", "score 2", "score 3"}


@given(desirable=st.integers(1, 10_000), undesirable=st.integers(1, 10_000), most=st.sampled_from([4 / 3, 3 / 2]))
def test_the_weights_keep_the_papers_rule(desirable: int, undesirable: int, most: float) -> None:
    """lambda_D n_D / (lambda_U n_U) in [1, most], with no class below a weight of 1."""
    said = lambdas(desirable, undesirable, most)
    found = re.fullmatch(r"lambda_(U|D) = 1, lambda_(U|D) from (\S+) to (\S+)", said)
    assert found
    assert found[1] != found[2]
    for weight in (float(found[3]), float(found[4])):
        ratio = desirable / undesirable * (weight if found[2] == "D" else 1 / weight)
        assert 1 - 6e-3 <= ratio <= most * (1 + 6e-3)
        assert weight >= 1 - 6e-3


def test_tokens_of_the_completion_are_marked_and_markup_is_text(tmp_path: Path) -> None:
    rows = [{"prompt": "<b>[red]", "completion": "<script>[/red]", "label": True}]
    found = inspected(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path, examples=1)
    assert "".join(found.examples[0].prompt) == "<b>[red]"
    assert "".join(found.examples[0].completion) == "<script>[/red]<|im_end|>"
    with (tmp_path / "out").open("w") as file:
        show(found, Console(file=file, width=100))
    assert "<b>[red]⟦<script>[/red]<|im_end|>⟧" in (tmp_path / "out").read_text()  # no colours in a file


def test_the_command_shows_tables_and_writes_json(tmp_path: Path, tiny_folder: Path, capfd: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": f"p{i}", "completion": "c", "label": i % 2} for i in range(9)])
    words = [f"--tokenizer={tiny_folder}", "--columns={prompt: q}", "--rows=8"]
    main(["data", "inspect", path, *words, f"--json_file={tmp_path}/out/a.json"])
    assert "distinct prompts" in capfd.readouterr().out
    assert json.loads((tmp_path / "out/a.json").read_text())["figures"]["rows"] == 8
    with pytest.raises(SystemExit) as stopped:
        main(["data", "inspect", str(tmp_path / "absent.jsonl"), f"--tokenizer={tiny_folder}"])
    assert stopped.value.code == 1
    assert "no such file" in capfd.readouterr().err
    with pytest.raises(SystemExit) as stopped:  # said before the tokenizer, which is not there either, is looked for
        main(["data", "inspect", path, "--tokenizer=nowhere", "--chat_template=absent.jinja"])
    assert stopped.value.code == 1
    assert "--chat_template: absent.jinja" in capfd.readouterr().err


def test_notes_are_shown(tmp_path: Path) -> None:
    tokenizer = shipped("qwen3")
    ask = [{"role": "user", "content": "Why?"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": ask, "completion": "So.", "label": True}])
    found = inspect(Source(path), tokenizer, cache_dir=tmp_path / "cache")
    [note] = counted(found.notes)
    assert repr("<think>\n\n</think>\n\n") in note
    with (tmp_path / "out").open("w") as file:
        show(found, Console(file=file, width=500))
    assert note in (tmp_path / "out").read_text()


def test_a_source_without_a_sound_row(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "", "label": True}] * 3
    found = inspected(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path)
    assert (found.figures["rows"], found.figures["faulty rows"], found.examples) == (0, 3, [])
    show(found, Console(quiet=True))


def test_what_a_terminal_would_obey_and_what_takes_several_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "[red]"
    folder.mkdir()
    rows = [{"prompt": "é😀 漢字", "completion": "a\x1b[2Jb", "label": True}]
    found = inspected(write_jsonl(folder / "a.jsonl", rows), tmp_path, examples=-1)
    assert found.examples == []
    found = inspected(write_jsonl(folder / "a.jsonl", rows), tmp_path, examples=1)
    assert "".join(found.examples[0].prompt) == "é😀 漢字"
    assert "".join(found.examples[0].completion) == "a\\x1b[2Jb<|im_end|>"
    with (tmp_path / "out").open("w") as file:
        show(found, Console(file=file, width=200))
    assert "[red]/a.jsonl" in (tmp_path / "out").read_text()
