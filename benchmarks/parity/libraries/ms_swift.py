"""ms-swift: formulas written out from ``swift/rlhf_trainers``, where they are not those of TRL 1.16."""

from __future__ import annotations

import torch
from torch import Tensor

from parity.batch import Batch
from parity.formulas import running_bco, shared_length, smoothed
from parity.library import Library

LIBRARY = Library("ms-swift", "modelscope/ms-swift", "3602360a562313afbf2ef6065fdf61f271a2c5b9")


def dpo(batch: Batch, *, beta: float = 0.1, label_smoothing: float = 0.0, rpo_alpha: float = 0.0) -> Tensor:
    """``loss_type: sigmoid``; the likelihood is a mean over the chosen rows' tokens."""
    likelihood = batch.policy[batch.good][batch.mask[batch.good]].mean()
    return smoothed(beta * batch.margin(batch.r), label_smoothing).mean() - rpo_alpha * likelihood


def ld_dpo(batch: Batch, *, ld_alpha: float, beta: float = 0.1) -> Tensor:
    """``loss_type: sigmoid`` with ``ld_alpha``, which weighs the policy's tokens and not the reference's."""
    logp = (torch.where(shared_length(batch), 1.0, ld_alpha) * batch.policy).sum(1)
    return smoothed(beta * batch.margin(logp - batch.reference.sum(1))).mean()


def ipo(batch: Batch, *, beta: float = 0.1) -> Tensor:
    """``loss_type: ipo``: log-probs are divided by the number of tokens, under both models."""
    return (batch.margin(batch.r / batch.length) - 1 / (2 * beta)).pow(2).mean()


def bco_pair(batch: Batch, *, beta: float = 0.1, after: Batch | None = None) -> Tensor:
    """``loss_type: bco_pair``."""
    return running_bco(batch, beta, after)
