"""Power of a comparison over seeds: before a study for what is assumed, in its report for what was found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import optimize, special, stats

from halos_pl.study.standard_error import Floats, caution, errors, heterogeneous_df
from halos_pl.study.statistics import LEVEL

POWER = 0.8
#: Outcomes of the run variances that the power is averaged over; a power of 2, for Sobol's points.
DRAWS = 1024
#: The largest logarithm of a ratio that counts as detectable: a factor of 1000.
FARTHEST = math.log(1000)


@dataclass(frozen=True)
class Noise:
    """What a difference between two arms varies by.

    Attributes:
        run: variance of one arm's mean over its seeds, what sampling adds included.
        examples: variance of the difference over examples.
        sampling: the part of it that varies anew by run and example, which both of the above include.
        count: examples.
        seeds: of each arm.
        df: of the pooled run variance.
        arms: 2 where both sides have seeds, 1 where the reference is a model without.
    """

    run: float
    examples: float
    sampling: float
    count: int
    seeds: int
    df: float
    arms: int = 2

    @classmethod
    def planned(
        cls, *, prompt_sd: float, run_sd: float, sampling_sd: float, count: int, seeds: int, arms: int
    ) -> Noise:
        """The noise of a comparison of two out of so many arms.

        Args:
            prompt_sd: SD over prompts of the paired difference of two arms, as far as it is the same in every run.
            run_sd: SD over seeds of an arm's mean, beyond what sampling and prompts add.
            sampling_sd: SD of the paired difference of two runs on a prompt from seed to seed, as sampled answers have.
            count: prompts.
            seeds: of each arm.
            arms: with seeds, the reference arm included.
        """
        sampling = sampling_sd**2 / (seeds * count)
        return cls(
            run=run_sd**2 / seeds + sampling / 2,
            examples=prompt_sd**2 / count + sampling,
            sampling=sampling,
            count=count,
            seeds=seeds,
            df=(seeds - 1) * (arms - 1),
        )

    @property
    def error(self) -> float:
        """Standard error of the difference."""
        return math.sqrt(self.examples + max(self.arms * self.run - self.sampling, 0.0))


def power(effect: float, noise: Noise, level: float) -> float:
    """The chance to find a difference, two-sided.

    The tests by the pooled run variance, by the reference arm's own and (at :data:`LEVEL`) by the arm's own have to
    agree. With one of them alone the chance is that of the noncentral t; it is computed as what that is, the mean of a
    normal chance over the values that the run variances may take, and over those of all three.

    Args:
        effect: the true difference.
        noise: what it varies by.
        level: of the test: 0.05 divided by the number of comparisons and by ``MARGIN``.
    """
    if noise.error == 0:
        return float(effect != 0)
    if noise.seeds < 2:
        return _t_power(effect / noise.error, noise.count - 1, float(stats.t.isf(level / 2, noise.count - 1)))
    reach, shift = _reach(noise, level) / noise.error, abs(effect) / noise.error
    return float((special.ndtr(shift - reach) + special.ndtr(-shift - reach)).mean())


@lru_cache(maxsize=64)
def _reach(noise: Noise, level: float) -> Floats:
    """What a difference must exceed, for each of ``DRAWS`` outcomes of the run variances."""
    free = noise.seeds - 1
    arms = max(1, round(noise.df / free)) + (noise.arms == 2)
    points = stats.qmc.Sobol(free * arms, rng=np.random.default_rng(0)).random(DRAWS)
    normal = special.ndtri(np.clip(points, 1e-9, 1 - 1e-9)).reshape(DRAWS, free, arms)
    if noise.arms == 2:  # what is common to a seed cancels
        normal *= math.sqrt(arms / (arms - 1))
        normal -= normal.mean(axis=2, keepdims=True)
    own = noise.run * (normal**2).mean(axis=1)
    pooled, care = own.mean(axis=1), caution(noise.df)
    if noise.arms == 2:
        df = heterogeneous_df(noise.df, noise.seeds)
        tests = [
            ([(2 * pooled, df)], level),
            ([(own[:, 0], free), (pooled, df)], level),
            ([(own[:, 1], free), (pooled, df)], LEVEL),
        ]
    else:
        tests = [([(pooled, noise.df)], level), ([(own[:, 0], free)], LEVEL)]
    found = []
    for runs, at in tests:
        size, df_of = errors(runs, noise.examples, noise.sampling, noise.count, care)
        found.append(special.stdtrit(df_of, 1 - at / 2) * size)
    return np.asarray(np.max(found, axis=0))


def _t_power(shift: float, df: float, bound: float) -> float:
    """The chance that a noncentral t is beyond the bound on either side."""
    shift = abs(shift)
    above = float(stats.nct.sf(bound, df, shift))
    if math.isnan(above):  # scipy's series does not converge far out
        return float(shift > bound)
    return above + float(np.nan_to_num(stats.nct.cdf(-bound, df, shift)))  # NaN as well where it is next to 0


def detectable(noise: Noise, level: float) -> float | None:
    """The smallest difference that is found with probability ``POWER``; None where none is.

    None as well where nothing varies, which does not tell, and for so few examples that no outcome is below the level.
    """
    if not noise.error or 2.0 ** (1 - noise.count) >= level:
        return None
    top = noise.error
    while power(top, noise, level) < POWER:
        top *= 2
        if top > 1e6 * noise.error:
            return None
    return float(optimize.brentq(lambda d: power(d, noise, level) - POWER, 0.0, top, rtol=1e-3))
