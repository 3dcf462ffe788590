"""Sampling completions in batches."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from halos_pl.data.columns import prompt_in_context
from halos_pl.data.example import DataError, Prompt
from halos_pl.data.formats import irregular
from halos_pl.data.source import Source
from halos_pl.data.special import SpecialText, SpecialTokens
from halos_pl.data.tokenize import encode_prompt
from halos_pl.data.turns import stop_ids
from halos_pl.data.values import BadRow
from halos_pl.files import check_target, part_of, whole
from halos_pl.outcomes import FlatBatch
from halos_pl.policy.finite import FiniteLogits
from halos_pl.policy.limits import check_prompts, positions, room, rows_of_vocabulary
from halos_pl.policy.loading import ModelSpec, base_model, load_model, load_tokenizer
from halos_pl.policy.logprobs import completion_kl
from halos_pl.policy.spec import ModelError

LEAST_TEMPERATURE = 1e-6
MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        prompt_ids, completion_ids: token ids; the completion's end in that token where it is finished.
        text: the completion without special tokens and the one that ended it.
        finished: the model ended it by itself, by EOS or the end of a turn.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    finished: bool


@contextmanager
def _plain_sampling(model: Any) -> Iterator[list[int]]:
    """Sets aside what a model's own generation settings add, and yields the ids at which it stops.

    transformers fills in top_k, repetition_penalty and the like from them wherever the caller says nothing; the
    samples would then not be the model's distribution, which a KL estimate takes them for.
    """
    # Under an adapter generate() copies the outer settings to the inner model, so these are the ones to set.
    inner = base_model(model)
    own = inner.generation_config
    stops = own.eos_token_id
    training = model.training
    model.eval()
    inner.generation_config = GenerationConfig()
    try:
        yield stops if isinstance(stops, list) else [] if stops is None else [stops]
    finally:
        inner.generation_config = own
        model.train(training)


def add_stops(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Has the model's own generation settings stop where :func:`generate` does; the ids that they lacked."""
    settings = base_model(model).generation_config
    own = settings.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    missing = [token for token in stop_ids(tokenizer) if token not in own]
    if missing:
        settings.eos_token_id = [*own, *missing]
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
        progress: show a bar.

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
    with _plain_sampling(model) as also_stops:
        # Some models name more than one end, e.g. of a turn and of a text.
        ends = {*also_stops, *stops}
        for batch in track(batches, description="generating", disable=not progress, transient=True):
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


def check_sampling(temperature: float, seed: int) -> None:
    """Refuses what logits cannot be divided by, and seeds that torch does not take.

    Raises:
        DataError: naming the value and the range.
    """
    if 0 < temperature < LEAST_TEMPERATURE:
        raise DataError(f"temperature is {temperature}; it must be 0 or at least {LEAST_TEMPERATURE}")
    if not 0 <= seed < MOST_SEED:
        raise DataError(f"seed is {seed}; it must be from 0 to {MOST_SEED - 1}")


def _check_ranges(
    temperature: float, top_p: float, max_new_tokens: int, num_samples: int, batch_size: int, seed: int
) -> None:
    if not temperature >= 0 or not 0 < top_p <= 1 or min(max_new_tokens, num_samples, batch_size) < 1:
        raise ValueError(
            "generate: temperature must be at least 0, top_p in (0, 1], and max_new_tokens, num_samples and"
            f" batch_size at least 1; got {temperature}, {top_p}, {max_new_tokens}, {num_samples}, {batch_size}"
        )
    check_sampling(temperature, seed)


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    control: str,
    special_tokens_in_text: SpecialTokens,
) -> list[list[int]]:
    """Token ids of the prompts.

    Raises:
        ValueError: naming a prompt that cannot be encoded, and why.
    """
    ending = list(tokenizer(control, add_special_tokens=False)["input_ids"]) if control else []
    special = SpecialText(tokenizer, special_tokens_in_text)
    found = []
    for name, prompt in zip(names, prompts, strict=True):
        try:
            found.append(encode_prompt(tokenizer, prompt, special) + ending)
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
        names: of the prompts, for messages.
        progress: show a bar.

    Returns:
        For each prompt, in order, its ``num_samples`` completions.

    Raises:
        ValueError: for a number outside its range, and for a prompt that cannot be encoded or does not fit the model.
    """
    _check_ranges(temperature, top_p, max_new_tokens, num_samples, batch_size, seed)
    names = names or [f"prompt {i + 1}" for i in range(len(prompts))]
    encoded = _encoded(tokenizer, prompts, names, control, special_tokens_in_text)
    check_prompts(model, tokenizer, encoded, names, max_new_tokens)
    device = next(model.parameters()).device
    own = stop_ids(tokenizer)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        sampled = sample_tokens(
            model,
            [ids for ids in encoded for _ in range(num_samples)],
            stops=own,
            pad=tokenizer.pad_token_id,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
            names=[name for name in names for _ in range(num_samples)],
            progress=progress,
        )
    with _plain_sampling(model) as also_stops:
        ends = {*also_stops, *own}
    samples = []
    for ids, kept in zip((ids for ids in encoded for _ in range(num_samples)), sampled, strict=True):
        finished = kept[-1] in ends
        # The end of a turn need not be a special token, which decoding skips.
        text = tokenizer.decode(kept[:-1] if finished else kept, skip_special_tokens=True)
        samples.append(Sample(ids, kept, str(text).strip(), finished))
    return [samples[at : at + num_samples] for at in range(0, len(samples), num_samples)]


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
        batch = FlatBatch(
            prompts=[torch.tensor(s.prompt_ids) for s in some],
            completions=[torch.tensor(s.completion_ids) for s in some],
            prompt=torch.arange(n),
            desirable=torch.ones(n, dtype=torch.bool),
            rival=torch.full((n,), -1),
            probe=torch.zeros(n, dtype=torch.bool),
        ).to(device)
        for i, nats in enumerate(completion_kl(policy, reference(), batch).sum(dim=1).tolist(), start=at + 1):
            if not math.isfinite(nats):
                raise ModelError(
                    f"answer {i}: its KL to the reference model is {nats}, so one of the two has no finite logits; its"
                    " weights are too large or damaged, or its dtype overflows (try float32)"
                )
            yield nats


def as_messages(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[Prompt]:
    """The prompts, with texts as a user's message where ``chat`` is wanted and the tokenizer has a template for it."""
    as_chat = chat and bool(tokenizer.chat_template)
    return [[{"role": "user", "content": p}] if as_chat and isinstance(p, str) else p for p in prompts]


def _lines(path: Path, most: int) -> Iterator[bytes]:
    """Lines, of which none holds more than ``most`` + 1 bytes; longer ones come in pieces."""
    with path.open("rb") as file:
        # Lines end at \n and nowhere else: JSON may hold U+2028 and its like as they are.
        while raw := file.readline(most + 1):
            yield raw


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of :func:`read_prompt_lines` alone."""
    return [prompt for _, prompt in read_prompt_lines(path)]


def read_prompt_lines(path: Path) -> list[tuple[int, Prompt]]:
    """Prompts and the numbers of their lines.

    A ``.txt`` file has one a line, JSON lines have ``prompt`` each, a text or a message list.

    Raises:
        DataError: for a missing or empty file and for a line without a prompt, naming file and line.
    """
    if what := irregular(str(path)):
        raise DataError(f"{path}: is {what}; write what it gives to a file, and name that")
    if not path.is_file():
        raise DataError(f"{path}: no such file; --prompts takes a .txt file or JSON lines with a 'prompt' each")
    prompts: list[tuple[int, Prompt]] = []
    most = Source(str(path)).max_row
    for number, raw in enumerate(_lines(path, most), start=1):
        if len(raw) > most:  # tokenising it would take minutes and gigabytes
            raise DataError(f"{path}:{number}: the line is longer than {most / 1e6:g} MB; remove or shorten it")
        try:
            line = raw.removesuffix(b"\n").decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 text; save it as UTF-8") from error
        if not line.strip():
            continue
        try:
            row = {"prompt": line} if path.suffix == ".txt" else json.loads(line)
            prompt = row["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # not JSONDecodeError alone
            raise DataError(f'{path}:{number}: not a JSON object with "prompt"') from error
        if not (isinstance(prompt, str) and prompt.strip()) and not (
            isinstance(prompt, list)
            and prompt
            and all(
                isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content")) for m in prompt
            )
        ):
            raise DataError(f"{path}:{number}: prompt is neither a text nor a list of messages with role and content")
        try:
            prompts.append((number, prompt_in_context(row)))
        except BadRow as bad:
            raise DataError(f"{path}:{number}: column '{bad.column}'{bad.within} {bad.reason}") from bad
    if not prompts:
        raise DataError(f"{path}: the file holds no prompts")
    return prompts


def load_for_generation(folder: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model and tokenizer of a Hugging Face folder, of a folder with a peft adapter, or of a hub name."""
    spec = ModelSpec(path=folder, attn_implementation=None)
    model: Any = load_model(spec)
    if torch.cuda.is_available():
        model = model.cuda()
    return model.eval(), load_tokenizer(spec)


def generate_file(
    folder: str,
    *,
    prompts: str,
    out: str | None = None,
    chat: bool = True,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    control: str = "",
    special_tokens_in_text: SpecialTokens = "refuse",
) -> None:
    """Sample completions of the prompts in a file.

    Args:
        folder: a Hugging Face folder, a folder with a peft adapter, or a hub name.
        prompts: a .txt file with one prompt a line, or JSON lines with "prompt", a text or a message list.
        out: JSON lines to write, "prompt" and "completions" each; default: beside the prompts. Until all of them are
            there, they are in a file with the ending .part.
        chat: take a text prompt as a user's message where the tokenizer has a chat template.
        max_new_tokens: the most tokens of a completion.
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that hold this share of the probability.
        num_samples: completions per prompt.
        batch_size: completions at a time.
        seed: of the sampling.
        control: text between every prompt and its completion; "<|good|>" for a model trained with csft.yaml.
        special_tokens_in_text: special tokens that a message spells, as data.special_tokens_in_text was in training:
            refuse those that forge a turn, split them into plain text, or allow them.
    """
    _check_ranges(temperature, top_p, max_new_tokens, num_samples, batch_size, seed)
    lines = read_prompt_lines(Path(prompts))
    read = [prompt for _, prompt in lines]
    target = Path(out) if out else Path(prompts).with_suffix(".completions.jsonl")
    if target.exists() and target.samefile(prompts):
        raise FileExistsError(f"--out {target} is the file of the prompts, which would be lost; name another file")
    check_target(target)
    model, tokenizer = load_for_generation(folder)
    asked = as_messages(read, tokenizer, chat)
    names = [f"{prompts}:{number}" for number, _ in lines]
    encoded = _encoded(tokenizer, asked, names, control, special_tokens_in_text)
    check_prompts(model, tokenizer, encoded, names, max_new_tokens)  # before any is sampled
    chunk = 8 * max(1, batch_size // num_samples)
    done = 0
    try:
        with whole(target, keep=True) as file:
            # Written chunk by chunk, so that a long run that is cut off leaves what it has.
            for at in range(0, len(asked), chunk):
                samples = generate(
                    model,
                    tokenizer,
                    asked[at : at + chunk],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    num_samples=num_samples,
                    batch_size=batch_size,
                    seed=seed + at,
                    control=control,
                    special_tokens_in_text=special_tokens_in_text,
                    names=names[at : at + chunk],
                )
                for prompt, found in zip(read[at : at + chunk], samples, strict=True):
                    line = {"prompt": prompt, "completions": [s.text for s in found]}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                done = at + len(samples)
    except BaseException:
        left = f"those of the first {done} are in {part_of(target)}" if done else "nothing was written"
        print(f"halos: completions of {len(read)} prompts were asked for; {left}", file=sys.stderr)
        raise
    print(f"halos: completions of {len(read)} prompts are in {target}")
