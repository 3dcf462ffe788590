"""Compares the arms of a study with a baseline arm, so that 95% of studies make no false claim.

With several seeds, a difference is tested by t over seeds *and* examples. The variance between runs is pooled over all
arms (:mod:`halos_pl.study.run_variance`), since three seeds of one comparison tell next to nothing about it. Arms may
vary unequally, so two more tests must agree: one with the reference arm's own variance, which all comparisons share,
and, uncorrected, one with the arm's own. p is corrected for the comparisons on the primary metric by Holm (1979), or by
Bonferroni if equivalence is tested too, since both kinds of claims share the 5%. As t is an approximation with so few
runs, p is first multiplied by a margin that suffices in simulated studies. The other metrics are exploratory: they have
estimates and intervals, but no p and no decision.

"Differs in these runs only" answers a weaker question, whether these runs would differ on other examples, by t over the
examples alone. With one seed, it is the only question, answered by McNemar's test or a paired permutation test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from halos_pl.study.comparison import Comparison, Decision, Scale
from halos_pl.study.power import Noise
from halos_pl.study.run_variance import Runs, RunVariance, Values, run_variance
from halos_pl.study.standard_error import MARGIN, StandardError, caution, heterogeneous_df
from halos_pl.study.statistics import LEVEL, RESAMPLES, estimate


class _Test:
    """The test of one arm against the reference: the difference, its standard errors and p-values."""

    def __init__(self, arm: Runs, reference: Runs, name: str, other: str, variance: RunVariance | None) -> None:
        if arm.seeds and reference.seeds:
            self.seeds: tuple[int, ...] = tuple(seed for seed in arm.seeds if seed in reference.seeds)
        else:
            self.seeds = arm.seeds or reference.seeds
        one, two = arm.on(self.seeds), reference.on(self.seeds)
        values = one - two
        self.count = values.shape[1]
        self.value = float(values.mean())
        self.errors: list[StandardError] = []
        self.arm_error: StandardError | None = None
        self.noise: Noise | None = None
        self.identical = not values.any()
        by_example = values.mean(axis=0)
        self.examples = examples = float(by_example.var(ddof=1)) / self.count if self.count > 1 else 0.0
        # No p below that of the sign test: with few examples that differ, t would give one.
        self.least = min(1.0, 2.0 ** (1 - int(np.count_nonzero(by_example))))
        self.runs_p = max(self.least, StandardError(math.sqrt(examples), max(self.count - 1, 1)).p(self.value))
        if len(self.seeds) < 2:
            mean = estimate(values[0])
            self.low, self.high = mean.low, mean.high
            self.runs_p = self.p = _of_examples(one[0], two[0])
            self.df = math.nan
            self.noise = Noise(0.0, examples, 0.0, self.count, 1, math.inf)
            return
        assert variance is not None
        seeds = len(self.seeds)
        rest = values - by_example - values.mean(axis=1, keepdims=True) + self.value
        free = (seeds - 1) * (self.count - 1)
        sampling = float((rest**2).sum()) / free / values.size if free else 0.0

        paired = bool(arm.seeds and reference.seeds)
        care = caution(variance.paired_df if paired else variance.whole_df)

        def error(*runs: tuple[float, float]) -> StandardError:
            return StandardError.of([(v / seeds, df) for v, df in runs], examples, sampling, self.count, care)

        if paired:
            df, pooled = heterogeneous_df(variance.paired_df, seeds), variance.paired
            self.errors = [
                error((2 * pooled, df)),
                error((variance.by_arm[other], variance.df_by_arm[other]), (pooled, df)),
            ]
            self.arm_error = error((variance.by_arm[name], variance.df_by_arm[name]), (pooled, df))
            self.noise = Noise(pooled / seeds, examples, sampling, self.count, seeds, variance.paired_df)
        else:
            trained = name if arm.seeds else other
            self.errors = [error((variance.whole, variance.whole_df))]
            self.arm_error = error((variance.whole_by_arm[trained], variance.df_by_arm[trained]))
            self.noise = Noise(variance.whole / seeds, examples, sampling, self.count, seeds, variance.whole_df, 1)
        self.p = max(self.least, *(each.p(self.value) for each in self.errors))
        widest = max((*self.errors, self.arm_error), key=lambda each: each.reach(LEVEL))
        self.df = max(self.errors, key=lambda each: each.p(self.value)).df
        self.low, self.high = self.value - widest.reach(LEVEL), self.value + widest.reach(LEVEL)

    @property
    def arm_p(self) -> float:
        """p with the arm's own variance."""
        return self.arm_error.p(self.value) if self.arm_error else 1.0

    def equivalence(self, margin: float, *, share: bool) -> tuple[float, float]:
        """p of two one-sided tests of equivalence (Schuirmann 1987), and p with the arm's own variance.

        Shares that differ by the margin have a variance over examples of at least ``margin * (1 - margin)``. The test
        uses no smaller one, as a score test does: with few examples that differ, the estimate is small by chance.
        """
        if not self.errors or self.arm_error is None:
            return 1.0, 1.0
        room = margin - abs(self.value)
        more = max(margin * (1 - margin) / self.count - self.examples, 0.0) if share else 0.0
        errors = [StandardError(math.hypot(e.size, math.sqrt(more)), e.df) for e in (*self.errors, self.arm_error)]
        return max(each.below(room) for each in errors[:-1]), errors[-1].below(room)


def _of_examples(one: Values, other: Values) -> float:
    """p of two single runs over examples: McNemar's exact test for binary metrics, else a paired permutation test."""
    difference = one - other
    if not difference.any() or len(difference) < 2:
        return 1.0
    if np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all():
        both = [[((one == a) & (other == b)).sum() for b in (1, 0)] for a in (1, 0)]
        return float(mcnemar(both, exact=True).pvalue)
    test = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
        batch=1000,
    )
    return float(test.pvalue)


def corrected(p: Sequence[float], family: int, *, step_down: bool) -> list[float]:
    """p corrected for ``family`` comparisons, by Holm or, without stepping down, by Bonferroni.

    Comparisons that cannot be made yet count with p = 1. statsmodels has this too, but runs the garbage collector in
    each call.
    """
    order = np.argsort(p, kind="stable")
    steps = family - (np.arange(len(p)) if step_down else np.zeros(len(p)))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p)[order] * steps), 1.0)
    return [float(each) for each in adjusted]


def compare(
    metric: str,
    arms: Mapping[str, Runs],
    reference: str | Mapping[str, str],
    *,
    planned: int,
    family: int = 0,
    primary: bool = True,
    scale: Scale = "difference",
    margin: float | None = None,
    share: bool = False,
) -> list[Comparison]:
    """Compares each arm with its reference arm on one metric.

    Args:
        metric: name of the metric.
        arms: runs by arm, references included, on the same examples in the same order.
        reference: name of the arm that the others are compared with; or, by arm to compare, that of its own reference.
        planned: number of seeds of the study.
        family: number of comparisons that the study will make on this metric, those of unfinished arms included.
        primary: whether to make decisions; otherwise there are only estimates and intervals.
        scale: ``ratio`` for positive metrics; differences are used if the mean of a run is 0.
        margin: margin of equivalence, on that scale: a ratio above 1, or a difference; ignored if differences replace
            ratios.
        share: whether the metric lies between 0 and 1.

    Raises:
        ValueError: if there are no values, or they differ in shape or are not finite.
    """
    _check(arms)
    if scale == "ratio":
        logs = {name: runs.logs for name, runs in arms.items()}
        if any(each is None for each in logs.values()):
            scale, margin = "difference", None
        else:
            arms = {name: each for name, each in logs.items() if each is not None}
            margin = None if margin is None else math.log(margin)
    variance = run_variance(arms)
    others = {name: reference for name in arms if name != reference} if isinstance(reference, str) else reference
    tests = {}
    for name, other in others.items():
        arm, base = arms[name], arms[other]
        if not arm.seeds or not base.seeds or set(arm.seeds) & set(base.seeds):
            tests[name] = _Test(arm, base, name, other, variance)
    if not tests:
        return []
    family = max(family, len(tests))
    # Claims of difference and of equivalence share the error rate: at most one of a comparison's hypotheses is true.
    step_down = margin is None
    over_seeds = [1.0 if len(t.seeds) < 2 else MARGIN * t.p for t in tests.values()]
    adjusted = [
        max(p, t.arm_p) if len(t.seeds) > 1 else p
        for p, t in zip(corrected(over_seeds, family, step_down=step_down), tests.values(), strict=True)
    ]
    over_examples = [t.runs_p if len(t.seeds) < 2 else MARGIN * t.runs_p for t in tests.values()]
    runs_adjusted = corrected(over_examples, family, step_down=step_down)
    equivalent = [False] * len(tests)
    if margin is not None:
        both = [t.equivalence(margin, share=share) for t in tests.values()]
        both_p = corrected([MARGIN * p for p, _ in both], family, step_down=step_down)
        equivalent = [max(p, arm_p) < LEVEL for p, (_, arm_p) in zip(both_p, both, strict=True)]
    back = np.exp if scale == "ratio" else float
    comparisons = []
    for (name, test), p, runs_p, same in zip(tests.items(), adjusted, runs_adjusted, equivalent, strict=True):
        one = len(test.seeds) < 2
        comparisons.append(
            Comparison(
                metric=metric,
                arm=name,
                reference=others[name],
                scale=scale,
                effect=float(back(test.value)),
                low=max(float(back(test.low)), -1.0 if share else -math.inf),
                high=min(float(back(test.high)), 1.0 if share else math.inf),
                p=test.p if primary else math.nan,
                adjusted=(runs_p if one else p) if primary else None,
                decision=_decision(test, p, runs_p, same, planned) if primary else "exploratory",
                df=test.df,
                examples=test.count,
                seeds=len(test.seeds),
                planned=planned,
                margin=None if margin is None else float(back(margin)),
                noise=test.noise,
                level=LEVEL / family / (1.0 if one else MARGIN),
                share=share,
            )
        )
    return comparisons


def _check(arms: Mapping[str, Runs]) -> None:
    shapes = {runs.values.shape[1:] for runs in arms.values()}
    for name, runs in arms.items():
        values = runs.values
        if values.ndim != 2 or values.size == 0 or len(values) != max(1, len(runs.seeds)) or len(shapes) > 1:
            raise ValueError(
                f"values of {name!r} are {values.shape} for seeds {runs.seeds}; expected [seeds, examples] with the"
                " same examples for all arms"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values of {name!r} are not finite")


def _decision(test: _Test, p: float, runs_p: float, equivalent: bool, planned: int) -> Decision:
    if test.identical:
        return "identical"
    if len(test.seeds) == 1 < planned:
        return "one seed so far"
    if p < LEVEL:
        return "significant over seeds"
    if equivalent:
        return "equivalent"
    return "differs in these runs only" if runs_p < LEVEL else "not significant"
