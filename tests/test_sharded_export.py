"""Runs whose checkpoints are folders, through the commands: export, best, evaluation, and resumption on one device."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import binary_data, fit, metrics, pair_data, refused
from safetensors.torch import load_file

from halos_pl.cli.export import export
from halos_pl.cli.main import main
from halos_pl.evaluation.evaluate import evaluate
from halos_pl.evaluation.files import FILE
from halos_pl.run_dir import LAST, PREVIOUS
from halos_pl.training.checkpoint_reading import read_checkpoint
from halos_pl.training.checkpoint_shards import Shards
from halos_pl.training.sharded_checkpoint import save_sharded
from halos_pl.training.trained import load_run


def to_folders(run: Path) -> Path:
    """Writes the checkpoints of a run as a single rank of a sharded run would."""
    for name in (PREVIOUS, LAST):
        save_sharded(read_checkpoint(run / name), run / name, rotate=True)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder) -> tuple[Path, list[str]]:
    """A run of 3 steps, each of them saved, and the words that made it."""
    folder = tmp_path_factory.mktemp("finished")
    words = fit(tiny_folder, "kto", binary_data(folder / "data.jsonl"), folder / "run", "--checkpoint.every_n_steps=1")
    main(words)
    shutil.copytree(folder / "run", folder / "folders")
    to_folders(folder / "folders")
    return folder, words


def content(folder: Path) -> dict[str, Any]:
    """The files of a model; weights as one dict."""
    files: dict[str, Any] = {
        path.name: json.loads(path.read_text()) for path in folder.glob("*.json") if "index" not in path.name
    }
    return {**files, "weights": {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights, others = one.pop("weights"), other.pop("weights")
    equal = weights.keys() == others.keys() and all(torch.equal(v, others[k]) for k, v in weights.items())
    return equal and all(v.dtype == others[k].dtype for k, v in weights.items()) and one == other


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_folder_exports_as_a_file_does_a_file_at_a_time(finished, tmp_path, monkeypatch, dtype):
    folder, _ = finished
    export(str(folder / "run"), str(tmp_path / "file"), dtype=dtype)
    read: list[weakref.ref[Any]] = []
    in_memory: list[int] = []
    whole = Shards.whole

    def watched(*args: Any) -> torch.Tensor:
        tensor = whole(*args)
        read.append(weakref.ref(tensor))
        in_memory.append(sum(t.nbytes for ref in read if (t := ref()) is not None))
        return tensor

    monkeypatch.setattr(Shards, "whole", watched)
    monkeypatch.setattr("halos_pl.training.models.load_model", None)  # no other weights are read
    export(str(folder / "folders"), str(tmp_path / "folder"), dtype=dtype, max_shard_size="20KB")
    files = [load_file(path) for path in (tmp_path / "folder").glob("model-*.safetensors")]
    sizes = [sum(t.nbytes for t in weights.values()) for weights in files]
    assert len(files) > 2
    assert all(size <= 20_000 or len(weights) == 1 for size, weights in zip(sizes, files, strict=True))
    assert max(in_memory) == max(sizes) < sum(sizes) / 2
    assert (tmp_path / "folder" / "model.safetensors.index.json").exists()
    assert same(content(tmp_path / "folder"), content(tmp_path / "file"))


def test_a_folder_is_loaded_and_goes_on_with_one_device_bit_for_bit(finished, tmp_path):
    folder, words = finished
    one, other = load_run(folder / "run").state_dict(), load_run(folder / "folders").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    run = Path(shutil.copytree(folder / "folders", tmp_path / "run", symlinks=True))
    main([*words, f"--run_dir={run}", f"--ckpt_path={run / PREVIOUS}"])
    assert metrics(run) == metrics(folder / "run")
    again, straight = read_checkpoint(run / LAST), read_checkpoint(folder / "run" / LAST)
    assert all(torch.equal(again["state_dict"][k], v) for k, v in straight["state_dict"].items())


@pytest.mark.slow
def test_a_folder_is_evaluated_as_a_file_is(finished, tmp_path):
    folder, _ = finished
    held_out = [str(pair_data(tmp_path / "pairs.jsonl"))]
    measured = []
    for name in ("run", "folders"):
        run = Path(shutil.copytree(folder / name, tmp_path / name, symlinks=True))
        evaluate(str(run), held_out=held_out)
        measured.append(json.loads((run / FILE).read_text()))
    assert measured[0]
    assert measured[0] == measured[1]


def test_damage_and_weights_that_are_not_finite_are_named(finished, tmp_path, capfd):
    folder, words = finished
    run = Path(shutil.copytree(folder / "folders", tmp_path / "run", symlinks=True))
    checkpoint = read_checkpoint(run / LAST)
    checkpoint["state_dict"]["scorer.model.lm_head.weight"][3, 2] = 7e4
    save_sharded(checkpoint, run / LAST, rotate=True, keep=run / PREVIOUS)
    said = refused(capfd, ["export", str(run), str(tmp_path / "out"), "--dtype=float16"])
    assert "lm_head.weight is not finite in float16" in said
    assert not (tmp_path / "out").exists()
    shard = run / LAST / "shard-00000.safetensors"
    bits = bytearray(shard.read_bytes())
    bits[-1] ^= 1
    shard.write_bytes(bits)
    for command in (
        ["export", str(run), str(tmp_path / "out")],
        ["test", f"--config={run}/config.yaml", f"--run_dir={run}", f"--data.test={folder}/data.jsonl"],
        [*words, f"--run_dir={run}", "--ckpt_path=last"],
    ):
        said = refused(capfd, command)
        assert f"{run / LAST} is damaged: the checksum of {shard.name}" in said
        assert f"--ckpt_path {run / PREVIOUS}" in said
    assert "max_shard_size" in refused(capfd, ["export", str(run), str(tmp_path / "out"), "--max_shard_size=big"])


def test_another_model_is_refused(finished, tmp_path, capfd, tiny_gpt2_folder):
    folder, words = finished
    run = Path(shutil.copytree(folder / "folders", tmp_path / "run", symlinks=True))
    said = refused(capfd, [*words, f"--run_dir={run}", "--ckpt_path=last", f"--model.policy.path={tiny_gpt2_folder}"])
    assert str(run / LAST) in said
