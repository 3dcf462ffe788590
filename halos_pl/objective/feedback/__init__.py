"""Feedback: the sign (a) and weight (w) of each row, and the denominator of the loss.

Classes in the files of this folder are discovered: the command line takes their bare names, and the tests check them
against the clauses of their kind. The imports below are for type checkers.
"""

from __future__ import annotations

from halos_pl.objective.feedback.base import Feedback as Feedback
from halos_pl.objective.feedback.base import Judgement as Judgement
from halos_pl.objective.feedback.binary import Binary as Binary
from halos_pl.objective.feedback.by_length import ByLength as ByLength
from halos_pl.objective.feedback.flipped import Flipped as Flipped
from halos_pl.objective.feedback.group_advantage import GroupAdvantage as GroupAdvantage
from halos_pl.objective.feedback.listwise import EveryRow as EveryRow
from halos_pl.objective.feedback.listwise import SoftmaxOfScores as SoftmaxOfScores
from halos_pl.objective.feedback.margin_adaptive import MarginAdaptive as MarginAdaptive
from halos_pl.objective.feedback.pairwise import Pairwise as Pairwise
from halos_pl.objective.feedback.pairwise import RobustPairwise as RobustPairwise
from halos_pl.objective.feedback.slopes import Slopes as Slopes
from value_functions.discovery import plug_ins

_PLUG_INS = plug_ins(__name__, Feedback)
globals().update(_PLUG_INS)
__all__ = ["Feedback", "Judgement", "Slopes", *sorted(_PLUG_INS)]
