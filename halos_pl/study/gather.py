"""Gathers the data of a report from the folders of a study's runs."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halos_pl.conformance.check import reports
from halos_pl.evaluation.files import measured_how
from halos_pl.evaluation.metrics import BY_JUDGE
from halos_pl.objective.halo import HALO
from halos_pl.run_dir import CONFIG
from halos_pl.study.choice import choices
from halos_pl.study.finished import finished, summary
from halos_pl.study.recorded import AMOUNTS, Figures, Key, Recorded
from halos_pl.study.spec import Run, Study
from halos_pl.study.state import PLAN, failure, state
from halos_pl.study.trivial import baselines, by_length, held_out_records, starts_of
from halos_pl.study.tuning import tuning_in
from halos_pl.training.module import HALOModule
from halos_pl.training.run_log import METRICS
from halos_pl.training.trained import module_of_run
from value_functions import reward_scale

#: Columns of ``metrics.csv`` by training figure of a report; the first column is multiplied by beta.
TRAINING = {
    "training/margin": "rewards/margins",
    "training/z0": "outcome/z0",
    "training/z0_standard_error": "outcome/z0_standard_error",
    "training/gains": "outcome/gains",
    "training/rho": "outcome/rho",
}
#: Maximum number of steps to keep of a curve, evenly spaced.
STEPS = 400
#: Points of a value function's curve.
GRID = 401


def gather(study: Study, out: Path) -> tuple[dict[Key, Figures], dict[Run, str]]:
    """The metrics of the finished runs in a study's folder, and of the baselines that are not arms.

    Returns:
        the metrics, and the reason for each measured run that is skipped.
    """
    measured, faults = finished(study, out)
    values: dict[Key, Figures] = {
        (run.arm.name, run.seed): {**metrics, **by_length(held_out_records(run))} for run, metrics in measured.items()
    }
    return _with_shared(values | baselines(list(measured))), faults


def _with_shared(values: dict[Key, Figures]) -> dict[Key, Figures]:
    """The metrics with only those examples of a judge's metrics that all runs and baselines have: it may abstain."""
    for metric in BY_JUDGE:
        examples = [set(figures[metric]) for figures in values.values() if metric in figures]
        shared = set.intersection(*examples) if examples else set()
        values = {
            key: {**figures, metric: {name: figures[metric][name] for name in figures[metric] if name in shared}}
            if metric in figures
            else figures
            for key, figures in values.items()
        }
    return values


def describe(study: Study, out: Path) -> Recorded:
    """All data of a report; executes the code that the runs' configs name."""
    values, faults = gather(study, out)
    runs = study.runs(out)
    done = [run for run in runs if (run.arm.name, run.seed) in values]
    verdicts = {}
    for arm in study.arms:
        of_arm = [run for run in done if run.arm is arm]
        module = module_of_run(of_arm[0].folder) if of_arm and (of_arm[0].folder / CONFIG).is_file() else None
        for run in of_arm:
            values[arm.name, run.seed] = {**values[arm.name, run.seed], **_training(run, module)}
        if module is not None:
            verdicts[arm.name] = reports(module.objective)["icml"].verdict
            if module.objective.halo is not None and (
                curve := _value_curve(module.objective.halo, [values[arm.name, r.seed] for r in of_arm])
            ):
                key = arm.name, of_arm[0].seed
                values[key] = {**values[key], "value_function": curve}
    tuning = tuning_in(study, out)
    trials = study.trials(out)
    tuned = [run for run in trials if tuning.has(run)]
    decisions = choices(study, tuning.means)
    reasons = {each.arm: each.why_not for each in decisions if each.why_not}
    why = faults | {run: reasons[run.arm.name] for run in runs if run.arm.name in reasons}
    record = {
        **_record(study, out, done, tuned),
        "missing": _missing(trials, tuned, tuning.faults) + _missing(runs, done, why),
        "verdicts": verdicts,
    }
    if study.tune is not None:
        chosen = {each.arm: each.value for each in decisions}
        record["tuning"] = {"option": study.tune.option, "examples": tuning.examples, "chosen": chosen}
    return Recorded(values, record, tuning.means)


def _training(run: Run, module: HALOModule | None) -> dict[str, dict[str, float]]:
    """Training figures by step, and the outcomes of the last rows. Margins are in nats: rewards without beta."""
    halo = module.objective.halo if module is not None else None
    beta = reward_scale(halo.value_function) if halo is not None else 1.0
    figures: dict[str, dict[str, float]] = {}
    amounts = {**(summary(run).get("trained") or {}), "steps": summary(run).get("steps")}
    if known := {key: float(amounts[key]) for key in AMOUNTS if amounts.get(key) is not None}:
        figures["trained"] = known
    for name, column in TRAINING.items():
        scale = beta if name == "training/margin" else 1.0
        curve = {step: value / scale for step, value in _curve(run, column) if scale and math.isfinite(value / scale)}
        if curve:
            kept = {round(at) for at in np.linspace(0, len(curve) - 1, min(STEPS, len(curve)))}
            figures[name] = {str(step): value for i, (step, value) in enumerate(curve.items()) if i in kept}
    outcomes = [(float(u), bool(d)) for u, d in summary(run).get("last_outcomes", []) if math.isfinite(u)]
    for name, label in (("outcome/desirable", True), ("outcome/undesirable", False)):
        if some := {str(i): u for i, (u, desirable) in enumerate(outcomes) if desirable is label}:
            figures[name] = some
    return figures


def _curve(run: Run, name: str) -> list[tuple[int, float]]:
    """Steps and values of a training figure."""
    path = run.folder / METRICS
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def _value_curve(halo: HALO, runs: list[Figures]) -> dict[str, float]:
    """v over the bulk of the outcomes of an arm's runs; empty without outcomes."""
    names = ("outcome/desirable", "outcome/undesirable")
    outcomes = [abs(u) for figures in runs for name in names for u in figures.get(name, {}).values()]
    if not outcomes:
        return {}
    reach = max(1.0, float(np.quantile(outcomes, 0.98)) * 1.2)
    grid = torch.linspace(-reach, reach, GRID)
    with torch.no_grad():
        v = halo.value_function(grid)
    return {repr(u): y for u, y in zip(grid.tolist(), v.tolist(), strict=True) if math.isfinite(y)}


def _record(study: Study, out: Path, done: list[Run], tuned: list[Run]) -> dict[str, Any]:
    """The contents of a report besides numbers; ``tuned`` are the tuning runs that have ended."""
    plan = json.loads((out / PLAN).read_text(encoding="utf-8")) if (out / PLAN).is_file() else {}
    return {
        "study": plan.get("study", str(study.path)),
        "overrides": plan["overrides"] if plan else None if study.overrides is None else str(study.overrides),
        "out": str(out),
        "primary": plan.get("primary"),
        "anyway": plan.get("anyway"),
        "starts": starts_of(done),
        "made": _made(done + tuned),
        "data": _data(done + tuned),
    }


def _missing(runs: list[Run], used: list[Run], why: Mapping[Run, str]) -> list[dict[str, str]]:
    """The runs that are not used, and why."""
    states = {run: state(run) for run in runs if run not in used}
    return [
        {
            "run": str(run.folder),
            "state": "skipped" if run in why and run.measured else how,
            "error": why.get(run) or (failure(run)["error"] if how == "failed" else ""),
        }
        for run, how in states.items()
    ]


def _data(runs: list[Run]) -> list[str]:
    """Hashes of the data that the runs were trained and measured on."""
    trained = {pair for run in runs for pair in summary(run).get("digests", {}).items()}
    measured = {pair for run in runs for pair in measured_how(run.folder).get("files", {}).items()}
    return [
        *(f"trained on {path}, sha256 of its tokens and rows {digest}" for path, digest in sorted(trained)),
        *(f"measured with {path}, sha256 {digest}" for path, digest in sorted(measured)),
    ]


def _made(runs: list[Run]) -> list[dict[str, Any]]:
    """The code, libraries and machine that made the runs, with the number of runs of each combination."""
    counts: Counter[str] = Counter()
    for run in runs:
        by, trained = measured_how(run.folder).get("by") or {}, summary(run).get("by") or {}
        for key in ("revision", "halos_pl") if by and trained else ():
            if trained.get(key, by.get(key)) != by.get(key):
                by[key] = f"{trained[key]}, measured by {by.get(key)}"
        counts[json.dumps(by, sort_keys=True)] += 1
    return [{"runs": count, **json.loads(by)} for by, count in counts.most_common()]
