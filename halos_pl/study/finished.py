"""The finished runs of a study: those whose figures can be compared, and why the others are skipped."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from halos_pl.evaluation.files import FILE, measured_how, trained_on
from halos_pl.evaluation.metrics import BY_JUDGE
from halos_pl.run_dir import CONFIG, SUMMARY, shortfall
from halos_pl.study.record_shape import NUMBER
from halos_pl.study.spec import Run, Study
from halos_pl.study.state import read_part

#: Values by metric and example.
Metrics = dict[str, dict[str, float]]
METRICS = {"*": {"*": NUMBER}}  #: their shape in a file
#: Parts of the record of an evaluation that may differ between runs.
NOT_THE_SAME = ("by", "step", "seconds")
#: Settings that differ from run to run: its seed and its folder.
PER_RUN = ("run_dir", "seed_everything", "default_root_dir")


def finished(study: Study, out: Path) -> tuple[dict[Run, Metrics], dict[Run, str]]:
    """The measured runs in a study's folder.

    Returns:
        the metrics of those that can be compared, and why each of the others is skipped.
    """
    return comparable(study.runs(out), study.metrics)


def comparable(runs: Iterable[Run], needed: Sequence[str]) -> tuple[dict[Run, Metrics], dict[Run, str]]:
    """Those of the runs that are measured; returns as :func:`finished`.

    Args:
        runs: runs of a study that are measured in the same way.
        needed: metrics that all runs must have on the same examples.
    """
    measured: dict[Run, Metrics] = {run: read_part(run.folder / FILE, METRICS) for run in runs if run.measured}
    faults = _faults(measured, needed)
    return {run: metrics for run, metrics in measured.items() if run not in faults}, faults


def summary(run: Run) -> dict[str, Any]:
    """The summary of a run's training; empty if there is none."""
    path = run.folder / SUMMARY
    return read_part(path, {}) if path.is_file() else {}


def config_of(run: Run) -> dict[str, Any]:
    """A run's config; empty if there is none."""
    path = run.folder / CONFIG
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader) if path.is_file() else {}
    return content or {}


def _faults(measured: dict[Run, Metrics], needed: Sequence[str]) -> dict[Run, str]:
    """Why runs cannot be compared: measured before the end of training, made differently from most, values that are not
    finite (except of tuning runs, where they rule out a value), or other examples than most."""
    short = {run: f"it was measured, but {why}" for run in measured if (why := shortfall(run.folder))}
    rest = {run: metrics for run, metrics in measured.items() if run not in short}
    faults = _made_otherwise(rest)
    for metric in needed:
        examples = {run: frozenset(metrics.get(metric, {})) for run, metrics in rest.items()}
        usual = Counter(examples.values()).most_common(1)[0][0] if examples else frozenset()
        for run, names in examples.items():
            lost = sum(not math.isfinite(value) for value in rest[run].get(metric, {}).values())
            if lost and not run.trial:
                faults[run] = f"{metric} of {lost} of {len(names)} examples is not finite"
            elif not names and (count := trained_on(run.folder, metric)):
                faults[run] = f"its training data contain {count} of {metric}"
            elif names != usual and not (names and metric in BY_JUDGE):
                faults[run] = (
                    f"{metric} has {len(names)} examples; {len(names ^ usual)} differ from those of other runs"
                )
    return faults | short


def _made_otherwise(runs: Iterable[Run]) -> dict[Run, str]:
    """Runs whose config differs from other seeds of their arm, or that were measured differently from most.

    A file that changes while a study runs, such as a config, data or the rule, leaves no other trace.
    """
    faults: dict[Run, str] = {}
    arms: dict[str, list[Run]] = defaultdict(list)
    measured = {}
    for run in runs:
        arms[run.arm.title].append(run)
        how = {key: value for key, value in measured_how(run.folder).items() if key not in NOT_THE_SAME}
        # A run that was trained on a benchmark's questions lacks that metric, which is reported as such.
        measured[run] = {k: json.dumps(v) for k, v in _leaves(how).items() if not k.endswith(".trained_on")}
    for why, settings in [
        ("measured differently from most", measured),
        *(("trained differently from other seeds", {run: _trained_how(run) for run in arm}) for arm in arms.values()),
    ]:
        usual = Counter(json.dumps(each, sort_keys=True) for each in settings.values()).most_common(1)
        for run, each in settings.items():
            common = json.loads(usual[0][0])
            keys = sorted(key for key in {*each, *common} if each.get(key) != common.get(key))
            if keys:
                faults[run] = f"{why}: {', '.join(keys)} differ{'s' * (len(keys) == 1)}"
    for arm in arms.values():  # as after raising max_steps of some; older summaries do not record it
        planned = {run: steps for run in arm if (steps := summary(run).get("planned_steps")) is not None}
        usual_steps = Counter(planned.values()).most_common(1)
        faults |= {
            run: f"trained for {steps} planned steps, other seeds for {usual_steps[0][0]}"
            for run, steps in planned.items()
            if steps != usual_steps[0][0]
        }
    return faults


def _trained_how(run: Run) -> dict[str, str]:
    """A run's config and the digests of its data, as JSON by dotted key."""
    settings = _leaves(config_of(run)) if (run.folder / CONFIG).is_file() else {}
    settings |= {f"the data {name}": digest for name, digest in summary(run).get("digests", {}).items()}
    return {key: json.dumps(value) for key, value in settings.items() if key.rpartition(".")[2] not in PER_RUN}


def _leaves(node: Any, at: str = "") -> dict[str, Any]:
    """The values of a nested mapping by dotted key."""
    if not isinstance(node, dict):
        return {at: node}
    return {k: v for key, part in node.items() for k, v in _leaves(part, f"{at}.{key}" if at else str(key)).items()}
