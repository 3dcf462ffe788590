"""experiments/theory/candidates.py: a sweep from files to its report."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from theory_scripts import script

from halos_pl.candidates.read import read_preferences
from halos_pl.policy.loading import ModelSpec

SCRIPT = script("candidates")


def rows(first: int, count: int) -> list[dict[str, Any]]:
    """Preferences for the answer that says yes; the tiny tokenizer knows letters."""
    return [
        {"prompt": f"question {i}?", "chosen": f"yes {i % 3}", "rejected": f"no {i % 5} no"}
        for i in range(first, first + count)
    ]


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


@pytest.fixture
def study(tmp_path: Path, tiny_folder: Path) -> dict[str, Any]:
    return {
        "train": [write(tmp_path / "train.jsonl", rows(0, 12))],
        "held_out": [write(tmp_path / "held_out.jsonl", rows(100, 8))],
        "model": {"path": str(tiny_folder)},
        "reference": False,
        "votes": 8,
        "seeds": 3,
        "steps": 10,
        "words": 4,
        "rates": [0.001, 0.1],
        "arms": {"kto": {"objective": "kto", "reference_point": "CandidateKL"}, "dpo": {"objective": "dpo"}},
        "axes": {"value_function.init_args.beta": [0.5, 1.0]},
        "noise": [0.0, 0.25],
    }


def swept(study: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The report."""
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    monkeypatch.setattr(sys, "argv", ["candidates.py", str(folder / "study.yaml"), "--out", str(folder / "out")])
    SCRIPT.main()
    return (folder / "out" / "report.md").read_text()


def test_a_sweep_measures_each_cell_at_its_best_rate(study, tmp_path, monkeypatch):
    report = swept(study, tmp_path, monkeypatch)
    values = list(csv.DictReader((tmp_path / "out" / "values.csv").open()))
    rates = list(csv.DictReader((tmp_path / "out" / "rates.csv").open()))
    assert len(values) == 2 * 2 * 2 * 3
    assert len(rates) == 2 * 2 * 2 * 2
    assert {line["value_function.init_args.beta"] for line in values} == {"0.5", "1.0"}
    for cell in range(8):
        curve = [float(line["chosen"]) for line in rates[2 * cell : 2 * cell + 2]]
        assert f"{'0.001' if curve[0] >= curve[1] else '0.1'} (edge)" in report.splitlines()[6 + cell]
    clean = [float(line["accuracy"]) for line in values if line["noise"] == "0.0"]
    assert min(clean) == 1  # the words tell which answer is preferred
    assert all(float(line["kl"]) >= 0 for line in values)
    assert "In 8 of 8 cells" in report


def test_log_probs_are_those_of_the_model_and_computed_once(study, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    twice = [*rows(0, 3), rows(0, 1)[0] | {"chosen": "no 0 no", "rejected": "yes 0"}]
    path = write(tmp_path / "votes.jsonl", twice)
    read = read_preferences([path], ModelSpec(str(tiny_folder)), reference=True)
    assert (len(read.texts), read.pairs[3]) == (6, read.pairs[0][::-1])  # the same candidates, contradicted
    again = read_preferences([path], ModelSpec(str(tiny_folder)), reference=True)
    assert (again.scored, again.stored) == (0, 8)
    assert again.reference_logps == read.reference_logps
    assert max(read.reference_logps) < 0
    places = read.sets(range(4), read.features(4))
    assert places[0].reference_logps.exp().sum(0).tolist() == pytest.approx([1, 1, 1])
    assert torch.equal(places[1][3], places[1][0].flip(0))


def test_labels_and_scores_become_preferences(tmp_path, tiny_folder):
    labelled = [{"prompt": "q", "completion": c, "label": c != "bad"} for c in ("good", "better", "bad")]
    read = read_preferences([write(tmp_path / "l.jsonl", labelled)], ModelSpec(str(tiny_folder)), reference=False)
    assert {(read.texts[a], read.texts[b]) for a, b in read.pairs} == {("good", "bad"), ("better", "bad")}


def test_free_logits_are_reported_on_the_prompts_of_training(study, tmp_path, monkeypatch):
    contradicted = [row for row in rows(0, 4) for _ in range(2)]
    contradicted += [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(0, 4)]
    study |= {
        "train": [write(tmp_path / "votes.jsonl", contradicted)],
        "held_out": [write(tmp_path / "majority.jsonl", rows(0, 4))],
        **{"words": "free", "votes": 12, "seeds": 1, "noise": [0.0], "steps": 40, "rates": [0.01, 0.1]},
    }
    swept(study, tmp_path, monkeypatch)
    values = list(csv.DictReader((tmp_path / "out" / "values.csv").open()))
    assert [line["follows"] for line in values] == ["1.0"] * 4  # both follow a majority that pi_ref does not oppose


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"arms": {"kto": {"objective": "kto"}}}, "set reference_point to CandidateKL"),
        (
            {"arms": {"sft": {"objective": "sft"}}, "axes": {}},
            "sft: the objective's loss depends on the number of tokens",
        ),
        ({"arms": {"moving": {"objective": "tr_dpo"}}}, "model.reference_model"),
        ({"arms": {"a": {"objective": "dpo", "value_function.init_args.gamma": 1}}}, "gamma"),
        ({"arms": {"a": {"objective": "dpo", "valeu_function": 1}}}, "did you mean value_function"),
        ({"held_out": []}, "held_out is empty"),
        ({"rates": [0.1, 0.01]}, "ascending"),
        ({"votes": 13}, "votes is 13"),
        ({"votes": 12, "noise": [0.0]}, "set seeds to 1"),
        ({"steps": 0}, "steps is 0"),
        ({"noise": [1.5]}, "noise"),
        ({"colour": "red"}, "colour"),
        ({"train": ["none.jsonl"]}, "none.jsonl"),
    ],
)
def test_faults_of_a_study_are_one_line(study, change, fault, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        swept(study | change, tmp_path, monkeypatch)
    assert fault in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out" / "report.md").exists()


def test_a_prompt_in_training_and_held_out_data_is_refused(study, tmp_path, monkeypatch):
    study["held_out"] = [write(tmp_path / "held_out.jsonl", [*rows(100, 4), *rows(3, 1)])]
    with pytest.raises(SystemExit, match=r"held_out\.jsonl:5: the held-out prompt is also one of train"):
        swept(study, tmp_path, monkeypatch)
