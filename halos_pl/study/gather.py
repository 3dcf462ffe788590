"""Gathers the data of a report from the folders of a study's runs."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halos_pl.common.experiments import shipped_name
from halos_pl.conformance.check import reports
from halos_pl.evaluation.files import measured_how
from halos_pl.evaluation.metrics import BY_JUDGE
from halos_pl.objective.build import OF_THE_OBJECTIVE
from halos_pl.objective.halo import HALO
from halos_pl.run_dir import CONFIG
from halos_pl.study.choice import choices
from halos_pl.study.control import measured_on
from halos_pl.study.earlier import Earlier, read_earlier
from halos_pl.study.finished import config_of, finished, summary
from halos_pl.study.recorded import AMOUNTS, CLIPPED, Figures, Key, Recorded
from halos_pl.study.spec import Run, Study
from halos_pl.study.state import BY_CONTENT, by_variable, failure, read_plan, state
from halos_pl.study.trivial import STARTS, baselines, by_length, held_out_records, names_of, starts_of
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
    """The metrics of the finished runs in a study's folder, of the recorded ones that have no folder, and of the
    baselines that are not arms.

    Returns:
        the metrics, and the reason for each measured run that is skipped.
    """
    earlier = _used(study, out)
    recorded = {run: earlier.figures(run) for run in earlier.used(study.runs(out))}
    measured, faults = finished(study, out)
    moved = _moved(earlier, out, by_variable(out))
    own = {run: _renamed({**metrics, **by_length(held_out_records(run))}, moved) for run, metrics in measured.items()}
    others = _other_examples(study, own, recorded)
    own = {run: figures for run, figures in own.items() if run not in others}
    figures = {**own, **recorded}
    values: dict[Key, Figures] = {(run.arm.name, run.seed): figures[run] for run in study.runs(out) if run in figures}
    trivial = {key: _renamed(each, moved) for key, each in baselines(list(own), earlier).items()}
    return _with_shared(values | trivial), faults | others


def _used(study: Study, out: Path) -> Earlier:
    """The recorded runs; if none is used, without the baselines and the record, which are those of the runs."""
    earlier = read_earlier(study, out)
    return earlier if earlier.used([*study.trials(out), *study.runs(out)]) else Earlier(study, out)


def _moved(earlier: Earlier, out: Path, named: Callable[[str], str]) -> dict[str, str]:
    """The paths of files that have another path in the names of examples: that of the record, or the study's words."""
    recorded: dict[str, str] = earlier.record.get(BY_CONTENT, {}).get("files", {})
    then = {digest: path for path, digest in recorded.items()}
    now: dict[str, str] = read_plan(out).get(BY_CONTENT, {}).get("files", {})
    # Two files may have the same content.
    names = {path: then.get(digest, named(path)) for path, digest in now.items() if path not in recorded}
    return {path: name for path, name in names.items() if name != path}


def _renamed(figures: Figures, moved: Mapping[str, str]) -> Figures:
    """The values with the names that examples of files have in the record."""
    if not moved:
        return figures
    # A row is named FILE:LINE, or FOLDER[SPLIT]:LINE.
    names = {f"{path}{mark}": f"{then}{mark}" for path, then in moved.items() for mark in ":["}
    names |= {f"{Path(path).name}:": f"{Path(then).name}:" for path, then in moved.items()}  # those of prompts

    def name(example: str) -> str:
        before = next((before for before in names if example.startswith(before)), "")
        return names.get(before, "") + example.removeprefix(before)

    return {metric: {name(key): value for key, value in values.items()} for metric, values in figures.items()}


def _other_examples(study: Study, own: Mapping[Run, Figures], recorded: Mapping[Run, Figures]) -> dict[Run, str]:
    """Why runs cannot be compared with the recorded ones, which have other examples."""
    faults = {}
    for metric in study.metrics if recorded else ():
        names = next(iter(recorded.values())).get(metric, {}).keys()
        for run, figures in own.items():
            if metric not in BY_JUDGE and (differ := names ^ figures.get(metric, {}).keys()):
                faults[run] = f"{len(differ)} examples of {metric} differ from those of the recorded runs"
    return faults


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
    runs, earlier = study.runs(out), _used(study, out)
    recorded = earlier.used(runs)
    done = [run for run in runs if (run.arm.name, run.seed) in values]
    known = earlier.record.get("verdicts", {})
    verdicts = {run.arm.name: known[run.arm.name] for run in recorded if run.arm.name in known}
    checked: dict[str, str] = {}  # verdict by objective, as arms may differ in other settings
    parts: dict[Any, Any] = {}
    for arm in study.arms:
        of_arm = [run for run in done if run.arm is arm and run not in recorded]
        module = module_of_run(of_arm[0].folder) if of_arm and (of_arm[0].folder / CONFIG).is_file() else None
        for run in of_arm:
            values[arm.name, run.seed] = {**values[arm.name, run.seed], **_training(run, module)}
        if module is not None:
            objective = _objective(of_arm[0])
            if objective not in checked:
                checked[objective] = reports(module.objective, shared=parts)["icml"].verdict
            verdicts[arm.name] = checked[objective]
            drawn = any("value_function" in earlier.figures(run) for run in recorded if run.arm is arm)
            if (
                not drawn
                and module.objective.halo is not None
                and (curve := _value_curve(module.objective.halo, [values[arm.name, r.seed] for r in of_arm]))
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
        **_record(study, out, done + tuned, earlier),
        "missing": _missing(trials, tuned, tuning.faults) + _missing(runs, done, why),
        "verdicts": verdicts,
    }
    if study.tune is not None:
        chosen = {each.arm: each.value for each in decisions}
        record["tuning"] = {"option": study.tune.option, "examples": tuning.examples, "chosen": chosen}
    return Recorded(values, record, tuning.means)


def _objective(run: Run) -> str:
    """The settings of a run's objective, as JSON."""
    model = config_of(run).get("model") or {}
    return json.dumps({key: model[key] for key in sorted(OF_THE_OBJECTIVE & model.keys())}, sort_keys=True, default=str)


def _training(run: Run, module: HALOModule | None) -> dict[str, dict[str, float]]:
    """Training figures by step, and the outcomes of the last rows. Margins are in nats: rewards without beta."""
    halo = module.objective.halo if module is not None else None
    beta = reward_scale(halo.value_function) if halo is not None else 1.0
    figures: dict[str, dict[str, float]] = {}
    amounts = {**(summary(run).get("trained") or {}), "steps": summary(run).get("steps"), CLIPPED: _clipped(run)}
    if known := {key: float(amounts[key]) for key in (*AMOUNTS, CLIPPED) if amounts.get(key) is not None}:
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


def _clipped(run: Run) -> float | None:
    """The share of the logged steps whose gradient was clipped by its norm; None if that is unknown."""
    trainer = config_of(run).get("trainer") or {}
    norms = [norm for _, norm in _curve(run, "grad_norm")]
    if not norms or trainer.get("gradient_clip_algorithm") == "value":
        return None
    limit = trainer.get("gradient_clip_val") or math.inf
    return sum(norm > limit for norm in norms) / len(norms)


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


def _record(study: Study, out: Path, ended: list[Run], earlier: Earlier) -> dict[str, Any]:
    """The contents of a report besides numbers; ``ended`` are the runs that are used, tuning runs included."""
    plan, named = read_plan(out), by_variable(out)
    own = [run for run in ended if not earlier.has(run)]
    starts = starts_of([run for run in own if not run.trial], earlier)
    # All runs are measured on the same data.
    how = next((measured_how(run.folder) for run in own if not run.trial), None)
    measured = earlier.record.get("measured", {}) if how is None else measured_on(how)
    overrides = plan["overrides"] if plan else study.overrides
    record: dict[str, Any] = {
        "study": shipped_name(plan.get("study", str(study.path))),
        "overrides": None if overrides is None else shipped_name(str(overrides)),
        "out": str(out),
        "primary": plan.get("primary"),
        "anyway": plan.get("anyway"),
        "starts": names_of(starts),
        STARTS: starts,
        "measured": measured,
        "made": _made(ended, earlier),
        "data": _data(ended, earlier, named),
    }
    if contents := plan.get(BY_CONTENT):
        arms = {run.arm.folder for run in ended}
        # Examples are named after the files that the recorded runs were measured on.
        then = earlier.record.get(BY_CONTENT, {}).get("files", {})
        now = {named(path): digest for path, digest in contents["files"].items() if digest not in then.values()}
        contents["arms"] = {folder: digest for folder, digest in contents["arms"].items() if folder in arms}
        record[BY_CONTENT] = {**contents, "files": {**then, **now}}
    return record


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


def _data(runs: list[Run], earlier: Earlier, named: Callable[[str], str]) -> dict[str, list[str]]:
    """Hashes of the data that the runs were trained and measured on, each with the names of its runs."""
    recorded: dict[str, list[str]] = earlier.record.get("data", {})
    names: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        name = earlier.name(run)
        if earlier.has(run):
            lines = [line for line, known in recorded.items() if name in known]
        else:
            trained, measured = summary(run).get("digests", {}), measured_how(run.folder).get("files", {})
            lines = [
                f"trained on {named(path)}, sha256 of its tokens and rows {digest}" for path, digest in trained.items()
            ]
            lines += [f"measured with {named(path)}, sha256 {digest}" for path, digest in measured.items()]
        for line in lines:
            names[line].append(name)
    return {line: names[line] for line in sorted(names, key=lambda line: (not line.startswith("trained"), line))}


def _made(runs: list[Run], earlier: Earlier) -> list[dict[str, Any]]:
    """The code, libraries and machine that made the runs, with the number and the names of the runs of each
    combination."""
    recorded = {
        name: {key: value for key, value in entry.items() if key not in ("runs", "names")}
        for entry in earlier.record.get("made", [])
        for name in entry["names"]
    }
    names: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        name = earlier.name(run)
        by = recorded.get(name, {}) if earlier.has(run) else _made_by(run)
        names[json.dumps(by, sort_keys=True)].append(name)
    by_size = sorted(names.items(), key=lambda each: -len(each[1]))
    return [{"runs": len(some), "names": some, **json.loads(by)} for by, some in by_size]


def _made_by(run: Run) -> dict[str, Any]:
    """The code, libraries and machine that made a run in the study's folder."""
    by, trained = measured_how(run.folder).get("by") or {}, summary(run).get("by") or {}
    for key in ("revision", "halos_pl") if by and trained else ():
        if trained.get(key, by.get(key)) != by.get(key):
            by[key] = f"{trained[key]}, measured by {by.get(key)}"
    return by
