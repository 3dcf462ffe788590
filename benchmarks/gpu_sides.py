"""Models, rows and training steps of ``gpu.py``: ours and TRL's, with the same weights and tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("kto", "dpo")
#: Bytes per parameter in float32: weights, gradient, two states of AdamW, reference; and bfloat16 copies of two models.
BYTES = 24


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, and the lengths of the rows that it trains.

    Attributes:
        hidden, inner, layers, heads, groups, vocabulary, tied: sizes of the model; ``groups`` are heads of keys.
        rows: number of completions in a step.
        prompt, completion: shortest and longest number of tokens.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool = True
    rows: int = 32
    prompt: tuple[int, int] = (64, 512)
    completion: tuple[int, int] = (32, 512)

    @property
    def parameters(self) -> int:
        """Number of parameters, without norms."""
        size = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.groups * size
        layer = attention + 3 * self.hidden * self.inner
        return self.layers * layer + self.vocabulary * self.hidden * (1 if self.tied else 2)


SHAPES = {
    "SmolLM2-135M": Shape(576, 1536, 30, 9, 3, 49152, rows=64),
    "SmolLM2-360M": Shape(960, 2560, 32, 15, 5, 49152),
    "Llama-3.2-1B": Shape(2048, 8192, 16, 32, 8, 128256),
    "Llama-3.2-3B": Shape(3072, 8192, 28, 24, 8, 128256),
    "Mistral-7B": Shape(4096, 14336, 32, 32, 8, 32000, tied=False),
    "tiny": Shape(32, 64, 2, 4, 2, 128, rows=4, prompt=(4, 16), completion=(2, 12)),
    "tiny, untied": Shape(48, 96, 2, 4, 2, 128, tied=False, rows=8, prompt=(4, 16), completion=(2, 12)),
}
SMALL = "SmolLM2-135M"


def filling(free: int) -> str:
    """The largest shape whose models and optimizer take at most 60% of ``free`` bytes."""
    names = [name for name in SHAPES if not name.startswith("tiny")]
    return max((n for n in names if BYTES * SHAPES[n].parameters <= 0.6 * free), key=names.index, default=SMALL)


def model_of(shape: Shape, device: str) -> Any:
    """A Llama with random weights, float32, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    with torch.device(device):
        return LlamaForCausalLM(config).train()


def moved(model: Any) -> Any:
    """The model after a small random change, equal on both sides: otherwise all rewards would be 0."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.add_(noise, alpha=1e-3)
    return model


def rows_of(kind: str, shape: Shape, count: int) -> list[dict[str, Any]]:
    """``count`` completions in TRL's columns of token ids: rows with mismatched completions, or half as many pairs."""
    draw = random.Random(0)

    def ids(lengths: tuple[int, int]) -> list[int]:
        return [draw.randrange(3, shape.vocabulary) for _ in range(draw.randint(*lengths))]

    if kind == "dpo":
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        lengths = (shape.prompt, shape.completion, shape.completion)
        return [{name: ids(length) for name, length in zip(names, lengths, strict=True)} for _ in range(count // 2)]
    prompts, completions = ([ids(length) for _ in range(count)] for length in (shape.prompt, shape.completion))
    return [
        {"prompt_ids": p, "completion_ids": c, "KL_completion_ids": completions[i - 1], "label": i % 2 == 0}
        for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
    ]


def batch_of(kind: str, rows: list[dict[str, Any]]) -> Any:
    """The rows as our batch, on the CPU."""
    from halos_pl.batch import TokenBatch
    from halos_pl.labels import Labels

    n = len(rows)
    keys = ("chosen_ids", "rejected_ids") if kind == "dpo" else ("completion_ids", "KL_completion_ids")
    place = torch.arange(2 * n)
    labels = (
        Labels(desirable=place < n, pair=place.roll(n))
        if kind == "dpo"
        else Labels(desirable=torch.tensor([row["label"] for row in rows] + [False] * n), mismatched=place >= n)
    )
    return TokenBatch(
        prompts=[torch.tensor(row["prompt_ids"]) for row in rows],
        completions=[torch.tensor(row[key]) for key in keys for row in rows],
        prompt=place % n,
        labels=labels,
    )


# -- the two sides ------------------------------------------------------------------------------------------

#: Computes loss and gradient of rows, in float32 or in bfloat16.
Step = Callable[[str, list[dict[str, Any]], bool], torch.Tensor]


def our_side(shape: Shape, device: str, variant: str, folder: str) -> tuple[Any, Step]:
    """Our policy, and a function that computes loss and gradient."""
    from halos_pl.objective.build import load_objective
    from halos_pl.policy.reference import FrozenCopy
    from halos_pl.policy.scorer import Scorer
    from halos_pl.training.engine import StepEngine

    policy = Scorer(model_of(shape, device), compiled=variant == "compiled", liger=variant == "liger")
    reference = FrozenCopy()
    reference.bind(policy, None)
    moved(policy.model)
    engines = {
        kind: StepEngine(load_objective(ROOT / f"experiments/objectives/{kind}.yaml"), policy, reference)
        for kind in KINDS
    }

    def step(kind: str, rows: list[dict[str, Any]], half: bool) -> torch.Tensor:
        def backward(loss: torch.Tensor) -> None:
            with torch.autocast(device, enabled=False):
                loss.backward()

        with torch.autocast(device, torch.bfloat16, enabled=half):
            [part] = engines[kind].step(batch_of(kind, rows).to(device), backward=backward)
        return part.result.loss

    return policy.model, step


def their_side(shape: Shape, device: str, variant: str, folder: str) -> tuple[Any, Step]:
    """TRL's policy, and a function that computes loss and gradient."""
    import trl
    from datasets import Dataset
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.utils import is_flash_attn_2_available

    from halos_pl.testing import binary_rows, pair_rows, tiny_tokenizer

    policy = model_of(shape, device)
    reference = deepcopy(policy).eval().requires_grad_(False)
    moved(policy)
    for model in (policy, reference):
        if device == "cuda" and is_flash_attn_2_available():
            model.set_attn_implementation("flash_attention_2")
        if device == "cuda" and find_spec("liger_kernel"):
            apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    trainers = {}
    for kind in KINDS:
        config: Any
        make: Any
        config, make = (trl.KTOConfig, trl.KTOTrainer) if kind == "kto" else (trl.DPOConfig, trl.DPOTrainer)
        options = {"bf16": False, "gradient_checkpointing": False, "max_length": None, "beta": 0.1}
        rows = pair_rows(4) if kind == "dpo" else binary_rows(4)  # its loader is not used
        trainers[kind] = make(
            model=policy,
            ref_model=reference,
            args=config(
                output_dir=folder,
                per_device_train_batch_size=4,
                report_to=[],
                use_cpu=device == "cpu",
                disable_tqdm=True,
                **options,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )

    def step(kind: str, rows: list[dict[str, Any]], half: bool) -> torch.Tensor:
        trainer = trainers[kind]
        with torch.autocast(device, torch.bfloat16, enabled=half):
            batch = trainer._prepare_inputs(trainer.data_collator(rows))
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss.detach()  # type: ignore[no-any-return]

    return policy, step
