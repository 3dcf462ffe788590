"""HALOs, the code of the KTO paper: formulas written out from ``train/trainers.py``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from parity.batch import PROMPT, Batch
from parity.formulas import clipped, kto_of_rows, of_tokens, reflected, smoothed, standardised
from parity.library import Library

LIBRARY = Library("HALOs", "ContextualAI/HALOs", "4831988636b4cbc1c30c0bce78df568cf0f8103b")


def _reward(tokens: Tensor, humanline: bool) -> Tensor:
    return (tokens.clamp(-1.0, 1.5) if humanline else tokens).sum(1)


def _mean(tokens: Tensor) -> Tensor:
    """Divides by the number of tokens whose value is not 0."""
    return tokens.sum(1) / (tokens != 0).sum(1).clamp(min=1)


def dpo(batch: Batch, *, beta: float = 0.1, epsilon: float = 0.0, humanline: bool = False) -> Tensor:
    """``DPOTrainer``, and ``CDPOTrainer`` with epsilon."""
    return smoothed(beta * batch.margin(_reward(batch.ratio, humanline)), epsilon).mean()


def ipo(batch: Batch, *, tau: float = 0.1) -> Tensor:
    """``IPOTrainer``."""
    return (batch.margin(_mean(batch.ratio)) - 1 / (2 * tau)).pow(2).mean()


def simpo(batch: Batch, *, beta: float, gamma_beta_ratio: float) -> Tensor:
    """``SimPOTrainer``."""
    return -logsigmoid(beta * (batch.margin(_mean(batch.policy)) - gamma_beta_ratio)).mean()


def slic(batch: Batch, *, beta: float = 1.0, lambda_coef: float = 0.1) -> Tensor:
    """``SLiCTrainer`` on micro-batches of one pair, as (pairs,) + (pairs, positions) does not add up for others.

    The mean is over positions of the padded rows, prompt included.
    """
    losses = []
    for pair in batch.each():
        hinge = torch.relu(beta - pair.margin(pair.logp))
        positions = PROMPT + int(pair.length[pair.train].max())
        losses.append(hinge.mean() - lambda_coef * pair.logp[pair.good].sum() / positions)
    return torch.stack(losses).mean()


def kto(
    batch: Batch,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    micro_batches: int = 1,
    humanline: bool = False,
) -> Tensor:
    """``KTOTrainer``: a mean over the rows of a micro-batch; z0 is a mean over the mismatched rows whose r is not 0."""
    losses = []
    for part in batch.halves() if micro_batches == 2 else (batch,):
        r = _reward(part.ratio, humanline)
        kl = r[part.mismatched].detach()
        z0 = (kl.sum() / (kl != 0).sum().clamp(min=1)).clamp(min=0)
        losses.append(kto_of_rows(part, r, z0, beta, desirable_weight, undesirable_weight).mean())
    return torch.stack(losses).mean()


def grpo(batch: Batch, *, beta: float = 0.04, epsilon: float = 0.2, humanline: bool = False) -> Tensor:
    """``GRPOTrainer``."""
    ratio = batch.ratio[batch.train]
    kept = ratio.clamp(-1.0, 1.5) if humanline else ratio
    advantage = standardised(batch, correction=0, eps=1e-2)[:, None]
    return of_tokens(batch, clipped(kept.exp(), advantage, epsilon, epsilon) + beta * (torch.exp(-ratio) + ratio - 1))


def bradley_terry(batch: Batch) -> Tensor:
    """``BradleyTerryTrainer``."""
    margin = batch.margin(batch.scalar)
    return torch.nn.functional.binary_cross_entropy_with_logits(margin, torch.ones_like(margin))


def sft(batch: Batch) -> Tensor:
    """``SFTTrainer``."""
    return -batch.policy[batch.good].sum() / batch.mask[batch.good].sum()


def dpo_sigmoid(batch: Batch, *, beta: float = 0.1) -> Tensor:
    """``DPOSigmoidTrainer`` of the branch legacy."""
    return -torch.sigmoid(beta * batch.margin(batch.r)).mean()


def kto_legacy(batch: Batch, *, variant: str, beta: float = 0.1) -> Tensor:
    """``KTOZeroTrainer``, ``KTOLogSigmoidTrainer`` or ``KTOSurprisalTrainer`` of the branch legacy."""
    r = batch.logp / batch.length if variant == "surprisal" else batch.r
    mean = r[batch.mismatched].mean().detach()
    z0 = {"zero": torch.zeros_like(mean), "log_sigmoid": mean.clamp(min=0), "surprisal": mean}[variant]
    gain = beta * reflected(batch, r - z0)
    return (-logsigmoid(gain) if variant == "log_sigmoid" else 1 - torch.sigmoid(gain)).mean()


def csft(batch: Batch) -> Tensor:
    """``SFTTrainer`` and ``ConditionalSFTDataLoader`` of the branch legacy: a sum over tokens, a mean over rows."""
    return -batch.logp[batch.train].mean()
