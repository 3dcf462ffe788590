"""The KL divergence between two models along the tokens of completions, over the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from halos_pl.batch import TokenBatch
from halos_pl.policy.architecture import vocabulary_size
from halos_pl.policy.head import most_logits
from halos_pl.policy.logprobs import completion_mask
from halos_pl.policy.scorer import Scorer, scorer_of
from halos_pl.policy.sharding import is_sharded, most_over_ranks


class Scoring(Protocol):
    """An object with a model to compare the policy with, such as a reference."""

    @property
    def scoring(self) -> Callable[[], AbstractContextManager[Scorer]]:
        """Returns a context manager that gives the model."""


def _of_shared_ids(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs [..., size] of the ids that both models have; with the same tokenizer, unused ids may differ."""
    width = min(log_p.shape[-1], log_q.shape[-1])
    return log_p[..., :width], log_q[..., :width]


def _compared(log_p: Tensor, log_q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p and log q of the targets [...], and KL(p || q) at each of them, from log-probs [..., V]."""
    log_p, log_q = _of_shared_ids(log_p, log_q)
    of_target = (x.gather(-1, targets[..., None]).squeeze(-1) for x in (log_p, log_q))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return (*of_target, kl)  # type: ignore[return-value]


def _tokens(
    policy: Scorer, reference: Scoring, batch: TokenBatch
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
    """Yields (rows, columns, compared) for a few tokens at a time, so that memory does not grow with the vocabulary."""
    model = scorer_of(policy).model
    ours = policy(batch, wanted="states")
    with reference.scoring() as other:
        theirs = other(batch, wanted="states")
    for p, q in zip(ours, theirs, strict=True):
        logits = len(p.targets) * vocabulary_size(model)
        chunks = max(1, math.ceil(logits / most_logits(p.hidden.device)))
        if is_sharded(model):  # each product with a sharded head is a collective operation
            (chunks,) = most_over_ranks(chunks)
        pieces = zip(*(x.tensor_split(chunks) for x in (p.hidden, q.hidden, p.targets, p.row, p.column)), strict=True)
        for of_policy, of_reference, targets, row, column in pieces:
            log_p = policy(hidden=of_policy).log_softmax(dim=1)
            with reference.scoring() as other:
                log_q = other(hidden=of_reference).log_softmax(dim=1)
            yield row, column, _compared(log_p, log_q, targets)


@torch.no_grad()
def compared_logps(policy: Scorer, reference: Scoring, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the completion tokens under two models, and KL(policy || reference) at each of them.

    The divergence is summed over the whole vocabulary, so it is exact at every position given its prefix. If the
    completions were sampled from the policy, its sum over a completion's tokens is an unbiased, low-variance estimate
    of the KL divergence between sequences.

    Args:
        policy: model over which the expectation is taken.
        reference: source of the other model, which may be the policy with its adapter off.
        batch: n rows.

    Returns:
        Log-probs under the policy, log-probs under the reference, and the divergence: nats, float32 [n, T] each, 0
        where a row has no token with loss.
    """
    with reference.scoring() as other:
        shared = scorer_of(policy).shares_prefixes and other.shares_prefixes
        log_q = None if shared else other(batch, wanted="logits").log_softmax(dim=-1)
    mask = completion_mask(batch)
    out = [torch.zeros_like(mask, dtype=torch.float32) for _ in range(3)]
    if log_q is None:
        for row, column, figures in _tokens(policy, reference, batch):
            for whole, some in zip(out, figures, strict=True):
                whole[row, column] = some
    else:
        targets = torch.nn.utils.rnn.pad_sequence(batch.completions, batch_first=True)
        log_p = policy(batch, wanted="logits").log_softmax(dim=-1)
        out = [torch.where(mask, figures, 0.0) for figures in _compared(log_p, log_q, targets)]
    return out[0], out[1], out[2]


def completion_kl(policy: Scorer, reference: Scoring, batch: TokenBatch) -> Tensor:
    """KL(policy || reference) at each completion token, nats, float32 [n, T]; see :func:`compared_logps`."""
    return compared_logps(policy, reference, batch)[2]
