"""Compares two evaluations question by question, and a run's model with the model before training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_pl.common.messages import plain
from halos_pl.data.example import DataError
from halos_pl.evaluation.files import FILE, measured_how
from halos_pl.evaluation.metrics import METRICS, metric_of

Values = Mapping[str, Mapping[str, float]]


def print_before_and_after(values: Values, before: Values) -> None:
    """Prints how a run's scores differ from those of the model before training.

    Args:
        values: Values by metric and example.
        before: The same before training; empty for other models.
    """
    scores = [name for name in values if name == "rule" or (name not in METRICS and "/" not in name)]
    if before and scores:
        from halos_pl.tasks.paired import compare as paired

        for each in paired(values, before, scores):
            print(plain(f"halos: {each.line('trained', 'before')}"))


def compare(first: str, second: str) -> None:
    """Compare two evaluations on the examples that both measured.

    Prints, for every metric with a direction, both means, their difference with its 95 % interval, p (McNemar's exact
    test for scores of 0 and 1, otherwise a permutation test; corrected for the number of metrics by Holm's method), n,
    and the smallest difference that such a test finds 80 % of the time.

    Args:
        first: the folder of a run, or another folder that halos evaluate wrote to.
        second: the folder to compare it with.
    """
    from halos_pl.tasks.paired import compare as paired

    folders = [Path(first), Path(second)]
    one, other = (_values(folder) for folder in folders)
    for line in differences(*folders):
        print(plain(f"halos: {line}"))
    scores = [name for name in one if metric_of(name).higher_is_better is not None and "/" not in name]
    results = paired(one, other, scores)
    if not results:
        raise DataError(f"{first} and {second} have no example in common on any metric that has a better direction")
    for each in results:
        lost = len(one[each.metric].keys() ^ other[each.metric].keys())
        print(plain(each.line(first, second)) + (f"; {lost} examples that only one has are left out" if lost else ""))


def _values(folder: Path) -> Values:
    path = folder / FILE
    try:
        values: Values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no {FILE}: run halos evaluate on it first") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); run halos evaluate again") from error
    return values


def differences(first: Path, second: Path) -> list[str]:
    """Lines on benchmarks that are not compared, and on settings in which two evaluations differ."""
    how = [measured_how(folder) for folder in (first, second)]
    tasks = [each.get("tasks") or {} for each in how]
    lines = [
        f"{name} is not compared: {folder} was trained on {about['trained_on']} of it"
        for folder, listed in zip((first, second), tasks, strict=True)
        for name, about in listed.items()
        if "trained_on" in about
    ]
    settings: list[dict[str, Any]] = [
        each.get("evaluate", {}) | {f"{name}.{key}": v for name, about in listed.items() for key, v in about.items()}
        for each, listed in zip(how, tasks, strict=True)
    ]
    both = settings[0].keys() & settings[1].keys() - {"ckpt_path", "reference", "batch_size"}
    changed = [key for key in sorted(both) if settings[0][key] != settings[1][key] and not key.endswith(".trained_on")]
    return lines + [f"{key} differs: {settings[0][key]} in {first}, {settings[1][key]} in {second}" for key in changed]
