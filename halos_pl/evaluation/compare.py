"""Compares two evaluations question by question, and a run's model with the model before training."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from halos_pl.common.messages import counted, plain
from halos_pl.data.example import DataError
from halos_pl.evaluation.files import ANSWERS, FILE, MEASURED, measured_how, read_object
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
    and the smallest difference that such a test finds 80 % of the time. Answers are paired by their prompts. Held-out
    data are compared only if both evaluations read the same.

    Args:
        first: the folder of a run, or another folder that halos evaluate wrote to.
        second: the folder to compare it with.
    """
    from halos_pl.tasks.paired import compare as paired

    folders = [Path(first), Path(second)]
    one, other = (_scores(folder) for folder in folders)
    for line in differences(*folders):
        print(plain(f"halos: {line}"))
    for mine, others, folder in ((one, other, first), (other, one, second)):
        if alone := [name for name in mine if name not in others]:
            print(plain(f"halos: only {folder} has {', '.join(alone)}"))
    one, other = _matched(folders, one, other)
    results = paired(one, other)
    if not results:
        raise DataError(f"{first} and {second} have no example in common on any metric that has a better direction")
    for each in results:
        lost = len(one[each.metric].keys() ^ other[each.metric].keys())
        left_out = f"; left out: {counted(lost, 'example')} that only one has" if lost else ""
        print(plain(each.line(first, second)) + left_out)


def _scores(folder: Path) -> Values:
    """The values of all metrics with a better direction, by metric and example."""
    path = folder / FILE
    try:
        values = read_object(path)
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no {FILE}: run halos evaluate on it first") from error
    scores = {
        name: each for name, each in values.items() if "/" not in name and metric_of(name).higher_is_better is not None
    }
    for name, examples in scores.items():
        if not isinstance(examples, dict):
            raise DataError(f"{path} is damaged ({name} is no object); run halos evaluate again")
        for example, value in examples.items():
            if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                raise DataError(
                    f"{path}: {name} of {example} is {value!r:.40}, not a finite number; run halos evaluate again"
                )
    return scores


def _matched(folders: list[Path], *scores: Values) -> Sequence[Values]:
    """The values of the same data: answers by their prompt, and no other values of files that differ.

    A question of a benchmark is named by its content, other examples by file and line.
    """
    from halos_pl.evaluation.held_out import mean_by_example

    matched: list[dict[str, Mapping[str, float]]] = [dict(each) for each in scores]
    how = [measured_how(folder) for folder in folders]
    prompts = [_prompts(folder) for folder in folders]
    for key in ("prompts", "held_out"):
        names = [name for name in scores[0] if name in scores[1] and _input_of(name) == key]
        if key == "prompts" and all(prompts):
            for folder, values, prompt in zip(folders, matched, prompts, strict=True):
                for name in names:
                    if lost := [example for example in values[name] if example not in prompt]:
                        raise DataError(
                            f"{folder / ANSWERS} has no row {lost[0]}, unlike {FILE}; run halos evaluate again"
                        )
                    values[name] = mean_by_example(values[name], prompt)
        elif names and len({json.dumps(_digests(each, key)) for each in how}) > 1:
            listed, (one, other) = ", ".join(names), folders
            print(plain(f"halos: {listed}: not compared, as the {key} files of {one} and {other} have other digests"))
            for values in matched:
                for name in names:
                    del values[name]
    return matched


def _input_of(metric: str) -> str | None:
    """The argument that names the data of a metric; None for a benchmark."""
    unit = metric_of(metric).unit
    return {"prompts": "prompts", "questions": None}.get(unit, "held_out")


def _digests(how: Mapping[str, Any], key: str) -> list[str | None]:
    """The digests of the files that an argument names."""
    from halos_pl.evaluation.arguments import paths_of

    named = how.get("evaluate", {}).get(key) or []
    return [how.get("files", {}).get(path) for path in paths_of([named] if isinstance(named, str) else named)]


def _prompts(folder: Path) -> dict[str, str]:
    """The prompt of each row that was answered, by the row's name; empty if they are not recorded.

    A text and a single user message with this text are the same prompt.
    """
    path = folder / ANSWERS
    if not path.is_file():
        return {}
    prompts = {}
    try:
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            row = json.loads(line)
            prompt = row["prompt"]
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompts[row["row"]] = json.dumps(messages, sort_keys=True)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error!r}); run halos evaluate again") from error
    return prompts


def differences(first: Path, second: Path) -> list[str]:
    """Lines on benchmarks that are not compared, and on settings and files in which two evaluations differ."""
    from halos_pl.evaluation.arguments import FOR_WIN_RATES

    folders, how = (first, second), [measured_how(folder) for folder in (first, second)]
    lines = [
        f"{folder} has no {MEASURED}: its settings are unknown"
        for folder, each in zip(folders, how, strict=True)
        if not each
    ]
    tasks = [each.get("tasks") or {} for each in how]
    lines += [
        f"{name} is not compared: {folder} was trained on {about['trained_on']} of it"
        for folder, listed in zip(folders, tasks, strict=True)
        for name, about in listed.items()
        if "trained_on" in about
    ]
    if not all(how):
        return lines
    settings = [_settings(each, shared=tasks[0].keys() & tasks[1].keys()) for each in how]
    files = [each.get("files", {}) for each in how]
    for each, digests in zip(settings, files, strict=True):
        each.update({f"the content of {path}": digests[path] for path in files[0].keys() & files[1].keys()})
    unused = {*NOT_SETTINGS, *(() if all("win_rate" in each for each in settings) else FOR_WIN_RATES)}
    values = {
        key: [each.get(key, "not set") for each in settings] for key in sorted(settings[0].keys() | settings[1].keys())
    }
    return lines + [
        f"{key} differs: {one} in {first}, {other} in {second}"
        for key, (one, other) in values.items()
        if one != other and key not in unused
    ]


#: Arguments that name the model, or do not change what is measured.
NOT_SETTINGS = ("ckpt_path", "batch_size")


def _settings(how: Mapping[str, Any], shared: Collection[str]) -> dict[str, Any]:
    """All arguments that are set, and how the ``shared`` benchmarks were measured; defaults may not be recorded."""
    chosen = {key: value for key, value in how.get("evaluate", {}).items() if value is not None and value is not False}
    chosen["precision"] = how.get("precision", "32-true")  # not the argument, which may be as_trained
    tasks = {f"{name}.{key}": value for name in shared for key, value in how["tasks"][name].items()}
    return chosen | {key: value for key, value in tasks.items() if not key.endswith(".trained_on")}
