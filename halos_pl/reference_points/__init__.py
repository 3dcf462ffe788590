"""Reference points: estimators of z0."""

from halos_pl.reference_points.base import MeanOverRanks, ReferencePoint
from halos_pl.reference_points.batch import BatchMean, BatchQuantile, LeaveOneOut
from halos_pl.reference_points.constant import Constant, Zero
from halos_pl.reference_points.exact import SampledKL, TokenKL
from halos_pl.reference_points.mismatched_kl import MismatchedKL
from halos_pl.reference_points.rival import Rival
from halos_pl.reference_points.running_mean import RunningMean
from halos_pl.reference_points.sorted import SortedMargins, SortedRival

__all__ = [
    "BatchMean",
    "BatchQuantile",
    "Constant",
    "LeaveOneOut",
    "MeanOverRanks",
    "MismatchedKL",
    "ReferencePoint",
    "Rival",
    "RunningMean",
    "SampledKL",
    "SortedMargins",
    "SortedRival",
    "TokenKL",
    "Zero",
]
