"""Adapters: a LoRA fit on an adapter exports what was trained; one that cannot be used is refused by name.

LlamaFactory#2910 (an adapter trained on an SFT adapter), alpaca-lora#248 (an adapter without tokenizer), peft#2415 and
unsloth#978 (an adapter after a resized vocabulary), LoRA targets that match nothing.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from run_halos import binary_data, fit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halos_pl.cli.export import _adapter_alone
from halos_pl.cli.main import main
from halos_pl.policy.loading import LoRASpec, ModelError, ModelSpec, load_model, load_tokenizer

IDS = torch.tensor([[5, 9, 17, 33, 80, 120], [7, 200, 90, 91, 4, 6]])
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def randomise(model: Any, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)


def adapter_of(
    base: Path | str,
    folder: Path,
    config: Any = None,
    *,
    tokenizer: Any = None,
    prepare: Callable[[Any], Any] = lambda model: None,
    **saving: Any,
) -> Path:
    """A folder of an adapter that changes the model, as peft writes it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    prepare(model)
    made = get_peft_model(model, config or LoraConfig(**LORA))
    randomise(made)
    made.save_pretrained(folder, **saving)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def name_base(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def sft(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on the tiny model, without tokenizer."""
    return adapter_of(tiny_folder, tmp_path_factory.mktemp("sft") / "adapter")


def exported(spec: ModelSpec, out: Path) -> tuple[torch.Tensor, Path]:
    """Logits of a policy with a new adapter that is not 0, and the folder that its adapter is written to."""
    policy: Any = load_model(spec)
    randomise(policy, seed=2)
    expected = logits(policy)
    _adapter_alone(policy, spec).save_pretrained(out)
    return expected, out


def test_a_fit_on_an_adapter_exports_an_adapter_of_the_model_below_both(
    tiny_folder: Path, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Named by a relative path, which says nothing to who loads the exported adapter from elsewhere.
    monkeypatch.chdir(sft.parent)
    data = binary_data(tmp_path / "data.jsonl")
    run = tmp_path / "run"
    lora = ("--model.policy.lora={r: 3}", "--model.optimizer.init_args.lr=1e-2", "--trainer.max_steps=3")
    main(fit(Path(sft.name), "kto", data, run, *lora))
    main(["export", str(run), str(tmp_path / "merged")])
    main(["export", str(run), str(tmp_path / "ad"), "--adapter=true"])
    monkeypatch.chdir(tmp_path)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert differ(merged, logits(load_model(ModelSpec(str(sft))))) > 0.01  # it was trained
    base = json.loads((tmp_path / "ad" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == tiny_folder
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ad"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "ad"),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ad"),
        load_model(ModelSpec(str(tmp_path / "ad"))),
    ):
        assert differ(logits(loaded), merged) < 1e-5
    (tmp_path / "prompts.txt").write_text("question 1\n")
    main(["sample", "ad", "--prompts=prompts.txt", "--max_new_tokens=2"])


@pytest.mark.parametrize(
    "earlier",
    [
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        pytest.param({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, marks=pytest.mark.slow),
        pytest.param({"target_modules": ["k_proj"], "lora_alpha": 1}, marks=pytest.mark.slow),
        # peft then saves a copy of the embedding and of the head that it is put on.
        {"target_modules": ["embed_tokens", "q_proj"]},
        pytest.param({"target_modules": ["lm_head", "q_proj"]}, marks=pytest.mark.slow),
    ],
)
def test_ranks_scales_and_layers_of_two_adapters_add_up(
    tiny_folder: Path, tmp_path: Path, earlier: dict[str, Any]
) -> None:
    first = adapter_of(tiny_folder, tmp_path / "first", LoraConfig(**(LORA | earlier)))
    spec = ModelSpec(str(first), lora=LoRASpec(r=3, alpha=5))
    expected, out = exported(spec, tmp_path / "out")
    assert differ(logits(AutoPeftModelForCausalLM.from_pretrained(out)), expected) < 1e-5


@pytest.mark.slow
def test_two_adapters_of_conv1d_layers_add_up(tiny_gpt2_folder: Path, tmp_path: Path) -> None:
    """GPT-2 keeps its matrices the other way round, and ties its ends."""
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    first = adapter_of(tiny_gpt2_folder, tmp_path / "first", config)
    expected, out = exported(ModelSpec(str(first), lora=LoRASpec(r=3)), tmp_path / "out")
    assert differ(logits(AutoPeftModelForCausalLM.from_pretrained(out)), expected) < 1e-5


def test_a_chain_of_three_adapters(tiny_folder: Path, sft: Path, tmp_path: Path) -> None:
    second = name_base(adapter_of(tiny_folder, tmp_path / "2"), base_model_name_or_path=str(sft))
    third = name_base(adapter_of(tiny_folder, tmp_path / "3"), base_model_name_or_path=str(second))
    # The three are equal, so the sum is three times one.
    one, three = (load_model(ModelSpec(str(folder))) for folder in (sft, third))
    base = dict(load_model(ModelSpec(str(tiny_folder))).named_parameters())
    for (name, a), b in zip(one.named_parameters(), three.parameters(), strict=True):
        torch.testing.assert_close(b, base[name] + 3 * (a - base[name]))
    expected, out = exported(ModelSpec(str(third), lora=LoRASpec(r=2)), tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3 * 4 + 2
    assert differ(logits(AutoPeftModelForCausalLM.from_pretrained(out)), expected) < 1e-5


def test_an_adapter_of_a_converted_model(conversions: tuple[ModelSpec, list[int]], tmp_path: Path, capfd: Any) -> None:
    """Its base is the converted folder: others load it from there, and are told that it is here alone."""
    spec = replace(conversions[0], lora=LoRASpec(r=2))
    expected, out = exported(spec, tmp_path / "out")
    assert str(tmp_path / "cache") in capfd.readouterr().out
    assert differ(logits(AutoPeftModelForCausalLM.from_pretrained(out)), expected) < 5e-5
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ModelError, match="GGUF"):
        load_model(ModelSpec(str(out)))
    load_tokenizer(conversions[0])  # converts it again
    assert differ(logits(load_model(ModelSpec(str(out)))), expected) < 5e-5


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA, use_dora=True),
        LoraConfig(**LORA, modules_to_save=["lm_head"]),
        LoraConfig(**LORA, init_lora_weights="pissa"),
        pytest.param(LoraConfig(**LORA, trainable_token_indices=[1, 2]), marks=pytest.mark.slow),
        pytest.param(
            IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dora", "modules to save", "pissa", "tokens", "ia3"],
)
def test_what_is_no_plain_sum_trains_on_but_is_exported_merged_alone(
    tiny_folder: Path, tmp_path: Path, config: Any
) -> None:
    folder = adapter_of(tiny_folder, tmp_path / "first", config)
    reference = logits(AutoPeftModelForCausalLM.from_pretrained(folder))
    spec = ModelSpec(str(folder), lora=LoRASpec(r=2))
    policy: Any = load_model(spec)
    assert differ(logits(policy), reference) < 1e-4
    with pytest.raises(ValueError, match="without --adapter"):
        _adapter_alone(policy, spec)


def test_an_adapter_of_a_resized_embedding_is_exported_merged_alone(tiny_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(**LORA | {"target_modules": ["embed_tokens", "lm_head"]})
    folder = adapter_of(tiny_folder, tmp_path / "ad", config, prepare=lambda m: m.resize_token_embeddings(362))
    spec = ModelSpec(str(folder), lora=LoRASpec(r=2))
    with pytest.raises(ValueError, match="without --adapter"):
        _adapter_alone(load_model(spec), spec)


@pytest.mark.slow
def test_an_adapter_that_works_on_the_prompt_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    folder = adapter_of(tiny_folder, tmp_path / "prompt", config)
    with pytest.raises(ModelError, match="PROMPT_TUNING"):
        load_model(ModelSpec(str(folder)))


def test_the_tokenizer_of_the_base_where_an_adapter_has_none(tiny_folder: Path, sft: Path, tmp_path: Path) -> None:
    found, base = (load_tokenizer(ModelSpec(str(folder))) for folder in (sft, tiny_folder))
    assert found.get_vocab() == base.get_vocab()
    assert found.chat_template == base.chat_template
    own = tmp_path / "own"
    shutil.copytree(sft, own)
    (own / "chat_template.jinja").write_text("mine")
    assert load_tokenizer(ModelSpec(str(own))).chat_template == "mine"


@pytest.mark.parametrize("trained", [None, pytest.param(["embed_tokens", "lm_head"], marks=pytest.mark.slow)])
def test_an_adapter_after_a_resized_vocabulary(tiny_folder: Path, tmp_path: Path, trained: list[str] | None) -> None:
    tokenizer = load_tokenizer(ModelSpec(str(tiny_folder)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "</tool>"]})  # type: ignore[dict-item]
    config = LoraConfig(**LORA, modules_to_save=trained)
    rows = len(tokenizer)
    folder = adapter_of(
        tiny_folder, tmp_path / "ad", config, tokenizer=tokenizer, prepare=lambda m: m.resize_token_embeddings(rows)
    )
    model = load_model(ModelSpec(str(folder)))
    assert model.config.vocab_size == rows
    assert differ(logits(model), logits(AutoPeftModelForCausalLM.from_pretrained(folder))) < 1e-5
    # Without them in the file there is nothing to take the new rows from.
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "lm_head" not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=rf"{rows} tokens.*360"):
        load_model(ModelSpec(str(folder)))


def broken(kind: str, sft: Path, tiny: Path, folder: Path) -> Path:
    """A folder of an adapter that is not right."""
    shutil.copytree(sft, folder)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    last = sorted(tensors)[-1]
    if kind == "base moved":
        name_base(folder, base_model_name_or_path="/no/such/base")
    elif kind == "base offline":
        name_base(folder, base_model_name_or_path="nobody/base")
    elif kind == "no base":
        name_base(folder, base_model_name_or_path=None)
    elif kind == "itself":
        name_base(folder, base_model_name_or_path=str(folder))
    elif kind == "lacks a weight":
        save_file({name: value for name, value in tensors.items() if name != last}, weights)
    elif kind == "other rank":
        name_base(folder, r=8)
    elif kind == "other layers":
        save_file(tensors | {last.replace("layers.1", "layers.7"): tensors[last].clone()}, weights)
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "config":
        (folder / "adapter_config.json").write_text("{")
    elif kind == "kind":
        name_base(folder, peft_type="NOPE")
    elif kind == "task":
        name_base(folder, task_type="SEQ_CLS")
    elif kind == "whole model":
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
    else:
        weights.unlink()

        class Evil:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(folder / "executed"),)

        if kind == "pickle":
            (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
        else:
            torch.save({"x": Evil()}, folder / "adapter_model.bin")
    return folder


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("base moved", "/no/such/base"),
        pytest.param("base offline", "nobody/base", marks=pytest.mark.slow),
        pytest.param("no base", "base_model_name_or_path", marks=pytest.mark.slow),
        pytest.param("itself", "base_model_name_or_path", marks=pytest.mark.slow),
        ("lacks a weight", "layers.1.self_attn.v_proj.lora_B"),
        ("other rank", "size mismatch"),
        pytest.param("other layers", "layers.7", marks=pytest.mark.slow),
        pytest.param("cut", "", marks=pytest.mark.slow),
        pytest.param("no weights", "adapter_model.safetensors", marks=pytest.mark.slow),
        pytest.param("config", "adapter_config.json", marks=pytest.mark.slow),
        pytest.param("kind", "NOPE", marks=pytest.mark.slow),
        pytest.param("task", "SEQ_CLS", marks=pytest.mark.slow),
        ("whole model", "whole model"),
        ("pickle", "pickle"),
        pytest.param("torch pickle", "pickle", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_that_is_not_right_is_named(
    kind: str, named: str, tiny_folder: Path, sft: Path, tmp_path: Path
) -> None:
    folder = broken(kind, sft, tiny_folder, tmp_path / "ad")
    with pytest.raises(ModelError) as error:
        load_model(ModelSpec(str(folder)))
    assert str(folder) in str(error.value)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "executed").exists()


def test_a_folder_of_several_adapters(sft: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(sft, tmp_path / name)
    with pytest.raises(ModelError, match=rf"{tmp_path}/one.*{tmp_path}/two"):
        load_model(ModelSpec(str(tmp_path)))


@pytest.mark.parametrize(
    ("targets", "wrong", "near"),
    [
        (["q_proj", "nope"], "nope", "q_proj"),
        (["q_proj", "vproj"], "vproj", "v_proj"),
        (["q_proj", "q_proj "], "q_proj ", "q_proj"),
        ("all_linear", "all_linear", "all-linear"),
        ("q_proj", "q_proj", "q_proj"),  # a regular expression is of the whole name
    ],
)
def test_a_target_that_no_layer_is_called(tiny_folder: Path, targets: Any, wrong: str, near: str) -> None:
    with pytest.raises(ModelError) as error:
        load_model(ModelSpec(str(tiny_folder), lora=LoRASpec(r=2, target_modules=targets)))
    assert repr(wrong) in str(error.value)
    assert near in str(error.value).rpartition(";")[2]


@pytest.mark.parametrize(
    ("targets", "wrong"),
    [
        ("(q|v", "(q|v"),  # no regular expression
        (".*", "LlamaModel"),  # every part of the model, and not its layers alone
        pytest.param(["q_proj", "layers"], "ModuleList", marks=pytest.mark.slow),
    ],
)
def test_targets_that_no_adapter_can_be_put_on(tiny_folder: Path, targets: Any, wrong: str) -> None:
    with pytest.raises(ModelError) as error:
        load_model(ModelSpec(str(tiny_folder), lora=LoRASpec(r=2, target_modules=targets)))
    assert "target_modules" in str(error.value)
    assert wrong in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"r": 0}, {"alpha": 0}, {"alpha": -1}, {"dropout": 1.0}, {"target_modules": []}])
def test_an_adapter_that_could_not_learn(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(settings))):
        LoRASpec(**settings)


def test_targets_by_regular_expression_and_by_the_end_of_a_name(tiny_folder: Path) -> None:
    for targets in (r".*\.(q|v)_proj", ["self_attn.q_proj", "v_proj"]):
        model: Any = load_model(ModelSpec(str(tiny_folder), lora=LoRASpec(r=2, target_modules=targets)))
        assert len(get_peft_model_state_dict(model)) == 2 * 2 * 2
