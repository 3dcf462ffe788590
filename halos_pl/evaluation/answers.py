"""Answers to prompts, sampled once per model and sampling settings, and cached for later evaluations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from halos_pl.cache import ANSWERS, Use, cache_root, make_room
from halos_pl.common.files import unique_name, write
from halos_pl.common.leases import Lease
from halos_pl.data.prompt_files import PromptRow
from halos_pl.data.special import SpecialTokens
from halos_pl.policy.identity import model_fingerprint
from halos_pl.policy.limits import check_prompts
from halos_pl.policy.reference import weights_fingerprint
from halos_pl.policy.sampling import Sample, as_samples, encode_prompts, ends_of, generate
from halos_pl.provenance import provenance


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PromptRow],
    special_tokens_in_text: SpecialTokens,
    *,
    start: bool = False,
    **sampling: Any,
) -> tuple[list[Sample], Path | None]:
    """The answers of a model to prompts, from the cache if they have been sampled with the same settings.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        rows: the prompts.
        special_tokens_in_text: see :func:`halos_pl.policy.sampling.generate`.
        start: whether this is the model before training, which answers like its base even if it has an adapter.
        sampling: settings ``max_new_tokens``, ``temperature``, ``batch_size`` and ``seed``.

    Returns:
        one answer per prompt, and the file that they were read from, or None if they are new.

    Raises:
        ValueError: naming the prompt, if one cannot be encoded or does not fit the model.
    """
    prompts, names = [row.prompt for row in rows], [row.place for row in rows]
    tools = [row.tools for row in rows]
    encoded = encode_prompts(tokenizer, prompts, names, "", special_tokens_in_text, tools)
    check_prompts(model, tokenizer, encoded, names, sampling["max_new_tokens"])
    path = cache_root() / ANSWERS / f"{_key(model, tokenizer, encoded, start, sampling)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with Lease(path.with_suffix(".lock")).held():  # concurrent evaluations of a study wait for the first
        use = Use(path)
        cached = _read(path, len(rows))
        use.end()
        if cached is not None:
            return as_samples(model, tokenizer, encoded, cached), path
        options: dict[str, Any] = {"names": names, "tools": tools, **sampling}
        options["special_tokens_in_text"] = special_tokens_in_text
        samples = [each for (each,) in generate(model, tokenizer, prompts, **options)]
        ids = [sample.completion_ids for sample in samples]
        write(path, json.dumps({"sha256": _digest(ids), "ids": ids}), writer=unique_name())
    make_room()
    return samples, None


def _key(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    start: bool,
    sampling: dict[str, Any],
) -> str:
    """A hash of everything that affects the samples: weights, prompts, stop tokens, settings, code, device and
    autocast."""
    weights = weights_fingerprint(model) if start else model_fingerprint(model)
    origin, device = provenance(), next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    autocast = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None
    code = [origin["revision"], origin["halos_pl"], origin["versions"], name, torch.get_num_threads(), autocast]
    ends = [ends_of(model, tokenizer), tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([weights, prompts, ends, sampling, code]).encode()).hexdigest()[:32]


def _digest(ids: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _read(path: Path, number: int) -> list[list[int]] | None:
    """The token ids of cached answers; None if there are none, or if they are damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ids: list[list[int]] = content["ids"]
        return ids if content["sha256"] == _digest(ids) and len(ids) == number else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
