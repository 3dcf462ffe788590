"""The soft maximum of a prompt's rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.reference_points.base import Estimate, ReferencePoint


class GroupLogSumExp(ReferencePoint):
    """z0 = 1/beta * log sum exp(beta * r) over the rows of the same prompt, the row itself included, with gradient.

    beta * (r - z0) is then the log of the row's share in a softmax over the prompt's completions, so that ``Identity``
    as value function gives listwise losses: InfoNCA (Chen et al. 2024, "Noise contrastive alignment", eq. 6) with
    ``over: all``; the model of Plackett and Luce with ``over: not_better``, in which each completion competes with
    those of no higher score. Rows of equal score compete. A prompt with a single completion gives z0 = r.

    Args:
        beta: 1 / nats, above 0.
        over: ``all`` rows of the prompt, or those that are ``not_better`` than the row by their score.

    Raises:
        ValueError: an argument is none of these.
    """

    scope = "row"
    within_prompt = True
    needs = Needs(groups=True, whole_step=True)
    violates: Mapping[str, str] = {
        "reference_in_range": "a soft maximum, not a mean: of k equal rewards, it exceeds them by log(k) / beta"
    }

    def __init__(self, *, beta: float = 0.1, over: Literal["all", "not_better"] = "all") -> None:
        super().__init__()
        if not 0 < beta < float("inf"):
            raise ValueError(f"GroupLogSumExp: beta is {beta}; it must be above 0")
        if over not in ("all", "not_better"):
            raise ValueError(f"GroupLogSumExp: over is {over!r}; choose all or not_better")
        self.beta, self.over = float(beta), over

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        labels = rows.labels
        rivals = labels.same_prompt
        if self.over == "not_better":
            rivals &= labels.score[None, :] <= labels.score[:, None]
        rivals |= torch.eye(len(rows), dtype=torch.bool, device=rewards.device)
        scaled = torch.where(rivals, self.beta * rewards[None, :], -torch.inf)
        return Estimate(scaled.logsumexp(dim=1) / self.beta, rows=rivals[labels.train_index].sum(dim=1).float().mean())
