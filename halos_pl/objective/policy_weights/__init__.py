"""Policy weights: numbers without gradient that depend on the policy, for losses that are HALOs except for them.

Classes in the files of this folder are discovered: the command line takes their bare names. The imports below are for
type checkers.
"""

from __future__ import annotations

from halos_pl.objective.policy_weights.base import PolicyWeight as PolicyWeight
from halos_pl.objective.policy_weights.future_kl import FutureKL as FutureKL
from halos_pl.objective.policy_weights.gap_temperature import GapTemperature as GapTemperature
from halos_pl.objective.policy_weights.pair_probability import PairProbability as PairProbability
from value_functions.discovery import plug_ins

_PLUG_INS = plug_ins(__name__, PolicyWeight)
globals().update(_PLUG_INS)
__all__ = ["PolicyWeight", *sorted(_PLUG_INS)]
