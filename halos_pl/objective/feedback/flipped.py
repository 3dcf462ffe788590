"""Another feedback, turned round."""

from __future__ import annotations

from halos_pl.batch import LogProbBatch
from halos_pl.objective.feedback.base import Feedback, Judgement


class Flipped(Feedback):
    """Another feedback with the opposite sign: it lowers what that one raises.

    A term that also holds the chosen completion down, as in NCA or APO-down.

    Args:
        feedback: the one whose weights and denominator are kept.
    """

    def __init__(self, feedback: Feedback) -> None:
        super().__init__()
        self.feedback = feedback
        self.needs = feedback.needs

    def forward(self, rows: LogProbBatch) -> Judgement:
        judgement: Judgement = self.feedback(rows)
        return judgement._replace(sign=-judgement.sign)
