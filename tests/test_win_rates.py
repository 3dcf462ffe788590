"""Win rates against published figures, and what a report recovers of a simulated judge."""

from __future__ import annotations

import csv
import gzip
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats import inter_rater

from halos_pl.judge.agreement import agreement, cohens_kappa, fleiss_kappa, majority
from halos_pl.judge.estimates import linear, mean_of
from halos_pl.judge.simulated import SimulatedJudge
from halos_pl.judge.win_rates import JudgedPair, WinRate, from_alpaca_eval, win_rate

#: Number of models, and the precision of the figures. Two of AlpacaEval 2's 59 models are in the file twice.
PUBLISHED = {"alpaca_eval_gpt4": (52, 1e-6), "alpaca_eval2_gpt4_turbo": (57, 1e-5)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_win_rates_and_standard_errors_are_the_published_ones(name: str, shared_data: Path) -> None:
    verdicts: dict[str, dict[str, float]] = defaultdict(dict)
    with gzip.open(shared_data / "stats" / f"{name}_preferences.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            if row["preference"] and row["preference"] != "nan":
                verdicts[row["model"]][row["instruction_index"]] = from_alpaca_eval(float(row["preference"]))
    with (shared_data / "stats" / f"{name}_leaderboard.csv").open() as file:
        published = {next(iter(row.values())): row for row in csv.DictReader(file)}
    models, within = PUBLISHED[name]
    names = verdicts.keys() & published.keys()
    assert len(names) == models
    for model in names:
        rate = mean_of([*verdicts[model].values()])
        assert 100 * rate.value == pytest.approx(float(published[model]["win_rate"]), abs=within), model
        assert 100 * rate.error == pytest.approx(float(published[model]["standard_error"]), abs=within), model
        assert rate.low <= rate.value <= rate.high


def test_the_interval_of_a_share_is_that_of_wilson() -> None:
    """But for the quantile, which is that of t, and ddof, which is 1."""
    many = mean_of([1.0] * 300 + [0.0] * 700)
    wilson = stats.binomtest(300, 1000).proportion_ci(method="wilson")
    assert (many.low, many.high) == pytest.approx((wilson.low, wilson.high), abs=1e-4)
    assert mean_of([0.0] * 20).high == pytest.approx(0.18, abs=0.02)
    assert mean_of([0.0] * 20).low == pytest.approx(0, abs=1e-12)
    assert mean_of([]).n == 0
    for n, least, most in ((3, 0.0, 1.0), (40, -1.0, 1.0)):  # equal values count as n tosses
        equal = [mean_of([least + share * (most - least)] * n, least, most) for share in (0.25, 0.5, 1.0)]
        assert all(each.high - each.low > 0.5 * (most - least) / n for each in equal)
        assert all(linear(each.value, np.zeros(n), least, most) == each for each in equal)
    for wrong in ([1.5], [float("nan")]):
        with pytest.raises(ValueError, match="0 to 1"):
            mean_of(wrong)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_intervals_hold_the_truth_as_often_as_they_say(p: float) -> None:
    """For wins, losses and ties, and for continuous preferences."""
    rng = np.random.default_rng(0)
    for draw in (
        lambda: rng.choice([0, 0.5, 1], size=80, p=[0.8 - p + p / 2, 0.2, p - p / 2]),
        lambda: rng.beta(2 * p, 2 * (1 - p), size=80),
    ):
        truth = np.mean([draw().mean() for _ in range(2000)])
        hits = np.mean([mean_of(draw()).contains(float(truth)) for _ in range(500)])
        assert 0.92 <= hits <= 0.98


judges = st.builds(
    SimulatedJudge,
    accuracy=st.floats(0.5, 0.95),
    position_bias=st.floats(-0.7, 0.7),
    abstains=st.floats(0, 0.2),
    ties=st.floats(0, 0.3),
)


@settings(max_examples=10, deadline=None)
@given(judges, st.integers(0, 2**31))
def test_a_report_recovers_a_simulated_judge(judge: SimulatedJudge, seed: int) -> None:
    """A true model win rate of 70%: both orders cancel the position, which only pulls the win rate to a half."""
    rng = np.random.default_rng(seed)
    n = 2000
    truth = {f"row {i}": 1 if i < 0.7 * n else -1 for i in range(n)}
    pairs = judge.judge(truth, rng)
    report, people = win_rate(pairs), agreement(pairs, truth, "truth")
    # Five standard errors, as 40 estimates would miss a 95% interval now and then.
    without_ties = (judge.agreement - 0.5) / (1 - abs(judge.position_bias)) + 0.5
    rate = 0.5 + 0.4 * (judge.agreement - 0.5)
    for estimate, expected in (
        (report.rate, rate),
        (report.position_bias, judge.position_bias),
        (people.accuracy, judge.agreement),
        (people.without_position, without_ties),
    ):
        assert abs(estimate.value - expected) < 5 * estimate.error + 1e-9
    assert report.abstentions == pytest.approx(2 * n * judge.abstains, abs=5 * np.sqrt(n))
    assert report.left_out == n - report.rate.n
    assert report.bounds[0] <= report.rate.value <= report.bounds[1]


@pytest.mark.parametrize("bias", [0.0, 0.3, -0.6])
def test_intervals_hold_a_judges_parameters_as_often_as_they_say(bias: float) -> None:
    judge = SimulatedJudge(accuracy=0.75, position_bias=bias, abstains=0.05)
    truth = {f"row {i}": 1 if i % 3 else -1 for i in range(60)}
    hits = []
    for seed in range(120):
        pairs = judge.judge(truth, np.random.default_rng(seed), repeats=0)
        report, people = win_rate(pairs), agreement(pairs, truth, "truth")
        hits.append(
            [
                report.position_bias.contains(bias),
                people.accuracy.contains(judge.agreement),
                people.without_position.contains(judge.accuracy),
                report.rate.contains(0.5 + (judge.agreement - 0.5) / 3),
            ]
        )
    assert (np.mean(hits, axis=0) >= 0.9).all(), np.mean(hits, axis=0)


def test_both_orders_combine_and_neither_abstentions_nor_failures_become_ties() -> None:
    pairs = [
        JudgedPair("wins", 1, 1, (1,), (0,)),
        JudgedPair("follows", 1, 0, (1,), ()),
        JudgedPair("leans", 0.9, 0.4),
        JudgedPair("loses", 0, 0),
        JudgedPair("half", 1, None),
        JudgedPair("none", None, None, failed=1),
        JudgedPair("same", 0.5, 0.5, identical=True),
    ]
    report = win_rate(pairs)
    assert report.preferences == pytest.approx({"wins": 1, "follows": 0.5, "leans": 0.65, "loses": 0, "same": 0.5})
    assert (report.wins, report.ties, report.losses, report.identical) == (2, 2, 1, 1)
    assert (report.abstentions, report.failures, report.left_out) == (2, 1, 2)
    assert report.rate.value == pytest.approx(2.65 / 5)
    assert report.bounds == pytest.approx((2.65 / 7, 4.65 / 7))
    assert report.position_bias.value == pytest.approx(1.5 / 4)
    assert report.follows_position.value == pytest.approx(2 / 4)
    assert report.consistency.value == pytest.approx((0.5 + 1) / 2)


verdict = st.none() | st.sampled_from([0.0, 0.5, 1.0])
several = st.lists(st.tuples(st.sampled_from("abc"), verdict, verdict), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(several)
def test_the_bounds_are_the_win_rates_with_the_pairs_left_out_lost_and_won(
    rows: list[tuple[str, float | None, float | None]],
) -> None:
    """Also where several pairs share a prompt, which counts once."""

    def rated(value: float | None) -> WinRate:
        filled = [(x, y) if None not in (x, y) else (value, value) for _, x, y in rows]
        return win_rate([JudgedPair(f"{i}", *both, example=rows[i][0]) for i, both in enumerate(filled)])

    report = rated(None)
    assert report.bounds == pytest.approx((rated(0.0).rate.value, rated(1.0).rate.value))
    if report.rate.n:
        assert report.bounds[0] - 1e-9 <= report.rate.value <= report.bounds[1] + 1e-9


def test_the_agreement_of_a_judge_does_not_depend_on_pairs_of_equal_answers() -> None:
    rng = np.random.default_rng(0)
    truth = {f"row {i}": 1 if i % 3 else -1 for i in range(60)}
    pairs = SimulatedJudge(accuracy=0.85, position_bias=0.4).judge(truth, rng)
    equal = [JudgedPair(f"same {i}", 0.5, 0.5, identical=True) for i in range(60)]
    labels = truth | {pair.name: i % 3 - 1 for i, pair in enumerate(equal)}
    assert agreement([*pairs, *equal], labels, "x") == agreement(pairs, truth, "x")


labels = st.lists(st.tuples(*[st.sampled_from([-1, 0, 1])] * 3), min_size=6, max_size=60)


@settings(max_examples=40, deadline=None)
@given(labels)
def test_kappas_are_those_of_statsmodels(rows: list[tuple[int, int, int]]) -> None:
    first, second, _ = zip(*rows, strict=True)
    table, kinds = np.zeros((3, 3)), [-1, 0, 1]
    for a, b in zip(first, second, strict=True):
        table[kinds.index(a), kinds.index(b)] += 1
    if len({*first}) > 1 and len({*second}) > 1:
        theirs = inter_rater.cohens_kappa(table)
        ours = cohens_kappa(first, second)
        assert (ours.value, ours.error) == pytest.approx((theirs.kappa, theirs.std_kappa), abs=1e-6)
    else:
        assert np.isnan(cohens_kappa(first, second).value)
    counts, _ = inter_rater.aggregate_raters(np.array(rows))
    if len({label for row in rows for label in row}) > 1:
        assert fleiss_kappa(rows).value == pytest.approx(inter_rater.fleiss_kappa(counts), abs=1e-9)


def test_repeated_rows_of_a_prompt_say_no_more_than_one() -> None:
    rng = np.random.default_rng(0)
    shown, truth = rng.choice([0.0, 0.5, 1.0], (40, 2)), rng.integers(-1, 2, 40)
    votes = [[int(v) for v in np.where(rng.random(3) < 0.6, label, rng.integers(-1, 2, 3))] for label in truth]

    def figures(times: int) -> list[tuple[float, ...]]:
        pairs = [JudgedPair(f"{i}.{k}", *shown[i], example=f"{i}") for i in range(40) for k in range(times)]
        report = agreement(pairs, {pair.name: int(truth[int(pair.example)]) for pair in pairs}, "x")
        kappa = fleiss_kappa([votes[int(pair.example)] for pair in pairs], [pair.example for pair in pairs])
        found = (report.accuracy, report.without_position, report.same_label, report.kappa, kappa)
        return [(each.value, each.error, each.low, each.high, each.n) for each in found]

    for once, thrice in zip(figures(1), figures(3), strict=True):
        assert thrice == pytest.approx(once)


@pytest.mark.parametrize("wrong", [1, 2, 7])
def test_verdicts_that_follow_the_position_say_nothing_about_the_rest(wrong: int) -> None:
    """All other verdicts are wrong: the interval is Wilson's for their number, up to the quantile of Student's t."""

    def high(followers: int) -> float:
        pairs = [JudgedPair(f"f{i}", 1.0, 0.0) for i in range(followers)]
        pairs += [JudgedPair(f"w{i}", 0.0, 0.0) for i in range(wrong)]
        found = agreement(pairs, {pair.name: 1 for pair in pairs}, "x").without_position
        assert (found.value, found.low) == pytest.approx((0, 0), abs=1e-12)
        return found.high

    z = stats.norm.isf(0.025)
    assert high(10_000) == pytest.approx(z**2 / (wrong + z**2), rel=1e-3)
    assert high(20) >= high(1000) >= high(10_000)


def test_the_interval_of_fleiss_kappa_holds_the_truth() -> None:
    """Three raters that copy a common label with probability 0.7 and otherwise draw one."""
    rng = np.random.default_rng(0)

    def drawn(items: int) -> list[list[int]]:
        common, copies = rng.integers(-1, 2, size=(items, 1)), rng.random((items, 3)) < 0.7
        rows: list[list[int]] = np.where(copies, common, rng.integers(-1, 2, size=(items, 3))).tolist()
        return rows

    hits = np.mean([fleiss_kappa(drawn(60)).contains(0.49) for _ in range(200)])
    assert hits >= 0.9


def test_a_majority_needs_more_votes_than_any_other_label() -> None:
    assert [majority(votes) for votes in ([1, 1, 0], [1, 0, -1], [0, 0, 0], [1, -1])] == [1, None, 0, None]


def test_people_agree_on_pandalm(shared_data: Path) -> None:
    """Figures of the real test set: 999 pairs, three annotators."""
    with gzip.open(shared_data / "feedback" / "pandalm_testset_3annotators.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    votes = [[{0: 0, 1: 1, 2: -1}[row[f"annotator{i}"]] for i in (1, 2, 3)] for row in rows]
    kappa = fleiss_kappa(votes)
    counts, _ = inter_rater.aggregate_raters(np.array(votes))
    assert kappa.value == pytest.approx(inter_rater.fleiss_kappa(counts), abs=1e-9)
    assert kappa.high - kappa.low < 0.1
