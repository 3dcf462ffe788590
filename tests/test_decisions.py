"""Decisions of studies: formulas written out, and that false claims are as rare as promised."""

from __future__ import annotations

import gzip
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from halos_pl.study.comparison import Comparison
from halos_pl.study.decisions import compare
from halos_pl.study.planned_power import deviations_of
from halos_pl.study.power import Noise, detectable, equivalence_power, power
from halos_pl.study.run_variance import Runs, run_variance
from halos_pl.study.standard_error import CAUTION, MARGIN, StandardError, caution

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import family_wise_error as simulation

SEEDS = (0, 1, 2)


def study(seed: int, arms: int = 4, prompts: int = 80, run: float = 0.1, shift: float = 0.0) -> dict[str, Runs]:
    draw = np.random.default_rng(seed)
    common = draw.normal(size=prompts)
    return {
        f"arm {i}": Runs(
            common + 0.5 * draw.normal(size=(3, prompts)) + run * draw.normal(size=(3, 1)) + shift * (i == 1), SEEDS
        )
        for i in range(arms)
    }


def only(found: list[Comparison]) -> Comparison:
    [each] = found
    return each


def test_run_variance_is_the_residual_of_arms_by_seeds() -> None:
    means = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 5.0], [0.0, 3.0, 3.0]])
    found = run_variance({f"{i}": Runs(row[:, None] + [[-1.0, 1.0]], SEEDS) for i, row in enumerate(means)})
    assert found is not None
    rest = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
    assert found.paired == pytest.approx((rest**2).sum() / 4)
    assert found.paired_df == 4
    assert found.whole == pytest.approx(means.var(axis=1, ddof=1).mean())
    assert 2 <= found.whole_df <= 6  # of three arms by themselves; 2 where all variance is common to a seed
    # Arms whose own variances are those of independent runs have them on average.
    assert np.mean(list(found.by_arm.values())) == pytest.approx(found.paired)


def test_a_model_without_seeds_is_not_pooled() -> None:
    arms = study(1)
    with_it = {**arms, "before": Runs(np.full((1, 80), 100.0), ())}
    assert run_variance(with_it) == run_variance(arms)
    c = compare("m", with_it, "before", planned=3)
    assert [each.seeds for each in c] == [3] * 4
    assert all(each.significant and each.effect == pytest.approx(-100, abs=1) for each in c)


def test_two_arms_with_three_seeds_are_tested_by_what_three_differences_tell() -> None:
    """Where examples do not vary, the test is the paired t over seeds, with 2 degrees of freedom."""
    draw = np.random.default_rng(2)
    runs = draw.normal(size=(2, 3, 1)) + np.zeros((1, 1, 40))
    c = only(compare("m", {"a": Runs(runs[0], SEEDS), "b": Runs(runs[1], SEEDS)}, "b", planned=3))
    assert c.p == pytest.approx(stats.ttest_rel(runs[0, :, 0], runs[1, :, 0]).pvalue, rel=1e-6)
    assert c.df == 2


def test_without_runs_that_vary_the_test_is_the_paired_one_over_examples() -> None:
    draw = np.random.default_rng(3)
    one, two = draw.normal(size=60), draw.normal(size=60)
    arms = {name: Runs(np.tile(values, (3, 1)), SEEDS) for name, values in (("a", one), ("b", two))}
    c = only(compare("m", arms, "b", planned=3))
    assert c.p == pytest.approx(stats.ttest_rel(one, two).pvalue)
    assert c.df == 59


def test_a_comparison_turns_round_with_its_arms() -> None:
    arms = {name: runs for name, runs in study(4, arms=2, shift=0.3).items()}
    one, other = only(compare("m", arms, "arm 0", planned=3)), only(compare("m", arms, "arm 1", planned=3))
    assert (one.effect, one.low, one.high) == pytest.approx((-other.effect, -other.high, -other.low))
    assert one.p == pytest.approx(other.p)
    assert one.decision == other.decision


def test_p_is_corrected_by_holm_for_all_comparisons_to_come() -> None:
    arms = study(5, shift=0.6)
    for family in (3, 5):
        found = compare("m", arms, "arm 0", planned=3, family=family)
        most = 0.0
        for rank, c in enumerate(sorted(found, key=lambda c: c.p)):
            most = max(most, min(1.0, MARGIN * (family - rank) * c.p))
            assert c.adjusted == pytest.approx(most, abs=0.05)  # the arm's own variance may raise it
            assert c.adjusted is not None
            assert c.adjusted >= most - 1e-12
        assert found[0].level == pytest.approx(0.05 / family / MARGIN)


def test_only_the_primary_metric_gets_decisions() -> None:
    arms = study(6, shift=2.0)
    assert compare("m", arms, "arm 0", planned=3)[0].significant
    for c in compare("m", arms, "arm 0", planned=3, primary=False):
        assert c.decision == "exploratory"
        assert c.adjusted is None
        assert math.isnan(c.p)
        assert c.detectable is None
    assert compare("m", arms, "arm 0", planned=3, primary=False)[0].low > 1


def test_positive_metrics_are_compared_by_ratios() -> None:
    arms = {name: Runs(np.exp(0.3 * runs.values), runs.seeds) for name, runs in study(7, shift=2.0).items()}
    found = compare("kl", arms, "arm 0", planned=3, scale="ratio")
    means = {name: np.exp(np.log(runs.values.mean(axis=1)).mean()) for name, runs in arms.items()}
    for c in found:
        assert c.effect == pytest.approx(means[c.arm] / means["arm 0"])
        assert 0 < c.low < c.effect < c.high
        assert c.effect / c.low == pytest.approx(c.high / c.effect)
    assert found[0].significant
    assert found[0].effect == pytest.approx(math.exp(0.6), rel=0.1)
    # The unit of a positive metric makes no difference to its ratios.
    scaled = {name: Runs(1000 * runs.values, runs.seeds) for name, runs in arms.items()}
    for c, other in zip(found, compare("kl", scaled, "arm 0", planned=3, scale="ratio"), strict=True):
        assert c.p == pytest.approx(other.p)
    # A model that has not moved has no ratio.
    none = {**arms, "before": Runs(np.zeros((1, 80)), ())}
    assert {c.scale for c in compare("kl", none, "before", planned=3, scale="ratio")} == {"difference"}


def test_equivalence_is_claimed_within_a_margin_only() -> None:
    arms = study(8, arms=2, prompts=400, run=0.01)
    assert only(compare("m", arms, "arm 0", planned=3)).decision == "not significant"
    close = only(compare("m", arms, "arm 0", planned=3, margin=0.3))
    assert close.decision == "equivalent"
    assert "0.3" in close.verdict
    assert only(compare("m", arms, "arm 0", planned=3, margin=0.01)).decision == "not significant"
    # Two one-sided tests at 5 % are a 90 % interval within the margin.
    assert close.noise is not None
    p = stats.t.cdf(-(0.3 - abs(close.effect)) / close.noise.error, close.df)
    assert p < 0.05


def test_shares_of_which_few_examples_differ_are_not_equivalent_by_luck() -> None:
    """The reference never fails, the arm on 5 % of prompts, in every run: so much is not within 5 points."""
    draw = np.random.default_rng(0)
    claims = 0
    for _ in range(300):
        fails = np.tile(draw.random((1, 60)) < 0.05, (3, 1)) ^ (draw.random((3, 60)) < 0.002)
        arms = {"a": Runs(np.ones((3, 60)), (0, 1, 2)), "b": Runs(1.0 - fails, (0, 1, 2))}
        claims += only(compare("rule", arms, "a", planned=3, margin=0.05, share=True)).decision == "equivalent"
    assert claims <= 0.05 * 300


def test_words_say_what_seeds_allow() -> None:
    far = study(9, run=2.0)
    assert {c.decision for c in compare("m", far, "arm 0", planned=3)} == {"differs in these runs only"}
    one = {name: Runs(runs.values[:1], (0,)) for name, runs in study(9, arms=2, shift=3.0).items()}
    assert only(compare("m", one, "arm 0", planned=1)).decision == "differs in these runs only"
    assert only(compare("m", one, "arm 0", planned=3)).decision == "one seed so far"
    same = {"a": study(9)["arm 0"], "b": study(9)["arm 0"]}
    assert only(compare("m", same, "a", planned=3)).decision == "identical"
    some = only(compare("m", study(9, arms=2, shift=3.0), "arm 0", planned=4))
    assert some.verdict == "significant over seeds (3 of 4 seeds)"


def test_one_binary_run_of_each_arm_is_tested_by_mcnemar() -> None:
    x, y = np.array([1] * 40 + [0] * 12 + [1] * 3 + [0] * 20), np.array([1] * 40 + [1] * 12 + [0] * 3 + [0] * 20)
    arms = {"a": Runs(x[None] * 1.0, (0,)), "b": Runs(y[None] * 1.0, (0,))}
    assert only(compare("m", arms, "b", planned=1)).p == pytest.approx(stats.binomtest(3, 15).pvalue)


@pytest.mark.parametrize("examples", [1, 4, 12])
def test_few_examples_that_differ_claim_no_more_than_their_signs(examples: int) -> None:
    arms = {"a": Runs(np.ones((3, examples)), SEEDS), "b": Runs(np.zeros((3, examples)), SEEDS)}
    c = only(compare("m", arms, "b", planned=3))
    assert c.p == min(1.0, 2.0 ** (1 - examples))
    assert c.significant == (examples == 12)


def test_what_is_detectable_has_that_power_and_else_is_not_stated() -> None:
    c = compare("m", study(10), "arm 0", planned=3)[0]
    assert c.noise is not None
    assert c.detectable is not None
    assert power(c.detectable, c.noise, 0.05 / 3 / MARGIN) == pytest.approx(0.8, abs=0.005)
    assert f"{c.detectable:.2g}" in c.verdict
    few = study(10, prompts=5)
    for c in compare("m", few, "arm 0", planned=3):
        assert c.detectable is None
        assert "power for a" not in c.verdict
    share = replace(c, noise=Noise(1.0, 1.0, 0.0, 100, 3, 6), share=True)
    assert share.detectable is None  # a share does not differ by more than 1
    assert "power for a" not in share.verdict


def test_power_is_that_of_the_noncentral_t() -> None:
    """Where the tests that have to agree are the same one, its power has a closed form."""
    noise = Noise(run=0.02, examples=0.0, sampling=0.0, count=1000, seeds=9, df=8, arms=1)
    bound = stats.t.isf(0.025, 8)
    for effect in (0.1, 0.3, 0.6):
        t = stats.nct(8, effect / math.sqrt(0.02))
        assert power(effect, noise, 0.05) == pytest.approx(t.sf(bound) + t.cdf(-bound), abs=2e-3)
    two = Noise(run=0.01, examples=0.0, sampling=0.0, count=1000, seeds=3, df=2)
    bound = stats.t.isf(0.025, 2)
    t = stats.nct(2, 0.6 / math.sqrt(0.02))
    assert power(0.6, two, 0.05) == pytest.approx(t.sf(bound) + t.cdf(-bound), abs=2e-3)
    assert detectable(replace(noise, run=0.0), 0.05) is None  # nothing varies, which does not tell


def test_the_power_of_equivalence_is_that_of_two_one_sided_tests() -> None:
    """Where runs do not vary, it has a closed form; it grows with the margin, and one seed has none."""
    noise = Noise.planned(prompt_sd=1.0, run_sd=0.0, sampling_sd=0.0, count=101, seeds=3, arms=2)
    error = 1 / math.sqrt(101)
    bound = stats.t.isf(0.05, 100) * error
    for margin in (0.1, 0.2, 0.3, 0.5):
        room = max(margin - bound, 0.0) / error
        assert equivalence_power(margin, noise, 0.05) == pytest.approx(2 * stats.norm.cdf(room) - 1, abs=2e-3)
    varying = replace(noise, run=0.01)
    found = [equivalence_power(margin, varying, 0.05) for margin in (0.2, 0.4, 0.8, 3.0)]
    assert found == sorted(found)
    assert found[0] < equivalence_power(0.2, noise, 0.05)
    assert equivalence_power(9.0, replace(noise, seeds=1), 0.05) == 0
    # Shares have at least the variance of a difference as large as the margin.
    still = Noise.planned(prompt_sd=1e-6, run_sd=0.0, sampling_sd=0.0, count=20, seeds=3, arms=2)
    assert equivalence_power(0.05, still, 0.05) == pytest.approx(1)
    assert equivalence_power(0.05, still, 0.05, share=True) == 0


def test_power_falls_with_the_arms_own_variances() -> None:
    """Where the tests by the arms' own variances have to agree, power is below that of the pooled one."""
    noise = Noise(run=0.01, examples=0.0, sampling=0.0, count=1000, seeds=3, df=14)
    level = 0.05 / 7
    pooled = stats.nct(14, 1.0 / math.sqrt(0.02)).sf(stats.t.isf(level / 2, 14))
    assert 0.2 < power(1.0, noise, level) < pooled - 0.05


def test_degrees_of_freedom_lie_between_those_of_their_parts() -> None:
    for share in (0.1, 0.5, 0.9):
        e = StandardError.of([(share, 4.0)], 1 - share, 0.0, 101)
        assert e.size == pytest.approx(1)
        weight = share**CAUTION
        assert 1 / e.df == pytest.approx(weight / 4 + (1 - weight) / 100)
        satterthwaite = 1 / (share**2 / 4 + (1 - share) ** 2 / 100)
        assert 4 < e.df < satterthwaite
        many = StandardError.of([(share, 6.0)], 1 - share, 0.0, 101, caution(6))
        assert 1 / many.df == pytest.approx(share / 6 + (1 - share) / 100)


@pytest.mark.parametrize("bad", [np.zeros((2, 5)), np.zeros((3, 4)), np.full((3, 5), np.nan)])
def test_what_cannot_be_compared_is_refused(bad: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match="values"):
        compare("m", {"a": Runs(np.zeros((3, 5)), SEEDS), "b": Runs(bad, SEEDS)}, "a", planned=3)


def test_an_earlier_study_tells_how_much_prompts_and_runs_vary(tmp_path: Path) -> None:
    draw = np.random.default_rng(11)
    lines = ["run,arm,seed,metric,example,value"]
    common = draw.normal(size=400)
    for arm in range(8):
        own = 0.6 * draw.normal(size=400)
        for seed in range(6):
            values = common + own + 0.3 * draw.normal() + 0.8 * draw.normal(size=400)
            lines += [f"a{arm}/seed-{seed},a{arm},{seed},m,e{i},{value!r}" for i, value in enumerate(values.tolist())]
    path = tmp_path / "values.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    found = deviations_of(path, "m")
    assert found == pytest.approx((0.6 * math.sqrt(2), 0.3, 0.8 * math.sqrt(2)), rel=0.25)
    with pytest.raises(ValueError, match=r"no two arms"):
        deviations_of(path, "kl")
    for value, said in (("nan", "not finite"), ("0.5", "does not vary")):
        other = [lines[0], *(f"{line.rpartition(',')[0]},{value}" for line in lines[1:])]
        path.write_bytes(gzip.compress("\n".join(other).encode()))
        with pytest.raises(ValueError, match=said):
            deviations_of(path, "m")


#: One setting of each kind, for every run of the tests; the whole grid is slow.
SOME = [
    simulation.Setting(2, 3, 60, 0.4),
    simulation.Setting(8, 3, 100, 0.4, binary=True),
    simulation.Setting(4, 3, 100, 0.4, uneven="reference"),
    simulation.Setting(4, 3, 100, 0.0, binary=True, untrained=True),
    simulation.Setting(2, 3, 60, 0.1, untrained=True),
    simulation.Setting(12, 5, 40, 0.2, binary=True, base=0.95),
]


@pytest.mark.parametrize("setting", SOME, ids=repr)
def test_the_simulation_decides_as_reports_do(setting: simulation.Setting) -> None:
    effect = 0.04 if setting.base > 0.9 else 0.25 if setting.binary else 0.6
    for each in (setting, replace(setting, effect=effect)):
        values = simulation.drawn(each, 8, np.random.default_rng(1))
        found = simulation.decided(each, values)
        for number, study_values in enumerate(values):
            arms = simulation.arms_of(each, study_values)
            told = compare("m", arms, "arm 0", planned=each.seeds)
            assert [c.significant for c in told] == found.significant[number].tolist()
            assert [c.runs_only for c in told] == found.runs_only[number].tolist()


@pytest.mark.parametrize("setting", SOME, ids=repr)
def test_few_studies_without_a_difference_claim_one(setting: simulation.Setting) -> None:
    assert_rare(simulation.count(setting, 300, 0).claimed, 300)


def assert_rare(claimed: int, studies: int) -> None:
    """Fails with a chance of 1 in 1,000 where 5 % of studies make a false claim, and hardly ever where fewer do."""
    assert stats.binomtest(claimed, studies, 0.05, alternative="greater").pvalue > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("setting", simulation.GRID, ids=repr)
def test_family_wise_error(setting: simulation.Setting) -> None:
    """At most 5 %, and the upper 95 % bound at most 7 %: with 2,000 studies the bound allows up to 5.8 %."""
    claimed = simulation.count(setting, 2000, 1).claimed
    assert_rare(claimed, 2000)
    assert simulation.bounds(claimed, 2000)[1] <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("design", simulation.COMPARED, ids=repr)
def test_power_is_no_lower_than_before_at_equal_error(design: simulation.Setting) -> None:
    """From four arms, in each of the three senses that docs/statistics.md names.

    A level that few of 4,000 studies fall below, and 2,000 studies, tell the difference of two powers to a point.
    """
    nulls = [simulation.count(replace(design, run=run), 4000, 1) for run in simulation.RUNS]
    level_of = simulation.level_of
    worst = min(level_of(none.least_before, 0.05) for none in nulls)
    for run, none in zip(simulation.RUNS[:2], nulls, strict=False):
        for effect in (0.12, 0.2):
            some = simulation.count(replace(design, run=run, base=0.4, effect=effect), 2000, 1)
            pairs = [
                (some.found / 2000, level_of(none.least_before, none.significant / 4000)),
                (some.found / 2000, worst),
                (float(np.mean(some.first < level_of(none.least, 0.05))), level_of(none.least_before, 0.05)),
            ]
            for power_now, level in pairs:
                before = float(np.mean(some.first_before < level))
                assert power_now >= before - 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "effect"), simulation.PLANNED, ids=repr)
def test_planned_power_is_what_simulated_studies_have(setting: simulation.Setting, effect: float) -> None:
    """Within 3 points; 8,000 studies tell the power to 0.6 points, and what is stated is off by up to 1.5."""
    c = simulation.count(replace(setting, effect=effect), 8000, 1)
    assert c.found / 8000 == pytest.approx(simulation.planned(setting, effect), abs=0.03)
