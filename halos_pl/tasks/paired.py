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


@dataclass(frozen=True)
class Paired:
    """The difference of two models on the questions that both answered.

    Attributes:
        metric: Name of the metric.
        count: Number of questions.
        first, second: Mean of each model.
        low, high: 95% interval of ``first - second``; without bounds if the permutation test has too few questions to
            find any difference. It contains 0 unless p is below the level.
        p: Two-sided p.
        adjusted: p after Holm's correction for all metrics compared together.
        detectable: The smallest difference that the test finds with a probability of 80 %, at the level of a single
            test; None if it finds none.
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
        smallest = "no difference" if self.detectable is None else f"{self.detectable:.2g}"
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
    low, high, p, detectable = (_binary if binary else _other)(one - other, seed)
    if p >= LEVEL:  # the test is stricter than the interval, which is approximate
        low, high = min(low, 0.0), max(high, 0.0)
    test: Literal["McNemar", "permutation"] = "McNemar" if binary else "permutation"
    return Paired(metric, len(one), float(one.mean()), float(other.mean()), low, high, p, p, detectable, test)


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

    The interval contains the differences that the test over all signs does not reject (Hartigan 1969); with many
    questions, it is that of t, which also gives the detectable difference.
    """
    n, mean = len(difference), float(difference.mean())
    spread = float(difference.std(ddof=1)) if n > 1 else 0.0
    p = _permutation(difference, seed)
    if _has_few_signs(n):
        low, high = _bounds(difference[None])
        smallest = _detectable_of_few(n)
        return float(low[0]), float(high[0]), p, None if math.isinf(smallest) else smallest * spread
    reach = float(stats.t.isf(LEVEL / 2, n - 1)) * spread / math.sqrt(n)
    effect = TTestPower().solve_power(nobs=n, alpha=LEVEL, power=POWER)
    return mean - reach, mean + reach, p, float(np.squeeze(effect)) * spread


def _has_few_signs(n: int) -> bool:
    """Whether the permutation test goes over all signs of n differences."""
    return bool(2**n <= RESAMPLES)


def _signs(n: int) -> NDArray[np.float64]:
    """All signs of n differences, [2**n, n]; first those that change none."""
    return np.where((np.arange(2**n)[:, None] >> np.arange(n)) & 1, -1.0, 1.0)


def _bounds(differences: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The smallest and the largest mean that the test over all signs does not reject.

    The test rejects a mean m if fewer than half of LEVEL of all subsets, the empty one included, have a mean that is
    not above m (or not below it).

    Args:
        differences: [studies, n].

    Returns:
        Both, [studies]; infinite if it rejects none.
    """
    studies, n = differences.shape
    rank = math.ceil(2**n * LEVEL / 2) - 2
    if rank < 0:
        return np.full(studies, -np.inf), np.full(studies, np.inf)
    subsets = _signs(n)[1:] < 0
    means = np.partition(differences @ (subsets / subsets.sum(axis=1, keepdims=True)).T, (rank, -1 - rank))
    return means[:, rank], means[:, -1 - rank]


@functools.cache
def _detectable_of_few(n: int) -> float:
    """The smallest normal effect, in standard deviations, that the test over all signs finds in 80 % of 2000 simulated
    studies of n differences; infinite if it finds none."""
    rng = np.random.default_rng(0)
    low = np.concatenate([_bounds(rng.standard_normal((200, n)))[0] for _ in range(10)])
    return float(np.quantile(-low, POWER)) if np.isfinite(low).all() else math.inf


def _permutation(difference: NDArray[np.float64], seed: int) -> float:
    """Two-sided p of the mean under random signs; over all signs if they are few."""
    n = len(difference)
    size = abs(difference.sum()) * (1 - 1e-12)  # equal sums may be rounded differently
    if _has_few_signs(n):
        return float((np.abs(_signs(n) @ difference) >= size).mean())
    rng, beyond, batch = np.random.default_rng(seed), 0, max(1, 4_000_000 // n)
    for start in range(0, RESAMPLES, batch):
        signs = 1 - 2.0 * rng.integers(0, 2, (min(batch, RESAMPLES - start), n), dtype=np.int8)
        beyond += int((np.abs(signs @ difference) >= size).sum())
    return (1 + beyond) / (1 + RESAMPLES)
