"""Rewards: how strongly the policy prefers a completion, in nats.

Classes in the files of this folder are discovered: the command line takes their bare names, and the tests check them
against the clauses of their kind. The imports below are for type checkers.
"""

from __future__ import annotations

from halos_pl.objective.rewards.alpha_probability import AlphaProbability as AlphaProbability
from halos_pl.objective.rewards.base import Reward as Reward
from halos_pl.objective.rewards.divergences import AlphaDivergence as AlphaDivergence
from halos_pl.objective.rewards.divergences import ForwardKL as ForwardKL
from halos_pl.objective.rewards.divergences import JensenShannon as JensenShannon
from halos_pl.objective.rewards.humanline import HumanlineLogRatio as HumanlineLogRatio
from halos_pl.objective.rewards.log_odds import LogOdds as LogOdds
from halos_pl.objective.rewards.log_prob import LogProb as LogProb
from halos_pl.objective.rewards.log_ratio import LogRatio as LogRatio
from halos_pl.objective.rewards.log_ratio import TokenLogRatio as TokenLogRatio
from halos_pl.objective.rewards.pair_margin import PairMargin as PairMargin
from halos_pl.objective.rewards.scalar_head import ScalarHead as ScalarHead
from halos_pl.objective.rewards.shared_length import SharedLengthLogRatio as SharedLengthLogRatio
from halos_pl.objective.rewards.total_variation import TotalVariationLogRatio as TotalVariationLogRatio
from value_functions.discovery import plug_ins

_PLUG_INS = plug_ins(__name__, Reward)
globals().update(_PLUG_INS)
__all__ = ["Reward", *sorted(_PLUG_INS)]
