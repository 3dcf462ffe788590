"""Means of a metric with their intervals.

The values of a metric are a matrix [seeds, examples]: the run of each seed is measured on the same held-out examples.

Seeds are few. A bootstrap over three seeds has their extremes as its quantiles, and its 95% interval misses the truth
one time in four. With several seeds, the interval is therefore that of t, with a standard error over seeds and examples
and its degrees of freedom (Satterthwaite 1946). If seeds matter and there are two or three, a 95% interval of an arm's
mean still misses the truth 6 to 10 times in 100. Comparisons of arms are more careful
(:mod:`halos_pl.study.decisions`).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Values = NDArray[np.float64]
RESAMPLES = 9999
LEVEL = 0.05


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval.

    Attributes:
        value: the mean over seeds and examples, in the metric's own unit.
        low, high: ends of the interval; equal to ``value`` if nothing varies.
        examples: number of held-out examples.
        seeds: number of runs.
        over: what the interval treats as random: ``examples`` (BCa bootstrap, with the run taken as fixed), or
            ``seeds and examples``.
        error: standard error.
        freedom: its degrees of freedom.
    """

    value: float
    low: float
    high: float
    examples: int
    seeds: int
    over: Literal["examples", "seeds and examples"]
    error: float
    freedom: float


def _matrix(values: object) -> Values:
    matrix = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(
            f"values of shape {np.asarray(values).shape}; expected [seeds, examples], at least one of each"
        )
    if not np.isfinite(matrix).all():
        raise ValueError(f"{int((~np.isfinite(matrix)).sum())} of {matrix.size} values are not finite")
    return matrix


def _crossed_error(matrix: Values) -> tuple[float, float]:
    """Standard error of the mean over seeds and examples, and its degrees of freedom (Satterthwaite 1946).

    The variances over seeds and over examples both contain the part that varies by seed *and* example, such as sampled
    answers; it is subtracted once, but the result is at least the largest of the three.
    """
    seeds, examples = matrix.shape
    rows, columns = matrix.mean(axis=1, keepdims=True), matrix.mean(axis=0, keepdims=True)
    rest = ((matrix - rows - columns + matrix.mean()) ** 2).sum()
    freedom = np.array([seeds - 1, examples - 1, (seeds - 1) * (examples - 1)])
    parts = np.array([rows.var(ddof=1) / seeds, columns.var(ddof=1) / examples, rest / freedom[2] / matrix.size])
    variance = max(float(parts[0] + parts[1] - parts[2]), *parts.tolist())
    return math.sqrt(variance), float(variance**2 / (parts**2 / freedom).sum())


def _within(mean: float, error: float, reach: float, share: bool, positive: bool) -> tuple[float, float]:
    """``reach`` standard errors to either side: on the log odds of a share, on the log of a positive mean."""
    if positive and mean > 0:
        far = min(reach * error / mean, 100.0)  # e^100 is practically unbounded
        return mean * math.exp(-far), mean * math.exp(far)
    if not (share and 0 < mean < 1):
        return mean - reach * error, mean + reach * error
    odds, far = math.log(mean / (1 - mean)), reach * error / (mean * (1 - mean))
    low, high = special.expit([odds - far, odds + far]).tolist()
    return low, high


def estimate(
    values: object, *, share: bool = False, positive: bool = False, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean of a metric with its 95% interval.

    With one seed, the BCa bootstrap over examples (Efron 1987); with several, the standard error over seeds and
    examples times a quantile of t, which is wide for few seeds.

    Args:
        values: [seeds, examples] or [examples].
        share: whether the mean and its interval lie between 0 and 1: with several seeds the interval is on the log
            odds, and if all values are 0 or all are 1 it is that of Clopper and Pearson.
        positive: whether the mean and its interval are above 0: with several seeds the interval is on the log scale.
        resamples: number of resamples of the bootstrap.
        seed: seed of the bootstrap.

    Raises:
        ValueError: if there are no values, or they are not finite.
    """
    matrix = _matrix(values)
    seeds, examples = matrix.shape
    mean, rng = float(matrix.mean()), np.random.default_rng(seed)
    over: Literal["examples", "seeds and examples"] = "examples" if seeds == 1 else "seeds and examples"
    if np.ptp(matrix) <= 1e-12 * np.abs(matrix).max() or matrix.size == 1:
        low = high = mean
        if share and mean in (0, 1):
            low, high = stats.binomtest(round(mean * examples), examples).proportion_ci(1 - LEVEL, "exact")
        return Estimate(mean, float(low), float(high), examples, seeds, over, 0.0, math.inf)
    if examples == 1:
        error, freedom = float(stats.sem(matrix[:, 0])), float(seeds - 1)
    elif seeds > 1:
        error, freedom = _crossed_error(matrix)
    if seeds > 1:
        low, high = _within(mean, error, float(stats.t.ppf(1 - LEVEL / 2, freedom)), share, positive)
        return Estimate(mean, low, high, examples, seeds, over, error, freedom)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        bootstrap = stats.bootstrap((matrix[0],), np.mean, n_resamples=resamples, method="BCa", rng=rng, batch=1000)
    low, high = bootstrap.confidence_interval
    if not math.isfinite(low + high):  # BCa is undefined for too few different values
        low, high = np.quantile(bootstrap.bootstrap_distribution, [LEVEL / 2, 1 - LEVEL / 2])
    if share:  # examples with several rows may exceed it
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(mean, float(low), float(high), examples, seeds, over, float(bootstrap.standard_error), math.inf)
