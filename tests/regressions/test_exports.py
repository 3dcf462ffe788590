"""An export is whole or absent, in the dtype that was asked for, and readable for others.

axolotl#1510 (a bf16 base exported as float32), h2o-llmstudio#214 (a full disk).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import binary_data, fit, full_disk, refused
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import halos_pl.training.named_model
from halos_pl.cli import export as exporting
from halos_pl.cli.main import main
from halos_pl.policy.loading import ModelSpec, load_tokenizer


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run over a base that is kept in bfloat16."""
    folder = tmp_path_factory.mktemp("run")
    LlamaForCausalLM.from_pretrained(tiny_folder).bfloat16().save_pretrained(folder / "base")
    load_tokenizer(ModelSpec(str(tiny_folder))).save_pretrained(folder / "base")
    words = fit(folder / "base", "kto", binary_data(folder / "d.jsonl"), folder / "run", "--trainer.max_steps=1")
    main([*words, "--model.policy.lora={r: 2}", "--model.optimizer.init_args.lr=0.01", "--model.warmup_ratio=0"])
    return folder / "run"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_dtype_of_an_export(run: Path, tmp_path: Path, capfd: Any) -> None:
    main(["export", str(run), str(tmp_path / "default")])
    assert "float32 (its base is in bfloat16" in capfd.readouterr().out  # what it was trained in
    exact = weights(tmp_path / "default")
    assert {value.dtype for value in exact.values()} == {torch.float32}
    for name in ("bfloat16", "float16"):
        main(["export", str(run), str(tmp_path / name), f"--dtype={name}"])
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == name
        for key, value in weights(tmp_path / name).items():
            assert torch.equal(value, exact[key].to(getattr(torch, name)))
    main(["export", str(run), str(tmp_path / "ad"), "--adapter=true", "--dtype=bfloat16"])
    assert {v.dtype for v in load_file(tmp_path / "ad" / "adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.slow
def test_a_run_of_half_precision_is_exported_as_it_was_trained(tiny_folder: Path, tmp_path: Path, capfd: Any) -> None:
    words = fit(tiny_folder, "kto", binary_data(tmp_path / "d.jsonl"), tmp_path / "run", "--trainer.max_steps=1")
    main([*words, "--trainer.precision=bf16-true"])
    main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.bfloat16}
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {v.dtype for k, v in state["state_dict"].items() if k.startswith("scorer.")} == {torch.bfloat16}


@pytest.mark.slow
def test_what_a_dtype_cannot_hold_is_refused(run: Path, tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    loaded = halos_pl.training.named_model.load_run

    def huge(*named: Any) -> Any:
        module = loaded(*named)
        next(iter(module.policy.parameters())).data[0, 0] = 1e30  # type: ignore[union-attr]
        return module

    monkeypatch.setattr(halos_pl.training.named_model, "load_run", huge)
    assert "float16" in refused(capfd, ["export", str(run), str(tmp_path / "out"), "--dtype=float16"])
    assert not (tmp_path / "out").exists()


def test_the_modes_of_the_files_are_those_of_the_umask(run: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        main(["export", str(run), str(tmp_path / "out")])
    finally:
        os.umask(before)
    files = sorted((tmp_path / "out").iterdir())
    assert {"model.safetensors", "config.json", "tokenizer.json"} < {path.name for path in files}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_what_was_there(run: Path, tmp_path: Path, capfd: Any, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_text("mine")
        (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with full_disk(1 << 14):
        said = refused(capfd, ["export", str(run), str(out), "--overwrite=true"])
    assert str(out) in said
    assert "too large" in said
    assert "\n" not in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert out.exists() == there


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_while_generating_is_named(tiny_folder: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "prompts.txt").write_text("why\n")
    words = ["sample", str(tiny_folder), f"--prompts={tmp_path}/prompts.txt", "--out=/dev/full"]
    assert "'/dev/full'" in refused(capfd, [*words, "--max_new_tokens=1"])


def test_what_a_killed_export_left_is_no_model_and_in_nobodys_way(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with exporting._written(out, ()) as part:
        (part / "config.json").write_text("{}")
        assert [path.name for path in out.iterdir()] == [part.name]  # all that a kill leaves
        (part / "config.json").unlink()
    part.mkdir(parents=True)
    (part / "stale").touch()
    main(["export", str(run), str(out)])
    assert not part.exists()
    assert not (out / "stale").exists()


@pytest.mark.slow
def test_an_export_over_another_model_leaves_nothing_of_it(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    mine = ("notes.txt", "train.py")
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "vocab.json")
    stale += ("merges.txt", "chat_template.json", "special_tokens_map.json", "adapter_config.json")
    for name in (*mine, *stale):
        (out / name).write_text("{}")
    main(["export", str(run), str(out), "--overwrite=true"])
    there = {path.name for path in out.iterdir()}
    assert there >= set(mine)
    assert not there & set(stale)
    AutoModelForCausalLM.from_pretrained(out)
