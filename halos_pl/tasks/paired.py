"""Two models on the same questions: difference, interval, test and power.

Scores of 0 and 1 are compared by McNemar's exact test, other scores by a permutation test of the paired differences.
The models are fixed: the result holds for further questions, not for further training runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

LEVEL, POWER = 0.05, 0.8
RESAMPLES = 9999
#: Differences up to this share of the largest score are rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Paired:
    """The difference of two models on the questions that both answered.

    Attributes:
        metric: Name of the metric.
        count: Number of questions.
        first, second: Mean of each model.
        low, high: 95% interval of ``first - second``; without bounds if the permutation test has too few questions to
            find any difference. It contains 0 unless p is below the level, and then it does not.
        p: Two-sided p.
        adjusted: p after Holm's correction for all metrics compared together.
        detectable: The smallest difference that the test finds with a probability of 80 %, at the level of a single
            test; None if it finds none, NaN if that is unknown, as the differences of other scores are all equal.
        test: ``McNemar`` or ``permutation``.
    """

    metric: str
    count: int
    first: float
    second: float
    low: float
    high: float
    p: float
    adjusted: float
    detectable: float | None
    test: Literal["McNemar", "permutation"]

    @property
    def difference(self) -> float:
        return self.first - self.second

    @property
    def significant(self) -> bool:
        return self.adjusted < LEVEL

    def line(self, first: str, second: str) -> str:
        """One line for the terminal."""
        smallest = "no difference" if self.detectable is None else f"{self.detectable:.2g}".replace("nan", "unknown")
        corrected = f", {self.adjusted:.2g} corrected" if self.adjusted > self.p else ""
        return (
            f"{self.metric}: {first} {self.first:.3g}, {second} {self.second:.3g}, difference {self.difference:+.3g}"
            f" [{self.low:+.3g}, {self.high:+.3g}], {'significant' if self.significant else 'not significant'}"
            f" ({self.test}, p = {self.p:.2g}{corrected}, n = {self.count}; found 80 % of the time: {smallest})"
        )


def compare(
    first: Mapping[str, Mapping[str, float]],
    second: Mapping[str, Mapping[str, float]],
    metrics: Iterable[str] | None = None,
) -> list[Paired]:
    """Compares two models on the questions that both have.

    Args:
        first: Values by metric and question.
        second: The same for the other model.
        metrics: Metrics to compare; default: all that both have.

    Returns:
        A comparison for each metric with common questions, p corrected for all of them (Holm 1979).
    """
    names = [name for name in (first if metrics is None else metrics) if name in first and name in second]
    results = []
    for name in names:
        common = sorted(first[name].keys() & second[name].keys())
        if common:
            columns = [[values[name][key] for key in common] for values in (first, second)]
            results.append(paired(name, columns[0], columns[1]))
    if not results:
        return []
    adjusted = multipletests([each.p for each in results], method="holm")[1]
    return [replace(each, adjusted=float(p)) for each, p in zip(results, adjusted, strict=True)]


def paired(
    metric: str,
    first: Sequence[float] | NDArray[np.float64],
    second: Sequence[float] | NDArray[np.float64],
    seed: int = 0,
) -> Paired:
    """The difference of two columns of scores.

    Args:
        metric: Name of the metric.
        first: Scores of one model.
        second: Scores of the other model on the same questions, in the same order.
        seed: Seed of the permutation test.

    Raises:
        ValueError: if the columns differ in length, are empty, or have values that are not finite.
    """
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != other.shape or one.ndim != 1 or not one.size or not np.isfinite([one, other]).all():
        raise ValueError(f"{metric}: {one.shape} and {other.shape} values; expected two equal columns of finite ones")
    binary = bool(np.isin([one, other], (0, 1)).all())
    other = np.where(np.abs(one - other) <= ROUNDING * np.abs([one, other]).max(), one, other)
    low, high, p, detectable = (_binary if binary else _other)(one - other, seed)
    means = float(one.mean()), float(other.mean())
    inside = [means[0] - means[1]]
    if p >= LEVEL:  # McNemar's test is stricter than its interval, which is approximate
        inside.append(0.0)
    low, high = min(low, *inside), max(high, *inside)
    test: Literal["McNemar", "permutation"] = "McNemar" if binary else "permutation"
    return Paired(metric, len(one), *means, low, high, p, p, detectable, test)


def _binary(difference: NDArray[np.float64], _: int) -> tuple[float, float, float, float | None]:
    """Interval of Bonett and Price 2012 (adjusted Wald), McNemar's exact p, and the detectable difference."""
    n, wins, losses = len(difference), int((difference > 0).sum()), int((difference < 0).sum())
    p = 1.0 if wins == losses else float(stats.binomtest(wins, wins + losses).pvalue)
    won, lost = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    reach = float(stats.norm.isf(LEVEL / 2)) * math.sqrt((won + lost - (won - lost) ** 2) / (n + 2))
    low, high = max(won - lost - reach, -1.0), min(won - lost + reach, 1.0)
    return low, high, p, detectable_share(n, min(won + lost, 1.0))


def mcnemar_power(effect: float, count: int, discordant: float) -> float:
    """The probability that McNemar's exact test at level 0.05 finds a difference of two shares.

    Args:
        effect: Difference of the shares.
        count: Number of questions.
        discordant: Share of questions on which the models differ; at least ``abs(effect)``.
    """
    discordant = max(discordant, abs(effect))
    if discordant == 0:
        return 0.0
    low, high = (int(end) for end in stats.binom.interval(1 - 1e-9, count, discordant))
    differing = np.arange(low, high + 1)
    weight = stats.binom.pmf(differing, count, discordant)
    # The largest number of wins of the worse model that is significant; -1 if none is.
    most = stats.binom.ppf(LEVEL / 2, differing, 0.5)
    most = np.where(stats.binom.cdf(most, differing, 0.5) > LEVEL / 2, most - 1, most)
    share = (1 + effect / discordant) / 2
    significant = stats.binom.cdf(most, differing, share) + stats.binom.cdf(most, differing, 1 - share)
    return float((weight * significant).sum())


def detectable_share(count: int, discordant: float) -> float | None:
    """The smallest difference that McNemar's exact test finds with a probability of 80 %; None if it finds none."""

    def excess(effect: float) -> float:
        return mcnemar_power(effect, count, discordant) - POWER

    return None if excess(1.0) < 0 else float(optimize.brentq(excess, 0.0, 1.0, xtol=1e-4))


def _other(difference: NDArray[np.float64], seed: int) -> tuple[float, float, float, float | None]:
    """Interval, p of the permutation test, and the detectable difference if differences are normal.

    The interval contains the differences that the test does not reject, with the same signs (Hartigan 1969). The
    detectable difference of many questions is that of the t test.
    """
    n = len(difference)
    low, high, p = _tested(difference, seed)
    if _has_few_signs(n):
        effect = _detectable_of_few(n)
    else:
        effect = float(np.squeeze(TTestPower().solve_power(nobs=n, alpha=LEVEL, power=POWER)))
    if math.isinf(effect):
        return low, high, p, None
    spread = float(difference.std(ddof=1))
    varies = spread > ROUNDING * float(np.abs(difference).max())
    return low, high, p, effect * spread if varies else math.nan


def _has_few_signs(n: int) -> bool:
    """Whether the permutation test goes over all signs of n differences."""
    return bool(2**n <= RESAMPLES)


def _all_flips(n: int) -> NDArray[np.float64]:
    """All choices of signs for n differences, [2**n, n]: 1 for a difference that is flipped, otherwise 0."""
    return ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(np.float64)


def _ends(flips: NDArray[np.float64], differences: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """The ends of the means m for which flipping signs of ``differences - m`` makes their sum no smaller.

    They are the means of the flipped differences and of the others; there are no bounds if all are flipped, or none.

    Args:
        flips: [k, n], 1 for a difference that is flipped, otherwise 0.
        differences: [studies, n].

    Returns:
        The lower and the upper ends, [studies, k].
    """
    flipped, total = flips.sum(axis=1), differences.sum(axis=1, keepdims=True)
    sums, kept = differences @ flips.T, flips.shape[1] - flipped
    with np.errstate(invalid="ignore", divide="ignore"):
        one, other = sums / flipped, (total - sums) / kept
    unbounded = (flipped == 0) | (kept == 0)
    return np.where(unbounded, -np.inf, np.minimum(one, other)), np.where(unbounded, np.inf, np.maximum(one, other))


def _bounds(low: NDArray[np.float64], high: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The smallest and the largest mean that the test does not reject, between at least a share LEVEL of ends.

    Args:
        low, high: Ends by choice of signs, [studies, k]; the mean of the differences lies between all of them.

    Returns:
        Both, [studies]; infinite if it rejects none.
    """
    rank = max(math.ceil(low.shape[1] * LEVEL) - 1, 0)
    return np.partition(low, rank)[:, rank], np.partition(high, -1 - rank)[:, -1 - rank]


@functools.cache
def _detectable_of_few(n: int) -> float:
    """The smallest normal effect, in standard deviations, that the test over all signs finds in 80 % of 2000 simulated
    studies of n differences; infinite if it finds none."""
    rng, flips = np.random.default_rng(0), _all_flips(n)
    low = np.concatenate([_bounds(*_ends(flips, rng.standard_normal((200, n))))[0] for _ in range(10)])
    return float(np.quantile(-low, POWER)) if np.isfinite(low).all() else math.inf


def _tested(difference: NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    """The interval of the mean, and its two-sided p, under random signs; under all signs if they are few."""
    n = len(difference)
    if _has_few_signs(n):
        ends = [_ends(_all_flips(n), difference[None])]
    else:
        rng, batch = np.random.default_rng(seed), max(1, 4_000_000 // n)
        ends = [_ends(np.zeros((1, n)), difference[None])]  # the signs as they are
        for start in range(0, RESAMPLES, batch):
            flips = rng.integers(0, 2, (min(batch, RESAMPLES - start), n), dtype=np.int8).astype(np.float64)
            ends.append(_ends(flips, difference[None]))
    lows, highs = (np.concatenate(each, axis=1) for each in zip(*ends, strict=True))
    rounding = ROUNDING * float(np.abs(difference).max())  # equal sums may be rounded differently
    p = float(((lows <= rounding) & (highs >= -rounding)).mean())
    low, high = _bounds(lows, highs)
    return float(low[0]), float(high[0]), p
