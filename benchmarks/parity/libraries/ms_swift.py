"""ms-swift: formulas written out from ``swift/rlhf_trainers``."""

from __future__ import annotations

import torch
from torch import Tensor

from parity.batch import Batch
from parity.formulas import clipped, of_prompts, of_tokens, running_bco, shared_length, smoothed, standardised
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


def grpo(
    batch: Batch,
    *,
    loss_type: str = "grpo",
    level: str = "token",
    advantage: str = "group",
    beta: float = 0.04,
    epsilon: tuple[float, float] = (0.2, 0.2),
    fipo_safety_threshold: float = 4.0,
) -> Tensor:
    """``GRPOTrainer`` with the reference as the old policy.

    Advantages are those of ``scale_rewards: group``, or ours. ``max_completion_length`` is 16.
    """
    rows, length = batch.train, batch.length[batch.train]
    correction, eps = {"group": (1, 1e-4), "ours": (0, 1e-2)}[advantage]
    weight = standardised(batch, correction=correction, eps=eps)[:, None]
    log_ratio, logp = batch.ratio[rows], batch.policy[rows]
    of_level = {
        "token": log_ratio,
        "sequence": (batch.r[rows] / length)[:, None].expand_as(log_ratio),
        "sequence_token": logp - logp.detach() + (batch.r[rows] / length)[:, None].detach(),
    }
    ratio = of_level[level].exp()
    if loss_type == "cispo":
        of_each = -ratio.detach().clamp(max=epsilon[1]) * weight * logp
    elif loss_type == "sapo":
        tau = torch.where(weight > 0, 1.0, 1.05)
        of_each = -weight * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    else:
        of_each = clipped(ratio, weight, *epsilon)
    if loss_type == "fipo":
        of_each = of_each * _influence(batch, weight, fipo_safety_threshold)
    of_each = torch.where(batch.mask[rows], of_each + beta * (torch.exp(-log_ratio) + log_ratio - 1), 0.0)
    if loss_type in ("grpo", "sapo"):
        return (of_each.sum(1) / length).mean()
    if loss_type == "dr_grpo":
        return of_each.sum() / (len(rows) * 16)
    return of_tokens(batch, of_each)


def _influence(batch: Batch, advantage: Tensor, threshold: float) -> Tensor:
    """FIPO's weights [2 * pairs, T] with a half-life of 32 tokens and a clip range of [1, 1.2]; constant."""
    ratio = batch.ratio[batch.train].detach()
    place = torch.arange(ratio.shape[1])
    ahead = place[None, :] - place[:, None]  # from a row's token to a column's one
    decay = torch.where(ahead >= 0, 0.5 ** (ahead.clamp(min=0) / 32), 0.0)
    weight = (ratio @ decay.T).exp().clamp(1.0, 1.2)
    return torch.where((advantage < 0) & (ratio.exp() > threshold), weight.clamp(0.8, 1.0), weight)


def real(batch: Batch, *, rewards: str = "labels", tau: float = 0.5) -> Tensor:
    """``loss_type: real`` with beta 0. The advantage's sign is the class; rewards are 1 and 0, or the scores."""
    score, losses = (batch.r / batch.length) / tau, []
    for rows in of_prompts(batch):
        reward = batch.labels.desirable[rows].float() if rewards == "labels" else batch.labels.score[rows]
        good = reward > reward.mean()
        losses += [torch.log1p(torch.exp(-score[rows[good]]).sum()), torch.log1p(torch.exp(score[rows[~good]]).sum())]
    return torch.stack(losses).sum() / (len(losses) / 2)
