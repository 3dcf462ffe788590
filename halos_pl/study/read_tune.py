"""Reads ``tune`` of a study file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halos_pl.evaluation.metrics import BY_JUDGE, CODE, METRICS
from halos_pl.study.grid import TUNE, GridPoint
from halos_pl.study.known_keys import refuse_unknown
from halos_pl.study.spec import StudyError
from halos_pl.study.tune import Tune, Value, is_numeric, same_option
from halos_pl.tasks.options import OPTIONS

KEYS = ("option", "values", "seeds", "held_out", "prompts", "metric")
#: Arguments of ``halos evaluate`` that name data of the report.
_DATA = ("held_out", "prompts", "tasks", "suite", *OPTIONS)
#: The largest seed that Lightning takes.
LAST_SEED = 2**32 - 1

Fault = Callable[..., StudyError]


def seeds_of(seeds: Any, name: str, fault: Fault, *place: str) -> tuple[int, ...]:
    """A list of different seeds."""
    whole = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not seeds or not whole:
        raise fault(f"{name} is {seeds}; it takes a list of whole numbers from 0", *place)
    if max(seeds) > LAST_SEED:
        raise fault(f"{name} is {seeds}; a seed is at most {LAST_SEED}", *place)
    if len(set(seeds)) < len(seeds):
        raise fault(f"{name} is {seeds}: a seed is listed twice", *place)
    return tuple(seeds)


def read_tune(
    given: Mapping[str, Any],
    points: Mapping[str, GridPoint],
    seeds: Sequence[int],
    evaluate: Mapping[str, Any],
    primary: str,
    fault: Fault,
) -> Tune:
    """The tuning of a study.

    Args:
        given: ``tune`` of the study file.
        points: the arms by name.
        seeds: seeds of the study.
        evaluate: ``evaluate`` of the study file, whose settings other than data apply to tuning too.
        primary: the study's primary metric, the default of ``metric``.
        fault: makes an error from a message and the key at fault.

    Raises:
        StudyError: names the line at fault.
    """
    refuse_unknown(given, "tune", KEYS, fault)
    option = given.get("option")
    if not isinstance(option, str) or "." not in option:
        why = f"tune.option is {option!r}; it takes an option of halos fit, such as model.optimizer.init_args.lr"
        raise fault(why, "tune", "option")
    values = {}
    for point in points.values():
        if same := next((key for key in point.settings if same_option(key, option)), None):
            raise fault(f"{option} is tuned, but arm {point.name!r} sets it too; remove one", *point.place, same)
        own = TUNE in point.settings
        place = (*point.place, TUNE) if own else ("tune", "values")
        values[point.name] = _values(point.settings[TUNE] if own else given.get("values"), point.name, fault, *place)
    if "values" in given and all(TUNE in point.settings for point in points.values()):
        raise fault("tune.values has no effect, as every arm has its own; remove one", "tune", "values")
    metric = _metric(given.get("metric", primary), evaluate, fault)
    own_seeds = seeds_of(given.get("seeds"), "tune.seeds", fault, "tune", "seeds")
    if shared := sorted({*own_seeds} & {*seeds}):
        why = f"tune.seeds has {', '.join(map(str, shared))}, as has seeds; tuning needs seeds of its own"
        raise fault(why, "tune", "seeds")
    return Tune(option, values, own_seeds, _evaluation(given, evaluate, metric, fault), metric)


def _values(given: Any, arm: str, fault: Fault, *place: Any) -> tuple[Value, ...]:
    """The values that an arm tries; numbers in ascending order."""
    if not isinstance(given, list) or not all(isinstance(value, int | float | str) for value in given):
        raise fault(f"the values to try of arm {arm!r} are {given!r}; tune takes a list of numbers or texts", *place)
    values: list[Value] = [_number(value) for value in given]
    if is_numeric(values) and not all(math.isfinite(float(value)) for value in values):
        raise fault(f"the values to try of arm {arm!r} are {given}; they must be finite", *place)
    if len(set(values)) < len(values):
        raise fault(f"the values to try of arm {arm!r} are {given}: one is listed twice", *place)
    if len(values) < 2:
        why = (
            f"arm {arm!r} has {len(values)} value to try, which leaves nothing to choose; list more, or set the option"
        )
        raise fault(f"{why} in options", *place)
    return tuple(sorted(values, key=float)) if is_numeric(values) else tuple(values)


def _number(value: Value) -> Value:
    """A text such as 1e-5 or .inf as the number that ``halos fit`` reads."""
    try:
        return float(value.replace(".inf", "inf").replace(".nan", "nan")) if isinstance(value, str) else value
    except ValueError:
        return value


def _metric(metric: Any, evaluate: Mapping[str, Any], fault: Fault) -> str:
    """A metric that can decide."""
    if metric not in METRICS:
        better = ", ".join(name for name, each in METRICS.items() if each.higher_is_better is not None)
        why = f"tune cannot choose by {metric!r}, which is not measured on feedback or prompts; set tune.metric"
        raise fault(f"{why} to one of {better}", "tune", "metric")
    if METRICS[metric].higher_is_better is None:
        raise fault(f"tune cannot choose by {metric}, which is better neither high nor low", "tune", "metric")
    needed = metric if metric in CODE else "win_rate" if metric in BY_JUDGE else None
    if needed and not evaluate.get(needed):
        raise fault(f"tune.metric is {metric}, but evaluate has no {needed}", "tune", "metric")
    return str(metric)


def _evaluation(given: Mapping[str, Any], evaluate: Mapping[str, Any], metric: str, fault: Fault) -> dict[str, Any]:
    """The arguments of ``halos evaluate`` for tuning: the validation split, and the report's settings that matter."""
    # Imported here: it loads torch, for which halos ablate status should not wait.
    from halos_pl.evaluation.arguments import FOR_WIN_RATES, USERS

    unit = METRICS[metric].unit
    needed, other = ("prompts", "held_out") if unit == "prompts" else ("held_out", "prompts")
    if not given.get(needed):
        raise fault(f"tune.metric {metric} is measured on {unit}; name validation data in tune.{needed}", "tune")
    if other in given:
        raise fault(f"tune.{other} has no effect, as {metric} is measured on {unit}; remove it", "tune", other)
    dropped = {*_DATA, *CODE} - {metric}
    dropped |= set() if metric in BY_JUDGE else {"win_rate", *FOR_WIN_RATES}
    kept = {key: value for key, value in evaluate.items() if key not in dropped} | {needed: given[needed]}
    return {key: value for key, value in kept.items() if key not in USERS or any(kept.get(u) for u in USERS[key][1])}
