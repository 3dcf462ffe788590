"""What a study has found so far: values by arm, seed and example, estimates, comparisons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from halos_pl.evaluation.metrics import METRICS, RATIOS, SHARES
from halos_pl.study.comparison import Comparison
from halos_pl.study.decisions import compare
from halos_pl.study.gather import describe, gather
from halos_pl.study.recorded import Recorded, read_recorded, write_recorded
from halos_pl.study.run_variance import Runs
from halos_pl.study.spec import BEFORE, Arm, Run, Study
from halos_pl.study.statistics import Estimate, Values, estimate

#: By the arm's name.
Compared = dict[str, Comparison]


class Results:
    """The finished runs of a study.

    Args:
        study: the study.
        out: its folder.
    """

    def __init__(self, study: Study, out: Path, recorded: Recorded | None = None) -> None:
        self.study, self.out = study, out
        self.runs = study.runs(out)
        #: Why a measured run is skipped.
        self.faults: dict[Run, str] = {}
        if recorded is None and self.has_runs:
            values, self.faults = gather(study, out)
            recorded = Recorded(values)
        recorded = recorded or read_recorded(study, out)
        self._values = recorded.values
        #: What is known of the runs besides their numbers; empty for runs that were not recorded yet.
        self.record = recorded.record
        #: Runs that have been trained and measured, and can be compared.
        self.done = [run for run in self.runs if (run.arm.name, run.seed) in self._values]

    @property
    def has_runs(self) -> bool:
        """Whether there is the folder of a run, finished or not, and not only what was recorded of it."""
        return any(run.folder.is_dir() for run in self.runs)

    def recorded(self) -> Results:
        """The same results, computed from ``values.csv.gz`` and ``record.json`` alone.

        Where there are runs both files are written first, and the code that the runs' configs name is executed.
        """
        if self.has_runs:
            write_recorded(describe(self.study, self.out), self.study, self.out)
        found = Results(self.study, self.out, read_recorded(self.study, self.out))
        found.faults = self.faults
        return found

    def seeds(self, arm: Arm) -> tuple[int, ...]:
        """The seeds that an arm has finished."""
        return tuple(seed for seed in self.study.seeds if (arm.name, seed) in self._values)

    def values(self, metric: str, arm: Arm, seeds: Iterable[int]) -> Values | None:
        """[seeds, examples], examples in one order for all arms; None where a run lacks the metric."""
        found = [self._values[arm.name, seed].get(metric, {}) for seed in seeds]
        if not found or not all(found):
            return None
        names = sorted(found[0])
        return np.array([[each[name] for name in names] for each in found], dtype=np.float64)

    @cached_property
    def estimates(self) -> dict[tuple[str, str], Estimate]:
        """By metric and arm, for what is finished."""
        found = {}
        for metric in self.study.metrics:
            for arm in self.study.arms:
                values = self.values(metric, arm, self.seeds(arm))
                if values is not None:
                    found[metric, arm.name] = estimate(values, share=metric in SHARES, positive=metric in RATIOS)
        return found

    @property
    def baseline(self) -> Arm:
        """The arm that the others are compared with."""
        return next(arm for arm in self.study.arms if arm.name == self.study.baseline)

    def stratum(self, name: str, metric: str) -> Values | None:
        """[seeds, examples] of a metric of some examples only, of an arm or a baseline that is none.

        Of the examples that all its runs have: completions that are cut by another tokenizer may have other lengths.
        """
        found = [f[metric] for (owner, _), f in self._values.items() if owner == name and f.get(metric)]
        if not found:
            return None
        shared = sorted(set.intersection(*map(set, found)))
        return np.array([[each[name] for name in shared] for each in found], dtype=np.float64) if shared else None

    @property
    def primary(self) -> str:
        """The metric that decides."""
        return self.study.primary

    @cached_property
    def ranked(self) -> list[Arm]:
        """The arms by the primary metric, best first (highest first where neither is better); unmeasured ones last."""
        more = METRICS[self.primary][2]

        def place(arm: Arm) -> tuple[bool, float]:
            e = self.estimates.get((self.primary, arm.name))
            return e is None, 0.0 if e is None else e.value if more is False else -e.value

        return sorted(self.study.arms, key=place)

    def _runs(self, metric: str, arms: Iterable[Arm]) -> dict[str, Runs]:
        """The finished runs of those arms that have the metric."""
        found = {}
        for arm in arms:
            seeds = self.seeds(arm)
            if (values := self.values(metric, arm, seeds)) is not None:
                found[arm.name] = Runs(values, seeds)
        return found

    def _compared(self, metric: str, runs: dict[str, Runs], reference: str, family: int, primary: bool) -> Compared:
        found = compare(
            metric,
            runs,
            reference,
            planned=len(self.study.seeds),
            family=family,
            primary=primary,
            scale="ratio" if metric in RATIOS else "difference",
            margin=self.study.equivalence if primary else None,
            share=metric in SHARES,
        )
        return {each.arm: each for each in found}

    @cached_property
    def _comparisons(self) -> dict[str, Compared]:
        found: dict[str, Compared] = {}
        for metric in self.study.metrics:
            runs = self._runs(metric, self.ranked)
            if self.study.baseline in runs:
                # Arms to come count as well: else what is found early would be corrected for fewer.
                others = len(self.study.arms) - 1
                found[metric] = self._compared(metric, runs, self.study.baseline, others, metric == self.primary)
        return found

    def comparisons(self, metric: str) -> Compared:
        """Each other arm against the baseline arm, by name, in the order of :attr:`ranked`.

        Only those on the primary metric carry decisions.
        """
        return self._comparisons.get(metric, {})

    def untrained(self, arm: Arm) -> str | None:
        """The baseline that is the model which an arm started from, where it is known."""
        name = BEFORE if BEFORE in self.baselines else self.record.get("starts", {}).get(arm.name)
        return name if name in self.baselines else None

    def _against_untrained(self, metric: str, *, primary: bool) -> Compared:
        starts: dict[str, list[Arm]] = defaultdict(list)
        for arm in self.ranked:
            if (before := self.untrained(arm)) is not None:
                starts[before].append(arm)
        found: Compared = {}
        for before, arms in starts.items():
            values = self.of_baseline(metric, before)
            runs = self._runs(metric, arms)
            if values is not None and runs:
                runs[before] = Runs(values, ())
                compared = self._compared(metric, runs, before, len(self.study.arms), primary)
                found |= {name: self._from_nothing(c, values) for name, c in compared.items()}
        return {arm.name: found[arm.name] for arm in self.ranked if arm.name in found}

    def _from_nothing(self, c: Comparison, before: Values) -> Comparison:
        """A positive metric less one that is 0 throughout, as the KL of an untrained model is.

        The difference is the arm's own mean, and has its interval, which ends above 0 and is not as wide as the runs of
        another arm would make it.
        """
        own = self.estimates.get((c.metric, c.arm))
        if c.metric not in RATIOS or before.any() or own is None or not c.exploratory:
            return c
        return replace(c, effect=own.value, low=own.low, high=own.high)

    @cached_property
    def _learned(self) -> dict[str, Compared]:
        alone = len(self.study.arms) == 1
        return {
            metric: self._against_untrained(metric, primary=alone and metric == self.primary)
            for metric in self.study.metrics
        }

    def learned(self, metric: str) -> Compared:
        """Each arm against the model before training, by name, in the order of :attr:`ranked`.

        Without decisions, unless there is one arm alone: those of a report, which share an error rate of 5 %, are
        against the baseline arm.
        """
        return self._learned.get(metric, {})

    @cached_property
    def nothing_learned(self) -> bool:
        """Whether no arm is significantly better than the model before training, on a primary metric that knows better.

        False where that model was not measured, and as long as an arm cannot be tested, as it has one seed of several.
        """
        more = METRICS[self.primary][2]
        found = self._against_untrained(self.primary, primary=True)
        untested = [arm for arm in self._runs(self.primary, self.study.arms) if arm not in found]
        untested += [c.arm for c in found.values() if c.decision == "one seed so far"]
        sure = [c for c in found.values() if c.significant or (c.runs_only and c.planned == 1)]
        known = more is not None and bool(found) and not untested
        return known and not any((c.effect > c.null) == more for c in sure)

    def figures(self, arm: Arm, metric: str) -> list[Mapping[str, float]]:
        """Of each finished seed of an arm: the values of a metric, such as a training figure by step."""
        found = [self._values[arm.name, seed].get(metric, {}) for seed in self.seeds(arm)]
        return [each for each in found if each]

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines that are no arm, such as the model before training."""
        return tuple(name for name, seed in self._values if seed is None)

    def of_baseline(self, metric: str, name: str) -> Values | None:
        """[1, examples], in the order of :meth:`values`; None where it has no such metric, or of other examples."""
        found = self._values[name, None].get(metric, {})
        arms = next((f[metric] for (_, seed), f in self._values.items() if seed is not None and metric in f), {})
        if not found or set(found) != set(arms):
            return None
        return np.array([[found[example] for example in sorted(found)]], dtype=np.float64)
