"""QLoRA: an adapter on a quantized base trains as on the base's dequantized weights, and merges into the original."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from run_halos import binary_data, fit, metrics, pair_data, refused, run_ranks
from safetensors.torch import load_file
from sharded_steps import Case, compare
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from halos_pl.cli.main import main
from halos_pl.policy.adapters import check_sharding
from halos_pl.policy.loading import LoRASpec, ModelError, ModelSpec, QuantizeSpec, check_files, load_model
from halos_pl.policy.logprobs import padded_logps
from halos_pl.policy.quantized_weights import bytes_of, dequantized, matrix_size, quantized_layers
from halos_pl.policy.reference import AdapterOff, weights_fingerprint
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.self_test import self_test_batch
from halos_pl.testing import tiny_tokenizer
from halos_pl.training.throughput import cost

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"method": "bitsandbytes", "bits": 4},
    "fp4": {
        "method": "bitsandbytes",
        "bits": 4,
        "quant_type": "fp4",
        "double_quant": False,
        "storage_dtype": "float32",
    },
    "bnb8": {"method": "bitsandbytes", "bits": 8},
    "torchao4": {"method": "torchao", "bits": 4},
    "torchao8": {"method": "torchao", "bits": 8},
}


def needs(method: str) -> None:
    if importlib.util.find_spec(method) is None:
        pytest.skip(f"{method} is not installed")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    needs(KINDS[request.param]["method"])
    return KINDS[request.param]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of the sizes that kernels for 4 bits need."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def randomise(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    padded_logps(model.train(), self_test_batch(model)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def unquantized(quantized: Any, base: Path, lora: LoRASpec) -> Any:
    """The same model in plain float32 weights that equal the dequantized ones."""
    plain: Any = load_model(ModelSpec(str(base), lora=lora))
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for name, layer in quantized_layers(quantized):
            modules[name].weight.copy_(dequantized(layer))
        for name, parameter in plain.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(quantized.get_parameter(name))
    return plain


def test_gradients_are_those_of_the_dequantized_model(base: Path, kind: dict[str, Any]) -> None:
    lora = LoRASpec(r=4, use_rslora=True)
    model: Any = load_model(ModelSpec(str(base), lora=lora, quantize=QuantizeSpec(**kind)))
    randomise(model)
    plain = unquantized(model, base, lora)
    expected = gradients(plain)
    assert len(expected) == 28
    batch = self_test_batch(model)
    for _ in range(2):  # also after a pass in evaluation, which AdapterOff makes each step
        for name, value in gradients(model).items():
            assert float((value - expected[name]).norm()) <= 1e-4 * float(expected[name].norm()), name
        with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
            off, of_plain = padded_logps(model.eval(), batch), padded_logps(plain.eval(), batch)
        assert float((off - of_plain).abs().max()) < 1e-4
    scorer = Scorer(model)
    assert scorer.shares_prefixes
    with torch.no_grad():
        assert float((scorer(batch) - padded_logps(model, batch)).abs().max()) < 1e-4


def test_half_precision_and_recomputation(base: Path, kind: dict[str, Any]) -> None:
    """The first rewards are exactly 0, and recomputed activations give the same gradients."""
    policies = []
    for dtype, recompute in (("bfloat16", True), ("bfloat16", False), ("float32", True)):
        quantize = QuantizeSpec(**kind | ({"storage_dtype": dtype} if "storage_dtype" in kind else {}))
        spec = ModelSpec(
            str(base), dtype=dtype, gradient_checkpointing=recompute, lora=LoRASpec(r=4), quantize=quantize
        )
        policies.append(Scorer(load_model(spec).train()))
        reference = AdapterOff()
        reference.bind(policies[-1], spec)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32"):
            logps = policies[-1](self_test_batch(policies[-1].model))
            assert torch.equal(logps, reference.logps(self_test_batch(policies[-1].model)))
        logps.sum().backward()
    one, other = ([p.grad for p in policy.parameters() if p.requires_grad] for policy in policies[:2])
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_backward_pass_dequantizes_again(base: Path, kind: dict[str, Any]) -> None:
    """A pass does not keep the matrices that its layers dequantize."""
    model: Any = load_model(ModelSpec(str(base), lora=LoRASpec(r=4), quantize=QuantizeSpec(**kind)))
    shapes = {tuple(dequantized(layer).shape) for _, layer in quantized_layers(model)}
    shapes |= {shape[::-1] for shape in shapes}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        padded_logps(model.train(), self_test_batch(model))
    assert saved
    matrices = [t for t in saved if type(t) is torch.Tensor and t.is_floating_point() and tuple(t.shape) in shapes]
    assert not [t for t in matrices if not any(t.data_ptr() == p.data_ptr() for p in model.parameters())]


def test_the_size_of_quantized_layers(base: Path, kind: dict[str, Any]) -> None:
    spec = ModelSpec(str(base), lora=LoRASpec(r=4), quantize=QuantizeSpec(**kind))
    model, plain = load_model(spec), load_model(ModelSpec(str(base), lora=LoRASpec(r=4)))
    assert cost(model) == cost(plain)
    bits = [8 * bytes_of(layer) / matrix_size(layer) for _, layer in quantized_layers(model)]
    assert len(bits) == 14
    assert max(bits) < 10.1  # with scales and their tables, which weigh most in a tiny layer
    assert weights_fingerprint(model) == weights_fingerprint(load_model(spec)) != weights_fingerprint(plain)


def test_a_fingerprint_contains_the_scales(base: Path, kind: dict[str, Any], tmp_path: Path) -> None:
    """Codes alone are the same for a model whose weights are all twice as large."""
    spec = ModelSpec(str(base), lora=LoRASpec(r=4), quantize=QuantizeSpec(**kind))
    model = load_model(spec)
    before = weights_fingerprint(model)
    padded_logps(model, self_test_batch(model))
    assert weights_fingerprint(model) == before  # bitsandbytes moves its scales in the first pass
    larger = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        larger.model.layers[0].mlp.up_proj.weight.mul_(2)
    larger.save_pretrained(tmp_path / "larger")
    other = ModelSpec(str(tmp_path / "larger"), lora=spec.lora, quantize=spec.quantize)
    assert weights_fingerprint(load_model(other)) != before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(base: Path, kind: dict[str, Any], tmp_path: Path, bad: float) -> None:
    broken = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_model(ModelSpec(str(tmp_path / "broken"), lora=LoRASpec(), quantize=QuantizeSpec(**kind)))


def step(base: Path, kind: dict[str, Any], objective: str, data: Path, run: Path, *options: str) -> list[str]:
    quantize = ", ".join(f"{name}: {value}" for name, value in kind.items()).replace("False", "false")
    return fit(
        base,
        objective,
        data,
        run,
        "--model.policy.lora={r: 4}",
        f"--model.policy.quantize={{{quantize}}}",
        "--model.warmup_ratio=0",
        "--model.lr_schedule=constant_with_warmup",
        "--trainer.max_steps=3",
        *options,
    )


@pytest.mark.parametrize("objective", ["kto", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_fit_starts_at_reward_zero_and_resumes_exactly(
    base: Path, kind: dict[str, Any], objective: str, tmp_path: Path
) -> None:
    data = (binary_data if objective == "kto" else pair_data)(tmp_path / "d.jsonl")
    main(step(base, kind, objective, data, tmp_path / "whole"))
    logged = metrics(tmp_path / "whole")
    rewards = {float(value) for name, value in logged[0].items() if name.startswith("rewards/")}
    assert rewards == {0.0}, logged[0]
    main(step(base, kind, objective, data, tmp_path / "part", "--trainer.max_steps=2"))
    resumed = step(base, kind, objective, data, tmp_path / "part")
    main([*resumed, "--ckpt_path=last"])
    states = [torch.load(tmp_path / r / "checkpoints/last.ckpt", weights_only=True) for r in ("whole", "part")]
    assert all("lora_" in name for name in states[0]["state_dict"])
    assert all(torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items())


def test_an_export_merges_into_the_original_base(base: Path, kind: dict[str, Any], tmp_path: Path) -> None:
    data, run = pair_data(tmp_path / "d.jsonl"), tmp_path / "run"
    main(step(base, kind, "dpo", data, run))
    main(["export", str(run), str(tmp_path / "merged"), "--dtype=float32"])
    main(["export", str(run), str(tmp_path / "adapter"), "--adapter=true"])
    merged, original = load_file(tmp_path / "merged/model.safetensors"), load_file(base / "model.safetensors")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    below, scale = "base_model.model.", 32 / 4
    changed = 0
    for name, weight in original.items():
        place = f"{below}{name.removesuffix('.weight')}"
        delta = torch.zeros_like(weight)
        if f"{place}.lora_A.weight" in adapter:
            delta = scale * adapter[f"{place}.lora_B.weight"] @ adapter[f"{place}.lora_A.weight"]
            changed += 1
        assert torch.allclose(merged[name], weight + delta, rtol=0, atol=1e-7), name
    assert changed == 14
    assert not hasattr(LlamaForCausalLM.from_pretrained(tmp_path / "merged").config, "quantization_config")
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 9, 17, 33]])
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
        of_merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    assert torch.allclose(logits, of_merged, atol=1e-4)


def test_a_run_on_a_quantized_base_is_measured_as_it_was_trained(base: Path, tmp_path: Path, capfd: Any) -> None:
    needs("torchao")
    kind, data, run = KINDS["torchao4"], pair_data(tmp_path / "d.jsonl"), tmp_path / "run"
    words = step(base, kind, "dpo", data, run, "--model.optimizer.init_args.lr=0.05")
    main(words)
    main(["predict", *words[1:], f"--data.predict={data}"])
    records = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    rewards = {label: [r["r"] for r in records if r["desirable"] is label] for label in (True, False)}
    margin = (sum(rewards[True]) - sum(rewards[False])) / 6
    assert abs(margin) > 0.1
    capfd.readouterr()
    main(["evaluate", str(run), f"--held_out={data}"])
    measured = re.search(r"reward_margin (\S+), before training 0 ", capfd.readouterr().out)
    assert measured
    assert float(measured[1]) == pytest.approx(margin, rel=1e-3)
    main(["sample", str(run), f"--prompts={data}", f"--out={tmp_path / 'g.jsonl'}", "--max_new_tokens=4"])
    assert len((tmp_path / "g.jsonl").read_text().splitlines()) == 6


def repacking(monkeypatch: Any) -> None:
    """Makes bitsandbytes act as on a CPU with AVX512-BF16, where a 4-bit layer reorders its weights in evaluation."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)


def test_bitsandbytes_does_not_reorder_weights_in_evaluation(base: Path, monkeypatch: Any) -> None:
    repacking(monkeypatch)
    spec = ModelSpec(str(base), lora=LoRASpec(r=4), quantize=QuantizeSpec("bitsandbytes"))
    model: Any = load_model(spec)
    randomise(model)
    before = gradients(model)
    with torch.no_grad(), model.disable_adapter():
        padded_logps(model.eval(), self_test_batch(model))
    assert all(torch.equal(value, before[name]) for name, value in gradients(model).items())


def test_a_layer_with_wrong_gradients_is_refused(base: Path, monkeypatch: Any) -> None:
    """A version of bitsandbytes that reorders weights whatever the switch."""
    repacking(monkeypatch)
    monkeypatch.setattr("halos_pl.policy.quantization._use_one_kernel", lambda layer: None)
    with pytest.raises(ModelError, match=r"model\.layers\.0\..*evaluation"):
        load_model(ModelSpec(str(base), lora=LoRASpec(r=4), quantize=QuantizeSpec("bitsandbytes")))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.policy.quantize={method: torchao, bits: 3}"], ["quantize", "3"]),
        (["--model.policy.quantize={method: torchoa}"], ["quantize", "torchoa", "torchao"]),
        (["--model.policy.quantize={method: torchao, quant_type: nf4}"], ["quantize.quant_type", "torchao"]),
        (["--model.policy.quantize={method: torchao, group_size: 48}"], ["quantize.group_size", "48", "64"]),
        (["--model.policy.lora=null"], ["model.policy.lora", "model.policy.quantize"]),
        (["--model.policy.compile=true"], ["model.policy.compile"]),
        (["--model.policy.gguf_file=x.gguf"], ["gguf_file"]),
        (["--model.reference_model=FrozenCopy"], ["FrozenCopy", "AdapterOff"]),
        (["--trainer.precision=bf16-true"], ["trainer.precision", "bf16-true"]),
        (["--model.policy.lora={modules_to_save: [lm_hed]}"], ["modules_to_save", "lm_hed"]),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_settings_that_do_not_fit_are_refused_before_anything_is_loaded(
    base: Path, tmp_path: Path, capfd: Any, options: list[str], named: list[str]
) -> None:
    needs("torchao")
    data = binary_data(tmp_path / "d.jsonl")
    status = 2 if "bits" in options[0] or "torchoa" in options[0] else 1  # refused by the parser
    message = refused(capfd, step(base, KINDS["torchao4"], "kto", data, tmp_path / "run", *options), status)
    assert all(part in message for part in named), message


@pytest.mark.usefixtures("no_model")
def test_stored_quantized_weights_are_refused_before_anything_is_loaded(
    base: Path, tiny_gpt2_folder: Path, tmp_path: Path, capfd: Any
) -> None:
    needs("torchao")
    data, stored = binary_data(tmp_path / "d.jsonl"), tmp_path / "stored"
    shutil.copytree(base, stored)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (stored / "config.json").write_text(json.dumps(config))
    lora, other = "--model.policy.lora={r: 4}", "--model.reference_model=OtherModel"
    for model, options, named in (
        (stored, [], [str(stored), "gptq", "model.policy.lora"]),
        (stored, [lora, "--model.reference_model=FrozenCopy"], ["FrozenCopy", "AdapterOff"]),
        (base, [other, f"--model.reference_model.model.path={stored}"], ["reference_model", str(stored), "gptq"]),
        (tiny_gpt2_folder, [lora, "--model.policy.quantize.method=torchao"], ["torchao", str(tiny_gpt2_folder)]),
    ):
        message = refused(capfd, fit(model, "kto", data, tmp_path / "run", *options))
        assert all(part in message for part in named), message


def test_models_that_cannot_be_quantized(base: Path, tmp_path: Path, adapter: Any, conversions: Any) -> None:
    needs("torchao")
    quantize, lora = QuantizeSpec("torchao", bits=8), LoRASpec(r=4)
    shutil.copytree(base, tmp_path / "stored")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "stored/config.json").write_text(json.dumps(config))
    for path, why in ((tmp_path / "stored", "gptq"), (adapter[1], "halos export"), (conversions[0].path, "GGUF")):
        with pytest.raises(ModelError, match=rf"model\.policy\.quantize: {path}.*{why}"):
            check_files(ModelSpec(str(path), lora=lora, quantize=quantize))
    with pytest.raises(ModelError, match=r"lora\.modules_to_save.*quantized"):
        load_model(ModelSpec(str(base), lora=LoRASpec(modules_to_save=["mlp"]), quantize=quantize))


def test_a_missing_library_is_named_with_its_extra(base: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'halos_pl\[bitsandbytes\]'"):
        check_files(ModelSpec(str(base), lora=LoRASpec(), quantize=QuantizeSpec("bitsandbytes")))


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"group_size": 0}, {"double_quant": True}, {"outlier_threshold": 6.0}]
)
def test_options_of_another_quantization(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"model.policy.quantize.*{next(iter(options))}"):
        QuantizeSpec("torchao", **options)


@pytest.mark.slow
def test_two_processes_train_as_one(base: Path, kind: dict[str, Any], tmp_path: Path) -> None:
    data = pair_data(tmp_path / "d.jsonl", 12)
    sgd = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.init_args={lr: 0.1, fused: false}")
    main(step(base, kind, "dpo", data, tmp_path / "one", *sgd))
    strategies = ["ddp", *(["fsdp2"] if kind.get("storage_dtype") == "float32" else [])]
    for strategy in strategies:
        for ended in run_ranks(step(base, kind, "dpo", data, tmp_path / strategy, *sgd), tmp_path, 2, strategy):
            assert ended.status == 0, ended
        for alone, together in zip(metrics(tmp_path / "one"), metrics(tmp_path / strategy), strict=True):
            assert alone.keys() == together.keys()
            assert all(float(value) == pytest.approx(float(together[k]), abs=2e-4) for k, value in alone.items())
        main(["export", str(tmp_path / strategy), str(tmp_path / f"{strategy}-exported")])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quantize": {"method": "torchao"}}, "torchao"),
        ({"quantize": {"method": "bitsandbytes"}}, "storage_dtype is uint8.*float32"),
        ({"quantize": {"method": "bitsandbytes", "storage_dtype": "float32"}, "half": True}, "bf16-mixed"),
        ({"lora": {"use_dora": True}}, "use_dora"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "modules_to_save"),
    ],
)
def test_what_cannot_be_sharded(base: Path, options: dict[str, Any], named: str) -> None:
    quantize = QuantizeSpec(**options["quantize"]) if "quantize" in options else None
    spec = ModelSpec(str(base), lora=LoRASpec(**options.get("lora", {})), quantize=quantize)
    with pytest.raises(ModelError, match=named):
        check_sharding(spec, half=options.get("half", False))


def test_a_sharded_quantized_base_takes_the_same_step(base: Path, tmp_path: Path) -> None:
    needs("bitsandbytes")
    quantize = QuantizeSpec("bitsandbytes", storage_dtype="float32")
    policy = {"lora": {"r": 4}, "quantize": quantize}
    cases = {
        "dpo": Case(str(base), str(pair_data(tmp_path / "p.jsonl", 9)), "dpo", policy, micro=2),
        "kto": Case(str(base), str(binary_data(tmp_path / "r.jsonl", 13)), "kto", policy),
    }
    for step in compare(cases, tmp_path).values():
        assert step["same_names"]
        assert step["shares"]
        assert step["first_rewards"] == 0
        assert step["gradient"] < 1e-5 * step["size"]
