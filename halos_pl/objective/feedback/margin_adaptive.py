"""The weights of MADPO."""

from __future__ import annotations

import torch

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.feedback.base import Feedback, Judgement, denominator_of, require_pairs


class MarginAdaptive(Feedback):
    """One completion preferred to the other, weighted more where their scores are close; a mean over pairs.

    MADPO (Rho 2025, arXiv 2510.05342): for a pair whose scores differ by h = s_chosen - s_rejected, the weight is
    sigmoid(c h) / sigmoid(h), where c falls from ``most`` to ``least`` as \\|h\\| grows and is 1 at the threshold; for
    h <= -threshold, the weight is 1. Scores are log-odds of a reward model.

    Args:
        least, most: bounds of c, 0 < least < 1 < most.
        threshold: \\|h\\| at which c is 1 (tau), above 0.
        rate: how fast c falls around the threshold (lambda), above 0.

    Raises:
        ValueError: an argument is outside its range; when called: a row has no paired completion.
    """

    needs = Needs(pairs=True, undesirable=True, scores=True)

    def __init__(self, *, least: float = 0.5, most: float = 2.0, threshold: float = 2.0, rate: float = 1.0) -> None:
        super().__init__()
        if not 0 < least < 1 < most:
            raise ValueError(
                f"MarginAdaptive: least is {least} and most {most}; they must satisfy 0 < least < 1 < most"
            )
        if not (threshold > 0 and rate > 0):
            raise ValueError(f"MarginAdaptive: threshold is {threshold} and rate {rate}; both must be above 0")
        self.least, self.most, self.threshold, self.rate = float(least), float(most), float(threshold), float(rate)

    def forward(self, rows: LogProbBatch) -> Judgement:
        require_pairs(self, rows)
        score, pair = rows.labels.score, rows.labels.pair
        margin = torch.where(pair < 0, 0.0, score - score[pair])
        odds = (
            (self.most - 1) / (1 - self.least) * torch.exp((self.rate * (margin.abs() - self.threshold)).clamp(max=80))
        )
        factor = self.least + (self.most - self.least) / (1 + odds)
        log_weight = torch.nn.functional.logsigmoid(factor * margin) - torch.nn.functional.logsigmoid(margin)
        weight = torch.where(margin > -self.threshold, log_weight.exp(), 1.0)
        return Judgement(
            sign=-torch.ones_like(weight),
            weight=weight * (rows.labels.desirable & rows.labels.train),
            denominator=denominator_of(rows, "pairs"),
        )
