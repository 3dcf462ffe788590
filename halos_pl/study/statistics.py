"""Intervals and tests for studies: what is random (examples, seeds) is said, and every figure carries its n.

Values of a metric are a matrix [seeds, examples]: each seed's run is measured on the same held-out examples. scipy and
statsmodels do the statistics; only the bootstrap over two crossed factors, which neither has, is written out here.

Seeds are few. The quantiles of a bootstrap over three of them are its extremes, and such an interval misses the truth
one time in four; a test over examples alone takes the runs as given and finds a difference between any two. So with
several seeds the bootstrap gives the standard error, and t with the degrees of freedom that seeds and examples leave
(Satterthwaite 1946) gives interval and p. Where seeds matter and are two or three, a 95 % interval still misses the
truth in 6 to 10 cases of 100.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

Values = NDArray[np.float64]
RESAMPLES = 9999
LEVEL = 0.05
POWER = 0.8
NONE = "none: no example differs"


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes:
        value: the mean over seeds and examples, in the metric's own unit.
        low, high: of the interval; equal to ``value`` where nothing varies.
        examples: held-out examples behind it.
        seeds: runs behind it.
        over: what the interval treats as random: ``examples`` (BCa bootstrap; the run is taken as given), or
            ``seeds and examples`` (both are drawn again, independently of each other).
        error: standard error, as the bootstrap gives it.
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


@dataclass(frozen=True)
class Comparison:
    """Two arms on the same examples.

    Attributes:
        difference: mean of the first arm less that of the second, with its interval.
        p: of the main test: with several seeds t over seeds and examples; with one seed, which says nothing of other
            ones, McNemar's for a binary metric, else the paired permutation test over examples, which is also that of
            differences that are all equal.
        test: its name.
        permutation, wilcoxon: p of the paired permutation and the signed-rank test over examples, the runs (their mean
            over seeds) taken as given.
        effect: the mean difference in standard deviations of the examples' differences (Cohen's d_z).
        detectable: the smallest difference that such a comparison would find in 4 of 5 cases, in the metric's unit;
            after :func:`holm` as one of its family. NaN where all differences are equal, which does not tell; infinite
            for so few examples that none would be.
        adjusted: p after Holm's correction over its family; ``p`` until :func:`holm` has been called.
        runs_adjusted: the same of ``permutation``.
    """

    difference: Estimate
    p: float
    test: str
    permutation: float
    wilcoxon: float
    effect: float
    detectable: float
    adjusted: float
    runs_adjusted: float

    @property
    def shown(self) -> bool:
        """Whether a difference is shown: by the corrected test and by the interval."""
        return self.adjusted < LEVEL and not self.difference.low <= 0 <= self.difference.high

    @property
    def runs_differ(self) -> bool:
        """Whether these runs differ over examples, whatever other seeds would give."""
        return self.runs_adjusted < LEVEL

    @property
    def same(self) -> bool:
        """Whether no example differs."""
        return self.test == NONE


def _matrix(values: object) -> Values:
    matrix = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(
            f"values of shape {np.asarray(values).shape}; wanted are [seeds, examples], at least one of each"
        )
    if not np.isfinite(matrix).all():
        raise ValueError(f"{int((~np.isfinite(matrix)).sum())} of {matrix.size} values are not finite")
    return matrix


def _crossed(matrix: Values, rng: np.random.Generator, resamples: int) -> Values:
    """Means of resamples that draw seeds and examples independently (Owen 2007, The pigeonhole bootstrap).

    One fewer of each is drawn than there are: so the variance is not understated where they are few (McCarthy and
    Snowden 1985).
    """
    seeds, examples = matrix.shape
    means = np.empty(resamples)
    for at in range(0, resamples, 1000):
        count = min(1000, resamples - at)
        by_seed = rng.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=count) / (seeds - 1)
        by_example = rng.multinomial(examples - 1, np.full(examples, 1 / examples), size=count) / (examples - 1)
        means[at : at + count] = ((by_seed @ matrix) * by_example).sum(axis=1)
    return means


def _crossed_error(matrix: Values, rng: np.random.Generator, resamples: int) -> tuple[float, float]:
    """Standard error of the mean over seeds and examples, and its degrees of freedom (Satterthwaite 1946).

    The bootstrap counts three times what varies by seed *and* example, such as what was sampled (Owen 2007, theorem 3),
    and twice that is taken off again; but no more than leaves the largest of the three parts.
    """
    seeds, examples = matrix.shape
    rows, columns = matrix.mean(axis=1, keepdims=True), matrix.mean(axis=0, keepdims=True)
    rest = ((matrix - rows - columns + matrix.mean()) ** 2).sum()
    freedom = np.array([seeds - 1, examples - 1, (seeds - 1) * (examples - 1)])
    parts = np.array([rows.var(ddof=1) / seeds, columns.var(ddof=1) / examples, rest / freedom[2] / matrix.size])
    variance = max(float(_crossed(matrix, rng, resamples).var(ddof=1) - 2 * parts[2]), *parts.tolist())
    return math.sqrt(variance), float(variance**2 / (parts**2 / freedom).sum())


def _within(mean: float, error: float, reach: float, share: bool) -> tuple[float, float]:
    """``reach`` standard errors to either side; of a share along the log odds, which stays between 0 and 1."""
    if not (share and 0 < mean < 1):
        return mean - reach * error, mean + reach * error
    odds, far = math.log(mean / (1 - mean)), reach * error / (mean * (1 - mean))
    low, high = special.expit([odds - far, odds + far]).tolist()
    return low, high


def estimate(values: object, *, share: bool = False, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean of a metric with its 95 % interval.

    With one seed it is the BCa bootstrap over examples (Efron 1987); with several, the standard error of the bootstrap
    over seeds and examples, times a quantile of t. Few seeds say little about how much seeds vary: such an interval is
    wide.

    Args:
        values: [seeds, examples] or [examples].
        share: the mean lies between 0 and 1, and so does its interval: with several seeds it is one of the log odds,
            and where all values are 0 or all are 1 that of Clopper and Pearson for so many examples.
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
        error, freedom = _crossed_error(matrix, rng, resamples)
    if seeds > 1:
        low, high = _within(mean, error, float(stats.t.ppf(1 - LEVEL / 2, freedom)), share)
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


def _mcnemar(one: Values, other: Values) -> float:
    both = [[((one == a) & (other == b)).sum() for b in (1, 0)] for a in (1, 0)]
    return float(mcnemar(both, exact=True).pvalue)


def _detectable(difference: Estimate, level: float) -> float:
    """The difference that is found at this level with probability ``POWER``; NaN where nothing varies.

    Infinite for so few examples of one seed that no outcome of an exact test is below the level.
    """
    if not difference.error:
        return math.nan
    if difference.seeds == 1 and 2.0 ** (1 - difference.examples) >= level:
        return math.inf
    reach = stats.t.ppf(1 - level / 2, difference.freedom) + stats.t.ppf(POWER, difference.freedom)
    return float(reach) * difference.error


def compare(one: object, other: object, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Two arms, paired by seed and example.

    Args:
        one, other: [seeds, examples] or [examples], of the same shape.
        resamples: of bootstrap and permutation test.
        seed: of their random numbers.

    Raises:
        ValueError: for values of different shapes, none, or values that are not finite.
    """
    a, b = _matrix(one), _matrix(other)
    if a.shape != b.shape:
        raise ValueError(f"arms of {a.shape} and {b.shape} seeds and examples cannot be paired")
    difference = estimate(a - b, resamples=resamples, seed=seed)
    by_example = (a - b).mean(axis=0)
    detectable = _detectable(difference, LEVEL)
    if not (a - b).any():
        return Comparison(difference, 1.0, NONE, 1.0, 1.0, 0.0, detectable, 1.0, 1.0)
    rng = np.random.default_rng(seed)
    permutation = p = 1.0  # of a single example
    if len(by_example) > 1:
        found = stats.permutation_test(
            (by_example,), np.mean, permutation_type="samples", n_resamples=resamples, rng=rng, batch=1000
        )
        permutation = p = float(found.pvalue)
    test = "paired permutation"
    if len(a) > 1 and difference.error:  # the same on every example and seed: t has no scale
        test = "t over seeds and examples"
        p = float(2 * stats.t.sf(abs(difference.value) / difference.error, difference.freedom))
    elif len(a) == 1 and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        p, test = _mcnemar(a[0], b[0]), "McNemar, exact"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties and zeros, which it handles
        wilcoxon = float(stats.wilcoxon(by_example, zero_method="pratt").pvalue) if by_example.any() else 1.0
    spread = float(by_example.std(ddof=1)) if len(by_example) > 1 else 0.0
    mean = float(by_example.mean())
    effect = mean / spread if spread > 0 else math.copysign(math.inf, mean) if mean else 0.0
    return Comparison(difference, p, test, permutation, wilcoxon, effect, detectable, p, permutation)


def holm(comparisons: Sequence[Comparison], family: int = 0) -> list[Comparison]:
    """The same comparisons with p corrected for their number (Holm 1979), in the same order.

    Args:
        comparisons: those that can be made.
        family: how many there are to be, where some cannot be made yet; they count with p = 1.
    """
    if not comparisons:
        return []
    missing = [1.0] * max(0, family - len(comparisons))
    both = ([*(c.p for c in comparisons), *missing], [*(c.permutation for c in comparisons), *missing])
    adjusted, runs = (multipletests(each, alpha=LEVEL, method="holm")[1] for each in both)
    # What is looked for is not known beforehand: its size is that of the strictest step.
    level = LEVEL / max(family, len(comparisons))
    return [
        replace(c, adjusted=float(p), runs_adjusted=float(q), detectable=_detectable(c.difference, level))
        for c, p, q in zip(comparisons, adjusted, runs, strict=False)
    ]


def win_rate(preferences: object) -> tuple[float, float]:
    """Win rate against a reference and its standard error, both in percent, as AlpacaEval publishes them.

    Args:
        preferences: one for each prompt: 1 the reference wins, 2 the model wins, 0 or 1.5 a draw; NaN, where the judge
            gave no verdict, is left out.

    Raises:
        ValueError: for another number, or fewer than two verdicts.
    """
    given = np.asarray(preferences, dtype=np.float64)
    given = given[~np.isnan(given)]
    if not np.isin(given, (0, 1, 1.5, 2)).all():
        raise ValueError(f"preferences are 0, 1, 1.5 or 2; found {sorted(set(given[~np.isin(given, (0, 1, 1.5, 2))]))}")
    if len(given) < 2:
        raise ValueError(f"{len(given)} verdicts; a standard error needs two at least")
    wins = np.where(given == 0, 0.5, given - 1)
    return 100 * float(wins.mean()), 100 * float(stats.sem(wins, ddof=1))
