"""Runs that an earlier session of a study recorded, perhaps on another machine; they count as done.

Their ``values.csv.gz`` and ``record.json`` are in ``earlier/`` of the study's folder. A run that has a folder of its
own takes precedence over its recorded values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halos_pl.study.recorded import VALUES, Figures, add_value, lines_of, read_record, readable, unpacked
from halos_pl.study.spec import Run, Study
from halos_pl.study.state import failure_file
from halos_pl.study.tune import COLUMN, text_of

#: The folder in a study's folder.
EARLIER = "earlier"


@dataclass(frozen=True)
class Earlier:
    """The recorded runs of a study.

    Attributes:
        study, out: the study and its folder.
        runs: values by run, metric and example; a run is its folder below ``out``.
        baselines: values of baselines that are not arms, by name.
        record: the record beside the values.
    """

    study: Study
    out: Path
    runs: Mapping[str, Figures] = field(default_factory=dict)
    baselines: Mapping[str, Figures] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    def name(self, run: Run) -> str:
        """The name of a run in the record."""
        return run.folder.relative_to(self.out).as_posix()

    def figures(self, run: Run) -> Figures:
        """The recorded values of a run; empty if there are none."""
        found = self.runs.get(self.name(run), {})
        return {metric: values for metric, values in found.items() if not metric.startswith(COLUMN)}

    def mean(self, run: Run) -> float | None:
        """What a tuning run has shown: NaN if it diverged, None if it is not recorded."""
        if (tune := self.study.tune) is None:
            return None
        return self.runs.get(self.name(run), {}).get(tune.column, {}).get(text_of(run.arm.options[tune.option]))

    def lacks(self, run: Run) -> list[str]:
        """Metrics of the study that were not recorded for a run."""
        figures = self.figures(run)
        return [metric for metric in self.study.metrics if not figures.get(metric)]

    def knows(self, run: Run) -> bool:
        """Whether a run is recorded with all metrics of the study."""
        return self.mean(run) is not None if run.trial else not self.lacks(run)

    def has(self, run: Run) -> bool:
        """Whether a run is recorded and has no folder, so that its recorded values are used."""
        return self.knows(run) and not has_folder(run)

    def used(self, runs: Iterable[Run]) -> list[Run]:
        """Those of the runs whose recorded values are used."""
        return [run for run in runs if self.has(run)] if self.runs else []


def has_folder(run: Run) -> bool:
    """Whether a run was begun in the study's folder."""
    return run.folder.is_dir() or failure_file(run).is_file()


def read_earlier(study: Study, out: Path, source: Path | None = None) -> Earlier:
    """The recorded runs of a study; none without the files.

    Args:
        study, out: the study and its folder.
        source: folder of the files; default: ``earlier/`` of the study's folder.

    Raises:
        StudyError: if the files cannot be read or do not belong together.
    """
    folder = out / EARLIER if source is None else source
    path = folder / VALUES
    if not path.is_file():
        return Earlier(study, out)
    runs: dict[str, dict[str, dict[str, float]]] = {}
    baselines: dict[str, dict[str, dict[str, float]]] = {}
    with readable(path):
        content = unpacked(path)
        for place, line in lines_of(path, content):
            found = runs.setdefault(line["run"], {}) if line["seed"] else baselines.setdefault(line["arm"], {})
            add_value(found, line, study, place)
    return Earlier(study, out, runs, baselines, read_record(folder, content))
