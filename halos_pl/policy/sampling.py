"""Sampling completions in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import TokenBatch
from halos_pl.common.progress import counted
from halos_pl.data.example import DataError, Prompt
from halos_pl.data.render import Tools
from halos_pl.data.special import SpecialText, SpecialTokens
from halos_pl.data.tokenize import encode_prompt
from halos_pl.data.turns import stop_ids
from halos_pl.labels import Labels
from halos_pl.policy.architecture import eos_ids
from halos_pl.policy.drawing import Decoding, draw, plan_batches
from halos_pl.policy.kl import Scoring, completion_kl
from halos_pl.policy.limits import check_prompts
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.sharding import is_sharded
from halos_pl.policy.spec import ModelError

LEAST_TEMPERATURE = 1e-6
MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        prompt_ids, completion_ids: token ids; a finished completion includes the token that ended it.
        raw: text of the completion without special tokens or the token that ended it, not stripped: after a
            plain-text prompt it usually begins with a space.
        finished: whether the model ended it, with EOS or the end of a turn.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    raw: str
    finished: bool

    @property
    def text(self) -> str:
        """The completion, stripped."""
        return self.raw.strip()


def ends_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion: those in the model's generation settings, EOS, and the end of a turn."""
    return sorted({*eos_ids(model), *stop_ids(tokenizer)})


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
    """Samples one completion per prompt, using the global random state. Equal prompts in a batch are processed once.

    Args:
        model: causal language model of transformers, or a peft model around one.
        prompts: token ids.
        stops: ids that end a completion, in addition to the model's own; the completion includes the id.
        pad: any id to pad with; None for 0.
        max_new_tokens: maximum number of tokens per completion; fewer if the model runs out of positions.
        temperature, top_p, batch_size: see :func:`generate`.
        names: names of the prompts, for messages.
        progress: whether to show progress on standard error.

    Returns:
        Token ids of each completion, in the order of the prompts.

    Raises:
        ModelError: the logits are not finite (names the prompt), or the model is sharded over ranks.
    """
    if is_sharded(model):
        raise ModelError(
            "fsdp2 shards the model over the ranks, which would wait for each other forever, as they sample answers of"
            " different lengths; leave out the callback that samples, or choose trainer.strategy ddp"
        )
    names = names or [f"prompt {i + 1}" for i in range(len(prompts))]
    completions: list[list[int]] = [[] for _ in prompts]
    batches = plan_batches(model, prompts, max_new_tokens, batch_size)
    for batch in counted(batches, "sampling, in batches") if progress else batches:
        decoding = Decoding(tuple(stops), pad, batch.room, temperature, top_p)
        some, their_names = [prompts[i] for i in batch.rows], [names[i] for i in batch.rows]
        for i, drawn in zip(batch.rows, draw(model, some, their_names, decoding), strict=True):
            completions[i] = drawn.ids
    return completions


class PolicySamples:
    """For each row of a batch, samples a completion from the current policy and adds it as a mismatched row.

    Gold answers get none.

    Args:
        policy: model to sample from, at temperature 1, using the global random state.
        tokenizer: tokenizer of the policy.
        max_new_tokens: maximum number of tokens per sample.
    """

    def __init__(self, policy: Scorer, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        self.policy, self.max_new_tokens = policy, max_new_tokens
        self._stops, self._pad = stop_ids(tokenizer), tokenizer.pad_token_id

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """The batch with the samples as further rows."""
        host, prompts = batch.labels.host, batch.prompt.tolist()
        answered = [i for i in range(len(batch)) if not host.gold[i]]
        names = [batch.row_ids[i] for i in answered] if batch.row_ids else []
        ids = sample_tokens(
            self.policy.model,
            [batch.prompts[prompts[i]].tolist() for i in answered],
            stops=self._stops,
            pad=self._pad,
            max_new_tokens=self.max_new_tokens,
            names=names,
        )
        labels, device, n = batch.labels, batch.prompt.device, len(answered)
        rows = torch.tensor([*range(len(batch)), *answered], device=device)
        is_sample = torch.arange(len(rows), device=device) >= len(batch)
        return replace(
            batch,
            completions=[*batch.completions, *(torch.tensor(sampled, device=device) for sampled in ids)],
            prompt=batch.prompt[rows],
            labels=Labels(
                desirable=labels.desirable[rows] & ~is_sample,
                pair=torch.where(is_sample, -1, labels.pair[rows]),
                mismatched=is_sample,
                group=labels.group[rows],
                score=labels.score[rows],
                weight=labels.weight[rows],
                gold=labels.gold[rows],
            ),
            row_ids=[*batch.row_ids, *(f"sample for {name}" for name in names)],
            loss=None if batch.loss is None else [*batch.loss, *[None] * n],
        )


def check_sampling(**settings: float | None) -> None:
    """Refuses settings of :func:`generate` that are outside their ranges.

    Args:
        settings: the settings by name; any of them may be omitted, or None for its default.

    Raises:
        DataError: names the setting and its range.
    """
    for name, value in settings.items():
        if value is None:
            continue
        if name == "top_p" and not 0 < value <= 1:
            raise DataError(f"top_p is {value}; it must be above 0 and at most 1")
        if name == "temperature" and not (value == 0 or LEAST_TEMPERATURE <= value < math.inf):
            raise DataError(f"temperature is {value}; it must be 0, or a finite number from {LEAST_TEMPERATURE}")
        if name == "seed" and not 0 <= value < MOST_SEED:
            raise DataError(f"seed is {value}; it must be from 0 to {MOST_SEED - 1}")
        if name in ("max_new_tokens", "num_samples", "n", "batch_size") and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    top_p = settings.get("top_p")
    if settings.get("temperature") == 0 and top_p not in (None, 1):
        raise DataError(f"top_p is {top_p}, which has no effect at temperature 0; raise the temperature, or omit top_p")


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
        ValueError: a prompt cannot be encoded; names the prompt and the reason.
    """
    ending = list(tokenizer(control, add_special_tokens=False)["input_ids"]) if control else []
    special = SpecialText(tokenizer, special_tokens_in_text)
    encoded = []
    for name, prompt, prompt_tools in zip(names, prompts, tools or [None] * len(prompts), strict=True):
        try:
            encoded.append(encode_prompt(tokenizer, prompt, special, prompt_tools) + ending)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return encoded


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

    A completion ends at any id in the model's ``generation_config``, at EOS, or at the token with which the chat
    template ends a turn.

    Args:
        model: causal language model of transformers, or a peft model around one.
        tokenizer: tokenizer of the model.
        prompts: texts or message lists.
        max_new_tokens: maximum number of tokens per completion.
        temperature: temperature of the softmax; 0 takes the most likely token.
        top_p: total probability of the most likely tokens to sample from; 1 samples from all.
        num_samples: number of completions per prompt.
        batch_size: number of completions sampled at a time.
        seed: seed of the sampling. The global random state is left unchanged.
        control: text between every prompt and its completion, such as the control token of conditional
            fine-tuning.
        special_tokens_in_text: how to treat special tokens in the text of messages, see
            :class:`halos_pl.data.special.SpecialText`.
        tools: JSON schemas of the tools that the model may call, or None, for each prompt.
        names: names of the prompts, for messages.
        progress: whether to show progress on standard error.

    Returns:
        For each prompt, in order, its ``num_samples`` completions.

    Raises:
        ValueError: a number is outside its range, or a prompt cannot be encoded or does not fit the model.
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
    """The samples with these token ids, one completion per prompt."""
    ends, samples = ends_of(model, tokenizer), []
    for prompt, ids in zip(prompts, completions, strict=True):
        finished = ids[-1] in ends
        # The end of a turn need not be a special token, so decoding might not skip it.
        text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
        samples.append(Sample(prompt, ids, str(text), finished))
    return samples


def kl_of_samples(
    policy: Scorer,
    reference: Scoring,
    samples: Sequence[Sample],
    batch_size: int = 8,
) -> Iterator[float]:
    """Yields KL(policy || reference) of each sample: exact at each token, summed over the tokens, in nats.

    Args:
        policy: model that the samples were drawn from.
        reference: reference whose model is compared with it.
        samples: completions.
        batch_size: number of samples at a time.

    Raises:
        ModelError: the divergence is not finite; names the sample.
    """
    for at in range(0, len(samples), batch_size):
        some = samples[at : at + batch_size]
        n = len(some)
        batch = TokenBatch(
            prompts=[torch.tensor(s.prompt_ids) for s in some],
            completions=[torch.tensor(s.completion_ids) for s in some],
            prompt=torch.arange(n),
            labels=Labels(desirable=torch.ones(n, dtype=torch.bool)),
        ).to(policy.device)
        for i, nats in enumerate(completion_kl(policy, reference, batch).sum(dim=1).tolist(), start=at + 1):
            if not math.isfinite(nats):
                raise ModelError(
                    f"answer {i}: its KL to the reference model is {nats}, so one of the two models has logits that are"
                    " not finite; its weights are too large or damaged, or its dtype overflows (try float32)"
                )
            yield nats
