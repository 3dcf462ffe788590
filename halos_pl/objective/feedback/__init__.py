"""Feedback: which way each row pulls (a), how hard (w), and what the loss is divided by.

A class in any file of this folder is found by itself: the command line takes its bare name, and the tests hold it to
the clauses of its kind. The imports below only tell type checkers about the library's own.
"""

from __future__ import annotations

from halos_pl.objective.feedback.base import Feedback as Feedback
from halos_pl.objective.feedback.base import Judgement as Judgement
from halos_pl.objective.feedback.binary import Binary as Binary
from halos_pl.objective.feedback.flipped import Flipped as Flipped
from halos_pl.objective.feedback.group_advantage import GroupAdvantage as GroupAdvantage
from halos_pl.objective.feedback.pairwise import Pairwise as Pairwise
from halos_pl.objective.feedback.pairwise import RobustPairwise as RobustPairwise
from value_functions.discovery import plug_ins

_FOUND = plug_ins(__name__, Feedback)
globals().update(_FOUND)
__all__ = ["Feedback", "Judgement", *sorted(_FOUND)]
