"""Sampling completions in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from halos_pl.batch import Labels, TokenBatch
from halos_pl.common.progress import counted
from halos_pl.data.example import DataError, Prompt
from halos_pl.data.render import Tools
from halos_pl.data.special import SpecialText, SpecialTokens
from halos_pl.data.tokenize import encode_prompt
from halos_pl.data.turns import stop_ids
from halos_pl.policy.finite import FiniteLogits
from halos_pl.policy.limits import check_prompts, positions, room, rows_of_vocabulary
from halos_pl.policy.loading import base_model
from halos_pl.policy.logprobs import completion_kl
from halos_pl.policy.spec import ModelError

LEAST_TEMPERATURE = 1e-6
MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        prompt_ids, completion_ids: token ids; the completion's end in that token where it is finished.
        raw: the completion without special tokens and the one that ended it, with blanks at its ends: a completion of
            plain text begins with the blank that parts it from its prompt.
        finished: the model ended it by itself, by EOS or the end of a turn.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    raw: str
    finished: bool

    @property
    def text(self) -> str:
        """The completion without blanks at its ends."""
        return self.raw.strip()


def _own_ends(model: nn.Module) -> list[int]:
    """The ids at which the model's own generation settings stop."""
    own = base_model(model).generation_config.eos_token_id
    return list(own) if isinstance(own, list) else [] if own is None else [own]


def ends_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which a completion ends: those that the model's settings name, EOS, and the end of a turn."""
    return sorted({*_own_ends(model), *stop_ids(tokenizer)})


@contextmanager
def _plain_sampling(model: Any) -> Iterator[None]:
    """Sets aside what a model's own generation settings add.

    transformers fills in top_k, repetition_penalty and the like from them wherever the caller says nothing; the
    samples would then not be the model's distribution, which a KL estimate takes them for.
    """
    # Under an adapter generate() copies the outer settings to the inner model, so these are the ones to set.
    inner = base_model(model)
    own = inner.generation_config
    training = model.training
    model.eval()
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own
        model.train(training)


def add_stops(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Has the model's own generation settings stop where :func:`generate` does; the ids that they lacked."""
    own = _own_ends(model)
    missing = [token for token in stop_ids(tokenizer) if token not in own]
    if missing:
        base_model(model).generation_config.eos_token_id = [*own, *missing]
    return missing


@torch.no_grad()
def sample_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stops: Sequence[int],
    pad: int | None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    names: Sequence[str] | None = None,
    progress: bool = False,
) -> list[list[int]]:
    """Samples one completion for each prompt with the process's own random state.

    Args:
        model: a causal language model of transformers, or a peft model around one.
        prompts: token ids.
        stops: ids at which a completion ends, besides the model's own; the id is part of the completion.
        pad: any id.
        max_new_tokens: the most tokens of a completion; fewer where the model has no position for them.
        temperature, top_p, batch_size: see :func:`generate`.
        names: of the prompts, for messages.
        progress: say on standard error how far it is.

    Returns:
        Token ids of each completion, in the order of the prompts.

    Raises:
        ModelError: where the logits are not finite, naming the prompt.
    """
    named = names or [f"prompt {i + 1}" for i in range(len(prompts))]
    # Prompts of like length side by side: little padding.
    work = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    found: list[list[int]] = [[] for _ in prompts]
    # A completion ends where the positions do, whatever prompts are beside its own.
    places = positions(model)
    most = [room(places, len(ids), max_new_tokens) for ids in prompts]
    alike = [list(same) for _, same in groupby(work, key=lambda i: most[i])]
    batches = [same[at : at + batch_size] for same in alike for at in range(0, len(same), batch_size)]
    if pad is None or not 0 <= pad < rows_of_vocabulary(model):
        pad = 0  # it goes through the model, and is then dropped
    device = next(model.parameters()).device
    generator: Any = model
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    ends = {*_own_ends(model), *stops}  # some models name more than one, e.g. of a turn and of a text
    with _plain_sampling(model):
        for batch in counted(batches, "sampling, in batches") if progress else batches:
            ids = [torch.tensor(prompts[i]) for i in batch]
            inputs = pad_sequence(ids, batch_first=True, padding_side="left").to(device)
            mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True, padding_side="left").to(device)
            out = generator.generate(
                input_ids=inputs,
                attention_mask=mask,
                max_new_tokens=most[batch[0]],
                eos_token_id=sorted(ends),
                pad_token_id=pad,
                logits_processor=[FiniteLogits([named[i] for i in batch], inputs.shape[1], sorted(ends))],
                **options,
            )
            for i, row in zip(batch, out[:, inputs.shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in ends), None)
                found[i] = row if end is None else row[: end + 1]
    return found


def check_sampling(**given: float) -> None:
    """Refuses settings of :func:`generate` outside their ranges, and what logits cannot be divided by.

    Args:
        given: settings by name, those that there are.

    Raises:
        DataError: naming the value and the range.
    """
    for name, value in given.items():
        if name == "top_p" and not 0 < value <= 1:
            raise DataError(f"top_p is {value}; it must be above 0 and at most 1")
        if name == "temperature" and not (value == 0 or LEAST_TEMPERATURE <= value < math.inf):
            raise DataError(f"temperature is {value}; it must be 0, or a finite number from {LEAST_TEMPERATURE}")
        if name == "seed" and not 0 <= value < MOST_SEED:
            raise DataError(f"seed is {value}; it must be from 0 to {MOST_SEED - 1}")
        if name in ("max_new_tokens", "num_samples", "batch_size") and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    control: str,
    special_tokens_in_text: SpecialTokens,
    tools: Sequence[Tools] | None = None,
) -> list[list[int]]:
    """Token ids of the prompts; see :func:`generate`.

    Raises:
        ValueError: naming a prompt that cannot be encoded, and why.
    """
    ending = list(tokenizer(control, add_special_tokens=False)["input_ids"]) if control else []
    special = SpecialText(tokenizer, special_tokens_in_text)
    found = []
    for name, prompt, own in zip(names, prompts, tools or [None] * len(prompts), strict=True):
        try:
            found.append(encode_prompt(tokenizer, prompt, special, own) + ending)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return found


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    control: str = "",
    special_tokens_in_text: SpecialTokens = "refuse",
    tools: Sequence[Tools] | None = None,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> list[list[Sample]]:
    """Samples completions; the same arguments give the same completions.

    A completion ends at the ids that the model's ``generation_config`` names, at EOS, and at the token with which the
    chat template ends a turn.

    Args:
        model: a causal language model of transformers, or a peft model around one.
        tokenizer: its tokenizer.
        prompts: texts or message lists.
        max_new_tokens: the most tokens of a completion.
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that hold this share of the probability.
        num_samples: completions per prompt.
        batch_size: completions at a time.
        seed: of the sampling. The process's own random state is left as it was.
        control: text between every prompt and its completion, such as the control token of conditional
            fine-tuning.
        special_tokens_in_text: what becomes of special tokens that messages spell, see
            :class:`halos_pl.data.special.SpecialText`.
        tools: for each prompt JSON schemas of what the model may call, or None.
        names: of the prompts, for messages.
        progress: say on standard error how far it is.

    Returns:
        For each prompt, in order, its ``num_samples`` completions.

    Raises:
        ValueError: for a number outside its range, and for a prompt that cannot be encoded or does not fit the model.
    """
    check_sampling(
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
    )
    names = names or [f"prompt {i + 1}" for i in range(len(prompts))]
    encoded = encode_prompts(tokenizer, prompts, names, control, special_tokens_in_text, tools)
    check_prompts(model, tokenizer, encoded, names, max_new_tokens)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        sampled = sample_tokens(
            model,
            [ids for ids in encoded for _ in range(num_samples)],
            stops=stop_ids(tokenizer),
            pad=tokenizer.pad_token_id,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
            names=[name for name in names for _ in range(num_samples)],
            progress=progress,
        )
    samples = as_samples(model, tokenizer, [ids for ids in encoded for _ in range(num_samples)], sampled)
    return [samples[at : at + num_samples] for at in range(0, len(samples), num_samples)]


def as_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
) -> list[Sample]:
    """What the model said, from the token ids of each prompt and of its completion."""
    ends, samples = ends_of(model, tokenizer), []
    for prompt, kept in zip(prompts, completions, strict=True):
        finished = kept[-1] in ends
        # The end of a turn need not be a special token, which decoding skips.
        text = tokenizer.decode(kept[:-1] if finished else kept, skip_special_tokens=True)
        samples.append(Sample(prompt, kept, str(text), finished))
    return samples


def kl_of_samples(
    policy: nn.Module,
    reference: Callable[[], AbstractContextManager[nn.Module]],
    samples: Sequence[Sample],
    batch_size: int = 8,
) -> Iterator[float]:
    """KL(policy || reference) of each sample in turn, exact at each of its tokens and summed over them, in nats.

    Args:
        policy: the model that has sampled.
        reference: called for each batch; what it returns is entered to get the other model.
        samples: completions.
        batch_size: samples at a time.

    Raises:
        ModelError: where it is not finite, naming the sample.
    """
    device = next(policy.parameters()).device
    for at in range(0, len(samples), batch_size):
        some = samples[at : at + batch_size]
        n = len(some)
        batch = TokenBatch(
            prompts=[torch.tensor(s.prompt_ids) for s in some],
            completions=[torch.tensor(s.completion_ids) for s in some],
            prompt=torch.arange(n),
            labels=Labels(desirable=torch.ones(n, dtype=torch.bool)),
        ).to(device)
        for i, nats in enumerate(completion_kl(policy, reference(), batch).sum(dim=1).tolist(), start=at + 1):
            if not math.isfinite(nats):
                raise ModelError(
                    f"answer {i}: its KL to the reference model is {nats}, so one of the two has no finite logits; its"
                    " weights are too large or damaged, or its dtype overflows (try float32)"
                )
            yield nats
