"""The other completion of the pair, plus a margin."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.reference_points.base import Estimate
from halos_pl.objective.reference_points.paired_completion import PairedCompletion


class ScoreMargin(PairedCompletion):
    """z0 = reward of the pair's other completion plus a margin, with gradient.

    The margin is ``scale`` times the difference between the row's score and that of its paired completion, so the
    chosen completion has to win by more where people preferred it more strongly (Touvron et al. 2023, "Llama 2",
    section 3.2.2, for reward models). With a log-ratio as reward, this is the loss of Amini et al. 2024 ("DPO with an
    offset"). Data with a ``margin`` column, as for TRL, give that margin, unless they have scores too. A negative
    margin lets the chosen completion lose; the counts of the data tell how many pairs have one.

    Args:
        scale: Nats per unit of the scores.

    Raises:
        ValueError: if ``scale`` is not positive; when called: a row that is not mismatched has no paired completion.
    """

    needs = Needs(pairs=True, scores=True)
    violates: Mapping[str, str] = {"reference_in_range": "the margin is added to the reward of the other completion"}

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"ScoreMargin: scale is {scale}; it must be above 0")
        self.scale = float(scale)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        other: Estimate = super().forward(rewards, rows)
        pair, score = rows.labels.pair, rows.labels.score
        margin = torch.where(pair < 0, 0.0, score - score[pair])
        return Estimate(other.value + self.scale * margin.to(rewards.dtype), rows=1.0)
