"""Comparisons of two models on the same questions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from halos_pl.tasks.paired import LEVEL, POWER, compare, detectable_share, mcnemar_power, paired


def scores(count: int, flipped: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = (rng.random(count) < 0.5).astype(float)
    return first, np.where(rng.random(count) < flipped, 1 - first, first)


@pytest.mark.parametrize("seed", range(5))
def test_zeros_and_ones_are_tested_as_statsmodels_tests_them(seed: int) -> None:
    first, second = scores(60, 0.3, seed)
    result = paired("m", first, second)
    table = [[0, int((first > second).sum())], [int((first < second).sum()), 0]]
    assert result.test == "McNemar"
    assert result.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert result.difference == pytest.approx(first.mean() - second.mean())
    assert result.low < result.difference < result.high
    other = paired("m", second, first)
    assert (other.p, other.low, other.high) == pytest.approx((result.p, -result.high, -result.low))


def test_few_other_scores_are_tested_over_all_signs() -> None:
    difference = np.array([0.5, -0.25, 0.125, 0.75, 0.375])
    sums = [abs(np.dot(signs, difference)) for signs in itertools.product((1, -1), repeat=5)]
    expected = np.mean([each >= abs(difference.sum()) for each in sums])
    result = paired("m", difference, np.zeros(5))
    assert result.test == "permutation"
    assert result.p == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 5, 6, 8, 13, 14, 40])
def test_a_difference_is_significant_exactly_if_its_interval_excludes_zero(count: int) -> None:
    rng = np.random.default_rng(count)
    for highest in (1, 8):  # scores of 0 and 1, and others
        for shift in range(5):
            first, second = rng.integers(0, highest + 1, (2, count)) / highest
            first = (
                np.clip(first + shift / 4, 0, 1) if highest > 1 else np.where(rng.random(count) < shift / 4, 1, first)
            )
            result = paired("m", first, second)
            assert (result.low > 0 or result.high < 0) == (result.p < LEVEL)
            assert result.low <= result.difference <= result.high


@pytest.mark.parametrize("count", [8, 16, 30])
def test_skewed_and_sparse_differences_have_the_interval_of_their_test(count: int) -> None:
    rng = np.random.default_rng(count)
    for first in ([1.0] + [0.05] * (count - 1), rng.standard_cauchy(count) + 1, rng.lognormal(size=count) - 0.5):
        for zeros in (0, 3, count // 2):
            one = np.where(np.arange(count) < count - zeros, first, 0.0)
            result = paired("m", one, np.zeros(count))
            assert (result.low > 0 or result.high < 0) == (result.p < LEVEL)
            assert result.low <= result.difference <= result.high
            turned, moved = paired("m", np.zeros(count), one), paired("m", one + 2, np.zeros(count))
            assert (turned.low, turned.high, turned.p) == pytest.approx((-result.high, -result.low, result.p))
            assert (moved.low, moved.high) == pytest.approx((result.low + 2, result.high + 2))


@pytest.mark.parametrize("count", [4, 8, 20])
def test_rounding_is_no_difference_and_equal_differences_tell_nothing_about_power(count: int) -> None:
    rounded = paired("m", [0.1 + 0.2] * count, [0.3] * count)
    assert (rounded.p, rounded.difference) == (1, 0)
    for first in (0.3, 0.4):
        result = paired("m", [first] * count, [0.3] * count)
        assert result.detectable is None if count < 6 else np.isnan(result.detectable)
        assert result.line("A", "B").endswith("no difference)" if count < 6 else "unknown)")


@pytest.mark.parametrize("count", [3, 5, 6, 8, 10])
def test_few_other_scores_find_the_detectable_difference_with_the_stated_power(count: int) -> None:
    rng = np.random.default_rng(count)
    one = rng.standard_normal(count)
    detectable = paired("m", one / one.std(ddof=1), np.zeros(count)).detectable
    if count < 6:
        assert detectable is None, "no outcome of five questions is significant"
        return
    assert detectable is not None
    found = [paired("m", row, np.zeros(count)).p < LEVEL for row in rng.normal(detectable, 1, (800, count))]
    assert np.mean(found) == pytest.approx(POWER, abs=0.05)


def test_many_other_scores_are_tested_as_by_t() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(300), rng.random(300)
    result = paired("m", first, second)
    assert result.p == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.02)
    interval = stats.ttest_rel(first, second).confidence_interval()
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), abs=0.004)


@pytest.mark.parametrize(("count", "effect", "discordant"), [(50, 0.2, 0.3), (200, 0.05, 0.1), (200, 0.0, 0.2)])
def test_the_power_is_the_share_of_simulated_studies_that_find_it(count: int, effect: float, discordant: float) -> None:
    rng = np.random.default_rng(0)
    cells = [(discordant + effect) / 2, (discordant - effect) / 2, 1 - discordant]
    wins, losses, _ = rng.multinomial(count, cells, size=4000).T
    p = np.minimum(1, 2 * stats.binom.cdf(np.minimum(wins, losses), wins + losses, 0.5))
    assert mcnemar_power(effect, count, discordant) == pytest.approx((p < LEVEL).mean(), abs=0.025)


def test_the_detectable_difference_is_found_with_the_stated_power() -> None:
    size = detectable_share(200, 0.1)
    assert size is not None
    assert mcnemar_power(size, 200, 0.1) == pytest.approx(POWER, abs=0.005)
    larger = detectable_share(50, 0.1)
    assert larger is not None
    assert larger > size
    assert detectable_share(5, 0.1) is None, "no outcome of five questions is significant"


def test_a_difference_that_is_not_significant_is_called_so() -> None:
    first, second = scores(40, 0.1, 1)
    line = paired("gsm8k", first, second).line("A", "B")
    assert "not significant" in line
    assert "n = 40" in line
    assert "not significant" not in paired("gsm8k", np.ones(40), np.zeros(40)).line("A", "B")


def test_several_metrics_are_corrected_and_paired_by_question() -> None:
    keys = [f"q{i}" for i in range(30)]
    first = {"a": dict.fromkeys(keys, 1.0), "b": dict.fromkeys(keys[:8], 1.0), "only": {"q0": 1.0}}
    second = {"a": dict.fromkeys(reversed(keys), 0.0), "b": {**dict.fromkeys(keys[:7], 0.0), "q99": 0.0}}
    a, b = compare(first, second)
    assert (a.metric, a.count, b.metric, b.count) == ("a", 30, "b", 7)
    assert a.adjusted == pytest.approx(2 * a.p)
    assert b.adjusted == pytest.approx(b.p)


@pytest.mark.parametrize("columns", [([1.0], [1.0, 0.0]), ([], []), ([np.nan], [1.0])])
def test_columns_that_do_not_match_are_refused(columns: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="m:"):
        paired("m", *columns)
