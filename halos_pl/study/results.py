"""The results of a study so far: values by arm, seed and example, estimates and comparisons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from halos_pl.evaluation.metrics import RATIOS, is_share, metric_of
from halos_pl.study.choice import choices, tuned
from halos_pl.study.comparison import Comparison
from halos_pl.study.control import Measured, Reached, Standing, check_control, standing
from halos_pl.study.decisions import compare
from halos_pl.study.earlier import EARLIER
from halos_pl.study.gather import describe, gather
from halos_pl.study.read import study_in
from halos_pl.study.recorded import VALUES, Recorded, read_recorded, write_recorded
from halos_pl.study.run_variance import Runs
from halos_pl.study.spec import BEFORE, Arm, Run, Study, StudyError
from halos_pl.study.statistics import Estimate, Values, estimate
from halos_pl.study.tuning import tuning_in

#: Comparisons by name of the arm.
Compared = dict[str, Comparison]


def has_runs(study: Study, out: Path) -> bool:
    """Whether a study's folder has runs, or took over recorded ones."""
    return (out / EARLIER).is_dir() or any(run.folder.is_dir() for run in study.possible_runs(out))


class Results:
    """The finished runs of a study.

    Means, tests and figures are of the study's seeds alone: what tuning runs have shown only chooses the values of the
    tuned option.

    Args:
        study: the study.
        out: its folder.
        recorded: values to use; None for those of its runs, or if there are none, of ``values.csv.gz``.
    """

    def __init__(self, study: Study, out: Path, recorded: Recorded | None = None) -> None:
        self.out = out
        self.has_runs = has_runs(study, out)
        #: Why a measured run is skipped.
        self.faults: dict[Run, str] = {}
        if recorded is None and self.has_runs:
            tuning = tuning_in(study, out)
            values, faults = gather(tuned(study, tuning.means), out)
            self.faults = {**tuning.faults, **faults}
            recorded = Recorded(values, trials=tuning.means)
        recorded = recorded or read_recorded(study, out)
        #: The study, whose arms have their chosen values.
        self.study = tuned(study, recorded.trials)
        #: The choice of each arm; empty if nothing is tuned.
        self.choices = choices(study, recorded.trials)
        self.runs = self.study.runs(out)
        self._values = recorded.values
        #: The record beside the values; empty for runs that are not recorded yet.
        self.record = recorded.record
        #: Runs that are trained and measured and can be compared.
        self.done = [run for run in self.runs if (run.arm.name, run.seed) in self._values]

    def recorded(self) -> Results:
        """The same results, from ``values.csv.gz`` and ``record.json`` alone.

        If there are runs, both files are written first, which executes the code that the runs' configs name.
        """
        if self.has_runs:
            write_recorded(describe(self.study, self.out), self.study, self.out)
        results = Results(self.study, self.out, read_recorded(self.study, self.out))
        results.faults = self.faults
        return results

    def seeds(self, arm: Arm) -> tuple[int, ...]:
        """The seeds that an arm has finished."""
        return tuple(seed for seed in self.study.seeds if (arm.name, seed) in self._values)

    def values(self, metric: str, arm: Arm, seeds: Iterable[int]) -> Values | None:
        """Values [seeds, examples], examples in the same order for all arms; None if a run lacks the metric."""
        by_seed = [self._values[arm.name, seed].get(metric, {}) for seed in seeds]
        if not by_seed or not all(by_seed):
            return None
        names = sorted(by_seed[0])
        return np.array([[each[name] for name in names] for each in by_seed], dtype=np.float64)

    @cached_property
    def estimates(self) -> dict[tuple[str, str], Estimate]:
        """Estimates by metric and arm, for finished runs."""
        estimates = {}
        for metric in self.study.metrics:
            for arm in self.study.arms:
                values = self.values(metric, arm, self.seeds(arm))
                if values is not None:
                    estimates[metric, arm.name] = estimate(values, share=is_share(metric), positive=metric in RATIOS)
        return estimates

    @property
    def baseline(self) -> Arm:
        """The arm that the others are compared with."""
        return next(arm for arm in self.study.arms if arm.name == self.study.baseline)

    def stratum(self, name: str, metric: str) -> Values | None:
        """Values [seeds, examples] of a metric on a subset of the examples, for an arm or another baseline.

        Examples that not all its runs have are left out: lengths may differ between tokenizers.
        """
        by_seed = [f[metric] for (owner, _), f in self._values.items() if owner == name and f.get(metric)]
        shared = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
        return np.array([[each[name] for name in shared] for each in by_seed], dtype=np.float64) if shared else None

    @property
    def primary(self) -> str:
        """The metric that decisions are made on."""
        return self.study.primary

    @cached_property
    def ranked(self) -> list[Arm]:
        """The arms by the primary metric, best first (highest first if neither is better), unmeasured ones last."""
        more = metric_of(self.primary).higher_is_better

        def place(arm: Arm) -> tuple[bool, float]:
            e = self.estimates.get((self.primary, arm.name))
            return e is None, 0.0 if e is None else e.value if more is False else -e.value

        return sorted(self.study.arms, key=place)

    def _runs(self, metric: str, arms: Iterable[Arm]) -> dict[str, Runs]:
        """The finished runs of arms that have the metric."""
        runs = {}
        for arm in arms:
            seeds = self.seeds(arm)
            if (values := self.values(metric, arm, seeds)) is not None:
                runs[arm.name] = Runs(values, seeds)
        return runs

    def _compared(self, metric: str, runs: dict[str, Runs], reference: str, family: int, primary: bool) -> Compared:
        comparisons = compare(
            metric,
            runs,
            reference,
            planned=len(self.study.seeds),
            family=family,
            primary=primary,
            scale="ratio" if metric in RATIOS else "difference",
            margin=self.study.equivalence if primary else None,
            share=is_share(metric),
        )
        return {each.arm: each for each in comparisons}

    @cached_property
    def _comparisons(self) -> dict[str, Compared]:
        comparisons: dict[str, Compared] = {}
        for metric in self.study.metrics:
            runs = self._runs(metric, self.ranked)
            if self.study.baseline in runs:
                # Arms that are not finished count too, or early claims would be corrected for fewer comparisons.
                others = len(self.study.arms) - 1
                primary = metric == self.primary and self.claims
                comparisons[metric] = self._compared(metric, runs, self.study.baseline, others, primary)
        return comparisons

    def comparisons(self, metric: str) -> Compared:
        """Each other arm against the baseline arm, by name, in the order of :attr:`ranked`.

        Only those on the primary metric have decisions, if the study :attr:`claims` anything.
        """
        return self._comparisons.get(metric, {})

    def untrained(self, arm: Arm) -> str | None:
        """The name of the untrained model that an arm started from; None if unknown."""
        name = BEFORE if BEFORE in self.baselines else self.record.get("starts", {}).get(arm.name)
        return name if name in self.baselines else None

    @cached_property
    def control(self) -> Standing | None:
        """Whether the positive control holds; None if the study names none.

        Raises:
            StudyError: if it names one that cannot be its control.
        """
        return control_of(self.study, self.record.get("measured"))

    @property
    def claims(self) -> bool:
        """Whether comparisons have decisions. Without its positive control, a study has none."""
        return self.control is None or self.control.holds

    def against_untrained(self, metric: str, *, primary: bool) -> Compared:
        """Each arm against the model before training, with decisions if ``primary``."""
        starts: dict[str, list[Arm]] = defaultdict(list)
        for arm in self.ranked:
            if (before := self.untrained(arm)) is not None:
                starts[before].append(arm)
        comparisons: Compared = {}
        for before, arms in starts.items():
            values = self.of_baseline(metric, before)
            runs = self._runs(metric, arms)
            if values is not None and runs:
                runs[before] = Runs(values, ())
                compared = self._compared(metric, runs, before, len(self.study.arms), primary)
                comparisons |= {name: self._from_nothing(c, values) for name, c in compared.items()}
        return {arm.name: comparisons[arm.name] for arm in self.ranked if arm.name in comparisons}

    def _from_nothing(self, c: Comparison, before: Values) -> Comparison:
        """A positive metric compared with 0 everywhere, such as the KL of an untrained model.

        The difference is the arm's own mean with its own interval: positive, and not widened by other arms' runs.
        """
        mean = self.estimates.get((c.metric, c.arm))
        if c.metric not in RATIOS or before.any() or mean is None or not c.exploratory:
            return c
        return replace(c, effect=mean.value, low=mean.low, high=mean.high)

    @cached_property
    def _learned(self) -> dict[str, Compared]:
        alone = len(self.study.arms) == 1 and self.claims
        return {
            metric: self.against_untrained(metric, primary=alone and metric == self.primary)
            for metric in self.study.metrics
        }

    def learned(self, metric: str) -> Compared:
        """Each arm against the model before training, by name, in the order of :attr:`ranked`.

        There are decisions only if the study has one arm; otherwise the error rate of 5% is spent on comparisons with
        the baseline arm.
        """
        return self._learned.get(metric, {})

    @cached_property
    def nothing_learned(self) -> bool:
        """Whether no arm is significantly better than the model before training on the primary metric.

        False if neither direction is better, if that model was not measured, and as long as an arm cannot be tested
        because only one of several seeds is finished.
        """
        more = metric_of(self.primary).higher_is_better
        comparisons = self.against_untrained(self.primary, primary=True)
        untested = [arm for arm in self._runs(self.primary, self.study.arms) if arm not in comparisons]
        untested += [c.arm for c in comparisons.values() if c.decision == "one seed so far"]
        sure = [c for c in comparisons.values() if c.significant or (c.runs_only and c.planned == 1)]
        tested = more is not None and bool(comparisons) and not untested
        return tested and not any((c.effect > c.null) == more for c in sure)

    def figures(self, arm: Arm, metric: str, seeds: Container[int] | None = None) -> list[Mapping[str, float]]:
        """For each finished seed of an arm: the values of a metric, such as a training figure by step.

        Args:
            arm, metric: the arm and the metric.
            seeds: seeds to keep; default: all.
        """
        kept = [seed for seed in self.seeds(arm) if seeds is None or seed in seeds]
        by_seed = [self._values[arm.name, seed].get(metric, {}) for seed in kept]
        return [each for each in by_seed if each]

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines that are not arms, such as the model before training."""
        return tuple(name for name, seed in self._values if seed is None)

    def of_baseline(self, metric: str, name: str) -> Values | None:
        """Values [1, examples], in the order of :meth:`values`; None if it lacks the metric or has other examples."""
        values = self._values[name, None].get(metric, {})
        arms = next((f[metric] for (_, seed), f in self._values.items() if seed is not None and metric in f), {})
        if not values or set(values) != set(arms):
            return None
        return np.array([[values[example] for example in sorted(values)]], dtype=np.float64)


def control_of(study: Study, measured: Measured | None) -> Standing | None:
    """Whether the positive control of a study holds; None if it names none.

    Args:
        study: the study.
        measured: the data that it is measured on, as from :func:`halos_pl.study.control.measured_on`; None if unknown.

    Raises:
        StudyError: if it names one that cannot be its control.
    """
    if (control := study.control) is None:
        return None
    if not (control.study / VALUES).is_file():
        return Standing(False, f"{control.study} has no {VALUES}")
    try:
        other = study_in(control.study)
        recorded = read_recorded(other, control.study)
    except StudyError as error:
        return Standing(False, str(error))
    check_control(study, other)
    results = Results(other, control.study, recorded)
    arm = next(arm for arm in results.study.arms if arm.name == control.arm)
    reached = Reached(
        results.record.get("measured"),
        len(results.seeds(arm)),
        len(other.seeds),
        results.estimates.get((control.metric, arm.name)),
        results.against_untrained(control.metric, primary=True).get(arm.name),
    )
    return standing(study, measured, reached)
