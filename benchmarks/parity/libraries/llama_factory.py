"""LLaMA-Factory: formulas written out from its trainers and from TRL 0.24, whose losses they call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from parity.batch import Batch
from parity.formulas import kto_of_rows, odds, running_bco, shared_length, smoothed
from parity.library import Library

LIBRARY = Library("LLaMA-Factory", "hiyouga/LLaMA-Factory", "ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30")


def _mean(batch: Batch) -> Tensor:
    return batch.logp / batch.length


def dpo(
    batch: Batch,
    *,
    pref_beta: float = 0.1,
    dpo_label_smoothing: float = 0.0,
    ld_alpha: float = 1.0,
    pref_ftx: float = 0.0,
) -> Tensor:
    """``pref_loss: sigmoid``; ``ld_alpha`` weighs the policy's tokens and not the reference's."""
    logp = (torch.where(shared_length(batch), 1.0, ld_alpha) * batch.policy).sum(1)
    losses = smoothed(pref_beta * batch.margin(logp - batch.reference.sum(1)), dpo_label_smoothing)
    return (losses - pref_ftx * (logp / batch.length)[batch.good]).mean()


def hinge(batch: Batch, *, pref_beta: float = 0.1) -> Tensor:
    """``pref_loss: hinge``."""
    return torch.relu(1 - pref_beta * batch.margin(batch.r)).mean()


def ipo(batch: Batch, *, pref_beta: float = 0.1) -> Tensor:
    """``pref_loss: ipo``: log-probs are divided by the number of tokens, under both models."""
    return (batch.margin(batch.r / batch.length) - 1 / (2 * pref_beta)).pow(2).mean()


def simpo(batch: Batch, *, pref_beta: float, simpo_gamma: float) -> Tensor:
    """``pref_loss: simpo``."""
    return -logsigmoid(pref_beta * (batch.margin(_mean(batch)) - simpo_gamma / pref_beta)).mean()


def orpo(batch: Batch, *, pref_beta: float = 0.1) -> Tensor:
    """``pref_loss: orpo``."""
    mean = _mean(batch)
    return (-mean[batch.good] - pref_beta * logsigmoid(batch.margin(odds(mean)))).mean()


def bco(batch: Batch, *, pref_beta: float = 0.1, after: Batch | None = None) -> Tensor:
    """The term that ``pref_bco_weight`` adds to DPO."""
    return running_bco(batch, pref_beta, after)


def kto(
    batch: Batch,
    *,
    pref_beta: float = 0.1,
    kto_chosen_weight: float = 1.0,
    kto_rejected_weight: float = 1.0,
    pref_ftx: float = 0.0,
    micro_batches: int = 1,
    ranks: int = 1,
) -> Tensor:
    """KTO. With two ``ranks``, one has two rows and the other six; the loss is the mean of theirs."""
    parts: tuple[Batch, ...] = (batch,)
    if micro_batches == 2:
        parts = batch.halves()
    elif ranks == 2:
        parts = batch.of_pairs(0), batch.of_pairs(1, 2, 3)
    means = torch.stack([part.r[part.mismatched].detach().mean() for part in parts])
    z0 = (means.mean().expand_as(means) if ranks == 2 else means).clamp(min=0)
    losses = []
    for part, mean in zip(parts, z0, strict=True):
        loss = kto_of_rows(part, part.r, mean, pref_beta, kto_chosen_weight, kto_rejected_weight).mean()
        likelihood = _mean(part)[part.good].mean() / len(part.good) * len(part.train)
        losses.append(loss - pref_ftx * likelihood)
    return torch.stack(losses).mean()


def reward_model(batch: Batch) -> Tensor:
    """``stage: rm``."""
    return -logsigmoid(batch.margin(batch.scalar)).mean()
