"""DoRA, rank-stabilized LoRA and modules that are trained whole: same start, same reference, same export."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from run_halos import binary_data, fit, metrics
from transformers import AutoModelForCausalLM

from halos_pl.cli.main import main
from halos_pl.policy.adapter_sum import _factors
from halos_pl.policy.loading import LoRASpec, ModelError, ModelSpec, check_files, load_model
from halos_pl.policy.logprobs import padded_logps
from halos_pl.policy.reference import AdapterOff, FrozenCopy, weights_fingerprint
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.self_test import self_test_batch
from halos_pl.training.throughput import cost
from halos_pl.training.trained import load_run

VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "r": 4},
    "whole": {"modules_to_save": ["lm_head", "norm"]},
    "all": {"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head", "embed_tokens"]},
}


def randomise(model: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_adapter_starts_at_the_base_and_its_absence_is_the_base(
    tiny_folder: Path, variant: dict[str, Any], dtype: Any
) -> None:
    spec = ModelSpec(str(tiny_folder), dtype=dtype, lora=LoRASpec(**variant))
    base = Scorer(load_model(ModelSpec(str(tiny_folder), dtype=dtype)).eval())
    policy = Scorer(load_model(spec).eval())
    batch = self_test_batch(policy.model)
    assert policy.shares_prefixes
    reference, copy = AdapterOff(), FrozenCopy()
    reference.bind(policy, spec)
    copy.bind(policy, spec)
    assert weights_fingerprint(policy.model) == weights_fingerprint(base.model)
    with torch.no_grad():
        expected = base(batch)
        assert torch.equal(policy(batch), expected)
        randomise(policy.model)
        changed = policy(batch)
        assert not torch.equal(changed, expected)
        assert torch.equal(reference.logps(batch), expected)
        assert torch.equal(copy.logps(batch), expected)
        assert torch.equal(policy(batch), changed)  # the adapter is on again
        rounding = 1e-4 if dtype == "float32" else 0.3
        assert float((padded_logps(policy.model, batch) - changed).abs().max()) < rounding
    assert weights_fingerprint(policy.model) == weights_fingerprint(base.model)


def test_a_module_that_is_trained_whole_is_counted_once(tiny_folder: Path) -> None:
    plain, whole = (
        cost(load_model(ModelSpec(str(tiny_folder), lora=LoRASpec(modules_to_save=names))))
        for names in (None, ["lm_head"])
    )
    assert (plain.token, plain.trained, plain.head) == (whole.token, whole.trained, whole.head)
    assert (plain.head_trained, whole.head_trained) == (0, whole.head)


@pytest.mark.parametrize("variant", [pytest.param(VARIANTS["rslora"], marks=pytest.mark.slow), VARIANTS["all"]])
def test_a_run_resumes_exactly_and_is_exported(tiny_folder: Path, tmp_path: Path, variant: dict[str, Any]) -> None:
    data = binary_data(tmp_path / "d.jsonl")

    def run(name: str, steps: int, *options: str) -> list[str]:
        lora = ", ".join(f"{key}: {str(value).lower()}" for key, value in variant.items())
        words = ["--model.lr_schedule=constant_with_warmup", "--model.warmup_ratio=0", f"--trainer.max_steps={steps}"]
        words += [f"--model.policy.lora={{{lora}}}", "--model.optimizer.init_args.lr=0.01", *options]
        return fit(tiny_folder, "kto", data, tmp_path / name, *words)

    main(run("whole", 3))
    logged = metrics(tmp_path / "whole")[0]
    assert {float(value) for name, value in logged.items() if name.startswith("rewards/")} == {0.0}
    main(run("part", 2))
    main(run("part", 3, "--ckpt_path=last"))
    one, other = (torch.load(tmp_path / r / "checkpoints/last.ckpt", weights_only=True) for r in ("whole", "part"))
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    assert not any("original_module" in name or "base_layer" in name for name in one["state_dict"])
    policy = load_run(tmp_path / "whole").policy.eval()
    ids = torch.tensor([[5, 9, 17, 33, 80, 120]])
    main(["export", str(tmp_path / "whole"), str(tmp_path / "merged")])
    main(["export", str(tmp_path / "whole"), str(tmp_path / "adapter"), "--adapter=true"])
    with torch.no_grad():
        expected = policy(input_ids=ids).logits
        assert not torch.allclose(expected, AutoModelForCausalLM.from_pretrained(tiny_folder)(input_ids=ids).logits)
        for folder, loader in (("merged", AutoModelForCausalLM), ("adapter", AutoPeftModelForCausalLM)):
            logits = loader.from_pretrained(tmp_path / folder).eval()(input_ids=ids).logits
            assert torch.allclose(logits, expected, atol=1e-4), folder


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"modules_to_save": ["lm_heat"]}, "modules_to_save.*'lm_heat'.*lm_head"),
        ({"modules_to_save": ["layers"]}, "modules_to_save"),
        ({"modules_to_save": ["self_attn", "q_proj"]}, r"modules_to_save.*layers\.0\.self_attn"),
        ({"modules_to_save": ["act_fn"]}, r"modules_to_save.*act_fn"),
        ({"modules_to_save": [""]}, "modules_to_save"),
    ],
)
def test_modules_that_cannot_be_trained_whole(tiny_folder: Path, lora: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        check_files(ModelSpec(str(tiny_folder), lora=LoRASpec(**lora)))


@pytest.mark.parametrize("name", ["lm_head", "wte"])
def test_a_tied_end_cannot_be_trained_whole(tiny_gpt2_folder: Path, name: str) -> None:
    with (
        warnings.catch_warnings(action="error", category=UserWarning),
        pytest.raises(ModelError, match=r"modules_to_save.*tied"),
    ):
        load_model(ModelSpec(str(tiny_gpt2_folder), lora=LoRASpec(modules_to_save=[name])))


def test_a_dora_adapter_is_not_added_to_another(tiny_folder: Path) -> None:
    policy: Any = load_model(ModelSpec(str(tiny_folder), lora=LoRASpec(use_dora=True)))
    with pytest.raises(ModelError, match="DoRA"):
        _factors(policy.peft_config["default"], {})
