"""What a study has found so far: values by arm, seed and example, estimates, comparisons."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from halos_pl.callbacks import CONFIG, SUMMARY
from halos_pl.callbacks import METRICS as CURVES
from halos_pl.ending import shortfall
from halos_pl.study.evaluate import FILE, METRICS, SHARES, measured_how
from halos_pl.study.plan import Arm, Run, Study
from halos_pl.study.statistics import RESAMPLES, Comparison, Estimate, Values, compare, estimate, holm

# Of a run's config: which run it is, and where.
OWN = ("run_dir", "seed_everything", "default_root_dir")


def _leaves(node: Any, at: str = "") -> dict[str, Any]:
    """The values of a config by their dotted keys."""
    if not isinstance(node, dict):
        return {at: node}
    return {k: v for key, own in node.items() for k, v in _leaves(own, f"{at}.{key}" if at else str(key)).items()}


def summary(run: Run) -> dict[str, Any]:
    """What a run says of its training; empty where it says nothing."""
    path = run.folder / SUMMARY
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _config(run: Run) -> dict[str, str]:
    """What a run was trained with: its config, and the digests of its data; as JSON, by dotted key."""
    path = run.folder / CONFIG
    known = _leaves(yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)) if path.is_file() else {}
    known |= {f"the data {name}": digest for name, digest in summary(run).get("digests", {}).items()}
    return {key: json.dumps(value) for key, value in known.items() if key.rpartition(".")[2] not in OWN}


def _made_otherwise(runs: Iterable[Run]) -> dict[Run, str]:
    """Runs that were not made as most are: with another config than other seeds of their arm, or measured otherwise.

    A file that is changed while a study runs, such as a config, data, or the rule, has no other trace.
    """
    faults, arms = {}, defaultdict(list)
    measured = {}
    for run in runs:
        arms[run.arm.name].append(run)
        how = {key: own for key, own in measured_how(run.folder).items() if key != "by"}
        measured[run] = {key: json.dumps(value) for key, value in _leaves(how).items()}
    for why, known in [
        ("measured in another way than most", measured),
        *(("trained in another way than other seeds", {run: _config(run) for run in own}) for own in arms.values()),
    ]:
        usual = Counter(json.dumps(each, sort_keys=True) for each in known.values()).most_common(1)
        for run, each in known.items():
            common = json.loads(usual[0][0])
            keys = sorted(key for key in {*each, *common} if each.get(key) != common.get(key))
            if keys:
                faults[run] = f"{why}: {', '.join(keys)} differ{'s' * (len(keys) == 1)}"
    for own in arms.values():  # as after raising max_steps of some; an older version's summary does not say
        planned = {run: steps for run in own if (steps := summary(run).get("planned_steps")) is not None}
        usual_steps = Counter(planned.values()).most_common(1)
        faults |= {
            run: f"trained for {steps} planned steps, other seeds for {usual_steps[0][0]}"
            for run, steps in planned.items()
            if steps != usual_steps[0][0]
        }
    return faults


@dataclass(frozen=True)
class Versus:
    """An arm compared with the baseline on one metric.

    Attributes:
        metric, arm: which.
        comparison: the arm less the baseline; p corrected for all comparisons of the study.
        seeds: those that both have finished.
        planned: seeds of the study.
    """

    metric: str
    arm: Arm
    comparison: Comparison
    seeds: tuple[int, ...]
    planned: int

    @property
    def shown(self) -> bool:
        """Whether a difference is shown; not by a single seed, which says nothing of other runs."""
        return self.comparison.shown and len(self.seeds) > 1

    @property
    def detectable(self) -> float:
        """The difference that would be found 4 times in 5; infinite where none that can be would."""
        found = self.comparison.detectable
        return math.inf if self.metric in SHARES and found > 1 else found

    @property
    def runs_differ(self) -> bool:
        """Whether no more than that is shown: these runs differ, other seeds may not."""
        one = len(self.seeds) == self.planned == 1 and self.comparison.shown
        return not self.shown and (one or (len(self.seeds) > 1 and self.comparison.runs_differ))

    @property
    def said(self) -> str:
        """In a few words."""
        if self.shown:
            some = len(self.seeds) < self.planned
            return f"differs (by {len(self.seeds)} of {self.planned} seeds)" if some else "differs"
        if self.comparison.same:
            return "the same on every example"
        if len(self.seeds) == 1 < self.planned:
            return "one seed so far"
        if self.runs_differ:
            return "these runs differ; " + (
                "not shown for other seeds" if len(self.seeds) > 1 else "one seed says nothing of others"
            )
        found = self.detectable
        size = f"{found:.2g} is detectable" if math.isfinite(found) else "too few values to find any"
        return f"no difference shown; {size}"


class Results:
    """The finished runs of a study.

    Args:
        study: the study.
        out: its folder.
    """

    def __init__(self, study: Study, out: Path) -> None:
        self.study, self.out = study, out
        self.runs = study.runs(out)
        found = {run: json.loads((run.folder / FILE).read_text(encoding="utf-8")) for run in self.runs if run.measured}
        #: Why a measured run is left out.
        self.faults: dict[Run, str] = self._faults(found)
        #: Runs that have been trained and measured, and can be compared.
        self.done = [run for run in found if run not in self.faults]
        self._values = {(run.arm.name, run.seed): found[run] for run in self.done}

    def _faults(self, found: dict[Run, dict[str, dict[str, float]]]) -> dict[Run, str]:
        """Runs that were measured before their training was done, whose figures are not finite or of other examples
        than those of most runs, or that were made in another way."""
        short = {run: f"it was measured, but {why}" for run in found if (why := shortfall(run.folder))}
        found = {run: values for run, values in found.items() if run not in short}
        faults = _made_otherwise(found)
        for metric in self.study.metrics:
            examples = {run: frozenset(values.get(metric, {})) for run, values in found.items()}
            usual = Counter(examples.values()).most_common(1)[0][0] if examples else frozenset()
            for run, own in examples.items():
                lost = sum(not math.isfinite(value) for value in found[run].get(metric, {}).values())
                if lost:
                    faults[run] = f"{metric} of {lost} of {len(own)} examples is no finite number"
                elif own != usual:
                    faults[run] = (
                        f"{metric} is of {len(own)} examples, {len(own ^ usual)} of which are not those of others"
                    )
        return faults | short

    def first_run(self, arm: Arm) -> Run | None:
        """The arm's first finished run, None where there is none yet."""
        return next((run for run in self.done if run.arm is arm), None)

    def seeds(self, arm: Arm) -> tuple[int, ...]:
        """The seeds that an arm has finished."""
        return tuple(seed for seed in self.study.seeds if (arm.name, seed) in self._values)

    def values(self, metric: str, arm: Arm, seeds: Iterable[int]) -> Values | None:
        """[seeds, examples], examples in one order for all arms; None where a run lacks the metric."""
        found = [self._values[arm.name, seed].get(metric) for seed in seeds]
        if not found or any(each is None for each in found):
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
                    found[metric, arm.name] = estimate(values, share=metric in SHARES)
        return found

    @property
    def baseline(self) -> Arm:
        """The arm that the others are compared with."""
        return next(arm for arm in self.study.arms if arm.name == self.study.baseline)

    @cached_property
    def versus(self) -> list[Versus]:
        """Every arm against the baseline on every metric, on the seeds that both have finished."""
        found = []
        for metric in self.study.metrics:
            for arm in self.study.arms:
                seeds = tuple(s for s in self.seeds(arm) if s in self.seeds(self.baseline))
                one, other = self.values(metric, arm, seeds), self.values(metric, self.baseline, seeds)
                if arm is not self.baseline and one is not None and other is not None:
                    found.append((metric, arm, one, other, seeds))
        # A permutation test of so many resamples can be below the strictest step of the correction.
        family = len(self.study.metrics) * (len(self.study.arms) - 1)
        resamples = max(RESAMPLES, 200 * family)
        # Those of runs to come count as well: else what is found early would be corrected for fewer.
        corrected = holm([compare(one, other, resamples=resamples) for _, _, one, other, _ in found], family)
        planned = len(self.study.seeds)
        return [
            Versus(m, arm, new, seeds, planned) for (m, arm, _, _, seeds), new in zip(found, corrected, strict=True)
        ]

    def curve(self, run: Run, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a training figure."""
        path = run.folder / CURVES
        if not path.is_file():
            return [], []
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get(name)]
        return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]

    def outcomes(self, arm: Arm) -> list[tuple[float, bool]]:
        """Outcomes in nats of the last rows that the arm's runs were trained on, and their labels."""
        found: list[tuple[float, bool]] = []
        for run in self.done:
            if run.arm is arm:
                found += [(float(u), bool(d)) for u, d in summary(run).get("last_outcomes", [])]
        return found

    def headline(self) -> str:
        """In a few sentences: which arm is ahead on the first metric, by how much, and whether to believe it."""
        metric = self.study.metrics[0]
        _, what, more = METRICS[metric]
        found = {arm: e for (m, arm), e in self.estimates.items() if m == metric}
        compared = set(found) - {self.baseline.name} or len(self.study.arms) == 1
        if self.baseline.name not in found or not compared:
            finished = f"of {len(self.runs)} runs {len(self.done)} are finished"
            lacks = "" if not found else ", of no other arm" if not compared else f", none of {self.baseline.name}"
            return f"Nothing to compare yet: {finished}{lacks}."
        base = found[self.baseline.name]
        n = f"{base.seeds} seed{'s' * (base.seeds > 1)} and {base.examples} prompts"
        said = [f"{metric} ({what}): {self.baseline.name} {shown(base)}, over {n}."]
        against = [v for v in self.versus if v.metric == metric]
        real = [v for v in against if v.shown]
        for v in sorted(real, key=lambda v: -abs(v.comparison.difference.value)):
            d = v.comparison.difference
            better = "" if more is None else " (better)" if (d.value > 0) == more else " (worse)"
            said.append(
                f"{v.arm.name} differs from {self.baseline.name} by {shown(d, '+')}{better}, corrected p ="
                f" {v.comparison.adjusted:.2g}."
            )
        rest: dict[str, list[Versus]] = defaultdict(list)
        for v in against:
            if not v.shown:
                rest[v.said.partition(";")[0]].append(v)
        for why, some in rest.items():
            known = [v.detectable for v in some if math.isfinite(v.detectable)]
            besides = {
                "no difference shown": f"; at this size one of {max(known):.2g} is found 4 times in 5" if known else "",
                "these runs differ": ", but the seeds are too few to say that other runs would",
            }
            said.append(f"{', '.join(v.arm.name for v in some)}: {why}{besides.get(why, '')}.")
        if len(self.done) < len(self.runs):
            said.append(f"Unfinished: {len(self.runs) - len(self.done)} of {len(self.runs)} runs are missing.")
        return " ".join(said)


def shown(e: Estimate, sign: str = "") -> str:
    """A figure with its 95 % interval."""
    return f"{e.value:{sign}.3g} [{e.low:{sign}.3g}, {e.high:{sign}.3g}]"
