"""Each benchmark still starts: a step of it on a tiny model. Seconds are no matter of a test."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import ROOT

from halos_pl.data.datamodule import FeedbackDataModule
from halos_pl.data.order import Order, StepSampler
from halos_pl.testing import tiny_tokenizer

sys.path.insert(0, str(ROOT / "benchmarks"))

import balance
import conformance
import guards
import scaling
import vs_trl
from before_after import median_interval


@pytest.mark.parametrize("name", ["kto_live", "kto_stored", "kto_lora", "dpo_live", "dpo_bf16"])
def test_our_side_takes_a_step(name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    workload = replace(vs_trl.WORKLOADS[name], model=str(tiny_folder))
    keys = ("chosen_ids", "rejected_ids") if workload.kind == "dpo" else ("completion_ids", "KL_completion_ids")
    rows = [
        {"prompt_ids": [5 + i, 6], keys[0]: [7, 8 + i], keys[1]: [9, 10, 11], "label": i % 2 == 0} for i in range(4)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    policy, step, flops = vs_trl.ours(workload, str(tmp_path))
    assert float(step()) == pytest.approx(0.5 if workload.kind == "kto" else 0.6931, abs=1e-3)
    gradients = [p.grad for p in policy.parameters() if p.requires_grad]
    assert all(g is not None for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients) > 0
    assert flops > 0


def test_balance_measures_two_ways(tmp_path: Path) -> None:
    """The first and the third row of each step are long: by turns, rank 0 has both."""
    rows = [
        {"prompt": f"question {i}", "completion": "x" * (1 if i % 2 else 100), "label": i % 3 == 0} for i in range(8)
    ]
    data = FeedbackDataModule(train=rows, cache_dir=str(tmp_path))
    data.connect(tokenizer=tiny_tokenizer(), needs=balance.KTO)
    data.setup("fit")
    split, sampler = data._splits["train"], StepSampler(Order(8, shuffle=False), batch_size=4, world_size=2)
    by_turns, by_tokens = (
        balance.imbalance(kind, 2, sampler, split, replace(balance.KTO, mismatched=False))
        for kind in (balance.ByTurns, balance.StepDataset)
    )
    assert len(by_turns) == len(by_tokens) == 2
    assert (by_turns > 1.5).all()
    assert (by_tokens < 1.1).all()


def test_scaling_measures_a_point(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.measure(scaling.Point(rows=2, prompt=4, completion=3, vocabulary=64), threads=1)
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["seconds"] > 0
    assert measured["embedding_gradient_megabytes"] == 64 * 256 * 4 / 1e6


CORPUS = """
import os
import torch
from value_functions import ValueFunction

class _Scaled(ValueFunction):
    def forward(self, u): return torch.tanh(self.scale * u)

class Rises(_Scaled):
    scale = 0.1

class Falls(_Scaled):
    CLAUSE = "non_decreasing (everywhere)"
    scale = -0.1

class Hidden(_Scaled):
    CLAUSE, KIND = "non_decreasing", "state and time"
    scale = 0.1

class Leaves(ValueFunction):
    CLAUSE = "process (os._exit)"
    def forward(self, u): os._exit(0)

def made(): return Falls()
made.CLAUSE = "non_decreasing"
"""


@pytest.mark.slow
def test_caught_and_passed_are_counted_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus.py").write_text(CORPUS)
    with pytest.raises(SystemExit) as left:
        conformance.main([str(tmp_path / "corpus.py")])
    assert left.value.code == 1  # for Hidden, which is not faulty at all
    lines = capsys.readouterr().out.splitlines()
    found = dict(reversed(line.split(": ")[:2]) for line in lines[: lines.index("")])
    assert found == {
        "corpus.Rises": "passed",
        "corpus.Falls": "caught",
        "corpus.Hidden": "missed",
        "corpus.Leaves": "caught",
        "corpus.made": "caught",
    }
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    counts = {row[0]: row[1:] for row in rows}
    assert counts["values and gradients"][:2] == ["2 / 2", "–"]
    assert counts["state and time"] == ["0 / 1", "–", "corpus.Hidden"]
    assert counts["false alarms"][:2] == ["–", "1 / 1"]
    assert counts["the process"][:2] == ["1 / 1", "–"]
    assert counts["all"][:2] == ["3 / 4", "1 / 1"]


def test_what_was_found_is_printed_before_the_next_target_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = conformance.check

    def cut_off(target: conformance.Target, child: Any) -> conformance.Checked:
        if target.name == "corpus.Falls":
            raise KeyboardInterrupt
        return check(target, child)

    (tmp_path / "corpus.py").write_text(CORPUS)
    monkeypatch.setattr(conformance, "check", cut_off)
    with pytest.raises(KeyboardInterrupt):
        conformance.main([str(tmp_path / "corpus.py"), "--details"])
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("passed: corpus.Rises: ")
    assert len(line) > len("passed: corpus.Rises: ")


@pytest.mark.parametrize("text", ["raise ValueError(3)", "x = 1", "from value_functions import Logistic as L"])
def test_a_file_without_targets_is_refused_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus.py").write_text(text)
    with pytest.raises(SystemExit) as left:
        conformance.main([str(tmp_path / "corpus.py")])
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("place", guards.GUARDS.values())
def test_the_guards_that_are_timed_exist(place: str) -> None:
    module, _, path = place.partition(":")
    owner: object = import_module(module)
    for name in path.split("."):
        owner = getattr(owner, name)
    assert callable(owner) or isinstance(owner, property)


def test_the_interval_of_a_median_holds_it() -> None:
    torch.manual_seed(0)
    held = 0
    for sample in torch.randn(400, 20).tolist():
        median, low, high = median_interval(sample)
        assert low <= median <= high
        held += low <= 0 <= high
    assert held >= 0.93 * 400
