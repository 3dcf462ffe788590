"""The positive control of a study: proof that this model and data show an effect where there is one.

Without it, "no difference" may only mean that nothing was learned, so a study that names a control claims nothing until
the control holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halos_pl.evaluation.arguments import NO_FILE
from halos_pl.evaluation.metrics import CODE, metric_of
from halos_pl.study.comparison import Comparison
from halos_pl.study.digits import of_comparison, of_estimate, p_value
from halos_pl.study.spec import Study, StudyError
from halos_pl.study.statistics import Estimate

#: For each of these, what identifies the content of each of its sources.
Measured = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Reached:
    """What the arm of a control has reached.

    Attributes:
        measured: the data that it was measured on; None if unknown.
        done, planned: numbers of finished and of planned runs.
        mean: its mean; None without a finished run.
        gain: its test against the untrained model; None if that was not measured.
    """

    measured: Measured | None
    done: int
    planned: int
    mean: Estimate | None
    gain: Comparison | None


@dataclass(frozen=True)
class Standing:
    """Whether a positive control holds.

    Attributes:
        holds: whether it does.
        why: its figures, as a clause; why it does not hold, if so.
    """

    holds: bool
    why: str


def measured_on(how: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The data, rule and judge in a record of an evaluation, see :func:`halos_pl.evaluation.arguments.measuring`.

    Returns:
        for each of them, by name: the digest of the file, with the settings that choose what is read from it.
    """
    arguments, digests = how.get("evaluate", {}), how.get("files", {})
    found: dict[str, dict[str, str]] = {key: {} for key in ("held_out", "prompts", *CODE)}

    def add(key: str, path: str, settings: str = "") -> None:
        if path in digests:
            digest = path if digests[path] == NO_FILE else digests[path]
            found[key][f"{path} {settings}".strip()] = f"{digest} {settings}".strip()

    for source in arguments.get("held_out") or []:
        given = {"path": source} if isinstance(source, str) else dict(source)
        path, _ = given.pop("path"), given.pop("weight", None)
        add("held_out", path, json.dumps(given, sort_keys=True) if given else "")
    if arguments.get("prompts"):
        column = arguments.get("prompt_column")
        add("prompts", arguments["prompts"], json.dumps({"prompt_column": column}) if column else "")
    for key in CODE:
        if arguments.get(key):
            path, _, function = str(arguments[key]).rpartition(":")
            add(key, path, function)
    return found


def check_control(study: Study, other: Study) -> None:
    """Refuses a control that its study does not have.

    Raises:
        StudyError: names the line of the study that has the control.
    """
    control = study.control
    assert control is not None
    own, theirs = ([(arm.name, arm.configs, arm.options) for arm in each.arms] for each in (study, other))
    if own == theirs:
        raise StudyError(
            f"{study.places['control.study']}: control.study: {control.study} has the arms of this study itself; a"
            " control is an arm of another study, whose effect is known"
        )
    arms = [arm.name for arm in other.arms]
    if control.arm not in arms:
        why = f"{control.study} has no arm {control.arm!r}; its arms are {', '.join(arms)}"
        raise StudyError(f"{study.places['control.arm']}: control.arm: {why}")
    if control.metric not in other.metrics:
        why = f"{control.study} has no metric {control.metric!r}; it has {', '.join(other.metrics)}"
        raise StudyError(f"{study.places['control.metric']}: control.metric: {why}")


def standing(study: Study, measured: Measured | None, reached: Reached) -> Standing:
    """Whether the control of a study holds.

    Args:
        study: the study that has the control.
        measured: the data that it is measured on, as from :func:`measured_on`; None if unknown.
        reached: what the control's arm has reached.

    Raises:
        StudyError: if the control was measured on other data; names the line.
    """
    control = study.control
    assert control is not None
    what = f"{control.arm} of {control.study}"
    if metric_of(control.metric).unit != "questions":
        if not measured or not reached.measured:
            owner = what if measured else "this study"
            return Standing(False, f"{owner} has no record of the data that it was measured on")
        _check_data(study, measured, reached.measured)
    if reached.done < reached.planned or reached.mean is None:
        return Standing(False, f"{what} has {reached.done} of {reached.planned} runs")
    figure = f"{what} has {control.metric} {of_estimate(reached.mean)}"
    if reached.mean.value < control.at_least:
        return Standing(False, f"{figure}, below {control.at_least:g}")
    if (c := reached.gain) is None:
        return Standing(False, f"{figure}, but the untrained model was not measured")
    assert c.adjusted is not None
    gain = f"{of_comparison(c)} against the untrained model, {p_value(c.adjusted)}"
    better = (c.significant or (c.runs_only and c.planned == 1)) and c.effect > c.null
    if not better:
        return Standing(False, f"{figure}, not significantly more than the untrained model ({gain})")
    return Standing(True, f"{figure} (at least {control.at_least:g} was required), {gain}")


def _check_data(study: Study, measured: Measured, others: Measured) -> None:
    """Refuses other files or rows, and another rule or judge; data from the hub have no digests, but names."""
    control = study.control
    assert control is not None
    data = "prompts" if metric_of(control.metric).unit == "prompts" else "held_out"
    for key in (data, control.metric) if control.metric in CODE else (data,):
        own, theirs = (each.get(key, {}) for each in (measured, others))
        if set(own.values()) != set(theirs.values()):
            what = "on other data" if key == data else f"by another {key}"
            some = [", ".join(names) or "none" for names in (theirs, own)]
            raise StudyError(
                f"{study.places['control.study']}: control.study: {control.study} was measured {what}"
                f" ({key}: {some[0]}; this study: {some[1]}; their content differs); run the control with the same, or"
                " set control: null in a file for --overrides to claim without one"
            )
