"""A rule that sees the gold answer: exact match on GSM8K, as published."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from halos_pl.cli.main import main
from halos_pl.evaluation.files import ANSWERS, FILE
from halos_pl.evaluation.judging import Row, judged_by

ROWS = 50
RULE = r'''
import re

def number(text):
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "") if found else None

def exact_match(answer, row):
    """The last number of the answer is that behind #### in GSM8K's own."""
    return number(answer) == number(row["answer"].rpartition("####")[2])
'''


@pytest.mark.slow
def test_exact_match_on_gsm8k(shared_data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    published = (shared_data / "eval" / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(published) + "\n", encoding="utf-8")
    (tmp_path / "rule.py").write_text(RULE, encoding="utf-8")
    rule = judged_by(f"{tmp_path}/rule.py:exact_match", "rule")
    for i, row in enumerate(map(json.loads, published)):
        given = Row(row, row["question"], f"gsm8k.jsonl:{i + 1}", True)
        right = row["answer"].rpartition("#### ")[2]
        assert rule(given, f"So it is {right}") == 1
        assert rule(given, f"So it is {right}1") == rule(given, "I do not know") == 0
    words = ["evaluate", str(tiny_folder), f"--prompts={tmp_path}/gsm8k.jsonl", "--prompt_column=question"]
    words += [f"--rule={tmp_path}/rule.py:exact_match", f"--out={tmp_path}/out", "--max_new_tokens=12"]
    main([*words, "--text_prompts=chat", "--temperature=1.5", "--batch_size=50"])
    values = json.loads((tmp_path / "out" / FILE).read_text())["rule"]
    lines = [json.loads(line) for line in (tmp_path / "out" / ANSWERS).read_text().splitlines()]
    assert list(values) == [f"gsm8k.jsonl:{i}" for i in range(1, ROWS + 1)]
    for line, row in zip(lines, map(json.loads, published), strict=True):
        assert line["columns"] == row
        assert line["prompt"] == [{"role": "user", "content": row["question"]}]
        gold = re.sub(",", "", row["answer"].split("#### ")[1])
        said = re.findall(r"-?\d[\d,]*(?:\.\d+)?", line["answer"])
        assert values[line["row"]] == (bool(said) and said[-1].replace(",", "") == gold)
