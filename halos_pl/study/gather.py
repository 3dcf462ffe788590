"""Gathers from the folders of a study's runs what its report is computed from."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from halos_pl.conformance.check import reports
from halos_pl.evaluation.evaluate import FILE, measured_how
from halos_pl.objective.halo import HALO
from halos_pl.study.execute import PLAN, failure, state
from halos_pl.study.plan import Run, Study
from halos_pl.study.recorded import Figures, Key, Recorded
from halos_pl.study.trivial import baselines, by_length, held_out_records, starts_of
from halos_pl.training.callbacks import CONFIG, SUMMARY
from halos_pl.training.callbacks import METRICS as CURVES
from halos_pl.training.ending import shortfall
from halos_pl.training.module import HALOModule
from halos_pl.training.trained import module_of_run
from value_functions import reward_scale

# Of a run's config: which run it is, and where.
OWN = ("run_dir", "seed_everything", "default_root_dir")
#: Training figures of a report and the column of ``metrics.csv``; the first is shown there times beta.
TRAINING = {
    "training/margin": "rewards/margins",
    "training/z0": "outcome/z0",
    "training/z0_standard_error": "outcome/z0_standard_error",
    "training/gains": "outcome/gains",
}
#: Steps of a curve that are kept at most, evenly spaced.
STEPS = 400
#: Points of a value function.
GRID = 401


def gather(study: Study, out: Path) -> tuple[dict[Key, Figures], dict[Run, str]]:
    """The metrics of the finished runs in a study's folder, and of the baselines that are no arm.

    Returns:
        them, and why each measured run that is skipped cannot be compared.
    """
    found = {
        run: json.loads((run.folder / FILE).read_text(encoding="utf-8")) for run in study.runs(out) if run.measured
    }
    faults = _faults(study, found)
    done = [run for run in found if run not in faults]
    values: dict[Key, Figures] = {
        (run.arm.name, run.seed): {**found[run], **by_length(held_out_records(run))} for run in done
    }
    return values | baselines(done), faults


def describe(study: Study, out: Path) -> Recorded:
    """All that a report is computed from. The code that the runs' configs name is executed."""
    values, faults = gather(study, out)
    runs = study.runs(out)
    done = [run for run in runs if (run.arm.name, run.seed) in values]
    verdicts = {}
    for arm in study.arms:
        own = [run for run in done if run.arm is arm]
        module = module_of_run(own[0].folder) if own and (own[0].folder / CONFIG).is_file() else None
        for run in own:
            values[arm.name, run.seed] = {**values[arm.name, run.seed], **_training(run, module)}
        if module is not None:
            verdicts[arm.name] = reports(module.objective)["icml"].verdict
            if module.objective.halo is not None and (
                drawn := _drawn(module.objective.halo, [values[arm.name, run.seed] for run in own])
            ):
                key = arm.name, own[0].seed
                values[key] = {**values[key], "value_function": drawn}
    return Recorded(values, _record(study, out, runs, done, faults) | {"verdicts": verdicts})


def _training(run: Run, module: HALOModule | None) -> dict[str, dict[str, float]]:
    """Training figures by step and outcomes of the last rows. Margins are in nats: of rewards without beta."""
    halo = module.objective.halo if module is not None else None
    beta = reward_scale(halo.value_function) if halo is not None else 1.0
    found: dict[str, dict[str, float]] = {}
    for name, column in TRAINING.items():
        scale = beta if name == "training/margin" else 1.0
        curve = {step: value / scale for step, value in _curve(run, column) if scale and math.isfinite(value / scale)}
        if curve:
            kept = {round(at) for at in np.linspace(0, len(curve) - 1, min(STEPS, len(curve)))}
            found[name] = {str(step): value for i, (step, value) in enumerate(curve.items()) if i in kept}
    outcomes = [(float(u), bool(d)) for u, d in summary(run).get("last_outcomes", []) if math.isfinite(u)]
    for name, wanted in (("outcome/desirable", True), ("outcome/undesirable", False)):
        if some := {str(i): u for i, (u, desirable) in enumerate(outcomes) if desirable is wanted}:
            found[name] = some
    return found


def _curve(run: Run, name: str) -> list[tuple[int, float]]:
    """Steps and values of a training figure."""
    path = run.folder / CURVES
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def _drawn(halo: HALO, runs: list[Figures]) -> dict[str, float]:
    """v over the bulk of the outcomes of an arm's runs; nothing where no outcome is known."""
    names = ("outcome/desirable", "outcome/undesirable")
    outcomes = [abs(u) for figures in runs for name in names for u in figures.get(name, {}).values()]
    if not outcomes:
        return {}
    reach = max(1.0, float(np.quantile(outcomes, 0.98)) * 1.2)
    grid = torch.linspace(-reach, reach, GRID)
    with torch.no_grad():
        v = halo.value_function(grid)
    return {repr(u): y for u, y in zip(grid.tolist(), v.tolist(), strict=True) if math.isfinite(y)}


def _record(study: Study, out: Path, runs: list[Run], done: list[Run], faults: Mapping[Run, str]) -> dict[str, Any]:
    """What a report says of a study besides its numbers."""
    plan = json.loads((out / PLAN).read_text(encoding="utf-8")) if (out / PLAN).is_file() else {}
    missing = [
        {
            "run": str(run.folder),
            "state": "skipped" if run in faults else state(run),
            "error": faults.get(run) or (failure(run)["error"] if state(run) == "failed" else ""),
        }
        for run in runs
        if run not in done
    ]
    return {
        "study": plan.get("study", str(study.path)),
        "over": plan["over"] if plan else None if study.over is None else str(study.over),
        "out": str(out),
        "primary": plan.get("primary"),
        "starts": starts_of(done),
        "missing": missing,
        "made": _made(done),
        "data": _data(done),
    }


def _data(runs: list[Run]) -> list[str]:
    """Hashes of what the runs were trained and measured on, as it was then."""
    trained = {pair for run in runs for pair in summary(run).get("digests", {}).items()}
    measured = {pair for run in runs for pair in measured_how(run.folder).get("files", {}).items()}
    return [
        *(f"trained on {path}, sha256 of its tokens and rows {digest}" for path, digest in sorted(trained)),
        *(f"measured with {path}, sha256 {digest}" for path, digest in sorted(measured)),
    ]


def _made(runs: list[Run]) -> list[dict[str, Any]]:
    """What made the runs, and how many of them each; several where code, libraries or machine changed in between."""
    found: Counter[str] = Counter()
    for run in runs:
        by, trained = measured_how(run.folder).get("by") or {}, summary(run).get("by") or {}
        for key in ("revision", "halos_pl") if by and trained else ():
            if trained.get(key, by.get(key)) != by.get(key):
                by[key] = f"{trained[key]}, measured by {by.get(key)}"
        found[json.dumps(by, sort_keys=True)] += 1
    return [{"runs": count, **json.loads(by)} for by, count in found.most_common()]


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


def _faults(study: Study, found: dict[Run, dict[str, dict[str, float]]]) -> dict[Run, str]:
    """Runs that were measured before their training was done, whose figures are not finite or of other examples
    than those of most runs, or that were made in another way."""
    short = {run: f"it was measured, but {why}" for run in found if (why := shortfall(run.folder))}
    found = {run: values for run, values in found.items() if run not in short}
    faults = _made_otherwise(found)
    for metric in study.metrics:
        examples = {run: frozenset(values.get(metric, {})) for run, values in found.items()}
        usual = Counter(examples.values()).most_common(1)[0][0] if examples else frozenset()
        for run, own in examples.items():
            lost = sum(not math.isfinite(value) for value in found[run].get(metric, {}).values())
            if lost:
                faults[run] = f"{metric} of {lost} of {len(own)} examples is no finite number"
            elif own != usual:
                faults[run] = f"{metric} is of {len(own)} examples, {len(own ^ usual)} of which are not those of others"
    return faults | short
