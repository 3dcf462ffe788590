"""A batch and modules on tiny models, whose steps are computed without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from halos_pl.batch import TokenBatch
from halos_pl.labels import Labels
from halos_pl.objective.build import load_objective
from halos_pl.objective.feedback import Binary, Pairwise
from halos_pl.objective.reference_points import MismatchedKL, PairedCompletion, RunningMean
from halos_pl.objective.rewards import LogRatio
from halos_pl.policy.loading import ModelSpec
from halos_pl.policy.reference import ReferenceModel
from halos_pl.training.module import HALOModule
from value_functions import Logistic, LogSigmoid


def batch(pairs: int = 3, *, seed: int = 0, mismatched: bool = True) -> TokenBatch:
    """Pairs of all lengths, including one-token prompts and completions, and a mismatched row for each row."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> torch.Tensor:
        return torch.randint(5, 300, (int(torch.randint(1, longest + 1, (1,), generator=draw)),), generator=draw)

    prompts = [tokens(9) for _ in range(pairs)]
    prompts[0] = prompts[0][:1]
    completions = [tokens(7) for _ in range(2 * pairs)]
    completions[1] = completions[1][:1]
    n = 2 * pairs
    own = torch.arange(n) // 2
    twice = n if mismatched else 0
    return TokenBatch(
        prompts=prompts,
        completions=completions + [completions[(i + 2) % n] for i in range(twice)],
        prompt=torch.cat([own, own[:twice]]),
        labels=Labels(
            desirable=torch.tensor([True, False] * pairs + [False] * twice),
            pair=torch.tensor([i ^ 1 for i in range(n)] + [-1] * twice),
            mismatched=torch.tensor([False] * n + [True] * twice),
            group=torch.cat([own, own[:twice]]) // 2,
        ),
        row_ids=[f"file:{i}" for i in range(n + twice)],
    )


PARTS: dict[str, dict[str, Any]] = {
    "kto": {
        "reward": LogRatio,
        "reference_point": MismatchedKL,
        "value_function": Logistic,
        "feedback": Binary,
        "reflect_undesirable": True,
        "loss_offset": 1.0,
    },
    "dpo": {
        "reward": LogRatio,
        "reference_point": PairedCompletion,
        "value_function": LogSigmoid,
        "feedback": Pairwise,
        "reflect_undesirable": False,
    },
    "bco": {
        "reward": LogRatio,
        "reference_point": RunningMean,
        "value_function": LogSigmoid,
        "feedback": Binary,
        "reflect_undesirable": True,
    },
}


def module(
    folder: Path, objective: str = "kto", reference: ReferenceModel | None = None, *, lr: float = 1.0, **options: Any
) -> HALOModule:
    of_policy = ("lora", "gradient_checkpointing", "dtype", "attn_implementation")
    spec = {key: options.pop(key) for key in of_policy if key in options}
    parts: dict[str, Any] = {}
    if objective in PARTS:
        parts = {k: v() if isinstance(v, type) else v for k, v in PARTS[objective].items()}
    else:
        parts["extra_terms"] = [load_objective(objective)]
    return HALOModule(
        ModelSpec(str(folder), **spec),
        reference,
        **parts,
        optimizer=lambda params: torch.optim.SGD(params, lr=lr),
        lr_schedule="constant_with_warmup",
        warmup_ratio=0.0,
        **options,
    )
