"""Draws completions of a batch of prompts: equal prompts are processed once, and each completion may have a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LogitsProcessor, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from halos_pl.policy.architecture import (
    empty_cache,
    eos_ids,
    evaluating,
    plain_generation,
    positions,
    vocabulary_size,
)
from halos_pl.policy.finite import FiniteLogits
from halos_pl.policy.limits import room


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn.

    Args:
        stops: Ids that end a completion, in addition to the model's own.
        pad: Any id to pad with; None for 0.
        max_new_tokens: Maximum number of tokens per completion; fewer if the model runs out of positions.
        temperature: Temperature of the softmax; 0 takes the most likely token.
        top_p: Total probability of the most likely tokens to sample from.
    """

    stops: tuple[int, ...]
    pad: int | None
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """One completion.

    Attributes:
        ids: Token ids, including the one that ended it.
        logprobs: Log-prob of each token in nats under the model at temperature 1, whatever the temperature of the
            sampling; None for completions without a seed.
    """

    ids: list[int]
    logprobs: list[float] | None


@dataclass(frozen=True)
class Batch:
    """Prompts that are completed together.

    Attributes:
        rows: Indices of the prompts.
        room: Maximum number of tokens for each completion.
    """

    rows: list[int]
    room: int


def plan_batches(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> list[Batch]:
    """Batches of prompts of similar length, so that there is little padding.

    Batches share the number of tokens to draw, so that a completion's length does not depend on the other prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    limits = positions(model)
    most = [room(limits, len(ids), max_new_tokens) for ids in prompts]
    groups = [list(group) for _, group in groupby(order, key=lambda i: most[i])]
    return [
        Batch(group[at : at + batch_size], most[group[0]])
        for group in groups
        for at in range(0, len(group), batch_size)
    ]


def draw(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    decoding: Decoding,
    seeds: Sequence[int] | None = None,
    streamer: BaseStreamer | None = None,
) -> list[Drawn]:
    """Draws one completion per prompt in one batch. Equal prompts go through the model once.

    Args:
        model: Causal language model of transformers, or a peft model around one.
        prompts: Token ids.
        names: Names of the prompts, for messages.
        decoding: How to draw; its ``max_new_tokens`` must fit the model's positions.
        seeds: Seed of each completion, from 0 to 2^64 - 1; None uses the global random state.
        streamer: Gets the tokens of a single prompt as they are drawn.

    Raises:
        ModelError: The logits are not finite; names the prompt.
    """
    pad = decoding.pad
    if pad is None or not 0 <= pad < vocabulary_size(model):
        pad = 0  # it goes through the model, so it needs a row in the embedding
    ends = {*eos_ids(model), *decoding.stops}  # some models have several, for a turn and for a text
    device = next(model.parameters()).device
    ids = [torch.tensor(prompt) for prompt in prompts]
    inputs = pad_sequence(ids, batch_first=True, padding_side="left").to(device)
    mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True, padding_side="left").to(device)
    options: dict[str, Any] = {"eos_token_id": sorted(ends), "pad_token_id": pad}
    processors: list[LogitsProcessor] = [FiniteLogits(names, inputs.shape[1], sorted(ends))]
    choice = None
    if seeds is not None:
        choice = SeededChoice(seeds, decoding)
        processors.append(choice)
    sampling: dict[str, Any] = {"do_sample": decoding.temperature > 0 and choice is None}
    if sampling["do_sample"]:
        sampling |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    generator: Any = model
    with torch.no_grad(), evaluating(model), plain_generation(model):
        cache = _shared_prefix(model, prompts, inputs, mask, options)
        out = generator.generate(
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=decoding.max_new_tokens,
            logits_processor=processors,
            streamer=streamer,
            **({} if cache is None else {"past_key_values": cache}),
            **options,
            **sampling,
        )
    logprobs = choice.logprobs() if choice is not None else [None] * len(prompts)
    drawn = []
    for row, values in zip(out[:, inputs.shape[1] :].tolist(), logprobs, strict=True):
        end = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
        drawn.append(Drawn(row[: end + 1], None if values is None else values[: end + 1]))
    return drawn


def _shared_prefix(
    model: nn.Module, prompts: Sequence[Sequence[int]], inputs: Tensor, mask: Tensor, options: dict[str, Any]
) -> DynamicCache | None:
    """Keys and values of all tokens but the last, computed once for equal prompts; None if no two are equal.

    Args:
        model: The model.
        prompts: Token ids.
        inputs, mask: The same as a batch [rows, length], padded on the left.
        options: Options of ``generate``.
    """
    distinct = {tuple(prompt): number for number, prompt in reversed(list(enumerate(prompts)))}
    # Without the last token, a prompt of one would be padding only, for which attention is undefined.
    if len(distinct) == len(prompts) or min(map(len, prompts)) < 2 or (cache := empty_cache(model)) is None:
        return None
    firsts = sorted(distinct.values())
    generator: Any = model
    generator.generate(  # draws a token that nobody reads, and fills the cache
        input_ids=inputs[firsts, :-1],
        attention_mask=mask[firsts, :-1],
        past_key_values=cache,
        max_new_tokens=1,
        do_sample=False,
        **options,
    )
    place = {number: at for at, number in enumerate(firsts)}
    cache.batch_select_indices(torch.tensor([place[distinct[tuple(p)]] for p in prompts], device=inputs.device))
    return cache


class SeededChoice(LogitsProcessor):
    """Chooses the next token of each row with random numbers of its own, and records its log-prob.

    A row's numbers depend on its seed alone, not on the other rows or the device. Inverts the distribution function.

    Args:
        seeds: Seed of each row.
        decoding: Temperature, ``top_p`` and maximum number of tokens.
    """

    def __init__(self, seeds: Sequence[int], decoding: Decoding) -> None:
        self._temperature = decoding.temperature
        self._warper = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None
        draws = [
            torch.rand(decoding.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
        self._uniforms = torch.stack(draws)
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary] that are finite for the chosen tokens only."""
        if self._temperature:
            scaled = scores / self._temperature
            if self._warper is not None:
                scaled = self._warper(input_ids, scaled)
            total = scaled.double().softmax(dim=-1).cumsum(dim=-1)
            draws = self._uniforms[:, len(self._logprobs), None].to(scores.device)
            chosen = torch.searchsorted(total, draws * total[:, -1:], right=True)  # never one of probability 0
            chosen = chosen.clamp(max=scores.shape[1] - 1)  # a row that has ended may have NaN
        else:
            chosen = scores.argmax(dim=-1, keepdim=True)
        self._logprobs.append(scores.log_softmax(dim=-1).gather(1, chosen))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    def logprobs(self) -> list[list[float]]:
        """The log-prob of each token of each row, also of those after its end."""
        values: list[list[float]] = torch.cat(self._logprobs, dim=1).tolist()
        return values
