"""Finds by trying whether a model may be computed with shared prefixes, or with padding.

No list of architectures could be complete: the same few rows are computed in several ways, and must get the same
log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from halos_pl.batch import Labels, TokenBatch
from halos_pl.policy import prefix_sharing
from halos_pl.policy.architecture import base_model, hidden_limit, logit_change, text_config
from halos_pl.policy.logprobs import completion_mask, padded_logps


def self_test_batch(model: nn.Module) -> TokenBatch:
    """Five rows of three prompts, of 1 to 9 tokens; the last row is mismatched."""
    size = min(text_config(model).vocab_size, 1000)
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)

    def some(n: int) -> Tensor:
        # On the CPU, where the generator is, even while Lightning creates new tensors on a GPU.
        return torch.randint(0, size, (n,), generator=draw, device="cpu").to(device)

    return TokenBatch(
        prompts=[some(5), some(1), some(9)],
        completions=[some(4), some(1), some(6), some(3), some(2)],
        prompt=torch.tensor([0, 0, 1, 2, 2], device=device),
        labels=Labels(
            desirable=torch.ones(5, dtype=torch.bool, device=device),
            mismatched=torch.tensor([False, False, False, False, True], device=device),
        ),
    )


def _equal(logps: Tensor, expected: Tensor, eps: float) -> bool:
    """Whether log-probs differ by no more than rounding, of a model in a dtype with this ``eps``.

    A model gathers some of half precision's eps, and may gather many of float32's, which log-probs always are.
    """
    most = max(8 * eps, 2000 * torch.finfo(torch.float32).eps) * (1 + expected.abs().max())
    return bool((logps - expected).abs().max() <= most)


@contextmanager
def _evaluating(model: nn.Module, attention: str | None = None) -> Iterator[None]:
    """In evaluation mode without gradient, and with an attention function of this name; restores both."""
    base, training = base_model(model), model.training
    before = base.config._attn_implementation
    try:
        with torch.no_grad():
            model.eval()
            base.config._attn_implementation = attention or before
            yield
    finally:
        base.config._attn_implementation = before
        model.train(training)


def _one_by_one(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Each row in a batch of its own, so that nothing is padded."""
    logps = torch.zeros(completion_mask(batch).shape, dtype=torch.float32, device=batch.prompt.device)
    for i in range(len(batch)):
        row = padded_logps(model, batch.select(torch.tensor([i], device=batch.prompt.device)))[0]
        logps[i, : len(row)] = row
    return logps


def sharing_fault(model: nn.Module) -> str | None:
    """Why prefixes cannot be shared between rows of a model; None where they can.

    Rows must get the same log-probs as one by one, and those of a row must not depend on what the others say.

    Args:
        model: a causal language model of transformers, or a peft model around one; left as it is.
    """
    attention = base_model(model).config._attn_implementation
    if attention not in ("sdpa", prefix_sharing.NAME):
        return f"its attention is {attention}, not sdpa"
    if change := logit_change(model):
        return f"its head has {change}"
    batch = self_test_batch(model)
    other = (batch.completions[0] + 1) % min(text_config(model).vocab_size, 1000)
    changed = replace(batch, completions=[other, *batch.completions[1:]])
    windows: set[int | None] = set()
    try:
        with _evaluating(model, "sdpa"):
            expected = _one_by_one(model, batch)
        with _evaluating(model, prefix_sharing.NAME):
            logps = prefix_sharing.shared_logps(model, batch, windows)
            of_changed = prefix_sharing.shared_logps(model, changed)[1:]
    except Exception as error:
        return f"it fails on them ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    eps, single = (torch.finfo(dtype).eps for dtype in (next(model.parameters()).dtype, torch.float32))
    if not _equal(logps, expected, eps):
        return "its log-probs change"
    # The same sums, so mostly no difference at all.
    if not bool((of_changed - logps[1:]).abs().max() <= max(eps / 16, 10 * single) * (1 + expected.abs().max())):
        return "tokens of one row reach another one"
    return hidden_limit(model, windows)


def padding_fault(model: nn.Module) -> str | None:
    """Why padded rows get wrong log-probs of a model; None where they do not.

    A model that takes no positions may count padding among them, or carry it along in a state; and one whose attention
    is not causal sees what it is to predict.

    Args:
        model: as for :func:`sharing_fault`.
    """
    batch = self_test_batch(model)
    eps = torch.finfo(next(model.parameters()).dtype).eps
    last: list[Any] = [torch.cat([c[:-1], (c[-1:] + 1) % 7]) for c in batch.completions]
    with _evaluating(model):
        alone, together = _one_by_one(model, batch), padded_logps(model, batch)
        otherwise = _one_by_one(model, replace(batch, completions=last))
    if not _equal(together, alone, eps):
        off = float((together - alone).abs().max())
        return f"beside longer rows a token's log-prob differs by up to {off:.2g} nats from its value without padding"
    before = torch.arange(alone.shape[1], device=alone.device) < completion_mask(batch).sum(dim=1, keepdim=True) - 1
    if not _equal(otherwise.where(before, alone), alone, eps):
        return "a token's log-prob depends on later tokens: as configured, it is no causal language model"
    return None
