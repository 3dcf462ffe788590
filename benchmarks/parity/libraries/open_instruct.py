"""open-instruct: formulas written out from ``open_instruct/dpo_utils.py`` and ``grpo_utils.py``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from parity.batch import Batch
from parity.formulas import centred, clipped, of_tokens, smoothed, standardised, thumbs
from parity.library import Library

LIBRARY = Library("open-instruct", "allenai/open-instruct", "e6c3044aa6201c8bfa4573c1b03142af599e730d")


def dpo(batch: Batch, *, beta: float = 0.1, label_smoothing: float = 0.0, norm: bool = False) -> Tensor:
    """``dpo``, and ``dpo_norm`` on means over tokens."""
    r = batch.r / batch.length if norm else batch.r
    return smoothed(beta * batch.margin(r), label_smoothing).mean()


def simpo(batch: Batch, *, beta: float, gamma_beta_ratio: float) -> Tensor:
    """``simpo``."""
    return smoothed(beta * (batch.margin(batch.logp / batch.length) - gamma_beta_ratio)).mean()


def wpo(batch: Batch, *, beta: float = 0.1) -> Tensor:
    """``wpo`` on micro-batches of one pair: log-probs that are sums already are averaged over the mask once more.

    So a pair weighs the probability of both completions, with gradient; more pairs than one do not add up.
    """
    losses = []
    for pair in batch.each():
        weight = (pair.logp[pair.good] + pair.logp[pair.bad]).exp().clamp(max=1)
        losses.append((weight * smoothed(beta * pair.margin(pair.r))).mean())
    return torch.stack(losses).mean()


def cispo(batch: Batch, *, clip: float, advantage: str = "centered") -> Tensor:
    """``cispo`` without a KL term, ``loss_denominator: token``."""
    of_rows = {"centered": centred(batch), "ours": standardised(batch, correction=0, eps=1e-2)}[advantage]
    ratio = batch.ratio[batch.train].exp().detach().clamp(max=1 + clip)
    return of_tokens(batch, -of_rows[:, None] * ratio * batch.policy[batch.train])


def grpo(batch: Batch, *, advantage: str = "centered", clip: float = 0.2) -> Tensor:
    """``dapo`` without a KL term, ``loss_denominator: token``."""
    of_rows = {
        "centered": centred(batch),
        "standard": standardised(batch, correction=0, eps=1e-8),
        "thumbs": thumbs(batch),
    }
    return of_tokens(batch, clipped(batch.ratio[batch.train].exp(), of_rows[advantage][:, None], clip, clip))


def reward_model(batch: Batch) -> Tensor:
    """``reward_modeling.py``."""
    return -logsigmoid(batch.margin(batch.scalar)).mean()
