"""The configs that the libraries publish: what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peer_configs import (
    DPO,
    HALOS_LOSSES,
    KTO,
    LLAMAFACTORY,
    TRL,
    WORDS,
    converted,
    write,
    write_halos,
    write_recipe,
)
from run_halos import run_here

from halos_pl.convert.run import ConvertError


def classes(config: dict[str, Any]) -> str:
    """The reward and the value function of a converted config."""
    model = config["model"]
    names = [model[key]["class_path"] if isinstance(model[key], dict) else model[key] for key in PARTS]
    return " ".join(map(str, names))


PARTS = ("reward", "value_function")
EXPECTED = {
    "kto": "LogRatio Logistic",
    "dpo": "LogRatio LogSigmoid",
    "reward": "ScalarHead LogSigmoid",
    "orpo": "LogOdds Scaled",
    "simpo": "LogProb Shifted",
    "full": "LogRatio LogSigmoid",
    "qlora": "LogRatio LogSigmoid",
    "old dpo": "LogRatio LogSigmoid",
    "old kto": "LogRatio Logistic",
    "old orpo": "LogOdds Scaled",
}


@pytest.mark.parametrize("name", LLAMAFACTORY)
def test_llamafactory_s_recipes(name, tmp_path):
    config, _ = converted("llamafactory", write_recipe(tmp_path, LLAMAFACTORY[name]), devices=2)
    model, data = config["model"], config["data"]
    assert classes(config) == EXPECTED[name]
    assert (data["batch_size"], data["max_length"], data["num_workers"]) == (16, 2048, 4)
    assert data["train"][0]["rows"] == 1000
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert (model["lr_schedule"], model["warmup_ratio"]) == ("cosine", 0.1)
    full = name == "full"
    assert model["policy"]["dtype"] == ("float32" if full else "bfloat16")
    assert ("lora" in model["policy"]) is not full
    if not full:
        assert (model["policy"]["lora"]["r"], model["policy"]["lora"]["alpha"]) == (8, 16)
    assert model["policy"].get("quantize") == (
        {"method": "bitsandbytes", "bits": 4, "quant_type": "nf4", "double_quant": False} if name == "qlora" else None
    )


@pytest.mark.parametrize("name", TRL)
def test_trl_s_examples(name, tmp_path):
    trainer, settings = TRL[name]
    config, _ = converted("trl", write(tmp_path, settings), trainer=trainer)
    model = config["model"]
    sizes = {"kto": (16, 16), "dpo": (16, 4), "mpo": (8, 16)}[name]
    assert (config["data"]["batch_size"], model["micro_batch_rows"]) == sizes
    if name == "kto":
        assert model["optimizer"]["init_args"]["lr"] == 5e-7  # YAML reads 5e-7 as a text
        assert model["policy"]["quantize"]["double_quant"] is False
        assert (model["lr_schedule"], model["warmup_ratio"]) == ("cosine", 0.1)
    if name == "dpo":
        assert (config["trainer"]["max_steps"], config["trainer"]["max_epochs"]) == (1000, -1)
        assert config["data"]["validation"]["split"] == "test"
        assert config["trainer"]["val_check_interval"] == 50
    if name == "mpo":
        assert [term["class_path"] for term in model["extra_terms"]] == ["HALO", "NLL"]


@pytest.mark.parametrize("name", HALOS_LOSSES)
def test_the_losses_of_the_halos_code(name, tmp_path):
    config, _ = converted("halos", write_halos(tmp_path), overrides=f"loss={name} {WORDS}", devices=4)
    rows = name in ("kto", "csft")
    assert config["data"]["batch_size"] == 64
    assert config["model"]["micro_batch_rows"] == (16 if rows else 32)
    assert config["run_dir"] == "/models/mine"
    assert config["trainer"]["max_steps"] == 20_000 // 64
    assert config["model"]["optimizer"]["init_args"] == {"lr": 1e-6, "weight_decay": 0.01, "betas": [0.9, 0.999]}
    assert config["data"]["train"] == [{"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs"}]
    tokens = {"desirable": "<|good|>", "undesirable": "<|bad|>"} if name == "csft" else None
    assert config["data"].get("control_tokens") == tokens


def test_a_saved_config_of_the_halos_code_needs_no_choice(tmp_path):
    """launch.py writes the whole config into the run's folder."""
    settings = {"seed": 1, "train_datasets": ["shp"], "test_datasets": ["shp"], "lr": 5.0e-6}
    settings |= {
        "loss": {"trainer": "KTOTrainer", "beta": 0.2},
        "model": {"name_or_path": "m", "policy_dtype": "float32"},
    }
    with pytest.raises(ConvertError, match="reference_dtype"):
        converted("halos", write(tmp_path, settings))
    settings["model"]["reference_dtype"] = "float32"
    config, _ = converted("halos", write(tmp_path, settings))
    assert config["model"]["value_function"]["init_args"]["beta"] == 0.2


def test_humanline(tmp_path):
    words = f"loss=kto {WORDS} ++humanline=true ++log_epsilon_P=-1.5"
    config, notes = converted("halos", write_halos(tmp_path), overrides=words)
    assert config["model"]["reward"] == {"class_path": "HumanlineLogRatio", "init_args": {"low": -1.5, "high": 1.5}}
    assert config["model"]["reference_model"]["class_path"] == "SyncedCopy"
    assert any(note.startswith("humanline") for note in notes)
    with pytest.raises(ConvertError, match="humanline"):
        converted("halos", write_halos(tmp_path), overrides=words.replace("loss=kto", "loss=simpo"))


@pytest.mark.parametrize("name", ["sft", "ppo", "grpo", "slic"])
def test_other_losses_of_the_halos_code_are_refused(name, tmp_path):
    with pytest.raises(ConvertError, match=rf"loss/{name}\.yaml:\d"):
        converted("halos", write_halos(tmp_path), overrides=f"loss={name} {WORDS}")


@pytest.mark.parametrize(
    ("recipe", "data", "source"),
    [
        (KTO, "kto_en_demo", {"schema": "messages", "columns": {"kto_tag": "label"}}),
        (KTO, "ultrafeedback_kto", {"schema": "unpaired", "split": "train"}),
        (DPO, "dpo_en_demo", {"schema": "sharegpt_pair"}),
        (DPO, "dpo_mix_en", {"schema": "sharegpt_pair", "name": "en", "split": "train"}),
        (DPO, "ultrafeedback", {"schema": "paired", "columns": {"prompt": "instruction"}, "split": "train"}),
    ],
)
def test_dataset_info(recipe, data, source, tmp_path):
    config, _ = converted("llamafactory", write_recipe(tmp_path, recipe | {"dataset": data}))
    found = config["data"]["train"][0]
    assert {key: found[key] for key in found if key not in ("path", "rows")} == source
    assert ("split" in source) is not Path(found["path"]).is_absolute()


@pytest.mark.parametrize(
    ("recipe", "data", "named"),
    [
        (DPO, "rlhf_v", "images"),
        (DPO, "kto_en_demo", "ranking"),
        (KTO, "dpo_en_demo", "kto_tag"),
        (KTO, "kto_demo", "kto_en"),
    ],
)
def test_data_that_do_not_fit_are_refused(recipe, data, named, tmp_path):
    with pytest.raises(ConvertError, match=named):
        converted("llamafactory", write_recipe(tmp_path, recipe | {"dataset": data}))


@pytest.mark.parametrize("name", ["trl", "halos"])
def test_fit_accepts_the_printed_config(name, tmp_path, capfd):
    trainer, settings = TRL["mpo"]
    words = {
        "trl": ["trl", str(write(tmp_path, settings)), f"--trainer={trainer}"],
        "halos": ["halos", str(write_halos(tmp_path)), f"--overrides=loss=kto {WORDS}"],
    }[name]
    assert run_here(capfd, ["convert", *words, f"--out={tmp_path}/out.yaml"]).status == 0
    assert run_here(capfd, ["fit", f"--config={tmp_path}/out.yaml", "--print_config"]).status == 0
