"""Helpers for testing your own plug-ins: random rows, tiny models and data, and a fit that takes seconds.

>>> from halos_pl import testing
>>> rows = testing.random_rows(seed=0, pairs=3)                                  # for an objective or a plug-in
>>> folder = testing.tiny_model(tmp_path / "model")                              # doctest: +SKIP
>>> steps = testing.fit(objective, testing.binary_rows(), folder).steps          # doctest: +SKIP

``halos_pl.conformance`` checks a plug-in against the laws of its kind; these helpers are for your own tests.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halos_pl.batch import LogProbBatch
from halos_pl.data import FeedbackDataModule
from halos_pl.labels import Labels
from halos_pl.objective.halo import Objective
from halos_pl.policy.spec import ModelSpec
from halos_pl.training.module import HALOModule

__all__ = ["Fit", "binary_rows", "fit", "pair_rows", "random_rows", "tiny_model", "tiny_tokenizer"]

#: A chat template that marks turns with ``<|im_start|>`` and ``<|im_end|>``.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Texts that the tokenizer is trained on.
CORPUS = [
    "The answer is forty-two, and the question was lost on the way.",
    "Could you tell me how to bake bread? Mix flour, water, salt and yeast; wait; bake it for an hour.",
    "system user assistant: I am sorry, but I cannot help with that.",
    "A duck lays 16 eggs a day: 3 + 4 = 7, and 9 are left.",
]


# -- rows ---------------------------------------------------------------------------------------------------


def random_rows(
    seed: int,
    pairs: int,
    mismatched: int = 3,
    *,
    gold: int = 0,
    tokens: int = 5,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
) -> LogProbBatch:
    """Rows with random log-probs: pairs in random order, then mismatched rows, then gold answers.

    Args:
        seed: seed of all random numbers.
        pairs: number of pairs of a chosen and a rejected row; up to two pairs share a prompt.
        mismatched: number of mismatched rows, which only feed the reference point.
        gold: number of gold answers, which only terms that need them see.
        tokens: maximum number of tokens of a completion, at least 1.
        dtype: dtype of the log-probs.
        scale: range of a token's log-prob, which is between ``-scale`` and 0, nats.

    Returns:
        2 * pairs + mismatched + gold rows with scalars; ``policy_logps`` and ``scalar`` require a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    judged = 2 * pairs + mismatched
    n = judged + gold
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (n, 1), generator=generator)
    order = torch.randperm(2 * pairs, generator=generator)
    place = torch.empty(2 * pairs, dtype=torch.long)
    place[order] = torch.arange(2 * pairs)
    pair = torch.full((n,), -1)
    pair[place[0::2]], pair[place[1::2]] = place[1::2], place[0::2]
    desirable = torch.zeros(n, dtype=torch.bool)
    desirable[place[0::2]] = True
    policy = -scale * torch.rand(n, tokens, generator=generator, dtype=dtype) * mask
    reference = -scale * torch.rand(n, tokens, generator=generator, dtype=dtype) * mask
    group = torch.randint(0, (pairs + 1) // 2, (n,), generator=generator)
    group[place] = torch.arange(2 * pairs) // 4
    is_gold = torch.arange(n) >= judged
    is_mismatched = (torch.arange(n) >= 2 * pairs) & ~is_gold
    labels = Labels(desirable | is_gold, pair, is_mismatched, group, gold=is_gold)
    scalar = scale * torch.randn(n, generator=torch.Generator().manual_seed(seed + 1), dtype=dtype)
    return LogProbBatch(policy.requires_grad_(), reference, mask, labels, scalar=scalar.requires_grad_())


def _words(draw: random.Random, longest: int) -> str:
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=3)) for _ in range(draw.randrange(1, longest + 1)))


def binary_rows(count: int = 12, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of binary feedback with distinct prompts, both labels and texts of various lengths."""
    draw = random.Random(seed)
    return [
        {"prompt": f"question {i} {_words(draw, 4)}", "completion": _words(draw, 6), "label": i % 3 != 0}
        for i in range(count)
    ]


def pair_rows(count: int = 6, *, seed: int = 0) -> list[dict[str, Any]]:
    """Preference pairs with distinct prompts and texts of various lengths."""
    draw = random.Random(seed)
    return [
        {"prompt": f"question {i} {_words(draw, 4)}", "chosen": _words(draw, 6), "rejected": _words(draw, 6)}
        for i in range(count)
    ]


# -- models -------------------------------------------------------------------------------------------------


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A lossless byte-level tokenizer with a few hundred tokens, EOS and padding; it adds no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=chat_template,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(folder: Path) -> Path:
    """Writes a random Llama with 30,000 weights and its tokenizer to a Hugging Face folder, and returns the folder."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,  # ten times the usual, so that log-probs vary
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- a fit --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """The result of :func:`fit`.

    Attributes:
        module: LightningModule with the trained policy (``module.policy``).
        steps: logged figures of each optimizer step.
    """

    module: HALOModule
    steps: list[dict[str, float]]


class _Steps(Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(
    objective: Objective,
    data: str | Path | Sequence[Mapping[str, Any]],
    model: str | Path,
    *,
    steps: int = 3,
    lr: float = 0.1,
    batch_size: int = 4,
    **options: Any,
) -> Fit:
    """Trains a model for a few steps of SGD on the CPU, without files.

    Args:
        objective: objective to minimize.
        data: rows, or a file with rows.
        model: folder or hub name, such as the folder from :func:`tiny_model`.
        steps: number of optimizer steps.
        lr: constant learning rate.
        batch_size: number of rows per step; of pairs, if the objective needs pairs.
        options: further arguments of ``HALOModule``, such as ``micro_batch_rows``.
    """
    recorder = _Steps()
    module = HALOModule(
        ModelSpec(str(model)),
        extra_terms=[objective],
        **{
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr),
            "lr_schedule": "constant_with_warmup",
            "warmup_ratio": 0.0,
            **options,
        },
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
    )
    rows = str(data) if isinstance(data, str | Path) else list(data)
    trainer.fit(module, datamodule=FeedbackDataModule(train=rows, batch_size=batch_size, seed=0))
    return Fit(module, recorder.steps)
