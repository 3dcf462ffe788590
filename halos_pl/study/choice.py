"""The choice of each arm's value of the tuned option, from the tuning runs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from halos_pl.common.messages import counted
from halos_pl.evaluation.metrics import metric_of
from halos_pl.study.tune import Tune, Value, is_numeric, short_key, text_of

if TYPE_CHECKING:
    from halos_pl.study.spec import Study

#: Means on the validation split by arm and seed, and by value of the option as text; NaN if a run diverged.
Trials = Mapping[tuple[str, int], Mapping[str, float]]
#: Means whose relative difference is below this are tied: they differ by rounding.
TIE = 1e-9


@dataclass(frozen=True)
class Choice:
    """What the tuning runs of an arm have shown.

    Attributes:
        arm: name of the arm.
        option: the tuned option.
        curve: for each value that the arm tries, the mean of the metric for each finished seed.
        planned: number of seeds of each value.
        best: the values with the best mean, of which the first is chosen; empty if there is none (yet).
    """

    arm: str
    option: str
    curve: Mapping[Value, tuple[float, ...]]
    planned: int
    best: tuple[Value, ...]

    @property
    def value(self) -> Value | None:
        """The chosen value; None if there is none (yet)."""
        return self.best[0] if self.best else None

    @property
    def edge(self) -> str:
        """``smallest`` or ``largest`` if one of the best values is at that end of the arm's numbers, else empty."""
        values = [*self.curve]
        if not is_numeric(values):
            return ""
        return "smallest" if values[0] in self.best else "largest" if values[-1] in self.best else ""

    @property
    def why_not(self) -> str:
        """Why no value is chosen; empty if one is."""
        if self.value is not None:
            return ""
        missing = sum(self.planned - len(each) for each in self.curve.values())
        if missing:
            return f"it is not tuned yet: {missing} of {self.planned * len(self.curve)} tuning runs are missing"
        return f"none of its {counted(len(self.curve), 'value')} can be chosen: each has a run that diverged"

    @property
    def summary(self) -> str:
        """A line on what is chosen, or why nothing is."""
        if self.value is None:
            return f"{self.arm}: no value is chosen: {self.why_not}"
        chosen = f"{self.arm}: {short_key(self.option)}={text_of(self.value)} is chosen"
        if len(self.best) > 1:
            chosen += f"; as good: {', '.join(map(text_of, self.best[1:]))}"
        if self.edge:
            chosen += f"; the {self.edge} of its grid is best: a wider grid may have a better one"
        return chosen


def at_edge(found: Sequence[Choice]) -> str:
    """A sentence on arms whose best value is at the edge of their grid, where a better one may lie beyond; or empty."""
    ends = []
    for edge in ("smallest", "largest"):
        if arms := [f"{each.arm} ({_at_end(each)})" for each in found if each.edge == edge]:
            ends.append(f"the {edge} of the grid for {'; '.join(arms)}")
    return f"The best {short_key(found[0].option)} is {', and '.join(ends)}: widen the grid." if ends else ""


def _at_end(choice: Choice) -> str:
    """The value at the edge, and the chosen one if another is as good."""
    end = [*choice.curve][0 if choice.edge == "smallest" else -1]
    return text_of(end) + ("" if end == choice.value else f", as good as {text_of(choice.best[0])}")


def choose(tune: Tune, arm: str, trials: Trials) -> Choice:
    """The value with the best mean over all seeds, once all tuning runs of the arm have ended.

    A value with a NaN is never chosen. Of values with the same mean, the first is: of numbers, the smallest.
    """
    by_seed = [trials.get((arm, seed), {}) for seed in tune.seeds]
    curve = {
        value: tuple(each[text_of(value)] for each in by_seed if text_of(value) in each) for value in tune.values[arm]
    }
    best: tuple[Value, ...] = ()
    if all(len(each) == len(tune.seeds) for each in curve.values()):
        sign = 1 if metric_of(tune.metric).higher_is_better else -1
        means = {value: sign * fmean(each) for value, each in curve.items()}
        finite = {value: mean for value, mean in means.items() if math.isfinite(mean)}
        top = max(finite.values(), default=math.nan)
        best = tuple(value for value, mean in finite.items() if math.isclose(mean, top, rel_tol=TIE))
    return Choice(arm, tune.option, curve, len(tune.seeds), best)


def choices(study: Study, trials: Trials) -> list[Choice]:
    """The choice of each arm; empty if the study tunes nothing."""
    return [] if study.tune is None else [choose(study.tune, arm.name, trials) for arm in study.arms]


def tuned(study: Study, trials: Trials) -> Study:
    """The study whose arms have their chosen values; an arm without a choice stays undecided."""
    if (tune := study.tune) is None:
        return study
    arms = [
        arm if choice.value is None else arm.at(tune.option, choice.value)
        for arm, choice in zip(study.arms, choices(study, trials), strict=True)
    ]
    return replace(study, arms=tuple(arms))
