"""Reference points: estimators of z0."""

from halos_pl.objective.reference_points.base import Estimate, MeanOverRanks, ReferencePoint
from halos_pl.objective.reference_points.batch import BatchMean, BatchQuantile, LeaveOneOut
from halos_pl.objective.reference_points.constant import Constant, Zero
from halos_pl.objective.reference_points.exact import SampledKL, TokenKL
from halos_pl.objective.reference_points.mismatched_kl import MismatchedKL
from halos_pl.objective.reference_points.paired_completion import PairedCompletion
from halos_pl.objective.reference_points.running_mean import RunningMean
from halos_pl.objective.reference_points.sorted import RankMatched, SortedMargins

__all__ = [
    "BatchMean",
    "BatchQuantile",
    "Constant",
    "Estimate",
    "LeaveOneOut",
    "MeanOverRanks",
    "MismatchedKL",
    "PairedCompletion",
    "RankMatched",
    "ReferencePoint",
    "RunningMean",
    "SampledKL",
    "SortedMargins",
    "TokenKL",
    "Zero",
]
