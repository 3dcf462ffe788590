"""Pieces that formulas of several libraries have in common."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from parity.batch import Batch


def smoothed(x: Tensor, epsilon: float = 0.0) -> Tensor:
    """-(1 - epsilon) log sigmoid(x) - epsilon log sigmoid(-x)."""
    return -(1 - epsilon) * logsigmoid(x) - epsilon * logsigmoid(-x)


def kto_of_rows(batch: Batch, r: Tensor, z0: Tensor, beta: float, desirable: float, undesirable: float) -> Tensor:
    """[2 * pairs], w (1 - sigmoid(beta u)) of desirable, w (1 - sigmoid(-beta u)) of undesirable rows; u = r - z0."""
    weight = torch.where(batch.labels.desirable[batch.train], desirable, undesirable)
    return weight * (1 - torch.sigmoid(beta * reflected(batch, r - z0)))


def reflected(batch: Batch, u: Tensor) -> Tensor:
    """[2 * pairs], u of chosen and -u of rejected rows; ``u`` is [n]."""
    return torch.cat([u[batch.good], -u[batch.bad]])


def odds(mean_logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean log-prob per token)."""
    return mean_logp - torch.log1p(-torch.exp(mean_logp))


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """-min(A p, A clip(p, 1 - low, 1 + high)) for ratios p; A is a column."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def standardised(batch: Batch, *, correction: int, eps: float) -> Tensor:
    """[2 * pairs], (s - mean) / (standard deviation + eps) among the rows of a prompt."""
    score, group = batch.labels.score[batch.train], batch.labels.group[batch.train]
    found = torch.zeros_like(score)
    for prompt in group.unique():
        of = group == prompt
        found[of] = (score[of] - score[of].mean()) / (score[of].std(correction=correction) + eps)
    return found


def of_prompts(batch: Batch) -> list[Tensor]:
    """The rows of each prompt that have a loss, long [rows of the prompt] each."""
    group = batch.labels.group[batch.train]
    return [batch.train[group == prompt] for prompt in group.unique()]


def centred(batch: Batch) -> Tensor:
    """[2 * pairs], s - mean among the rows of a prompt."""
    score, group = batch.labels.score[batch.train], batch.labels.group[batch.train]
    return score - torch.stack([score[group == prompt].mean() for prompt in group])


def thumbs(batch: Batch) -> Tensor:
    """[2 * pairs], 1 for chosen and -1 for rejected rows."""
    return torch.where(batch.labels.desirable[batch.train], 1.0, -1.0)


def of_tokens(batch: Batch, values: Tensor) -> Tensor:
    """Mean over the completion tokens of the rows with a loss; ``values`` is [2 * pairs, T]."""
    return values[batch.mask[batch.train]].mean()


def shared_length(batch: Batch) -> Tensor:
    """bool [n, T], the tokens up to the length of the pair's shorter completion."""
    shorter = torch.minimum(batch.length, batch.length[batch.labels.pair])
    return torch.arange(batch.mask.shape[1]) < shorter[:, None]


def running_bco(batch: Batch, beta: float, after: Batch | None) -> Tensor:
    """-log sigmoid(beta r_w - delta) - log sigmoid(delta - beta r_l), mean over pairs.

    delta is the mean over steps of each step's mean reward; ``after`` is the step before.
    """
    steps = [beta * step.r[step.train].detach().mean() for step in ([after] if after else []) + [batch]]
    delta, reward = torch.stack(steps).mean(), beta * batch.r
    return (-logsigmoid(reward[batch.good] - delta) - logsigmoid(delta - reward[batch.bad])).mean()
