"""Tuning: one option of ``halos fit`` with the values that each arm tries before its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: A value of the tuned option.
Value = int | float | str | bool
#: Stands for the value of an arm that is not decided yet.
UNDECIDED = "undecided"
#: How the metrics of tuning runs begin in ``values.csv.gz``.
COLUMN = "tune/"


@dataclass(frozen=True)
class Tune:
    """How a study chooses the value of an option for each arm.

    Attributes:
        option: dotted option of ``halos fit``.
        values: values by arm: numbers in ascending order, others as listed.
        seeds: seeds of the tuning runs; none is a seed of the study.
        evaluate: arguments of ``halos evaluate`` for the tuning runs, except the run; their data are the validation
            split.
        metric: metric whose mean decides.
    """

    option: str
    values: Mapping[str, tuple[Value, ...]] = field(hash=False)
    seeds: tuple[int, ...]
    evaluate: Mapping[str, Any] = field(hash=False)
    metric: str

    @property
    def column(self) -> str:
        """The metric of tuning runs in ``values.csv.gz``; its examples are the values of the option, as texts."""
        return f"{COLUMN}{self.metric}"


def text_of(value: Any) -> str:
    """A value as in a command."""
    return value if isinstance(value, str) else json.dumps(value)


def short_key(option: str) -> str:
    """The last part of an option."""
    return option.rpartition(".")[2]


def same_option(one: str, other: str) -> bool:
    """Whether two dotted options set the same: jsonargparse takes those of a class without ``init_args`` too."""
    first, second = (option.split(".") for option in (one, other))
    return [part for part in first if part != "init_args"] == [part for part in second if part != "init_args"]


def is_numeric(values: Sequence[Value]) -> bool:
    """Whether the values are numbers, which have an order."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
