"""Feedback with weights that depend on the length of a row."""

from __future__ import annotations

from halos_pl.batch import LogProbBatch
from halos_pl.objective.feedback.base import Feedback, Judgement
from halos_pl.objective.feedback.slopes import Slopes


class ByLength(Feedback):
    """Another feedback with weights times a power of the row's number of tokens.

    With a reward per token, ``power: -1`` makes each row a mean over its tokens, as in the original GRPO and SAPO. With
    a reward per row, ``power: 1`` weights rows by their length, as in LUSPO (``luspo`` of TRL 1.16).

    Args:
        feedback: feedback whose weights are multiplied; its signs and denominator are kept.
        power: exponent of the number of tokens.
    """

    def __init__(self, feedback: Feedback, *, power: float) -> None:
        super().__init__()
        self.feedback, self.power = feedback, float(power)
        self.needs = feedback.needs
        self.follows_slopes = feedback.follows_slopes

    def forward(self, rows: LogProbBatch) -> Judgement:
        judgement: Judgement = self.feedback(rows)
        length = rows.mask.sum(dim=1).clamp(min=1).to(judgement.weight.dtype)
        return judgement._replace(weight=judgement.weight * length**self.power)

    def observe(self, slopes: Slopes) -> None:
        self.feedback.observe(slopes)
