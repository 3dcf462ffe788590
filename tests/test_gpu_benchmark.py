"""The benchmark for GPUs, tried on the CPU with tiny models. Seconds are no matter of a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import ROOT

from halos_pl.policy import prefix_sharing, scorer

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
from gpu_profile import PLACES
from gpu_sides import SHAPES, filling, model_of, rows_of


def test_rows_that_share_prompts_are_compared_with_separate_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(value < 1e-4 for name, value in gpu.check_sharing("cpu").items() if "float32" in name)
    plain = prefix_sharing.token_logps
    monkeypatch.setattr(scorer, "sharing_fault", lambda model: None)
    monkeypatch.setattr(
        prefix_sharing, "token_logps", lambda head, hidden, targets: 1.01 * plain(head, hidden, targets)
    )
    with pytest.raises(SystemExit, match="log-probs"):
        gpu.check_sharing("cpu")


def test_our_side_is_measured(tmp_path: Path) -> None:
    result = gpu.side("ours", SHAPES["tiny"], "cpu", "plain", 4, str(tmp_path))
    assert result["first"]["dpo float32"]["loss"] == pytest.approx(0.6931, abs=0.05)
    rows = []
    for kind in ("kto", "dpo"):
        figures = result[kind]
        assert figures["steps"] >= 3
        assert sum(figures["time"].values()) == pytest.approx(1)
        assert figures["time"].keys() == {*PLACES, "other", "idle"}
        assert all(figures["time"][place] > 0 for place in ("optimizer", "head", "attention", "products"))
        assert torch.load(tmp_path / f"ours {kind} bfloat16.pt")
        more = {"model": "tiny", "rows": 4, "loss": kind, "side": "ours", "tokens_per_second": 1.0, "of_matmul": 0.5}
        rows.append(figures | more)
    text = "\n".join(gpu.table(rows, {"matmul": 1e9}))
    assert "50.0%" in text
    assert text.count("tiny") == 4


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_sides_that_differ_stop_the_benchmark(what: str, tmp_path: Path) -> None:
    def first(name: str, loss: float, slope: float) -> dict[str, Any]:
        torch.save({"weight": torch.tensor([1.0, slope])}, tmp_path / f"{name} kto float32.pt")
        return {"first": {"kto float32": {"loss": loss, "norm": 1.0}}}

    same = {"ours": first("ours", 0.5, 0.1), "trl": first("trl", 0.5, 0.1)}
    assert max(gpu.compare("tiny", same, str(tmp_path)).values()) == 0
    other = first("trl", 0.51, 0.1) if what == "loss" else first("trl", 0.5, 0.11)
    with pytest.raises(SystemExit, match=what):
        gpu.compare("tiny", same | {"trl": other}, str(tmp_path))


def test_the_second_model_fills_the_card() -> None:
    names = [filling(gigabytes << 30) for gigabytes in (8, 24, 80, 140, 400)]
    assert names == ["SmolLM2-135M", "SmolLM2-360M", "Llama-3.2-1B", "Llama-3.2-3B", "Mistral-7B"]
    for shape in (SHAPES["SmolLM2-135M"], SHAPES["Mistral-7B"]):
        counted = sum(p.numel() for p in model_of(shape, "meta").parameters())
        assert counted == pytest.approx(shape.parameters, rel=1e-3)


def test_rows_depend_on_the_shape_alone() -> None:
    shape = SHAPES["tiny"]
    assert rows_of("dpo", shape, 4) == rows_of("dpo", shape, 4)
    assert [len(rows_of(kind, shape, 4)) for kind in ("kto", "dpo")] == [4, 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_names_the_way_to_try_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2
    assert "--device cpu --tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--variants", "plain", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run([sys.executable, gpu.__file__, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["model"], row["loss"], row["side"]) for row in rows} == {
        (model, loss, side) for model in ("tiny", "tiny, untied") for loss in ("kto", "dpo") for side in ("ours", "trl")
    }
