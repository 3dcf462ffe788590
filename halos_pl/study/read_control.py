"""Reads ``control`` of a study file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halos_pl.evaluation.metrics import METRICS, is_share, metric_of
from halos_pl.study.known_keys import refuse_unknown
from halos_pl.study.spec import Control, StudyError

KEYS = ("study", "arm", "metric", "at_least")


def read_control(given: Mapping[str, Any], fault: Callable[..., StudyError]) -> Control:
    """``control`` of a study file.

    Args:
        given: its content.
        fault: makes an error from a message and the key at fault.

    Raises:
        StudyError: names the line at fault.
    """
    refuse_unknown(given, "control", KEYS, fault)
    for key, what in {"study": "the folder of a study's results", "arm": "one of its arms"}.items():
        if not isinstance(given.get(key), str) or not given[key]:
            raise fault(f"control.{key} is {given.get(key)!r}; it takes {what}", "control", key)
    metric = given.get("metric")
    if not isinstance(metric, str) or not metric_of(metric).higher_is_better:
        higher = ", ".join(name for name, each in METRICS.items() if each.higher_is_better)
        why = f"control.metric is {metric!r}; at_least takes a metric of which more is better: a benchmark, {higher}"
        raise fault(why, "control", "metric")
    at_least = given.get("at_least")
    if not isinstance(at_least, int | float) or isinstance(at_least, bool) or not math.isfinite(at_least):
        raise fault(f"control.at_least is {at_least!r}; it must be a number", "control", "at_least")
    if is_share(metric) and not 0 < at_least < 1:
        why = f"control.at_least is {at_least:g}; {metric} is a share, so it must be between 0 and 1: 60 % is 0.6"
        raise fault(why, "control", "at_least")
    return Control(Path(given["study"]), given["arm"], metric, float(at_least))
