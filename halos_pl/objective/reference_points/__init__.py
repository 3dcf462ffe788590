"""Reference points: z0, with which the rewards of a step are compared.

Classes in the files of this folder are discovered: the command line takes their bare names, and the tests check them
against the clauses of their kind. The imports below are for type checkers.
"""

from __future__ import annotations

from halos_pl.objective.reference_points.base import Estimate as Estimate
from halos_pl.objective.reference_points.base import MeanOverRanks as MeanOverRanks
from halos_pl.objective.reference_points.base import ReferencePoint as ReferencePoint
from halos_pl.objective.reference_points.batch import BatchMean as BatchMean
from halos_pl.objective.reference_points.batch import BatchQuantile as BatchQuantile
from halos_pl.objective.reference_points.batch import LeaveOneOut as LeaveOneOut
from halos_pl.objective.reference_points.by_rank import RankMatched as RankMatched
from halos_pl.objective.reference_points.by_rank import SortedMargins as SortedMargins
from halos_pl.objective.reference_points.calibrated import Calibrated as Calibrated
from halos_pl.objective.reference_points.calibrated import QuantileCalibrated as QuantileCalibrated
from halos_pl.objective.reference_points.constant import Constant as Constant
from halos_pl.objective.reference_points.constant import Zero as Zero
from halos_pl.objective.reference_points.exact import SampledKL as SampledKL
from halos_pl.objective.reference_points.exact import TokenKL as TokenKL
from halos_pl.objective.reference_points.log_sum_exp import GroupLogSumExp as GroupLogSumExp
from halos_pl.objective.reference_points.mismatched_kl import MismatchedKL as MismatchedKL
from halos_pl.objective.reference_points.paired_completion import PairedCompletion as PairedCompletion
from halos_pl.objective.reference_points.running_mean import RunningMean as RunningMean
from halos_pl.objective.reference_points.score_margin import ScoreMargin as ScoreMargin
from halos_pl.objective.reference_points.step_margin import AllottedMargin as AllottedMargin
from halos_pl.objective.reference_points.step_margin import NormalisedGapMargin as NormalisedGapMargin
from value_functions.discovery import plug_ins

_PLUG_INS = plug_ins(__name__, ReferencePoint)
globals().update(_PLUG_INS)
__all__ = ["ReferencePoint", "Estimate", "MeanOverRanks", *sorted(_PLUG_INS)]
