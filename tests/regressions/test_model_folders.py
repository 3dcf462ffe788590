"""Folders that are no sound causal language model are named; nothing in them is executed or silently skipped.

A damaged conversion of a GGUF file was used as long as its files had their length, ``package:a.b`` imported ``a``, and
transformers skips weights that it has no place for.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from run_halos import binary_data, fit, refused
from safetensors.torch import load_file, save_file

from halos_pl.policy import source
from halos_pl.policy.loading import ModelError, ModelSpec, load_model, load_tokenizer

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    found = load_file(path)
    save_file(change(found) or found, path, metadata={"format": "pt"})


def extra(name: str) -> Callable[[Path], None]:
    return lambda folder: tensors(folder, lambda found: found | {name: torch.ones(3)})


class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder / "executed")

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def binary(folder: Path, write: Callable[[Path], Any]) -> None:
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    os.replace(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


#: What is done to a folder, and what the message names.
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda f: os.truncate(f / "model.safetensors", 5000), "header"),
    "text": (lambda f: (f / "model.safetensors").write_text("hello"), "header"),
    "git lfs": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs\noid sha256:1"), "header"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "missing shard": (missing_shard, "model-00002-of-00002"),
    "missing weight": (lambda f: tensors(f, lambda t: {k: v for k, v in t.items() if k != f"{Q}.weight"}), Q),
    "shape": (lambda f: config(f, vocab_size=362), "vocab_size"),
    "transposed": (lambda f: tensors(f, lambda t: t | {f"{UP}.weight": t[f"{UP}.weight"].T.contiguous()}), UP),
    "fewer layers": (lambda f: config(f, num_hidden_layers=1), "model.layers.1"),
    "more layers": (lambda f: config(f, num_hidden_layers=3), "model.layers.2"),
    "scale": (extra(f"{Q}.weight_scale_inv"), f"{Q}.weight_scale_inv"),
    "bias": (extra(f"{Q}.bias"), f"{Q}.bias"),
    "norm": (extra("model.layers.0.self_attn.q_norm.weight"), "q_norm"),
    "adapter inside": (extra(f"{Q}.lora_A.default.weight"), "lora_A"),
    "adapter around": (lambda f: tensors(f, lambda t: {f"base_model.model.{k}": v for k, v in t.items()}), "lacks"),
    "int8": (lambda f: tensors(f, lambda t: t | {"lm_head.weight": t["lm_head.weight"].to(torch.int8)}), "I8"),
    "fp8": (lambda f: tensors(f, lambda t: t | {"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}), "F8"),
    "nan": (lambda f: tensors(f, lambda t: t | {"lm_head.weight": t["lm_head.weight"] * torch.nan}), "lm_head"),
    "unknown quantisation": (lambda f: config(f, quantization_config={"quant_method": "nope"}), "nope"),
    "bitsandbytes": (
        lambda f: config(f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "bitsandbytes",
    ),
    "encoder": (lambda f: config(f, model_type="bert", architectures=["BertModel"]), "causal"),
    "no language model": (lambda f: config(f, model_type="clip"), "CLIPConfig"),
    "unknown model": (lambda f: config(f, model_type="nope"), "nope"),
    "code": (lambda f: config(f, model_type="mine", auto_map={"AutoConfig": "c.C"}), "trust_remote_code"),
    "config text": (lambda f: (f / "config.json").write_text("hello"), "config.json"),
    "config list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "config value": (lambda f: config(f, num_attention_heads=3), "3"),
    "generation config": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json"),
    "stop": (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}'), "eos_token_id"),
    "negative stop": (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": -1}'), "eos_token_id"),
    "pickle": (lambda f: binary(f, lambda p: p.write_bytes(pickle.dumps(Evil(f)))), "pickle"),
    "torch pickle": (lambda f: binary(f, lambda p: torch.save({"x": Evil(f)}, p)), "pickle"),
    "cut pickle": (lambda f: binary(f, lambda p: (torch.save({"x": torch.ones(9)}, p), os.truncate(p, 600))), ""),
    "list": (lambda f: binary(f, lambda p: torch.save([1, 2], p)), ""),
    "nested": (lambda f: binary(f, lambda p: torch.save({"state_dict": {"a.weight": torch.ones(1)}}, p)), "lacks"),
}


#: One of each kind of damage; the others take as long again.
QUICK = {"cut", "missing weight", "shape", "scale", "adapter inside", "int8", "nan", "encoder", "code", "torch pickle"}
QUICK |= {"stop"}


@pytest.mark.parametrize(
    "damage", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES]
)
def test_a_folder_that_is_not_sound_is_named(tiny_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    change, named = DAMAGES[damage]
    change(folder)
    with pytest.raises(ModelError) as error:
        load_model(ModelSpec(str(folder)))
    said = str(error.value)
    assert str(folder) in said
    assert named in said
    assert "\n" not in said
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "hello"),
        ("chat_template.jinja", "{% for message in %}"),
        ("tokenizer.json", '{"encoder": {"a": 0}}'),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["t.T", null]}, "tokenizer_class": "T"}'),
    ],
)
def test_a_tokenizer_that_is_not_sound_is_named(
    tiny_folder: Path, tmp_path: Path, name: str, content: str | None
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(ModelError) as error:
        load_tokenizer(ModelSpec(str(folder)))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["v_head.summary.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "vision.layers.0.mlp.weight"]
)
def test_weights_beside_the_language_model_do_not_matter(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    extra(name)(folder)
    loaded, plain = (load_model(ModelSpec(str(path))).state_dict() for path in (folder, tiny_folder))
    assert all(torch.equal(loaded[key], plain[key]) for key in plain)


@pytest.mark.slow
def test_a_fit_on_such_a_folder_ends_in_a_line(tiny_folder: Path, tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    DAMAGES["torch pickle"][0](folder)
    refused(capfd, fit(folder, "kto", binary_data(tmp_path / "d.jsonl"), tmp_path / "run"))
    assert not (folder / "executed").exists()


# -- converted GGUF files -------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """One bit in the middle, with the times of the file as they were."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_flipped_bit_in_a_conversion_is_found(
    tiny_folder: Path, tmp_path: Path, conversions: tuple[ModelSpec, list[int]], name: str
) -> None:
    spec, made = conversions
    before = {key: value.clone() for key, value in load_model(spec).state_dict().items()}  # else mapped to the file
    load_tokenizer(spec)
    assert len(made) == 1
    (kept,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert {path.stat().st_mode & 0o044 for path in kept.iterdir()} == {0o044}  # whatever safetensors gives it
    flip(kept / name)
    after = load_model(spec).state_dict()
    assert len(made) == 2
    assert (kept / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert all(torch.equal(after[key], before[key]) for key in before)
    if name != "model.safetensors":  # which the tokenizer alone does not need
        flip(kept / name)
        load_tokenizer(spec)
        assert len(made) == 3


# -- packages -------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages with models in them, whose code must not run."""
    for name in ("outer_pkg", "outer_pkg/inner", "outer_pkg/inner/deep", "space_pkg/part"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copytree(tiny_folder, tmp_path / name, dirs_exist_ok=True)
        if not name.startswith("space"):  # a namespace package has no __init__.py
            (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "plain_module.py").write_text("raise SystemExit('imported')")
    with ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("zipped_pkg/__init__.py", "raise SystemExit('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "packed.zip"), *sys.path])
    return tmp_path


@pytest.mark.parametrize("name", ["outer_pkg", "outer_pkg.inner", "outer_pkg.inner.deep", "space_pkg.part"])
def test_a_model_in_a_package_is_found_and_none_of_its_parents_imported(packages: Path, name: str) -> None:
    before = set(sys.modules)
    folder = source.source_of(ModelSpec(f"package:{name}"))
    assert Path(folder) == packages.joinpath(*name.split("."))
    assert not {module for module in set(sys.modules) - before if "_pkg" in module}


@pytest.mark.parametrize(
    "name",
    [
        *("outer_pkg.nope", "outer_pkg..inner", ".outer_pkg", "outer_pkg.", "outer_pkg/inner", ".."),
        *("plain_module", "plain_module.part", "sys", "__main__", "zipped_pkg", "a\0b"),
    ],
)
def test_what_is_no_package_with_a_folder_is_named(packages: Path, name: str) -> None:
    with pytest.raises(ModelError) as error:
        source.source_of(ModelSpec(f"package:{name}"))
    assert name in str(error.value) or repr(name) in str(error.value)


@pytest.mark.parametrize("listed", ["{}", "[" * 100_000, None])
def test_a_conversion_of_nothing_or_of_what_never_ends_is_not_intact(tmp_path: Path, listed: str | None) -> None:
    """An empty list of files, one too deep to read, and a FIFO, which would wait for its writer."""
    if listed is None:
        os.mkfifo(tmp_path / source._COMPLETE)
    else:
        (tmp_path / source._COMPLETE).write_text(listed)
    assert not source._intact(tmp_path, weights=True)
