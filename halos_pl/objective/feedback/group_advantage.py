"""Scores compared within a prompt, as in GRPO."""

from __future__ import annotations

from typing import Literal

import torch

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import gather_over_ranks
from halos_pl.objective.feedback.base import Feedback, Judgement, denominator_of


class GroupAdvantage(Feedback):
    """Judges each row by its advantage over the prompt's rows.

    A = (s - mean) / (std + 0.01) over the rows of one prompt, where s is the row's score if the data have scores,
    otherwise 1 for a desirable and 0 for an undesirable row; sign -sign(A), weight |A|. GRPO's advantage (Shao et al.
    2024, section 4.1.2), offline. If all rows of a prompt have the same score, as where it has a single row, their
    weight is 0. std is the population standard deviation, and 0.01 is in the unit of the scores. TRL uses the sample
    standard deviation (n - 1) and 1e-4, so a pair with scores 0 and 1 gets +-0.71 there, and +-0.98 here. Mean and
    standard deviation do not depend on the rows' own weights, which multiply |A| in the loss.

    Args:
        only: sign of the advantage of the rows to train on: ``positive`` or ``negative``; null for both. The other rows
            get weight 0 but count in the denominator.
        scale: ``prompt`` divides by the standard deviation of the prompt's scores; ``step`` by that of the whole step's
            differences s - mean, over all ranks (REINFORCE++, Hu 2025); ``none`` does not divide (Dr. GRPO, Liu et al.
            2025).
        denominator: ``tokens`` or ``rows``.

    Raises:
        ValueError: an argument is none of these.
    """

    needs = Needs(groups=True, undesirable=True)

    def __init__(
        self,
        *,
        only: Literal["positive", "negative"] | None = None,
        scale: Literal["prompt", "step", "none"] = "prompt",
        denominator: Literal["tokens", "rows"] = "tokens",
    ) -> None:
        super().__init__()
        if only not in ("positive", "negative", None):
            raise ValueError(f"GroupAdvantage: only is {only!r}; choose positive, negative or null")
        if scale not in ("prompt", "step", "none"):
            raise ValueError(f"GroupAdvantage: scale is {scale!r}; choose prompt, step or none")
        if denominator not in ("tokens", "rows"):
            raise ValueError(f"GroupAdvantage: denominator is {denominator!r}; choose tokens or rows")
        self.only, self.scale, self.denominator = only, scale, denominator

    def forward(self, rows: LogProbBatch) -> Judgement:
        kept, score, same = rows.labels.train, rows.labels.score, rows.labels.same_prompt.float()
        count = same.sum(dim=1).clamp(min=1)
        # Differences first: of equal scores, they are exactly 0.
        above = torch.where(same > 0, score[:, None] - score[None, :], 0.0).sum(dim=1) / count
        advantage, tiny = above * kept, torch.finfo(score.dtype).tiny
        if self.scale == "prompt":
            off = torch.where(same > 0, score[None, :] - (score - above)[:, None], 0.0)
            # Divided by their sum, as squares of large scores would not fit float32.
            size = off.abs().sum(dim=1).clamp(min=tiny)
            std = size * (off / size[:, None]).square().sum(dim=1).div(count).sqrt()
            advantage = advantage / (std + 0.01)
        elif self.scale == "step":
            everywhere, _ = gather_over_ranks(advantage[rows.labels.train_index])
            size = everywhere.abs().sum().clamp(min=tiny)
            std = size * ((everywhere / size).square().sum() / max(len(everywhere), 1)).sqrt()
            advantage = advantage / (std + 0.01)
        below = advantage < 0
        side = kept if self.only is None else below if self.only == "negative" else advantage > 0
        return Judgement(
            sign=torch.where(below, torch.ones_like(advantage), -1.0),
            weight=torch.where(side, advantage.abs(), 0.0),
            denominator=denominator_of(rows, self.denominator),
        )
