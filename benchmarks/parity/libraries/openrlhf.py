"""OpenRLHF: formulas written out from ``openrlhf/models/loss.py`` and its trainers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from parity.batch import Batch
from parity.formulas import clipped, of_tokens, smoothed, standardised, thumbs
from parity.library import Library

LIBRARY = Library("OpenRLHF", "OpenRLHF/OpenRLHF", "3c3be6234e0cb353e76bb8019947db9dfe99fca7")


def dpo(batch: Batch, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_loss_coef: float = 0.0) -> Tensor:
    """``DPOLoss``; the likelihood is a mean over chosen rows of their means over tokens."""
    likelihood = (batch.logp / batch.length)[batch.good].mean()
    return smoothed(beta * batch.margin(batch.r), label_smoothing).mean() - nll_loss_coef * likelihood


def ipo(batch: Batch, *, beta: float = 0.1) -> Tensor:
    """``DPOLoss`` with ``ipo``: log-ratios are sums."""
    return (batch.margin(batch.r) - 1 / (2 * beta)).pow(2).mean()


def sft(batch: Batch, *, token_level: bool = True) -> Tensor:
    """``SFTLoss``."""
    if token_level:
        return -batch.policy[batch.good].sum() / batch.mask[batch.good].sum()
    return -(batch.logp / batch.length)[batch.good].mean()


def reward_model(batch: Batch, *, margin: bool = False) -> Tensor:
    """``PairWiseLoss``."""
    apart = batch.margin(batch.scalar)
    return -logsigmoid(apart - batch.margin(batch.labels.score) if margin else apart).mean()


def log_exp(batch: Batch) -> Tensor:
    """``LogExpLoss``, which takes a margin and does not use it."""
    return torch.log(1 + torch.exp(-batch.margin(batch.scalar))).mean()


def policy(batch: Batch, *, group_norm: bool = True, token_level: bool = True, kl: float = 0.0) -> Tensor:
    """``PolicyLoss`` of type ``ppo``, with advantages of ``group_norm`` or +1 and -1, and a KL loss (``k3``)."""
    advantage = standardised(batch, correction=1, eps=1e-9) if group_norm else thumbs(batch)
    ratio = batch.ratio[batch.train]
    of_each = clipped(ratio.clamp(-20, 20).exp(), advantage[:, None], 0.2, 0.2)
    of_each = of_each + kl * (torch.exp(-ratio) - 1 + ratio).clamp(-10, 10)
    if token_level:
        return of_tokens(batch, of_each)
    return (torch.where(batch.mask[batch.train], of_each, 0.0).sum(1) / batch.length[batch.train]).mean()


def gspo(batch: Batch, *, low: float, high: float) -> Tensor:
    """``PolicyLoss`` of type ``gspo``, with advantages of ``group_norm`` and no KL loss."""
    advantage = standardised(batch, correction=1, eps=1e-9)
    return clipped((batch.r / batch.length)[batch.train].exp(), advantage, low, high).mean()
