"""DataModules over small files, set up without a Trainer."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import Needs
from halos_pl.data import FeedbackDataModule
from halos_pl.testing import tiny_tokenizer

KTO = Needs(reference=True, mismatched=True, undesirable=True)


DPO = Needs(reference=True, pairs=True, undesirable=True)


SFT = Needs()


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


def binary(n: int = 10, prompts: int = 10) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i % prompts}", "completion": f"c{i}", "label": i % 3 > 0} for i in range(n)]


def pairs(n: int = 10) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(n)]


def connected(needs: Needs, **options: Any) -> FeedbackDataModule:
    data = FeedbackDataModule(**options)
    data.connect(tokenizer=tokenizer(), needs=needs)
    return data


def set_up(needs: Needs, stage: str = "fit", rank: int = 0, world_size: int = 1, **options: Any) -> FeedbackDataModule:
    data = connected(needs, **options)
    if world_size > 1:
        trainer: Any = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": world_size, "rank": rank})
        data.trainer = trainer
    data.setup(stage)
    return data


def text(ids: Tensor) -> str:
    return tokenizer().decode(ids)
