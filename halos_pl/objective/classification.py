"""The completions of a prompt, classified as a group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import sum_over_ranks
from halos_pl.objective.halo import Objective, Result, TermContext, divisor
from halos_pl.objective.rewards import LogRatio


class GroupClassification(Objective):
    """Mean over prompts of log(1 + sum_D exp(-s / tau)) + log(1 + sum_U exp(s / tau)).

    s is a completion's mean log-ratio per token, and D and U are the desirable and the undesirable completions of the
    prompt: REAL ("Rewards as Labels", arXiv 2602.05630, as in ms-swift's ``loss_type real``), offline. Within a class,
    the gradient is shared out by a softmax, so that no completion dominates, and falls towards 0 as the class is told
    apart. A prompt whose completions are all of one class counts in the mean but has a loss of 0, as in ms-swift. It is
    no HALO: a completion's loss depends on the others of its class.

    Args:
        temperature: tau, nats per token, above 0.

    Raises:
        ValueError: the temperature is not above 0.
    """

    def __init__(self, *, temperature: float = 0.5) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"GroupClassification: temperature is {temperature}; it must be above 0")
        self.temperature = float(temperature)
        self.score = LogRatio(length_normalised=True)

    @property
    def needs(self) -> Needs:
        return self.score.needs | Needs(undesirable=True, groups=True, whole_step=True)

    def prepare(self, rows: LogProbBatch) -> TermContext:
        train, alike = rows.labels.train, _alike(rows)
        of_prompt = rows.labels.same_prompt.sum(dim=1).clamp(min=1)
        # Each row carries an equal part of the term of its class.
        share = torch.where(train & (alike.sum(dim=1) < of_prompt), 1 / alike.sum(dim=1).clamp(min=1), 0.0)
        prompts = (train / of_prompt).sum()
        return TermContext(-torch.ones_like(share), share * rows.labels.weight, sum_over_ranks(prompts))

    def compute_loss(self, rows: LogProbBatch, context: TermContext) -> Result:
        logit = self.score(rows) / self.temperature
        wrong = torch.where(rows.labels.desirable, -logit, logit)
        of_class = torch.where(_alike(rows), wrong[None, :], -torch.inf)
        with_one = torch.cat([of_class, torch.zeros_like(of_class[:, :1])], dim=1)
        return Result((context.weight * with_one.logsumexp(dim=1)).sum() / divisor(context.denominator))


def _alike(rows: LogProbBatch) -> Tensor:
    """BoolTensor [n, n]: of the same prompt and the same class, and the second row carries a loss."""
    desirable = rows.labels.desirable
    return rows.labels.same_prompt & (desirable[:, None] == desirable[None, :])
