"""Tests whether a model gives the right log-probs with shared prefixes, or with padding.

No list of architectures could be complete, so a few rows are computed in several ways, which must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from halos_pl.batch import TokenBatch
from halos_pl.labels import Labels
from halos_pl.policy import prefix_sharing
from halos_pl.policy.architecture import (
    attention_function,
    evaluating,
    hidden_limit,
    logit_change,
    text_config,
    use_attention,
)
from halos_pl.policy.logprobs import completion_mask, padded_logps
from halos_pl.policy.sharding import gathered_dtype


def self_test_batch(model: nn.Module) -> TokenBatch:
    """Five rows that share three prompts, of 1 to 9 tokens; the last row is mismatched."""
    size = min(text_config(model).vocab_size, 1000)
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)

    def random_ids(n: int) -> Tensor:
        # On the CPU, like the generator, even while Lightning creates tensors on a GPU by default.
        return torch.randint(0, size, (n,), generator=draw, device="cpu").to(device)

    return TokenBatch(
        prompts=[random_ids(5), random_ids(1), random_ids(9)],
        completions=[random_ids(4), random_ids(1), random_ids(6), random_ids(3), random_ids(2)],
        prompt=torch.tensor([0, 0, 1, 2, 2], device=device),
        labels=Labels(
            desirable=torch.ones(5, dtype=torch.bool, device=device),
            mismatched=torch.tensor([False, False, False, False, True], device=device),
        ),
    )


def _equal(logps: Tensor, expected: Tensor, eps: float) -> bool:
    """Whether log-probs differ by rounding only, for a model with this rounding error ``eps``.

    In half precision, errors add up to a few eps; in float32, the dtype of all log-probs, they may add up to many.
    """
    most = max(8 * eps, 2000 * torch.finfo(torch.float32).eps) * (1 + expected.abs().max())
    return bool((logps - expected).abs().max() <= most)


def rounding(model: nn.Module) -> float:
    """The relative rounding error of a model's products: of their dtype, or of TF32 on a GPU."""
    device = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gathered_dtype(model)
    if dtype == torch.float32 and device == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return 2.0**-10
    return torch.finfo(dtype).eps


@contextmanager
def _testing(model: nn.Module, attention: str | None = None) -> Iterator[None]:
    """Puts the model in eval mode, without gradient, with the named attention function; restores all three."""
    with evaluating(model), torch.no_grad(), use_attention(model, attention):
        yield


def _one_by_one(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Computes each row separately, so that nothing is padded."""
    logps = torch.zeros(completion_mask(batch).shape, dtype=torch.float32, device=batch.prompt.device)
    for i in range(len(batch)):
        row = padded_logps(model, batch.select(torch.tensor([i], device=batch.prompt.device)))[0]
        logps[i, : len(row)] = row
    return logps


def sharing_fault(model: nn.Module) -> str | None:
    """Why rows of a model cannot share prefixes; None if they can.

    Rows must get the same log-probs as when computed separately, and they must not depend on other completions.

    Args:
        model: causal language model of transformers, or a peft model around one; left unchanged.
    """
    attention = attention_function(model)
    if attention not in ("sdpa", prefix_sharing.NAME):
        return f"its attention is {attention}, not sdpa"
    if change := logit_change(model):
        return f"its head has {change}"
    batch = self_test_batch(model)
    other = (batch.completions[0] + 1) % min(text_config(model).vocab_size, 1000)
    changed = replace(batch, completions=[other, *batch.completions[1:]])
    windows: set[int | None] = set()
    try:
        with _testing(model, "sdpa"):
            expected = _one_by_one(model, batch)
        with _testing(model, prefix_sharing.NAME):
            logps = prefix_sharing.shared_logps(model, batch, windows)
            of_changed = prefix_sharing.shared_logps(model, changed)[1:]
    except Exception as error:
        return f"it fails on them ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    eps, single = rounding(model), torch.finfo(torch.float32).eps
    if not _equal(logps, expected, eps):
        return "its log-probs change"
    # The same sums, so usually there is no difference at all.
    if not bool((of_changed - logps[1:]).abs().max() <= max(eps / 16, 10 * single) * (1 + expected.abs().max())):
        return "tokens of one row reach another row"
    return hidden_limit(model, windows)


def padding_fault(model: nn.Module) -> str | None:
    """Why a model gives wrong log-probs to padded rows; None if they are right.

    A model that takes no positions may count padding, or carry it along in a state. Without causal attention, a model
    sees the tokens that it has to predict.

    Args:
        model: as in :func:`sharing_fault`.
    """
    batch = self_test_batch(model)
    eps = rounding(model)
    last: list[Any] = [torch.cat([c[:-1], (c[-1:] + 1) % 7]) for c in batch.completions]
    with _testing(model):
        alone, together = _one_by_one(model, batch), padded_logps(model, batch)
        otherwise = _one_by_one(model, replace(batch, completions=last))
    if not _equal(together, alone, eps):
        off = float((together - alone).abs().max())
        return f"beside longer rows a token's log-prob differs by up to {off:.2g} nats from its value without padding"
    before = torch.arange(alone.shape[1], device=alone.device) < completion_mask(batch).sum(dim=1, keepdim=True) - 1
    if not _equal(otherwise.where(before, alone), alone, eps):
        return "a token's log-prob depends on later tokens: as configured, this is not a causal language model"
    return None
