"""The same rows and models for TRL's trainers and for halos_pl."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from halos_pl.batch import TokenBatch
from halos_pl.labels import Labels

BETA = 0.3


def short_pairs(shared_data: Path) -> list[dict[str, Any]]:
    """Six short human preferences."""
    found: list[dict[str, Any]] = []
    with gzip.open(shared_data / "feedback" / "hh_rlhf_train.jsonl.gz", "rt") as file:
        for line in file:
            row = json.loads(line)
            if len(line) < 900:
                found.append({key: row[key] for key in ("prompt", "chosen", "rejected")})
            if len(found) == 6:
                break
    return found


def models(folder: Path, seed: int) -> tuple[Any, Any]:
    """A policy that differs from its reference, so that no reward is 0."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return policy, reference


def settings(config: Any, tmp_path: Path, rows: int, **options: Any) -> Any:
    return config(
        output_dir=str(tmp_path),
        per_device_train_batch_size=rows,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        beta=BETA,
        disable_tqdm=True,
        **options,
    )


def flat(prompts: list, completions: list, desirable: list, pair: list, mismatched: list) -> TokenBatch:
    return TokenBatch(
        prompts=[torch.tensor(p) for p in prompts],
        completions=[torch.tensor(c) for c in completions],
        prompt=torch.arange(len(prompts)),
        labels=Labels(desirable=torch.tensor(desirable), pair=torch.tensor(pair), mismatched=torch.tensor(mismatched)),
    )
