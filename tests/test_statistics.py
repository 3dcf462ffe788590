"""Means of metrics with their intervals: an oracle, formulas written out, and that intervals cover as promised."""

from __future__ import annotations

import csv
import gzip
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from halos_pl.study.statistics import estimate

DATA = Path(os.environ.get("HALOS_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "stats"


def test_win_rates_are_those_that_alpaca_eval_has_published() -> None:
    if not DATA.is_dir():
        pytest.skip(f"no {DATA}: set HALOS_TEST_DATA to the folder of real data")
    verdicts: dict[str, list[float]] = defaultdict(list)
    with gzip.open(DATA / "alpaca_eval_gpt4_preferences.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            verdicts[row["model"]].append(float(row["preference"] or "nan"))
    with (DATA / "alpaca_eval_gpt4_leaderboard.csv").open() as file:
        published = {row[""]: row for row in csv.DictReader(file)}
    names = verdicts.keys() & published.keys()
    assert len(names) == 52
    for model in names:
        judged = np.array([verdict for verdict in verdicts[model] if not np.isnan(verdict)])
        wins = estimate(np.where(judged == 0, 0.5, judged - 1), share=True, resamples=399)  # 0 and 1.5 are ties
        assert 100 * wins.value == pytest.approx(float(published[model]["win_rate"]), abs=1e-6), model
        assert 100 * wins.error == pytest.approx(float(published[model]["standard_error"]), rel=0.2), model


# Without ties: between equal resamples the bias correction of BCa is a matter of rounding.
values = st.builds(
    lambda seed, n, spread: (np.random.default_rng(seed).standard_t(3, size=n) * spread).tolist(),
    st.integers(0, 10**6),
    st.integers(15, 40),
    st.floats(0.01, 100),
)


@settings(max_examples=30, deadline=None)
@given(values, st.floats(-10, 10), st.floats(0.1, 10))
def test_an_interval_moves_and_scales_with_its_values(drawn: list[float], shift: float, scale: float) -> None:
    plain = estimate(drawn, resamples=199)
    moved = estimate(np.array(drawn) * scale + shift, resamples=199)
    size = 1 + max(map(abs, drawn)) * scale
    for name in ("value", "low", "high"):
        assert getattr(moved, name) == pytest.approx(getattr(plain, name) * scale + shift, abs=1e-6 * size)
    assert plain.low <= plain.value + 1e-9 * size
    assert plain.value <= plain.high + 1e-9 * size
    assert (plain.examples, plain.seeds) == (len(drawn), 1)


def test_the_standard_error_is_that_of_theory() -> None:
    draw = np.random.default_rng(1)
    one = draw.normal(size=400)
    assert estimate(one).error == pytest.approx(one.std(ddof=1) / 20, rel=0.05)
    # Crossed factors: Var = s_seed^2 / S + s_example^2 / N + s_rest^2 / (S N). Both variances of means hold the last.
    seeds, examples = 12, 300
    matrix = draw.normal(size=(seeds, 1)) + draw.normal(size=(1, examples)) + draw.normal(size=(seeds, examples))
    found = estimate(matrix)
    by_seed, by_example = matrix.mean(axis=1).var(ddof=1) / seeds, matrix.mean(axis=0).var(ddof=1) / examples
    rest = (matrix - matrix.mean(0) - matrix.mean(1, keepdims=True) + matrix.mean()).var() / (seeds * examples)
    assert found.error == pytest.approx(np.sqrt(by_seed + by_example - rest), rel=0.05)
    assert found.over == "seeds and examples"
    # Resampling examples alone, as is usual, would claim a fifth of that error.
    assert estimate(matrix.mean(axis=0)).error < found.error / 2


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(2)
    hits = [
        estimate(draw.exponential(size=60), resamples=499, seed=i) for i in range(300)
    ]  # skewed, where a symmetric interval is off
    share = np.mean([e.low <= 1 <= e.high for e in hits])
    assert 0.87 <= share <= 0.98, share  # BCa reaches about 0.92 at this n


@pytest.mark.parametrize("bad", [[], [[1.0, np.nan]], [[[1.0]]]])
def test_what_cannot_be_summed_up_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="values"):
        estimate(bad)


def test_a_share_stays_between_nothing_and_all() -> None:
    draw = np.random.default_rng(11)
    few = (draw.random((3, 12)) < 0.9).astype(float)
    found = estimate(few, share=True)
    assert 0 < found.low < found.value < found.high < 1
    assert estimate(few).high > 1
    for all_of_them in (np.ones(20), np.ones((3, 20))):
        # Clopper and Pearson: all of 20, at a true share of 0.025^(1/20), is seen 2.5 % of the time.
        found = estimate(all_of_them, share=True)
        assert (found.low, found.high) == (pytest.approx(0.025 ** (1 / 20)), 1)
    many = draw.random((4, 400))  # away from the edges the interval is the usual one
    one, other = estimate(many, share=True), estimate(many)
    assert (one.low, one.high) == (pytest.approx(other.low, abs=2e-3), pytest.approx(other.high, abs=2e-3))


def test_one_example_of_several_seeds_varies_with_them() -> None:
    found = estimate([[0.0], [5.0], [10.0]])
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 2, 5, stats.sem([0, 5, 10])))


@pytest.mark.parametrize(
    ("seeds", "by_seed", "by_example"), [(3, 0.0, 0.0), (3, 0.5, 0.0), (5, 0.0, 1.0), (3, 0.3, 0.3)]
)
def test_an_interval_over_seeds_and_examples_is_as_wide_as_it_has_to_be(
    seeds: int, by_seed: float, by_example: float
) -> None:
    """Coverage of 95 % within what 300 draws tell; of what varies by both alone it was 100 % before."""
    draw = np.random.default_rng(12)
    hits = 0
    for i in range(300):
        matrix = by_seed * draw.normal(size=(seeds, 1)) + by_example * draw.normal(size=(1, 40))
        e = estimate(matrix + draw.normal(size=(seeds, 40)), resamples=299, seed=i)
        hits += e.low <= 0 <= e.high
    assert 0.9 <= hits / 300 <= 0.995, hits


def test_the_interval_of_a_share_stays_one() -> None:
    """Also where the values of examples with several rows, as of a ROC area, lie beyond 1."""
    above, below = 1 - 0.95, 0.45  # a sample whose mean is 0.95 and whose values are not shares
    values = np.array([0.95 + 2 * above] * 9 + [0.95 - 2 * below] + [0.95 + above] * 9 + [0.95 - below])
    values += 0.95 - values.mean()
    assert estimate(values).high > 1
    found = estimate(values, share=True)
    assert 0 <= found.low < 0.95 < found.high <= 1


def test_the_interval_of_a_positive_mean_is_positive() -> None:
    """A KL divergence of 1.2 is not -1.1, however few runs there are; close to the mean it is the plain one."""
    values = np.array([[0.2, 0.4, 0.1], [3.0, 2.0, 1.5], [0.3, 1.0, 2.5]])
    found, plain = estimate(values, positive=True), estimate(values)
    assert plain.low < 0 < found.low < found.value < found.high
    near = values / 100 + 5
    found, plain = estimate(near, positive=True), estimate(near)
    assert found.low == pytest.approx(plain.low, rel=1e-3)
    assert found.high == pytest.approx(plain.high, rel=1e-3)
