"""Sharded runs through the command line: killed, resumed with any number of ranks, measured, exported."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import equal, kill_at
from run_halos import KILLED, Ended, binary_data, fit, metrics, pair_data, run, run_ranks

from halos_pl.cli.export import export
from halos_pl.policy.loading import ModelSpec, load_model
from halos_pl.run_dir import LAST, PREVIOUS
from halos_pl.training.checkpoint_manifest import Manifest, read_manifest
from halos_pl.training.checkpoint_reading import read_checkpoint
from halos_pl.training.checkpoint_search import find_checkpoint
from halos_pl.training.trained import load_run

EACH = "--checkpoint.every_n_steps=1"
RESUMED = ("state_dict", "optimizer_states", "reference_model", "lr_schedulers", "loops", "rng_states")


def sharded(words: list[str], folder: Path, status: int = 0) -> list[Ended]:
    ended = run_ranks(words, folder, strategy="fsdp2")
    assert [rank.status for rank in ended] == [status] * 2, "\n".join(ended)
    return ended


def differences(one: Path, other: Path) -> list[str]:
    """The places where two runs' last checkpoints differ, in what a fit resumes from.

    Lightning counts the batches of a validation that ended just before the checkpoint again.
    """
    states = [read_checkpoint(folder / LAST) for folder in (one, other)]
    for state in states:
        del state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    return equal(*({part: state.get(part) for part in RESUMED} for state in states))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder) -> tuple[Path, list[str]]:
    """A sharded run of 3 steps, each of them saved, and the words that made it."""
    folder = tmp_path_factory.mktemp("sharded")
    data = binary_data(folder / "data.jsonl", 12)
    best = (
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.monitor=val/loss",
        "--trainer.callbacks.save_on_train_epoch_end=false",
        "--trainer.val_check_interval=1",
    )
    words = fit(tiny_folder, "kto", data, folder / "run", EACH, f"--data.validation={data}", *best)
    sharded(words, folder)
    return folder, words


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_resumes_bit_for_bit(finished, tmp_path):
    """Rank 0 dies while it writes the last file of the second checkpoint."""
    folder, words = finished
    run_dir = tmp_path / "run"
    words = [*words, f"--run_dir={run_dir}"]
    assert KILLED in [rank.status for rank in run_ranks([*words, *kill_at(2, "writing")], tmp_path, strategy="fsdp2")]
    assert read_checkpoint(run_dir / LAST)["global_step"] == 1
    assert list(run_dir.rglob("*.part"))
    sharded([*words, "--ckpt_path=last"], tmp_path)
    assert differences(run_dir, folder / "run") == []
    assert metrics(run_dir) == metrics(folder / "run")
    assert not list(run_dir.rglob("*.part"))
    assert read_checkpoint(run_dir / PREVIOUS)["global_step"] == 2


def test_the_best_checkpoint_is_exported(finished, tmp_path):
    folder, _ = finished
    path = find_checkpoint(folder / "run", "best")
    assert path.is_dir()
    export(str(folder / "run"), str(tmp_path / "out"), ckpt_path="best")
    exported = load_model(ModelSpec(str(tmp_path / "out"))).state_dict()
    weights = read_checkpoint(path)["state_dict"]
    assert all(torch.equal(exported[name.removeprefix("scorer.model.")], value) for name, value in weights.items())


@pytest.mark.slow
def test_tied_weights_are_saved_once_and_exported(tmp_path, tiny_gpt2_folder):
    words = fit(tiny_gpt2_folder, "kto", binary_data(tmp_path / "data.jsonl", 12), tmp_path / "run")
    sharded(words, tmp_path)
    manifest = read_manifest(tmp_path / "run" / LAST)
    assert isinstance(manifest, Manifest)
    names = ("state_dict.scorer.model.lm_head.weight", "state_dict.scorer.model.transformer.wte.weight")
    tied = [entry for entry in manifest.entries if ".".join(map(str, entry.path)) in names]
    assert len(tied) == 2
    assert len({e.key for e in tied}) == 1
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    exported: Any = load_model(ModelSpec(str(tmp_path / "out")))
    assert exported.lm_head.weight is exported.transformer.wte.weight
    weights = read_checkpoint(tmp_path / "run" / LAST)["state_dict"]
    assert all(torch.equal(exported.state_dict()[n.removeprefix("scorer.model.")], v) for n, v in weights.items())
    config, before = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", tiny_gpt2_folder))
    assert {k: config[k] for k in ("resid_pdrop", "embd_pdrop")} == {
        k: before[k] for k in ("resid_pdrop", "embd_pdrop")
    }


@pytest.mark.slow
def test_damage_ends_all_ranks_with_its_name(finished, tmp_path):
    folder, words = finished
    run_dir = Path(shutil.copytree(folder / "run", tmp_path / "run", symlinks=True))
    shard = run_dir / LAST / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 2
    shard.write_bytes(content)
    outputs = sharded([*words, f"--run_dir={run_dir}", "--ckpt_path=last"], tmp_path, status=1)
    line = next(line for output in outputs for line in output.splitlines() if "is damaged" in line)
    assert f"{run_dir / LAST} is damaged: the checksum of {shard.name}" in line
    assert f"--ckpt_path {run_dir / PREVIOUS}" in line
    assert not any("Traceback" in output for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["precision", "adapter", "model"])
def test_a_checkpoint_of_another_run_is_refused(finished, tmp_path, other, tiny_gpt2_folder):
    folder, words = finished
    path = folder / "run" / LAST
    changed = {
        "precision": "--trainer.precision=bf16-true",
        "adapter": "--model.policy.lora.r=2",
        "model": f"--model.policy.path={tiny_gpt2_folder}",
    }[other]
    outputs = sharded([*words, f"--run_dir={tmp_path}/x", f"--ckpt_path={path}", changed], tmp_path, status=1)
    assert any(str(path) in output for output in outputs)
    assert not any("Traceback" in output for output in outputs)


CASES: dict[str, tuple[str, ...]] = {
    "an adapter": ("dpo", "--model.policy.lora.r=2", "--model.policy.lora.dropout=0.1"),
    "a moving reference": ("tr_dpo", "--model.reference_model.init_args.every=1"),
    "past policies": ("mnpo", "--model.reference_model.init_args.every=1"),
    "an optimizer whose state spans all parameters": (
        "tr_dpo",
        "--model.reference_model.init_args.every=1",
        "--model.optimizer.class_path=torch.optim.LBFGS",
        "--model.optimizer.init_args={lr: 0.1, max_iter: 2}",
    ),
    "an adapter on a quantized base": (
        "dpo",
        "--model.policy.lora={r: 2, dropout: 0.1}",
        "--model.policy.quantize={method: bitsandbytes, bits: 4, storage_dtype: float32}",
    ),
    "in half precision": ("tr_dpo", "--trainer.precision=bf16-mixed", "--model.reference_model.init_args.every=1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, tiny_folder, case):
    if "bitsandbytes" in str(CASES[case]):
        pytest.importorskip("bitsandbytes")
    objective, *options = CASES[case]
    words = fit(tiny_folder, objective, pair_data(tmp_path / "data.jsonl", 12), tmp_path / "run", EACH, *options)
    sharded(words, tmp_path)
    sharded([*words, f"--run_dir={tmp_path}/again", f"--ckpt_path={tmp_path / 'run' / PREVIOUS}"], tmp_path)
    assert differences(tmp_path / "run", tmp_path / "again") == []
    saved = read_checkpoint(tmp_path / "run" / LAST)
    if "an adapter" in case:
        assert all(".lora_" in name for name in saved["state_dict"])
    else:
        moved = {re.sub(r"^\d+\.", "", name) for name in saved["reference_model"]}  # a snapshot's begin with its number
        assert moved == {n.removeprefix("scorer.model.") for n in saved["state_dict"]}
    policy = load_run(tmp_path / "run").policy.state_dict()
    assert all(torch.equal(policy[n.removeprefix("scorer.model.")], v) for n, v in saved["state_dict"].items())


@pytest.mark.slow
def test_two_ranks_then_one_then_two(tmp_path, tiny_folder):
    """The same run, up to rounding, as that of one process; its checkpoints are folders, a file, and folders again."""
    data = binary_data(tmp_path / "data.jsonl", 12)
    words = fit(tiny_folder, "kto", data, tmp_path / "run", EACH, "--trainer.max_epochs=3")
    last = f"--ckpt_path={tmp_path / 'run' / LAST}"
    planned = "--trainer.max_steps=9"
    alone = [*words, f"--run_dir={tmp_path}/alone", planned]
    assert run(alone, tmp_path).status == 0
    stop = [*words, planned, *kill_at(4, "after_checkpoint")]
    assert [rank.status for rank in run_ranks(stop, tmp_path, strategy="fsdp2")] == [KILLED] * 2
    assert (tmp_path / "run" / LAST).is_dir()
    assert run([*words, planned, last, *kill_at(7, "after_checkpoint")], tmp_path).status == KILLED
    assert (tmp_path / "run" / LAST).is_file()
    sharded([*words, planned, last], tmp_path)
    assert (tmp_path / "run" / LAST).is_dir()
    states: list[dict[str, Any]] = [read_checkpoint(tmp_path / name / LAST) for name in ("run", "alone")]
    for one, other in (
        [state["state_dict"] for state in states],
        [state["optimizer_states"][0]["state"] for state in states],
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [row["step"] for row in metrics(tmp_path / "alone")]
