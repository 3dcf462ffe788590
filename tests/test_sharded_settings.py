"""Settings that sharding could break: each gives the numbers of one process, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from gguf_files import write_gguf
from run_halos import ROOT, binary_data, fit, metrics, pair_data, refused, run_all, run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

SHARDED = "--trainer.strategy=fsdp2"


def assert_like_one_process(words: list[str], folder: Path, env: Mapping[str, str] | None = None) -> None:
    """The fit ``words``, whose run folder is ``run`` in ``folder``, sharded and then alone."""
    ended = run_ranks(words, folder, strategy="fsdp2", env=env)
    ended += run_all([[*words, f"--run_dir={folder}/alone"]], folder, [env or {}])
    assert [each.status for each in ended] == [0, 0, 0], "\n".join(ended)
    one, many = metrics(folder / "alone"), metrics(folder / "run")
    assert [line.keys() for line in one] == [line.keys() for line in many]
    for line, other in zip(one, many, strict=True):
        numbers = ({name: float(value) for name, value in each.items()} for each in (other, line))
        assert next(numbers) == pytest.approx(next(numbers), rel=1e-5, abs=2e-4)


@pytest.mark.slow
def test_compiled_layers(tiny_folder: Path, tmp_path: Path) -> None:
    data = pair_data(tmp_path / "data.jsonl", 8)
    words = fit(tiny_folder, "dpo", data, tmp_path / "run", "--model.policy.compile=true", "--trainer.max_steps=2")
    assert_like_one_process(words, tmp_path)


@pytest.mark.slow
def test_a_gguf_file(tiny_folder: Path, tmp_path: Path) -> None:
    """Both ranks start without its conversion in the cache."""
    (tmp_path / "model").mkdir()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    write_gguf(model, tokenizer, tmp_path / "model" / "tiny.gguf")
    data = binary_data(tmp_path / "data.jsonl", 8)
    words = fit(tmp_path / "model", "kto", data, tmp_path / "run", "--trainer.max_steps=2")
    assert_like_one_process(words, tmp_path, {"HALOS_CACHE": str(tmp_path / "cache")})


@pytest.mark.slow
def test_a_callback_that_samples_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """Ranks that sample answers of different lengths would wait for each other."""
    data = binary_data(tmp_path / "data.jsonl", 8)
    words = fit(tiny_folder, "kto", data, tmp_path / "run", "--trainer.callbacks+=plugins.samples.Samples")
    ended = run_ranks(words, tmp_path, strategy="fsdp2")
    assert [rank.status for rank in ended] == [1, 1]
    lines = [line for rank in ended for line in rank.splitlines() if line.startswith("halos: ")]
    assert any("callback" in line and "trainer.strategy ddp" in line for line in lines), lines
    assert not any("Traceback" in rank for rank in ended)


def test_a_base_that_cannot_be_sharded_is_refused_before_data_are_read(
    capfd: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    quantized = ("--model.policy.lora={r: 2}", "--model.policy.quantize={method: torchao, bits: 8}")
    words = fit(tiny_folder, "kto", tmp_path / "missing.jsonl", tmp_path / "run", *quantized, SHARDED)
    said = refused(capfd, words)
    assert "model.policy.quantize" in said
    assert "torchao" in said
    assert "fsdp2" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_study_of_sharded_runs(tiny_folder: Path, tmp_path: Path) -> None:
    """The command of a run starts both of its processes; both arms are measured, with the same result."""
    objective = {"objective": f"{ROOT}/experiments/objectives/kto.yaml"}
    study = {
        "configs": [f"{ROOT}/experiments/base.yaml"],
        "options": {
            "model.policy.path": str(tiny_folder),
            "data.train": str(binary_data(tmp_path / "train.jsonl", 12)),
            "data.batch_size": 4,
            "trainer.accelerator": "cpu",
            "trainer.max_steps": 2,
            "trainer.enable_progress_bar": False,
            "model.optimizer.init_args.lr": 0.01,
        },
        "arms": {"alone": objective, "sharded": {**objective, "trainer.strategy": "fsdp2", "trainer.devices": 2}},
        "seeds": [0],
        "evaluate": {"held_out": [{"path": str(pair_data(tmp_path / "held_out.jsonl", 6, seed=1))}]},
        "metrics": ["reward_accuracy", "reward_auroc"],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    (ended,) = run_all([["ablate", f"{tmp_path}/study.yaml", f"--out={tmp_path}/out"]], tmp_path, timeout=600)
    assert ended.status == 0, ended
    summaries = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").rglob("summary.json"))]
    assert len(summaries) == 2
    alone, sharded = (summary["metrics"] for summary in summaries)
    assert sharded["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    evaluations = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").rglob("evaluation.json"))]
    assert len(evaluations) == 2
