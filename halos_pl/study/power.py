"""Power of a comparison over seeds: before a study for what is assumed, in its report for what was found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from halos_pl.study.standard_error import StandardError, heterogeneous_df

POWER = 0.8
#: Quantiles of the reference arm's own variance that the power is averaged over.
GRID = 40
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

    The test takes the larger p of two: by the pooled run variance, and by the reference arm's own. So the chance is
    that of the noncentral t, averaged over what the few seeds of the reference arm may say.

    Args:
        effect: the true difference.
        noise: what it varies by.
        level: of the test: 0.05 divided by the number of comparisons.
    """
    if noise.error == 0:
        return float(effect != 0)
    if noise.seeds < 2:
        return _t_power(effect / noise.error, noise.count - 1, float(stats.t.isf(level / 2, noise.count - 1)))
    own_df = noise.seeds - 1
    u = stats.chi2.ppf((np.arange(GRID) + 0.5) / GRID, own_df) / own_df
    others = max(noise.df - own_df, 0.0)
    pooled = noise.run * (own_df * u + others) / noise.df if noise.arms == 2 else np.full(GRID, noise.run)
    found = 0.0
    for own, run in zip(noise.run * u, pooled, strict=True):
        if noise.arms == 2:
            parts = [
                ((2 * run, heterogeneous_df(noise.df, noise.seeds)),),
                ((own, own_df), (run, heterogeneous_df(noise.df, noise.seeds))),
            ]
        else:
            parts = [((run, noise.df),)]
        tests = [StandardError.of(each, noise.examples, noise.sampling, noise.count) for each in parts]
        reach = max(stats.t.ppf(1 - level / 2, test.df) * test.size for test in tests)
        if noise.arms == 2:
            free = 2 * run * others / max(own_df + others, 1e-9)
            spread = (free**2 / others if others else 0.0) + noise.examples**2 / max(noise.count - 1, 1)
        else:
            spread = run**2 / noise.df + noise.examples**2 / max(noise.count - 1, 1)
        found += _t_power(effect / noise.error, min(tests[0].size**4 / spread, 1e6), reach / noise.error)
    return found / GRID


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
