"""Power of a comparison over seeds: for assumed variances before a study, for estimated ones in its report."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy import optimize, special, stats

from halos_pl.study.standard_error import Floats, caution, errors, heterogeneous_df
from halos_pl.study.statistics import LEVEL

POWER = 0.8
#: Draws of the run variances that the power is averaged over; a power of 2, for Sobol points.
DRAWS = 1024
#: The largest logarithm of a ratio that counts as detectable: a factor of 1000.
FARTHEST = math.log(1000)


@dataclass(frozen=True)
class Noise:
    """The variances of a difference between two arms.

    Attributes:
        run: variance of an arm's mean over its seeds, sampling included.
        examples: variance of the difference over examples.
        sampling: the part that varies by run and example, contained in both of the above.
        count: number of examples.
        seeds: number of seeds of each arm.
        df: degrees of freedom of the pooled run variance.
        arms: 2 if both sides have seeds, 1 if the reference is a model without seeds.
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
        """The noise of a comparison in a planned study.

        Args:
            prompt_sd: SD over prompts of the paired difference of two arms, averaged over runs.
            run_sd: SD over seeds of an arm's mean, without the effect of sampling and prompts.
            sampling_sd: SD from seed to seed of the paired difference of two runs on a prompt, as of sampled answers.
            count: number of prompts.
            seeds: number of seeds of each arm.
            arms: number of arms with seeds, the reference arm included.
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
    """The probability of detecting a difference, two-sided.

    Three tests must agree: with the pooled run variance, with the reference arm's own and (at :data:`LEVEL`) with the
    arm's own. The power of a single test follows from the noncentral t: the mean of a normal probability over the
    distribution of the run variance. Here that mean is taken over the joint distribution of all three.

    Args:
        effect: the true difference.
        noise: its variances.
        level: level of the test: 0.05 divided by the number of comparisons and by ``MARGIN``.
    """
    if noise.error == 0:
        return float(effect != 0)
    if noise.seeds < 2:
        return _t_power(effect / noise.error, noise.count - 1, float(stats.t.isf(level / 2, noise.count - 1)))
    reach, shift = _reach(noise, level) / noise.error, abs(effect) / noise.error
    return float((special.ndtr(shift - reach) + special.ndtr(-shift - reach)).mean())


def equivalence_power(margin: float, noise: Noise, level: float, *, share: bool = False) -> float:
    """The probability that two arms without any difference are called equivalent.

    Args:
        margin: margin of equivalence, on the scale of the test.
        noise: variances of the difference.
        level: level of each of the two one-sided tests, as in :func:`power`.
        share: whether the metric is a share, whose variance over examples is taken to be at least that of a difference
            as large as the margin.
    """
    if noise.seeds < 2:
        return 0.0
    tested = replace(noise, examples=max(noise.examples, margin * (1 - margin) / noise.count)) if share else noise
    if tested.error == 0:
        return 1.0
    room = np.maximum(margin - _reach(tested, 2 * level, 2 * LEVEL), 0.0)
    return float((2 * special.ndtr(room / max(noise.error, 1e-300)) - 1).mean())


@lru_cache(maxsize=64)
def _reach(noise: Noise, level: float, own: float = LEVEL) -> Floats:
    """The difference that is just significant, for each of ``DRAWS`` draws of the run variances.

    Args:
        noise: its variances.
        level: two-sided level of the tests with the pooled and the reference arm's variance.
        own: that of the test with the arm's own.
    """
    free = noise.seeds - 1
    arms = max(1, round(noise.df / free)) + (noise.arms == 2)
    points = stats.qmc.Sobol(free * arms, rng=np.random.default_rng(0)).random(DRAWS)
    normal = special.ndtri(np.clip(points, 1e-9, 1 - 1e-9)).reshape(DRAWS, free, arms)
    if noise.arms == 2:  # the effect of the seed cancels
        normal *= math.sqrt(arms / (arms - 1))
        normal -= normal.mean(axis=2, keepdims=True)
    of_arms = noise.run * (normal**2).mean(axis=1)
    pooled, care = of_arms.mean(axis=1), caution(noise.df)
    if noise.arms == 2:
        df = heterogeneous_df(noise.df, noise.seeds)
        tests = [
            ([(2 * pooled, df)], level),
            ([(of_arms[:, 0], free), (pooled, df)], level),
            ([(of_arms[:, 1], free), (pooled, df)], own),
        ]
    else:
        tests = [([(pooled, noise.df)], level), ([(of_arms[:, 0], free)], own)]
    reaches = []
    for runs, at in tests:
        size, df_of = errors(runs, noise.examples, noise.sampling, noise.count, care)
        reaches.append(special.stdtrit(df_of, 1 - at / 2) * size)
    return np.asarray(np.max(reaches, axis=0))


def _t_power(shift: float, df: float, bound: float) -> float:
    """The probability that a noncentral t exceeds the bound on either side."""
    shift = abs(shift)
    above = float(stats.nct.sf(bound, df, shift))
    if math.isnan(above):  # scipy's series does not converge far out
        return float(shift > bound)
    return above + float(np.nan_to_num(stats.nct.cdf(-bound, df, shift)))  # NaN if it is close to 0


def detectable(noise: Noise, level: float) -> float | None:
    """The smallest difference that is detected with probability ``POWER``.

    None if there is none, if nothing varies, or if no outcome of so few examples is significant at the level.
    """
    if not noise.error or 2.0 ** (1 - noise.count) >= level:
        return None
    top = noise.error
    while power(top, noise, level) < POWER:
        top *= 2
        if top > 1e6 * noise.error:
            return None
    return float(optimize.brentq(lambda d: power(d, noise, level) - POWER, 0.0, top, rtol=1e-3))
