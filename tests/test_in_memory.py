"""A model, a tokenizer and rows that are already in memory train as from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning import Trainer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from halos_pl import (
    AdapterOff,
    FeedbackDataModule,
    FixedModel,
    HALOModule,
    ModelSpec,
    Scorer,
    StepEngine,
    load_objective,
    testing,
)
from halos_pl.policy.spec import ModelError

ROWS = testing.binary_rows(8)


def trained(policy: Any, tokenizer: Any = None, **options: Any) -> HALOModule:
    module = HALOModule(
        policy=policy,
        extra_terms=[load_objective("kto")],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        **options,
    )
    if tokenizer is not None:
        module.tokenizer = tokenizer
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=FeedbackDataModule(train=ROWS, batch_size=4, seed=0))
    return module


def test_a_model_in_memory_is_trained_in_place_as_one_from_a_folder(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    module = trained(model)
    assert module.policy is model
    of_folder = trained(ModelSpec(str(tiny_folder))).policy.state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, of_folder[name]), name
    assert any(not torch.equal(weight, start[name]) for name, weight in model.state_dict().items())


def test_an_adapter_in_memory_is_its_own_reference_when_off(tiny_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    module = trained(model, testing.tiny_tokenizer())
    assert isinstance(module.models.reference_model, AdapterOff)
    for name, p in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name.replace(".base_layer", "")]), name


def test_what_a_model_in_memory_lacks_is_named(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_folder).config)
    model.name_or_path = ""
    with pytest.raises(ModelError, match="tokenizer"):
        trained(model)
    with pytest.raises(ModelError, match=r"AdapterOff .*FrozenCopy"):
        trained(model, testing.tiny_tokenizer(), reference_model=AdapterOff())


def test_the_helpers_for_tests_of_ones_own_fit(tiny_folder: Path) -> None:
    fitted = testing.fit(load_objective("dpo"), testing.pair_rows(8), tiny_folder, steps=3)
    assert len(fitted.steps) == 3
    assert fitted.steps[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert fitted.steps[-1]["loss"] != fitted.steps[0]["loss"]


def test_a_data_set_with_a_transform_is_refused_and_hidden_columns_stay_hidden() -> None:
    rows = Dataset.from_list([{**row, "system": "Be brief."} for row in ROWS])
    with pytest.raises(ValueError, match="transform"):
        FeedbackDataModule(train=rows.with_transform(lambda batch: batch))
    shown = FeedbackDataModule(train=rows.with_format("numpy", columns=["prompt", "completion", "label"]))
    shown.connect(tokenizer=testing.tiny_tokenizer(), needs=load_objective("kto").needs)
    shown.setup("fit")
    assert shown.counts()["train"]["train"]["rows"] == len(ROWS)


def test_settings_of_the_hub_are_refused_for_rows_in_memory() -> None:
    with pytest.raises(ValueError, match="split, streaming"):
        FeedbackDataModule(train={"path": ROWS, "split": "train", "streaming": True})


def test_float16_weights_in_memory_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="float16"):
        trained(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float16))


def test_a_fixed_reference_is_not_the_policy(tiny_folder: Path) -> None:
    policy = Scorer(AutoModelForCausalLM.from_pretrained(tiny_folder))
    with pytest.raises(ValueError, match="policy itself"):
        FixedModel(policy.model, policy)


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("reference_model", "base", "FrozenCopy"),
        ("reference_model", torch.nn.Linear(1, 1), "Linear"),
        ("prefix_sharing", True, "auto, always, never"),
        ("lr_schedule", "cosinus", "cosine"),
        ("micro_batch_rows", 1.5, "1.5"),
        ("optimizer", torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), "SGD"),
        ("extra_terms", load_objective("sft"), "list"),
        ("loss_offset", 5.0, "5"),
    ],
)
def test_an_argument_that_would_fail_later_or_do_nothing_is_refused(argument: str, value: Any, named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{argument} is .*{named}"):
        HALOModule(**{"policy": ModelSpec("any"), "extra_terms": [load_objective("sft")]} | {argument: value})


def test_an_engine_says_what_it_takes(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    scorer, sft = Scorer(model), load_objective("sft")
    for arguments, named in {
        ("sft", scorer, None): "objective is a str",
        (sft, model, None): "policy is a LlamaForCausalLM",
        (sft, scorer, model): "reference is a LlamaForCausalLM",
    }.items():
        with pytest.raises(TypeError, match=named):
            StepEngine(*arguments)
    with pytest.raises(ValueError, match=r"2\.5"):
        StepEngine(sft, scorer, None, 2.5)  # type: ignore[arg-type]
    data = FeedbackDataModule(train=ROWS)
    with pytest.raises(TypeError, match=r"objective\.needs"):
        data.connect(tokenizer=testing.tiny_tokenizer(), needs=sft)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokenizer is a str"):
        data.connect(tokenizer=str(tiny_folder), needs=sft.needs)  # type: ignore[arg-type]
    data.connect(tokenizer=testing.tiny_tokenizer(), needs=sft.needs)
    with pytest.raises(RuntimeError, match="setup"):
        data.train_dataloader()
