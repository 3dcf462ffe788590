"""A study: its arms, seeds and measurements, and the commands of its runs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halos_pl.evaluation.files import FILE
from halos_pl.run_dir import shortfall
from halos_pl.study.tune import UNDECIDED, Tune, Value, short_key, text_of

#: Rows of every report that are not arms.
BEFORE, SHORTER = "before training", "fewer words wins"


class StudyError(ValueError):
    """A study that cannot be run; the message names the file, the line and the fix."""


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: name in reports, and of the folder, with special characters replaced.
        configs: config files, in order; later ones win.
        options: values of ``halos fit`` by dotted key; they win over the files.
        line: its line in the study file.
        candidate: the value of the tuned option, such as ``lr=1e-05``; ``UNDECIDED`` before the choice; empty if the
            study tunes nothing.
    """

    name: str
    configs: tuple[str, ...]
    options: Mapping[str, Any] = field(hash=False)
    line: int
    candidate: str = ""

    @property
    def folder(self) -> str:
        """Folder of its runs; each candidate has its own, so that another choice never mixes with earlier runs."""
        parts = [self.name, self.candidate] if self.candidate else [self.name]
        return "/".join(re.sub(r"[^\w.=-]+", "_", part).strip("._") or "arm" for part in parts)

    @property
    def title(self) -> str:
        """Name with the value of the tuned option."""
        return f"{self.name} {self.candidate}" if self.candidate else self.name

    @property
    def decided(self) -> bool:
        """Whether it can be trained: nothing is tuned, or the value is chosen."""
        return self.candidate != UNDECIDED

    def at(self, option: str, value: Value) -> Arm:
        """The arm with a value of the tuned option."""
        candidate = f"{short_key(option)}={text_of(value)}"
        return replace(self, options={**self.options, option: value}, candidate=candidate)

    def words(self, run_dir: Path | str, seed: int) -> list[str]:
        """The words of the command that trains a run, after ``halos``."""
        words = ["fit", "--no_base", *(f"--config={path}" for path in self.configs)]
        for key, value in self.options.items():
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(f"--{key}={text}")
        return [*words, f"--seed_everything={seed}", f"--run_dir={run_dir}"]


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm, seed: arm and seed.
        folder: run folder, as of any ``halos fit``.
        trial: whether it only serves to choose the value of the tuned option, and is measured on the validation split.
    """

    arm: Arm
    seed: int
    folder: Path
    trial: bool = False

    @property
    def fit(self) -> list[str]:
        return self.arm.words(self.folder, self.seed)

    @property
    def measured(self) -> bool:
        return (self.folder / FILE).is_file()

    @property
    def done(self) -> bool:
        """Whether it was trained for all its planned steps, and measured after that."""
        return self.measured and shortfall(self.folder) is None


@dataclass(frozen=True)
class Control:
    """The positive control of a study.

    Attributes:
        study: folder with the results of a study.
        arm: one of its arms.
        metric: one of its metrics, of which more is better.
        at_least: the mean that the arm must reach.
    """

    study: Path
    arm: str
    metric: str
    at_least: float


@dataclass(frozen=True)
class Study:
    """The content of a study file.

    Attributes:
        path: path of the file.
        arms: arms in order; the first is the baseline unless the file names another.
        seeds: seeds of each arm.
        evaluate: arguments of ``halos evaluate``, except the run.
        metrics: metrics of the report, in this order.
        primary: the metric that decisions are made on; the others are exploratory.
        equivalence: the largest difference in the primary metric that counts as equivalent, a ratio for metrics in
            RATIOS; None if equivalence is not tested.
        power: assumptions of the power analysis: ``prompt_sd``, ``run_sd`` and optionally ``sampling_sd``, or
            ``values``, the values.csv.gz of an earlier study; empty if unknown.
        baseline: name of the arm that the others are compared with.
        cluster: parameters of submitit; None to run on this machine.
        tune: how an option is chosen for each arm; None if nothing is tuned.
        control: the positive control, without which the study claims nothing; None if it needs none.
        note: question of the study, for the report.
        overrides: second file, which replaces keys of the first.
        places: file and line of some keys, for errors.
    """

    path: Path
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    evaluate: Mapping[str, Any]
    metrics: tuple[str, ...]
    primary: str
    baseline: str
    equivalence: float | None = None
    power: Mapping[str, Any] = field(default_factory=dict)
    cluster: Mapping[str, Any] | None = None
    tune: Tune | None = None
    control: Control | None = None
    note: str = ""
    overrides: Path | None = None
    places: Mapping[str, str] = field(default_factory=dict)

    def runs(self, out: Path) -> list[Run]:
        """Every arm with every seed, seed by seed: an interrupted study has complete rounds of arms."""
        return _runs(self.arms, self.seeds, out)

    @property
    def variants(self) -> list[Arm]:
        """The arms as they may be trained: each with each value that it tries."""
        if self.tune is None:
            return list(self.arms)
        return [arm.at(self.tune.option, value) for arm in self.arms for value in self.tune.values[arm.name]]

    def trials(self, out: Path) -> list[Run]:
        """The tuning runs; none if nothing is tuned."""
        return [] if self.tune is None else _runs(self.variants, self.tune.seeds, out, trial=True)

    def possible_runs(self, out: Path) -> list[Run]:
        """All runs that the folder may contain: the tuning runs, and those of the arms with whichever value."""
        return [*self.trials(out), *_runs(self.variants, self.seeds, out)]

    @property
    def validation(self) -> Study:
        """The study as its tuning runs are measured."""
        assert self.tune is not None
        metric = self.tune.metric
        places = dict.fromkeys(self.places, f"{self.places['tune']}: tune")
        return replace(self, tune=None, evaluate=self.tune.evaluate, metrics=(metric,), primary=metric, places=places)

    def evaluation(self, run: Run) -> list[str]:
        """The words of the command that measures a run, after ``halos``."""
        words = ["evaluate", str(run.folder)]
        for key, value in (self.validation if run.trial else self).evaluate.items():
            words.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
        return words


def _runs(arms: Iterable[Arm], seeds: Iterable[int], out: Path, *, trial: bool = False) -> list[Run]:
    arms = list(arms)
    return [Run(arm, seed, out / arm.folder / f"seed-{seed}", trial) for seed in seeds for arm in arms]


def command(words: list[str]) -> str:
    """The command as typed in a shell."""
    return f"halos {shlex.join(words)}"


def default_folder(study: str | Path, overrides: str | Path | None) -> Path:
    """The default of ``--out``: below runs/, named after the study's files."""
    return Path("runs") / "-".join(Path(path).stem for path in (study, overrides) if path)
