"""The log-prob engine: from a flat batch and a model to log-probs of completion tokens.

Prompts are padded on the left and completions on the right, so that every completion starts in the same
column and the model's head runs on completion positions only: no tensor of rows x length x vocabulary.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from halos_pl.batch import TokenBatch
from halos_pl.policy.head import compared_tokens, is_plain, of_shared_ids
from halos_pl.policy.loading import base_model
from halos_pl.policy.memory import recomputed
from halos_pl.policy.tree import is_packed, parts, same, self_test_batch, takes_trees, tree_logps, tree_states


def token_mask(batch: TokenBatch) -> Tensor:
    """BoolTensor [n, T]: which places of the rows' completions, padded on the right to T, hold a token."""
    lengths = torch.tensor([len(c) for c in batch.completions], device=batch.prompt.device)
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def completion_mask(batch: TokenBatch) -> Tensor:
    """BoolTensor [n, T]: which places of the rows' completions, padded on the right to T, hold a token with loss."""
    mask = token_mask(batch)
    for row, loss in enumerate(batch.loss or ()):
        if loss is not None:
            mask[row, : len(loss)] &= loss
    return mask


def _accepts(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _completion_logits(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Logits float32 [n, T, V] that predict each completion token, and the tokens LongTensor [n, T]."""
    targets = pad_sequence(batch.completions, batch_first=True)
    mask = token_mask(batch)
    prompts = [batch.prompts[i] for i in batch.prompt.tolist()]
    context = pad_sequence(prompts, batch_first=True, padding_side="left")
    real = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    attention_mask = torch.cat([real, mask.long()], dim=1)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([context, targets], dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        "use_cache": False,
    }
    # The logits of a column predict the token of the next one.
    first, count = context.shape[1] - 1, targets.shape[1]
    columns = torch.arange(first, first + count, device=targets.device)
    base = base_model(model)  # a peft model takes anything and hands it on
    if not _accepts(base, "position_ids"):
        del inputs["position_ids"]
    if _accepts(base, "logits_to_keep"):
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    return logits.float(), targets


def completion_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Log-probs of the completion tokens under ``model``, by the way that it is ready for (see :func:`pack`).

    Args:
        model: a causal language model of transformers, or a peft model around one.
        batch: n rows.

    Returns:
        float32 [n, T], whatever the model's dtype; 0 where a row has no token with loss (see
        :func:`completion_mask`). Of a packed model, mismatched rows have no gradient.
    """
    with recomputed():
        return tree_logps(model, batch) if is_packed(model) else padded_logps(model, batch)


def pack(model: nn.Module) -> str | None:
    """Makes ``model`` share prompts between rows and go without padding; says why not where it cannot."""
    return takes_trees(model, _alone_logps)


def _alone_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Each row in a batch of its own, so that nothing is padded."""
    out = torch.zeros(completion_mask(batch).shape, dtype=torch.float32, device=batch.prompt.device)
    for i in range(len(batch)):
        found = padded_logps(model, batch.select(torch.tensor([i], device=batch.prompt.device)))[0]
        out[i, : len(found)] = found
    return out


@torch.no_grad()
def padding_fault(model: nn.Module) -> str | None:
    """Why :func:`padded_logps` would be wrong of ``model``: what it says of made-up rows; None where it is right.

    A model that takes no positions may count padding among them, or carry it along in a state; and one whose
    attention is not causal sees what it is to predict.
    """
    batch, base, training = self_test_batch(model), base_model(model), model.training
    eps = torch.finfo(next(base.parameters()).dtype).eps
    last = replace(batch, completions=[torch.cat([c[:-1], (c[-1:] + 1) % 7]) for c in batch.completions])
    model.eval()
    alone, together, otherwise = _alone_logps(model, batch), padded_logps(model, batch), _alone_logps(model, last)
    model.train(training)
    if not same(together, alone, eps):
        off = float((together - alone).abs().max())
        return f"beside longer rows a token's log-prob differs by up to {off:.2g} nats from what it is without padding"
    before = torch.arange(alone.shape[1], device=alone.device) < completion_mask(batch).sum(dim=1, keepdim=True) - 1
    if not same(otherwise.where(before, alone), alone, eps):
        return "a token's log-prob depends on the tokens behind it: it is no causal language model as configured"
    return None


def padded_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """The plain way: each row by itself, prompts padded on the left and completions on the right."""
    logits, targets = _completion_logits(model, batch)
    logps = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    # where, not a product: a padded place may hold anything, and 0 * inf is not 0.
    return torch.where(completion_mask(batch), logps, 0.0)


@torch.no_grad()
def compared_logps(
    policy: nn.Module, reference: AbstractContextManager[nn.Module], batch: TokenBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the completion tokens under two models, and KL(policy || reference) at each of them.

    The divergence is summed over the whole vocabulary, exact at every position given its prefix. Where the completions
    were sampled from the policy, its sum over a completion's tokens is an unbiased, low-variance estimate of the
    sequences' KL divergence. Packed models compute shared prompts once.

    Args:
        policy: the model whose expectation is taken.
        reference: entered to get the other model; may be the policy with its adapter off.
        batch: n rows.

    Returns:
        log-probs under the policy, under the reference, and the divergence: nats, float32 [n, T] each, 0 where a row
        has no token with loss.
    """
    packed = is_packed(policy) and is_plain(parts(policy)[1])
    own = list(tree_states(policy, batch)) if packed else []
    with reference as model:
        if packed and is_packed(model) and is_plain(parts(model)[1]):
            heads = parts(policy)[1], parts(model)[1]
            out = [torch.zeros_like(completion_mask(batch), dtype=torch.float32) for _ in range(3)]
            for p, q in zip(own, tree_states(model, batch), strict=True):
                for to, found in zip(out, compared_tokens(heads, (p.hidden, q.hidden), p.targets), strict=True):
                    to[p.row, p.column] = found
            return out[0], out[1], out[2]
        logits, targets = _completion_logits(model, batch)
        log_q = logits.log_softmax(dim=-1)
    log_p, log_q = of_shared_ids(_completion_logits(policy, batch)[0].log_softmax(dim=-1), log_q)
    of_target = (x.gather(2, targets[:, :, None]).squeeze(2) for x in (log_p, log_q))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    mask = completion_mask(batch)
    of_policy, of_reference, kl = (torch.where(mask, x, 0.0) for x in (*of_target, kl))
    return of_policy, of_reference, kl


def completion_kl(policy: nn.Module, reference: AbstractContextManager[nn.Module], batch: TokenBatch) -> Tensor:
    """KL(policy || reference) along given completions, nats, float32 [n, T]; see :func:`compared_logps`."""
    return compared_logps(policy, reference, batch)[2]
