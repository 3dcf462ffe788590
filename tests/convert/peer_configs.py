"""Configs that other libraries publish, as the key/value pairs that they contain, and conversions of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from halos_pl.cli.convert import peers

# LLaMA-Factory at ff6d4d12, examples/train_lora/qwen3_lora_{dpo,kto,reward}.yaml: what they share, and what differs.
_LORA = {
    "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507",
    "trust_remote_code": True,
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "template": "qwen3_nothink",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "preprocessing_num_workers": 16,
    "dataloader_num_workers": 4,
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 5.0e-6,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
}
_FULL = {key: value for key, value in _LORA.items() if not key.startswith("lora_")} | {"finetuning_type": "full"}
KTO = _LORA | {"stage": "kto", "pref_beta": 0.1, "dataset": "kto_en_demo", "output_dir": "saves/kto"}
DPO = _LORA | {"stage": "dpo", "pref_beta": 0.1, "pref_loss": "sigmoid", "dataset": "dpo_en_demo"}
LLAMAFACTORY: dict[str, dict[str, Any]] = {
    "kto": KTO,
    "dpo": DPO,
    "reward": _LORA | {"stage": "rm", "dataset": "dpo_en_demo", "learning_rate": 1.0e-4},
    "orpo": DPO | {"pref_loss": "orpo"},  # the choices that qwen3_lora_dpo.yaml names
    "simpo": DPO | {"pref_loss": "simpo"},
    # With what examples/train_full/qwen3_full_sft.yaml and examples/train_qlora/qwen3_lora_sft_otfq.yaml set.
    "full": _FULL | {"stage": "dpo", "dataset": "dpo_en_demo", "deepspeed": "examples/deepspeed/ds_z3_config.json"},
    "qlora": DPO | {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": False},
    # Of earlier versions: examples/train_lora/llama3_lora_{dpo,kto,orpo}.yaml.
    "old dpo": {**_LORA, "stage": "dpo", "dpo_beta": 0.1, "dpo_loss": "sigmoid", "dataset": "dpo_en_demo"},
    "old kto": {**_LORA, "stage": "kto", "kto_ftx": 0.0, "dataset": "kto_en_demo", "visual_inputs": False},
    "old orpo": {**_LORA, "stage": "orpo", "orpo_beta": 0.1, "dataset": "dpo_en_demo"},
}
# Its data/dataset_info.json.
DATASETS: dict[str, dict[str, Any]] = {
    "dpo_en_demo": {
        "file_name": "dpo_en_demo.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "ultrafeedback": {
        "hf_hub_url": "llamafactory/ultrafeedback_binarized",
        "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    },
    "dpo_mix_en": {
        "hf_hub_url": "llamafactory/DPO-En-Zh-20k",
        "subset": "en",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "rlhf_v": {
        "hf_hub_url": "llamafactory/RLHF-V",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"},
    },
    "kto_en_demo": {
        "file_name": "kto_en_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "ultrafeedback_kto": {
        "hf_hub_url": "argilla/ultrafeedback-binarized-preferences-cleaned-kto",
        "columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"},
    },
}

# TRL 1.16: the commands in the docstrings of trl/scripts/{kto,dpo}.py, as a config.
TRL: dict[str, tuple[str, dict[str, Any]]] = {
    "kto": (
        "kto",
        {
            "dataset_name": "trl-lib/kto-mix-14k",
            "model_name_or_path": "trl-lib/qwen1.5-1.8b-sft",
            "per_device_train_batch_size": 16,
            "num_train_epochs": 1,
            "learning_rate": "5e-7",
            "lr_scheduler_type": "cosine",
            "gradient_accumulation_steps": 1,
            "eval_steps": 500,
            "output_dir": "kto-aligned-model",
            "warmup_steps": 0.1,
            "logging_first_step": True,
            "use_peft": True,
            "load_in_4bit": True,
            "lora_target_modules": "all-linear",
            "lora_r": 16,
            "lora_alpha": 16,
        },
    ),
    "dpo": (
        "dpo",
        {
            "dataset_name": "trl-lib/ultrafeedback_binarized",
            "model_name_or_path": "Qwen/Qwen2-0.5B-Instruct",
            "learning_rate": 5.0e-7,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "max_steps": 1000,
            "gradient_accumulation_steps": 8,
            "eval_strategy": "steps",
            "eval_steps": 50,
            "output_dir": "Qwen2-0.5B-DPO",
        },
    ),
    "mpo": (
        "dpo",
        {
            "dataset_name": "trl-lib/ultrafeedback_binarized",
            "model_name_or_path": "Qwen/Qwen2-0.5B-Instruct",
            "loss_type": ["sigmoid", "bco_pair", "sft"],
            "loss_weights": [0.8, 0.2, 1.0],
        },
    ),
}

# HALOs at 48319886: config/config.yaml with config/loss/*.yaml and config/model/{base_model,llama,pythia}.yaml.
_HALOS = {
    "config": {
        "seed": 1,
        "exp_name": "???",
        "train_datasets": "???",
        "test_datasets": "???",
        "debug": False,
        "wandb": {"enabled": True, "entity": None, "project": "halos"},
        "cache_dir": ".cache/",
        "local_run_dir": "${cache_dir}/${exp_name}",
        "do_first_eval": True,
        "minimum_log_interval_secs": 1.0,
        "intermediate_checkpoints": False,
        "defaults": ["_self_", {"model": "???"}, {"loss": "???"}],
        "trainer": "BasicTrainer",
        "template_tokens": [],
        "lr": "5e-6",
        "n_epochs": 1,
        "n_examples": None,
        "n_eval_examples": 256,
        "eval_every": 1024,
        "save_every": 5120,
        "optimizer": "AdamW",
        "weight_decay": 0.01,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": "1e-5",
        "warmup": 0.1,
        "cache_reference_logprobs": False,
        "load_reference_logprobs": None,
        "humanline": False,
        "log_epsilon_P": -1.0,
        "log_epsilon_R": 1.5,
        "online": False,
        "frac_unique_desirable": 1.0,
        "frac_unique_undesirable": 1.0,
    },
    "model/base_model": {
        "name_or_path": "???",
        "tokenizer_name_or_path": None,
        "load_from": None,
        "policy_dtype": "bfloat16",
        "reference_dtype": "bfloat16",
        "max_grad_norm": 1.0,
        "max_length": 1250,
        "max_prompt_length": 625,
        "activation_checkpointing": True,
        "batch_size": 32,
        "gradient_accumulation_steps": 1,
        "eval_batch_size": 32,
        "use_peft": False,
        "peft": {"lora_r": 64, "lora_alpha": 256, "lora_dropout": 0.05, "target_modules": "all-linear"},
    },
    "model/llama": {
        "defaults": ["base_model"],
        "name_or_path": None,
        "block_name": "LlamaDecoderLayer",
        "attn_implementation": "flash_attention_2",
    },
    "loss/kto": {
        "beta": 0.1,
        "trainer": "KTOTrainer",
        "dataloader": "UnpairedPreferenceDataLoader",
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    },
    "loss/csft": {
        "trainer": "SFTTrainer",
        "dataloader": "ConditionalSFTDataLoader",
        "control_tokens": {"chosen": "<|good|>", "rejected": "<|bad|>"},
    },
    "loss/sft": {"trainer": "SFTTrainer", "dataloader": "SFTDataLoader"},
    "loss/slic": {"beta": 1.0, "lambda_coef": 0.1, "trainer": "SLiCTrainer"},
    "loss/ppo": {"ppo_epochs": 1, "cliprange": 0.5, "trainer": "PPOTrainer"},
    "loss/grpo": {"beta": 0.01, "epsilon": 0.01, "sequence_level": True, "trainer": "GRPOTrainer"},
}
_PAIRED = {
    "dpo": {"beta": 0.1, "trainer": "DPOTrainer"},
    "cdpo": {"beta": 0.1, "epsilon": 0.2, "trainer": "CDPOTrainer"},
    "ipo": {"tau": 0.1, "trainer": "IPOTrainer"},
    "simpo": {"beta": 10.0, "gamma_beta_ratio": 0.3, "trainer": "SimPOTrainer"},
    "bradley-terry": {"trainer": "BradleyTerryTrainer"},
}
PEERS = peers()
HALOS_LOSSES = ("kto", "csft", *_PAIRED)
#: Words of its scripts, such as scripts/launch_llama_instruct_kto.sh.
WORDS = (
    "model=llama train_datasets=[ultrabin] test_datasets=[ultrabin] exp_name=mine ++cache_dir=/models"
    " ++model.name_or_path=meta-llama/Meta-Llama-3-8B ++lr=1e-6 ++n_examples=20_000 ++model.batch_size=64"
)


def _dump(content: Any) -> str:
    return str(yaml.dump(content, Dumper=yaml.CSafeDumper))


def write_halos(folder: Path) -> Path:
    """The configs of the HALOs code in a folder; its config.yaml."""
    paired = {f"loss/{k}": v | {"dataloader": "PairedPreferenceDataLoader"} for k, v in _PAIRED.items()}
    for name, content in (_HALOS | paired).items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        more = {"sync_reference": False} if name.startswith("loss/") else {}
        path.write_text(_dump(content | more))
    return folder / "config.yaml"


def write_recipe(folder: Path, content: dict[str, Any]) -> Path:
    """A recipe of LLaMA-Factory and its dataset_info.json in a folder, which the recipe names."""
    (folder / "dataset_info.json").write_text(json.dumps(DATASETS))
    path = folder / "recipe.yaml"
    path.write_text(_dump({"dataset_dir": str(folder)} | content))
    return path


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "peer.yaml"
    path.write_text(_dump(content))
    return path


def converted(
    word: str, path: Path, *, trainer: str | None = None, overrides: str = "", devices: int = 1
) -> tuple[dict[str, Any], list[str]]:
    """The converted config, and its notes."""
    found = PEERS[word].convert(path, overrides=overrides, trainer=trainer, devices=devices)
    return yaml.load(found.text, Loader=yaml.CSafeLoader), found.notes
