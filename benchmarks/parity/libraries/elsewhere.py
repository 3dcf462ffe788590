"""Losses of repositories that are no library, mostly their authors', and of papers whose code was not read.

Each row of the table names its repository. Formulas are written out from the lines that the row refers to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from parity.batch import Batch
from parity.formulas import centred, of_prompts, of_tokens, reflected, smoothed, standardised
from parity.library import Library

LIBRARY = Library("Elsewhere")


def npo(batch: Batch, *, per: str = "row", reference: bool = True, beta: float = 0.1) -> Tensor:
    """NPO and SimNPO, which forget the rejected rows.

    ``per`` says what is compared: the log-prob of a row, of its mean token, or of the mean token of all rows.
    """
    values, length = (batch.ratio if reference else batch.policy)[batch.bad].sum(1), batch.length[batch.bad]
    compared = {"row": values, "token": values / length, "batch": values.sum() / length.sum()}[per]
    return -logsigmoid(-beta * compared).mean() * 2 / beta


def unlikelihood(batch: Batch) -> Tensor:
    """A step takes ``mle_loss`` or ``ul_seq``, each with probability 1/2; here their mean."""
    likelihood = -batch.policy[batch.good][batch.mask[batch.good]].mean()
    other = (1 - batch.policy[batch.bad][batch.mask[batch.bad]].exp()).clamp(min=1e-20)
    return (likelihood - other.log().mean()) / 2


def simper(batch: Batch) -> Tensor:
    """``loss_type: SimPER``."""
    return -batch.margin((batch.logp / batch.length).exp()).mean()


def repo(batch: Batch, *, gamma: float = 0.5) -> Tensor:
    """``loss_type: repo``, with gamma for ``gamma_beta_ratio``."""
    return torch.relu(gamma - batch.margin(batch.logp / batch.length)).mean()


def alpha_dpo(batch: Batch, *, kept: float, beta: float = 2.5, gamma: float = 0.3, alpha: float = 0.05) -> Tensor:
    """``loss_type: alpha-dpo`` at the first step; ``kept`` is the share of the moving averages, which start from 0."""
    gap = batch.margin(batch.r / batch.length).detach()
    mean, std = (1 - kept) * gap.mean(), (1 - kept) * gap.std()
    margin = gamma + alpha * (gap - mean) / std
    return smoothed(beta * (batch.margin(batch.logp / batch.length) - margin)).mean()


def gamma_po(batch: Batch, *, beta: float = 2.0, gamma_beta_ratio: float = 0.5, tau: float = 10.0) -> Tensor:
    """``loss_type: gm-simpo`` without its queue of pairs of earlier steps."""
    gap, gamma = beta * batch.margin(batch.logp / batch.length), beta * gamma_beta_ratio
    share = torch.full_like(gap, 1 / len(gap))
    for _ in range(20):
        slope = tau * (1 + torch.log(len(gap) * (share + 1e-10)))
        slope = slope + gamma / (1 + torch.exp(gap.detach() - gamma * len(gap) * share))
        share = share * torch.exp(-min(0.5 / tau, 1) * slope)
        share = share / share.sum()
    return smoothed(gap - gamma * len(gap) * share).mean()


def mnpo(batch: Batch, *, normalised: bool = True, eta: float = 0.0075) -> Tensor:
    """``mnpo_loss``; the reference's log-probs stand for the weighted ones of all earlier policies."""
    return (batch.margin(batch.r / batch.length if normalised else batch.r) - 1 / (2 * eta)).pow(2).mean()


def madpo(batch: Batch, *, beta: float = 0.1, most: float = 2.0, least: float = 0.5, tau: float = 2.0) -> Tensor:
    """``MADPOLoss`` with ``lmbda`` 1 and the data's scores in place of a reward model's."""
    apart = batch.margin(batch.labels.score)
    c = least + (most - least) / (1 + (most - 1) / (1 - least) * torch.exp(apart.abs() - tau))
    weight = torch.where(apart > -tau, torch.sigmoid(c * apart) / torch.sigmoid(apart), 1.0)
    return (weight * smoothed(beta * batch.margin(batch.r))).mean()


def beta_dpo(batch: Batch, *, beta: float = 0.1, a: float = 0.6) -> Tensor:
    """``mode_loss: beta_DPO`` without its random choice of pairs, at the first step: the moving average is 0 before."""
    gap = batch.margin(batch.r)
    mean = gap.detach().mean()
    return smoothed((beta * (1 + a * (mean - 0.1 * mean))).clamp(min=1e-3) * gap).mean()


def wpo(batch: Batch, *, beta: float = 0.1) -> Tensor:
    """WPO, with the weights of two tokens, p and 1 - p, as the batch has no other ones."""
    p = batch.policy.exp()
    aligned = torch.where(batch.mask, batch.policy - torch.log(p.square() + (1 - p).square()), 0.0).sum(1)
    weight = aligned / batch.length
    weight = (weight[batch.good] + weight[batch.bad]).exp().clamp(max=1).detach()
    return (weight * smoothed(beta * batch.margin(batch.r))).mean()


def nca_pair(batch: Batch, *, beta: float = 0.1) -> Tensor:
    """``NCATrainer_pairwise``, ``loss_type: NCA``."""
    good, bad = beta * batch.r[batch.good], beta * batch.r[batch.bad]
    return (-logsigmoid(good) - logsigmoid(-good) / 2 - logsigmoid(-bad) / 2).mean()


def infonca(batch: Batch, *, beta: float = 0.1, first: float = 0.0) -> Tensor:
    """``NCATrainer``, ``loss_type: InfoNCA``; ``first`` is added to the score of a prompt's first completion."""
    losses = []
    for rows in of_prompts(batch):
        score = batch.labels.score[rows]
        label = torch.softmax(score + first * (score == score.max()), 0)
        losses.append(-(label * torch.log_softmax(beta * batch.r[rows], 0)).sum())
    return torch.stack(losses).mean()


def plackett_luce(batch: Batch, *, beta: float = 0.1) -> Tensor:
    """-log of the probability of the ranking by score, mean over prompts."""
    losses = []
    for rows in of_prompts(batch):
        reward = beta * batch.r[rows[batch.labels.score[rows].argsort()]]  # the worst first
        losses.append((torch.logcumsumexp(reward, 0) - reward).sum())
    return torch.stack(losses).mean()


def rebel(batch: Batch, *, eta: float = 1.0) -> Tensor:
    """The regression of ``rebel.py``, without the KL penalty on its rewards."""
    return (batch.margin(batch.r) - eta * batch.margin(batch.labels.score)).pow(2).mean()


def astar_po(batch: Batch, *, beta1: float = 0.5, beta2: float = 0.1) -> Tensor:
    """``compute_policy_loss``; a prompt's rows stand for the samples that V is estimated from."""
    losses = []
    for rows in of_prompts(batch):
        score = batch.labels.score[rows]
        losses.append(beta2 * batch.r[rows] + beta1 * torch.exp(score / beta1).mean().log() - score)
    return torch.cat(losses).pow(2).mean()


def dro(batch: Batch) -> Tensor:
    """(s - V - r)^2 / 2, where the mean score of a prompt's rows stands for a learned V."""
    return ((centred(batch) - batch.r[batch.train]).pow(2) / 2).mean()


def dro_of_tokens(batch: Batch, *, beta: float = 1.0) -> Tensor:
    """``loss_mode: dro``, with s - V as advantage."""
    advantage, ratio = centred(batch)[:, None], batch.ratio[batch.train]
    return of_tokens(batch, beta / 2 * ratio.square() - batch.policy[batch.train] * advantage)


def qrpo(batch: Batch, *, transform: str = "identity", beta: float = 0.1) -> Tensor:
    """``qrpo_loss``; a prompt's rows stand for the completions of the reference model."""
    losses = []
    log_z = {"identity": torch.tensor(beta).log() + 1 / beta, "log": torch.tensor(beta / (1 + beta)).log()}[transform]
    for rows in of_prompts(batch):
        score = batch.labels.score[rows]
        quantile = (score[None, :] <= score[:, None]).float().mean(1)
        reward = quantile if transform == "identity" else quantile.log()
        losses.append(reward - beta * log_z - beta * batch.r[rows])
    return torch.cat(losses).pow(2).mean()


def dppo(batch: Batch, *, cap: float, low: float = 0.2, high: float = 0.2) -> Tensor:
    """DPPO-Binary-TV with our advantages and the reference as the rollout policy."""
    logp, ratio = batch.policy[batch.train], batch.ratio[batch.train].detach().exp()
    advantage = standardised(batch, correction=0, eps=1e-2)[:, None]
    moved = logp.detach().exp() - batch.reference[batch.train].exp()
    kept = torch.where(advantage > 0, moved <= high, moved >= -low)
    return of_tokens(batch, -advantage * ratio.clamp(max=cap) * kept * logp)


def kto(batch: Batch, *, value: str = "logistic", reference: bool = True, beta: float = 0.1) -> Tensor:
    """KTO with the value functions of its paper, or without a reference model."""
    r = batch.r if reference else batch.logp
    z0 = r[batch.mismatched].mean().detach()
    gain = beta * reflected(batch, r - (z0.clamp(min=0) if reference else z0))
    values = {
        "logistic": torch.sigmoid(gain) - 1,
        "identity": gain,
        "kahneman_tversky": gain.abs().pow(0.88) * torch.where(gain < 0, -2.25, 1.0),
    }
    return -values[value].mean()
