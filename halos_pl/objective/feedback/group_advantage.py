"""Scores compared within a prompt, as in GRPO."""

from __future__ import annotations

from typing import Literal

import torch

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.feedback.base import Feedback, Judgement, denominator_of


class GroupAdvantage(Feedback):
    """How much better a row was than its prompt's other rows; the loss is a mean over tokens.

    A = (s - mean) / (std + 0.01) within the rows of one prompt, s = the row's score where the data have scores, else 1
    for a desirable row and 0 for an undesirable one; sign -sign(A), weight |A|. GRPO's advantage (Shao et al. 2024,
    section 4.1.2), offline. A prompt whose rows are all alike has weight 0. The deviation is that of the prompt's own
    rows, and 0.01 is in the unit of the scores; TRL takes the sample's (n - 1) and 1e-4, so that a pair with scores 0
    and 1 has +-0.71 there, and +-0.98 here.

    Args:
        only: rows with a ``positive`` or a ``negative`` advantage; null for both. The other rows get weight 0
            but are counted in the denominator.

    Raises:
        ValueError: for another ``only``.
    """

    needs = Needs(groups=True, undesirable=True)

    def __init__(self, *, only: Literal["positive", "negative"] | None = None) -> None:
        super().__init__()
        if only not in ("positive", "negative", None):
            raise ValueError(f"GroupAdvantage: only is {only!r}; choose positive, negative or null")
        self.only = only

    def forward(self, rows: LogProbBatch) -> Judgement:
        kept = rows.labels.train.float()
        score = rows.labels.score
        same = (
            rows.labels.group[:, None] == rows.labels.group[None, :]
        ).float() * kept  # [n, n], columns of mismatched rows are 0
        count = same.sum(dim=1).clamp(min=1)
        mean = same @ score / count
        std = (same * (score[None, :] - mean[:, None]).square()).sum(dim=1).div(count).sqrt()
        advantage = (score - mean) / (std + 0.01) * kept
        side = {"positive": advantage > 0, "negative": advantage < 0, None: rows.labels.train}[self.only]
        return Judgement(
            sign=torch.where(advantage < 0, torch.ones_like(kept), -torch.ones_like(kept)),
            weight=torch.where(side, advantage.abs(), torch.zeros_like(kept)),
            denominator=denominator_of(rows, "tokens"),
        )
