"""Means of a metric with their intervals: what is random (examples, seeds) is said, and every figure carries its n.

Values of a metric are a matrix [seeds, examples]: each seed's run is measured on the same held-out examples.

Seeds are few. The quantiles of a bootstrap over three of them are its extremes, and such an interval misses the truth
one time in four. So with several seeds the standard error is the sum of what varies over seeds and over examples, and
t with the degrees of freedom that they leave (Satterthwaite 1946) gives the interval. Where seeds matter and are two or
three, a 95 % interval of one arm's mean still misses the truth in 6 to 10 cases of 100. Arms are compared elsewhere
(:mod:`halos_pl.study.decisions`), with more care.
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
    """A mean and its 95 % interval.

    Attributes:
        value: the mean over seeds and examples, in the metric's own unit.
        low, high: of the interval; equal to ``value`` where nothing varies.
        examples: held-out examples behind it.
        seeds: runs behind it.
        over: what the interval treats as random: ``examples`` (BCa bootstrap; the run is taken as given), or
            ``seeds and examples``.
        error: standard error.
        freedom: degrees of freedom of the standard error.
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
            f"values of shape {np.asarray(values).shape}; wanted are [seeds, examples], at least one of each"
        )
    if not np.isfinite(matrix).all():
        raise ValueError(f"{int((~np.isfinite(matrix)).sum())} of {matrix.size} values are not finite")
    return matrix


def _crossed_error(matrix: Values) -> tuple[float, float]:
    """Standard error of the mean over seeds and examples, and its degrees of freedom (Satterthwaite 1946).

    The variances of both margins contain what varies by seed *and* example, such as what was sampled; it is subtracted
    once, but no more than leaves the largest of the three parts.
    """
    seeds, examples = matrix.shape
    rows, columns = matrix.mean(axis=1, keepdims=True), matrix.mean(axis=0, keepdims=True)
    rest = ((matrix - rows - columns + matrix.mean()) ** 2).sum()
    freedom = np.array([seeds - 1, examples - 1, (seeds - 1) * (examples - 1)])
    parts = np.array([rows.var(ddof=1) / seeds, columns.var(ddof=1) / examples, rest / freedom[2] / matrix.size])
    variance = max(float(parts[0] + parts[1] - parts[2]), *parts.tolist())
    return math.sqrt(variance), float(variance**2 / (parts**2 / freedom).sum())


def _within(mean: float, error: float, reach: float, share: bool, positive: bool) -> tuple[float, float]:
    """``reach`` standard errors to either side; of a share along the log odds, of a positive mean along the log."""
    if positive and mean > 0:
        far = min(reach * error / mean, 100.0)  # e^100 is as good as no bound
        return mean * math.exp(-far), mean * math.exp(far)
    if not (share and 0 < mean < 1):
        return mean - reach * error, mean + reach * error
    odds, far = math.log(mean / (1 - mean)), reach * error / (mean * (1 - mean))
    low, high = special.expit([odds - far, odds + far]).tolist()
    return low, high


def estimate(
    values: object, *, share: bool = False, positive: bool = False, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean of a metric with its 95 % interval.

    With one seed it is the BCa bootstrap over examples (Efron 1987); with several, the standard error over seeds and
    examples, times a quantile of t. Few seeds say little about how much seeds vary: such an interval is
    wide.

    Args:
        values: [seeds, examples] or [examples].
        share: the mean lies between 0 and 1, and so does its interval: with several seeds it is one of the log odds,
            and where all values are 0 or all are 1 that of Clopper and Pearson for so many examples.
        positive: the mean is above 0, and so is its interval: with several seeds it is one of the logarithm.
        resamples: of the bootstrap.
        seed: of its random numbers.

    Raises:
        ValueError: for no values, or values that are not finite.
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
        found = stats.bootstrap((matrix[0],), np.mean, n_resamples=resamples, method="BCa", rng=rng, batch=1000)
    low, high = found.confidence_interval
    if not math.isfinite(low + high):  # so few different values that BCa has no answer
        low, high = np.quantile(found.bootstrap_distribution, [LEVEL / 2, 1 - LEVEL / 2])
    if share:  # values of examples with several rows may lie beyond
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(mean, float(low), float(high), examples, seeds, over, float(found.standard_error), math.inf)
