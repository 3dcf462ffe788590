"""Feedback with its sign flipped."""

from __future__ import annotations

from halos_pl.batch import LogProbBatch
from halos_pl.objective.feedback.base import Feedback, Judgement
from halos_pl.objective.feedback.slopes import Slopes


class Flipped(Feedback):
    """Another feedback with the opposite sign: it lowers the value of rows that the other raises, and vice versa.

    For a term that pushes down the chosen completion too, as in NCA or APO-down.

    Args:
        feedback: feedback whose sign is flipped; its weights and denominator are kept.
    """

    def __init__(self, feedback: Feedback) -> None:
        super().__init__()
        self.feedback = feedback
        self.needs = feedback.needs
        self.follows_slopes = feedback.follows_slopes

    def forward(self, rows: LogProbBatch) -> Judgement:
        judgement: Judgement = self.feedback(rows)
        return judgement._replace(sign=-judgement.sign)

    def observe(self, slopes: Slopes) -> None:
        self.feedback.observe(slopes)
