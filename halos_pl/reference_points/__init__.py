"""Reference points: estimators of z0, one file each."""

from halos_pl.reference_points.base import MeanOverRanks, ReferencePoint
from halos_pl.reference_points.mismatched_kl import MismatchedKL
from halos_pl.reference_points.rival import Rival
from halos_pl.reference_points.running_mean import RunningMean
from halos_pl.reference_points.zero import Zero

__all__ = ["MeanOverRanks", "MismatchedKL", "ReferencePoint", "Rival", "RunningMean", "Zero"]
