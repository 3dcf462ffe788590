"""Reads a study file; every fault names its line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from halos_pl.common.experiments import PresetError, config_file, hint, objectives, presets, shipped_paths
from halos_pl.common.misplaced import misplaced, read_config
from halos_pl.common.yaml_files import Lines, YAMLFileError, read_yaml
from halos_pl.evaluation.evaluate import ARGUMENTS
from halos_pl.evaluation.metrics import BY_JUDGE, CODE, METRICS, RATIOS, is_share
from halos_pl.study.grid import OBJECTIVE, TUNE, GridPoint, Place, grid
from halos_pl.study.known_keys import refuse_unknown
from halos_pl.study.read_control import KEYS as CONTROL
from halos_pl.study.read_control import read_control
from halos_pl.study.read_tune import read_tune, seeds_of
from halos_pl.study.spec import BEFORE, SHORTER, Arm, Control, Study, StudyError
from halos_pl.study.state import OVERRIDES, STUDY
from halos_pl.study.tune import UNDECIDED, Tune, same_option
from halos_pl.tasks.options import task_names

KEYS = (
    *("configs", "options", "arms", "axes", "sample", "seeds", "evaluate", "metrics", "primary", "equivalence"),
    *("power", "baseline", "cluster", "tune", "control", "note"),
)
#: Keys that a second file may replace: those of a study's scale, not of its question.
REPLACEABLE = tuple(key for key in KEYS if key not in ("arms", "axes", "sample", "baseline"))
#: Keys of ``power``: standard deviations, or the values of an earlier study, and the difference to be found.
POWER = ("prompt_sd", "run_sd", "sampling_sd", "values", "effect")
#: The largest possible standard deviations for a share: of differences between -1 and 1, and of means between 0 and 1.
MOST = {"prompt_sd": 1.0, "run_sd": 0.5, "sampling_sd": 1.0}
#: The key and value of a sweep over policies over candidates.
POLICY, CANDIDATES = "policy", "candidates"
# Options that a study sets for each run, and what to do instead.
PER_RUN = {
    "run_dir": "each run has its own folder below that of --out",
    "seed_everything": "name the seeds in seeds",
    "config": "name files in configs, or in objective of an arm",
}


def load_study(path: str | Path, overrides: str | Path | None = None) -> Study:
    """The study in a file.

    Args:
        path: study file, or bare name of a shipped one, such as ``ablations/beta``.
        overrides: second file, or name of a shipped one. Its keys (those of ``REPLACEABLE``) replace those of the
            study; its options are added last.

    Raises:
        StudyError: names the line at fault.
    """
    return _Reader(_study_file(path), None if overrides is None else _study_file(overrides)).study()


def study_in(folder: Path) -> Study:
    """The study that a folder of results belongs to.

    Raises:
        StudyError: if it is no such folder, or its study cannot be read.
    """
    if not (folder / STUDY).is_file():
        raise StudyError(f"{folder} is not a study's folder: it has no {STUDY}")
    overrides = folder / OVERRIDES
    return load_study(folder / STUDY, overrides if overrides.is_file() else None)


def sweep_file(path: str | Path) -> Path | None:
    """The file with this path or name, if it has ``policy: candidates``; its other faults are for its reader.

    Raises:
        StudyError: it names another policy.
    """
    file = _study_file(path)
    try:
        content, lines = read_yaml(file)
    except (OSError, YAMLFileError):
        return None
    if (policy := content.get(POLICY)) is None:
        return None
    if policy != CANDIDATES:
        raise StudyError(
            f"{file}:{lines[POLICY,]}: {POLICY} is {policy!r}; it can only be {CANDIDATES}; leave it out in a study"
            " that trains language models"
        )
    return file


def _study_file(path: str | Path) -> Path:
    try:
        return config_file(str(path), presets(), "the study") if str(path) in presets() else Path(path)
    except PresetError as error:
        raise StudyError(str(error)) from error


class _Reader:
    def __init__(self, path: Path, overrides: Path | None = None) -> None:
        self.path = path
        self.overrides = overrides
        self.content, self.lines = self._read(path)
        # The second file and its lines, by each key that it replaces.
        self.replaced: dict[str, tuple[Path, Lines]] = {}
        self.last_options: dict[str, Any] = {}
        self.points: dict[str, GridPoint] = {}
        if overrides is not None:
            content, lines = self._read(overrides)
            self.replaced = {key: (overrides, lines) for key in content}
            for key in content:
                if key not in REPLACEABLE:
                    raise self.fault(f"{key!r} cannot be set in a second file; it takes {', '.join(REPLACEABLE)}", key)
            # They win over the options of arms too, such as a batch size that only suits a small model.
            self.last_options = content.pop("options", {})
            if not isinstance(self.last_options, dict):
                raise self.fault(f"options is {self.last_options!r}; it must be a mapping", "options")
            self.content = {**self.content, **content}

    @staticmethod
    def _read(path: Path) -> tuple[dict[str, Any], Lines]:
        """Content, and the line of each key."""
        try:
            content, lines = read_config(path)
            return shipped_paths(content), lines
        except OSError as error:
            if path.is_dir():
                raise StudyError(f"{misplaced(path)}; halos ablate takes the YAML file of a study") from error
            raise StudyError(f"{path} cannot be read: {error.strerror or error}{hint(path, presets())}") from error
        except YAMLFileError as error:
            raise StudyError(str(error)) from error

    @staticmethod
    def _line(lines: Mapping[tuple[str, ...], int], place: Place) -> int:
        """The line of the innermost key that has one; a key that was merged into a mapping has none."""
        names = tuple(map(str, place))
        while names and names not in lines:
            names = names[:-1]
        return lines.get(names, 1)

    def where(self, *place: Any) -> str:
        """File and line of a key."""
        path, lines = self.replaced.get(str(place[0]), (self.path, self.lines)) if place else (self.path, self.lines)
        return f"{path}:{self._line(lines, place)}"

    def fault(self, message: str, *place: Any) -> StudyError:
        """An error at the innermost key that has a line."""
        return StudyError(f"{self.where(*place)}: {message}")

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.content.get(key, default)
        if value is not default and not isinstance(value, kind):
            names: dict[Any, str] = {list: "a list", dict: "a mapping", str: "a text"}
            raise self.fault(f"{key} is {value!r}; it must be {names[kind]}", key)
        for name in value if kind is dict and value and key != "arms" else ():
            if not isinstance(name, str):
                why = f"YAML does not read the key {name!r} of {key} as a string; put it in quotes"
                raise self.fault(why, key, name)
        return value

    def study(self) -> Study:
        for key in self.content:
            if key not in KEYS:
                raise self.fault(f"unknown key {key!r}; a study has {', '.join(KEYS)}", key)
        arms = self._arms()
        evaluate = self.get("evaluate", dict, {})
        refuse_unknown(evaluate, "evaluate", ARGUMENTS, self.fault)
        baseline = self.get("baseline", str, arms[0].name)
        if baseline not in [arm.name for arm in arms]:
            names = ", ".join(arm.name for arm in arms)
            raise self.fault(f"baseline {baseline!r} is not an arm; the arms are {names}", "baseline")
        metrics = self._metrics(evaluate)
        primary = self._primary(metrics)
        seeds, power = self._seeds(), self._power(primary)
        tune = self._tune(arms, seeds, evaluate, primary)
        if tune is not None:
            arms = [replace(arm, candidate=UNDECIDED) for arm in arms]
        return Study(
            path=self.path,
            arms=tuple(arms),
            seeds=seeds,
            evaluate=evaluate,
            metrics=metrics,
            primary=primary,
            equivalence=self._equivalence(primary),
            power=power,
            baseline=baseline,
            cluster=self.get("cluster", dict, None),
            tune=tune,
            control=self._control(),
            note=self.get("note", str, ""),
            overrides=self.overrides,
            places={key: self.where(key) for key in ("evaluate", "metrics", "cluster", "power", "tune")}
            | {key: self.where("evaluate", key) for key in (*CODE, "prompts", "held_out", "win_rate")}
            | {f"control.{key}": self.where("control", key) for key in CONTROL}
            | {"effect": self.where(*(("power", "effect") if "effect" in power else ("equivalence",)))},
        )

    def _arms(self) -> list[Arm]:
        configs = self._files(self.get("configs", list, []), "configs")
        options = self.get("options", dict, {})
        points = grid(
            self.get("arms", dict, {}),
            self.get("axes", dict, {}),
            self.get("sample", dict, None),
            self.content.get("baseline"),
            self.fault,
        )
        self.points = {point.name: point for point in points}
        arms = [
            Arm(
                point.name,
                (*configs, *self._objectives(point.configs, *point.place, OBJECTIVE)),
                {**options, **point.options, **self.last_options},
                self._line(self.lines, point.place),
            )
            for point in points
        ]
        if not arms:
            raise self.fault("no arms: the grid is empty; name arms, axes with values, or both", "axes")
        for key in {key for arm in arms for key in arm.options if key in PER_RUN}:
            places = [("options", key), ("axes", key), *(("arms", arm.name, key) for arm in arms)]
            place = next((place for place in places if place in self.lines), ("options",))
            raise self.fault(f"{key} cannot be set by a study: {PER_RUN[key]}", *place)
        by_folder: dict[str, Arm] = {}
        for arm in arms:
            where = f"{self.path}:{arm.line}"
            if arm.name == SHORTER or arm.name.startswith(BEFORE):
                raise StudyError(f"{where}: arm {arm.name!r} has the name of a baseline; give it another")
            if arm.folder in by_folder:
                both = f"{by_folder[arm.folder].name!r} and {arm.name!r}"
                raise StudyError(f"{where}: the arms {both} would share the folder {arm.folder!r}; rename one")
            by_folder[arm.folder] = arm
        return arms

    def _files(self, files: list[Any], *place: Any) -> tuple[str, ...]:
        """Names of config files."""
        for file in files:
            if not isinstance(file, str):
                why = f"YAML does not read {file!r:.60} as a file name; put it in quotes if it is one"
                raise self.fault(why, *place)
        return tuple(files)

    def _objectives(self, names: list[Any], *place: Any) -> tuple[str, ...]:
        """Names of config files; the name of a shipped objective becomes one for ``--config``: ``objectives/kto``."""
        shipped = objectives()
        try:
            for name in (name for name in self._files(names, *place) if name in shipped):
                config_file(name, shipped, OBJECTIVE)  # refuses a name that is a file too
        except PresetError as error:
            raise self.fault(str(error), *place) from error
        return tuple(f"objectives/{name}" if name in shipped else name for name in names)

    def _seeds(self) -> tuple[int, ...]:
        return seeds_of(self.get("seeds", list, [0]), "seeds", self.fault, "seeds")

    def _tune(self, arms: list[Arm], seeds: tuple[int, ...], evaluate: Mapping[str, Any], primary: str) -> Tune | None:
        given = self.get("tune", dict, None)
        if given is None:
            for point in self.points.values():
                if TUNE in point.settings:
                    why = f"arm {point.name!r} has values to try, but the study has no tune, which names their option"
                    raise self.fault(why, *point.place, TUNE)
            return None
        option = given.get("option")
        fixed = {"options": {**self.get("options", dict, {}), **self.last_options}, "axes": self.get("axes", dict, {})}
        for key, some in fixed.items():
            if isinstance(option, str) and (same := next((each for each in some if same_option(each, option)), None)):
                raise self.fault(f"{option} is tuned, but {key} sets it too; remove one", key, same)
        tune = read_tune(given, self.points, seeds, evaluate, primary, self.fault)
        for arm in arms:
            values = tune.values[arm.name]
            if len({arm.at(tune.option, value).folder for value in values}) < len(values):
                raise self.fault(f"two values to try of arm {arm.name!r} would share a folder; change one", "tune")
        return tune

    def _control(self) -> Control | None:
        given = self.get("control", dict, None)
        return None if given is None else read_control(given, self.fault)

    def _metrics(self, evaluate: Mapping[str, Any]) -> tuple[str, ...]:
        metrics = self.get("metrics", list, [])
        tasks = evaluate.get("tasks") or []
        if not isinstance(tasks, str) and not (isinstance(tasks, list) and all(isinstance(t, str) for t in tasks)):
            raise self.fault(f"tasks is {tasks!r}; it takes names of benchmarks", "evaluate", "tasks")
        benchmarks = task_names(tasks, evaluate.get("suite"))
        choices = f"choose from {', '.join((*METRICS, *benchmarks))}; benchmarks are named in evaluate.tasks"
        if not metrics:
            raise self.fault(f"no metrics; {choices}", "metrics")
        for i, metric in enumerate(metrics):
            if not isinstance(metric, str) or (metric not in METRICS and metric.partition("/")[0] not in benchmarks):
                raise self.fault(f"unknown metric {metric!r}; {choices}", "metrics", i)
            if metric in metrics[:i]:
                raise self.fault(f"metric {metric} is listed twice", "metrics")
            if metric not in METRICS:
                continue
            unit = METRICS[metric].unit
            needed = "prompts" if unit == "prompts" else "held_out"
            needed = metric if metric in CODE and "prompts" in evaluate else needed
            needed = "win_rate" if metric in BY_JUDGE else needed
            if not evaluate.get(needed):
                raise self.fault(f"metric {metric} is measured on {unit}, but evaluate has no {needed}", "metrics", i)
        return tuple(metrics)

    def _primary(self, metrics: tuple[str, ...]) -> str:
        primary: str = self.get("primary", str, metrics[0])
        if primary not in metrics:
            raise self.fault(f"primary {primary!r} is not among the metrics {', '.join(metrics)}", "primary")
        if self.overrides is not None and {"metrics", "primary"} & set(self.replaced):
            for key in ("equivalence", "power"):
                if key in self.content and key not in self.replaced:
                    why = f"{key} belongs to the primary metric, which {self.overrides} may replace; set it there too"
                    raise self.fault(why, key)
        return primary

    def _number(self, value: Any, name: str, *place: str, above: float | None = None) -> float:
        """A finite number, at least 0 or above a bound."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not (value >= 0 if above is None else value > above):
            bound = "at least 0" if above is None else f"above {above:g}"
            raise self.fault(f"{name} is {value!r}; it must be a number, {bound}", *place)
        return float(value)

    def _equivalence(self, primary: str) -> float | None:
        value = self.content.get("equivalence")
        if value is None:
            return None
        return self._size(value, "equivalence", primary, "equivalence")

    def _power(self, primary: str) -> dict[str, Any]:
        settings: dict[str, Any] = self.get("power", dict, None) or {}
        refuse_unknown(settings, "power", POWER, self.fault)
        effect = {}
        if "effect" in settings:
            effect = {"effect": self._size(settings["effect"], "power.effect", primary, "power", "effect")}
            settings = {key: value for key, value in settings.items() if key != "effect"}
        if "values" in settings:
            if len(settings) > 1 or not isinstance(settings["values"], str):
                why = "power takes values (path of an earlier study's values.csv.gz), or prompt_sd and run_sd"
                raise self.fault(why, "power", "values")
            return settings | effect
        if settings and not {"prompt_sd", "run_sd"} <= set(settings):
            raise self.fault(f"power has {', '.join(settings)}; it takes prompt_sd and run_sd together", "power")
        deviations = {key: self._number(value, f"power.{key}", "power", key) for key, value in settings.items()}
        for key, value in deviations.items() if is_share(primary) else ():
            if value > MOST[key]:
                why = f"power.{key} is {value:g}; {primary} is a share, so it is at most {MOST[key]:g}"
                raise self.fault(f"{why}: 12 points are 0.12", "power", key)
        if deviations and not any(deviations.values()):
            raise self.fault("power states that nothing varies; prompt_sd or run_sd must be above 0", "power")
        return deviations | effect

    def _size(self, value: Any, name: str, primary: str, *place: str) -> float:
        """A difference in the primary metric: a factor for metrics in RATIOS."""
        size = self._number(value, name, *place, above=1 if primary in RATIOS else 0)
        if is_share(primary) and size >= 1:
            raise self.fault(f"{name} is {value!r}; {primary} is a share, so it must be below 1", *place)
        return size
