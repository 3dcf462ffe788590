"""The tuning runs of a study, read from their folders and from what an earlier session recorded."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from halos_pl.study.choice import Trials
from halos_pl.study.earlier import Earlier, read_earlier
from halos_pl.study.finished import comparable
from halos_pl.study.spec import Run, Study
from halos_pl.study.state import diverged
from halos_pl.study.tune import text_of


@dataclass(frozen=True)
class Tuning:
    """The tuning runs that have ended.

    Attributes:
        means: means of the metric on the validation split.
        faults: why each of the measured runs that cannot be compared is skipped.
        examples: number of validation examples.
        option: the tuned option.
    """

    means: Trials = field(default_factory=dict)
    faults: Mapping[Run, str] = field(default_factory=dict)
    examples: int = 0
    option: str = ""

    def has(self, run: Run) -> bool:
        """Whether a tuning run has ended and is used."""
        return text_of(run.arm.options[self.option]) in self.means.get((run.arm.name, run.seed), {})


def tuning_in(study: Study, out: Path, earlier: Earlier | None = None) -> Tuning:
    """The tuning runs in a study's folder, and the recorded ones that have no folder.

    Args:
        study, out: the study and its folder.
        earlier: the recorded runs; None to read them.
    """
    if (tune := study.tune) is None:
        return Tuning()
    earlier = earlier or read_earlier(study, out)
    runs = study.trials(out)
    measured, faults = comparable(runs, (tune.metric,))
    means: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for run in runs:
        values = measured.get(run, {}).get(tune.metric, {}).values()
        if values:
            mean = fmean(values) if all(map(math.isfinite, values)) else math.nan
        elif diverged(run):
            mean = math.nan
        elif earlier.has(run) and (recorded := earlier.mean(run)) is not None:
            mean = recorded
        else:
            continue
        means[run.arm.name, run.seed][text_of(run.arm.options[tune.option])] = mean
    known = earlier.record.get("tuning", {}).get("examples", 0) if earlier.used(runs) else 0
    examples = max((len(each.get(tune.metric, {})) for each in measured.values()), default=known)
    return Tuning(dict(means), faults, examples, tune.option)
