"""The arms of a study: named ones, crossed with the values of its axes, and a sample of that grid."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos_pl.study.spec import StudyError
from halos_pl.study.tune import short_key, text_of

#: The keys of an arm that are not options: of its config files, and of its own values of the tuned option.
OBJECTIVE, TUNE = "objective", "tune"
#: Path of a key in the study file.
Place = tuple[Any, ...]


@dataclass(frozen=True)
class GridPoint:
    """An arm in the study file.

    Attributes:
        name: name of the arm.
        settings: dotted options, config files under ``objective``, and values to try under ``tune``.
        place: path of its key, for errors.
    """

    name: str
    settings: Mapping[str, Any]
    place: Place

    @property
    def options(self) -> dict[str, Any]:
        """The dotted options alone."""
        return {key: value for key, value in self.settings.items() if key not in (OBJECTIVE, TUNE)}

    @property
    def configs(self) -> list[Any]:
        """The config files alone."""
        files = self.settings.get(OBJECTIVE)
        return files if isinstance(files, list) else [] if files is None else [files]


def grid(
    arms: Mapping[Any, Any],
    axes: Mapping[str, Any],
    sample: Mapping[str, Any] | None,
    baseline: str | None,
    fault: Callable[..., StudyError],
) -> list[GridPoint]:
    """Arms crossed with axes, or a sample of them.

    Args:
        arms: settings by name.
        axes: values by dotted key.
        sample: ``size`` and ``seed`` of a random sample; None for the whole grid.
        baseline: name of the arm that is always in the sample.
        fault: makes an error from a message and the key at fault.

    Raises:
        StudyError: for arms, axes or a sample that cannot be used.
    """
    named = [_named(name, settings, fault) for name, settings in arms.items()]
    for key, values in axes.items():
        for point in named:
            if key in point.settings:
                raise fault(
                    f"{key} is an axis, but arm {point.name!r} sets it too; remove one", "arms", point.name, key
                )
        if not isinstance(values, list) or not values:
            raise fault(f"axis {key} has no values, so the grid is empty; give it a list", "axes", key)
    if axes:
        last = list(axes)[-1]
        combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        points = [
            GridPoint(
                " ".join(filter(None, (point.name, _label(values)))),
                {**point.settings, **values},
                point.place or ("axes", last),
            )
            for point in (named or [GridPoint("", {}, ())])
            for values in combinations
        ]
    else:
        points = named
    return points if sample is None else _sampled(points, sample, baseline, fault)


def _named(name: Any, settings: Any, fault: Callable[..., StudyError]) -> GridPoint:
    if settings is not None and not isinstance(settings, dict):
        raise fault(f"arm {name!r} is {settings!r}; it takes objective: and dotted options", "arms", name)
    if not isinstance(name, str):
        raise fault(f"YAML reads the name of an arm as {name!r}; put it in quotes", "arms")
    if not name.isprintable():
        raise fault(f"the name of arm {name!r} has a character that cannot be printed; remove it", "arms")
    return GridPoint(name, settings or {}, ("arms", name))


def _sampled(
    points: list[GridPoint], sample: Mapping[str, Any], baseline: str | None, fault: Callable[..., StudyError]
) -> list[GridPoint]:
    whole = all(type(sample.get(key, 0)) is int for key in ("size", "seed"))
    if set(sample) - {"size", "seed"} or not whole or sample.get("size", 0) < 1:
        raise fault(f"sample is {sample}; it takes two whole numbers: size, at least 1, and seed", "sample")
    if sample["size"] > len(points):
        raise fault(f"sample.size is {sample['size']}, but there are only {len(points)} arms", "sample")
    kept = [i for i, point in enumerate(points) if point.name == baseline]
    others = [i for i in range(len(points)) if i not in kept]
    drawn = random.Random(sample.get("seed", 0)).sample(others, sample["size"] - len(kept))
    return [points[i] for i in sorted(kept + drawn)]


def _label(values: Mapping[str, Any]) -> str:
    """A grid point in short: the last part of each key with its value; for the objective the value alone."""

    def shown(value: Any) -> str:
        text = text_of(value)
        return Path(text).stem if text.endswith(".yaml") else text

    return " ".join(
        shown(value) if key == OBJECTIVE else f"{short_key(key)}={shown(value)}" for key, value in values.items()
    )
