"""A study: which arms, which seeds, what is measured; and everything that can be found wrong with it beforehand."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import random
import re
import shlex
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import halos_pl
import value_functions
from halos_pl.common.experiments import hint, presets
from halos_pl.common.misplaced import misplaced, read_config
from halos_pl.common.yaml_files import Lines, YAMLFileError
from halos_pl.data.example import DataError
from halos_pl.data.prompt_files import read_prompt_rows
from halos_pl.data.prompts import TEXT_SETTINGS
from halos_pl.evaluation.evaluate import CODE, FILE, METRICS, RATIOS, SHARES, check_arguments, evaluate, measuring
from halos_pl.evaluation.judging import judged_by
from halos_pl.study.planned_power import assumed
from halos_pl.training.ending import epoch_steps, fit_steps, shortfall
from halos_pl.training.monitors import check_monitors

KEYS = (
    *("configs", "options", "arms", "axes", "sample", "seeds", "evaluate", "metrics", "primary", "equivalence"),
    *("power", "baseline", "cluster", "note"),
)
# All but where it is written, which is each run's own folder.
EVALUATE = tuple(
    name for name, p in inspect.signature(evaluate).parameters.items() if p.kind is p.KEYWORD_ONLY and name != "out"
)
OBJECTIVE = "objective"
# What a second file may say otherwise: at which scale, not what is asked.
OVER = tuple(key for key in KEYS if key not in ("arms", "axes", "sample", "baseline"))
#: What ``power`` takes: standard deviations, or the values of an earlier study.
POWER = ("prompt_sd", "run_sd", "sampling_sd", "values")
#: The largest standard deviations of a share: of differences between -1 and 1, and of means between 0 and 1.
MOST = {"prompt_sd": 1.0, "run_sd": 0.5, "sampling_sd": 1.0}
#: The largest seed that Lightning takes.
LAST_SEED = 2**32 - 1

#: Rows of every report that are no arm.
BEFORE, SHORTER = "before training", "fewer words wins"

# Options that a study sets itself, for each run; what they said would not be used.
OWN = {
    "run_dir": "each run has a folder of its own in that of --out",
    "seed_everything": "name the seeds in seeds",
    "config": "name files in configs, or in objective of an arm",
}


class StudyError(ValueError):
    """A study that cannot be run as it is; the message names file, line and what to do."""


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: for people, and with other characters replaced the name of its folder.
        configs: config files, in order; later ones win.
        options: dotted keys of ``halos fit`` with their values; they win over the files.
        line: where the study file names it.
    """

    name: str
    configs: tuple[str, ...]
    options: Mapping[str, Any] = field(hash=False)
    line: int

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.=-]+", "_", self.name).strip("._") or "arm"

    def words(self, run_dir: Path | str, seed: int) -> list[str]:
        """The command, to be put behind ``halos``."""
        words = ["fit", "--no_base", *(f"--config={path}" for path in self.configs)]
        for key, value in self.options.items():
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(f"--{key}={text}")
        return [*words, f"--seed_everything={seed}", f"--run_dir={run_dir}"]


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm, seed: which.
        folder: everything of it, as of any run of ``halos fit``.
    """

    arm: Arm
    seed: int
    folder: Path

    @property
    def fit(self) -> list[str]:
        return self.arm.words(self.folder, self.seed)

    @property
    def measured(self) -> bool:
        return (self.folder / FILE).is_file()

    @property
    def done(self) -> bool:
        """Whether it has taken its planned steps and was measured then."""
        return self.measured and shortfall(self.folder) is None


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        path: the file.
        arms: in order; the first is the baseline unless the file names another.
        seeds: of each arm.
        evaluate: arguments of ``halos evaluate``, but for the run.
        metrics: which of them the report compares, in order.
        primary: the metric that decisions are made on; the others are exploratory.
        equivalence: the largest difference in the primary metric that counts as none, a ratio for a metric of RATIOS;
            None where equivalence is not to be claimed.
        power: what the power is computed for: ``prompt_sd``, ``run_sd`` and perhaps ``sampling_sd``, or ``values``, the
            values.csv.gz of an earlier study; empty where nothing is known.
        baseline: name of the arm that the others are compared with.
        cluster: parameters of submitit, None for processes of this machine.
        note: what the study asks, for the report.
        over: the file that was laid over it.
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
    note: str = ""
    over: Path | None = None
    places: Mapping[str, str] = field(default_factory=dict)

    def runs(self, out: Path) -> list[Run]:
        """Every arm with every seed; seed by seed, so that a study that is cut off has whole rounds of arms."""
        return [Run(arm, seed, out / arm.folder / f"seed-{seed}") for seed in self.seeds for arm in self.arms]

    def evaluation(self, run: Run) -> list[str]:
        """The command that measures a run, to be put behind ``halos``."""
        words = ["evaluate", str(run.folder)]
        for key, value in self.evaluate.items():
            words.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
        return words


def command(words: list[str]) -> str:
    """What a person types to do the same."""
    return f"halos {shlex.join(words)}"


class _Reader:
    """Reads one study file; every fault names its line."""

    def __init__(self, path: Path, over: Path | None = None) -> None:
        self.path = path
        self.over = over
        self.content, self.lines = self._read(path)
        # The file that a key was read from, where it is another one.
        self.others: dict[str, tuple[Path, dict[tuple[str, ...], int]]] = {}
        self.last: dict[str, Any] = {}
        if over is not None:
            content, lines = self._read(over)
            self.others = {key: (over, lines) for key in content}
            for key in content:
                if key not in OVER:
                    raise self.fault(f"{key!r} cannot be laid over a study; it takes {', '.join(OVER)}", key)
            # Options win over those of arms, too: a batch size, say, that suits a small model only.
            self.last = content.pop("options", {})
            if not isinstance(self.last, dict):
                raise self.fault(f"options is {self.last!r}; it must be a mapping", "options")
            self.content = {**self.content, **content}

    @staticmethod
    def _read(path: Path) -> tuple[dict[str, Any], Lines]:
        """Content, and the line of each key."""
        try:
            return read_config(path)
        except OSError as error:
            if path.is_dir():
                raise StudyError(f"{misplaced(path)}; halos ablate takes the YAML file of a study") from error
            raise StudyError(f"{path} cannot be read: {error.strerror or error}{hint(path, presets())}") from error
        except YAMLFileError as error:
            raise StudyError(str(error)) from error

    @staticmethod
    def _line(lines: Mapping[tuple[str, ...], int], place: tuple[Any, ...]) -> int:
        """Of the innermost key of a place that has a line; one that was merged into a mapping has none of its own."""
        names = tuple(map(str, place))
        while names and names not in lines:
            names = names[:-1]
        return lines.get(names, 1)

    def where(self, *place: Any) -> str:
        """File and line of a place."""
        path, lines = self.others.get(str(place[0]), (self.path, self.lines)) if place else (self.path, self.lines)
        return f"{path}:{self._line(lines, place)}"

    def fault(self, message: str, *place: Any) -> StudyError:
        """An error at the innermost place that has a line."""
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
        configs = self._files(self.get("configs", list, []), "configs")
        options = self.get("options", dict, {})
        arms = [
            Arm(name, (*configs, *files), {**options, **own, **self.last}, self._line(self.lines, place))
            for name, files, own, place in self._crossed()
        ]
        if not arms:
            raise self.fault("no arm: the grid is empty; name arms, axes with values, or both", "axes")
        for key in {key for arm in arms for key in arm.options if key in OWN}:
            places = [("options", key), ("axes", key), *(("arms", arm.name, key) for arm in arms)]
            place = next((place for place in places if place in self.lines), ("options",))
            raise self.fault(f"{key} is not for a study to set: {OWN[key]}", *place)
        taken: dict[str, Arm] = {}
        for arm in arms:
            if arm.name == SHORTER or arm.name.startswith(BEFORE):
                raise StudyError(
                    f"{self.path}:{arm.line}: arm {arm.name!r} has the name of a baseline; give it another"
                )
            if arm.folder in taken:
                raise StudyError(
                    f"{self.path}:{arm.line}: the arms {taken[arm.folder].name!r} and {arm.name!r} would have the same"
                    f" folder, {arm.folder!r}; give one another name"
                )
            taken[arm.folder] = arm
        seeds = self.get("seeds", list, [0])
        if not seeds or any(not isinstance(seed, int) or isinstance(seed, bool) or seed < 0 for seed in seeds):
            raise self.fault(f"seeds is {seeds}; it takes a list of whole numbers from 0", "seeds")
        if max(seeds) > LAST_SEED:
            raise self.fault(f"seeds is {seeds}; a seed is at most {LAST_SEED}", "seeds")
        if len(set(seeds)) < len(seeds):
            raise self.fault(f"seeds is {seeds}: a seed is named twice", "seeds")
        measured = self.get("evaluate", dict, {})
        for key in measured:
            if key not in EVALUATE:
                raise self.fault(f"unknown key {key!r} of evaluate; it takes {', '.join(EVALUATE)}", "evaluate", key)
        baseline = self.get("baseline", str, arms[0].name)
        if baseline not in [arm.name for arm in arms]:
            raise self.fault(
                f"baseline {baseline!r} is no arm; the arms are {', '.join(a.name for a in arms)}", "baseline"
            )
        return Study(
            path=self.path,
            arms=tuple(arms),
            seeds=tuple(seeds),
            evaluate=measured,
            metrics=(metrics := self._metrics(measured)),
            primary=(primary := self._primary(metrics)),
            equivalence=self._equivalence(primary),
            power=self._power(primary),
            baseline=baseline,
            cluster=self.get("cluster", dict, None),
            note=self.get("note", str, ""),
            over=self.over,
            places={key: self.where(key) for key in ("evaluate", "metrics", "cluster", "power")}
            | {key: self.where("evaluate", key) for key in (*CODE, "prompts", "held_out")},
        )

    def _metrics(self, evaluate: Mapping[str, Any]) -> tuple[str, ...]:
        metrics = self.get("metrics", list, [])
        if not metrics:
            raise self.fault(f"no metrics; choose from {', '.join(METRICS)}", "metrics")
        for i, metric in enumerate(metrics):
            if not isinstance(metric, str) or metric not in METRICS:
                raise self.fault(f"unknown metric {metric!r}; choose from {', '.join(METRICS)}", "metrics", i)
            if metric in metrics[:i]:  # it would count twice in the correction
                raise self.fault(f"metric {metric} is named twice", "metrics")
            unit = METRICS[metric][0]
            lacks = "prompts" if unit == "prompts" else "held_out"
            lacks = metric if metric in ("rule", "judge") and "prompts" in evaluate else lacks
            if not evaluate.get(lacks):
                raise self.fault(f"metric {metric} is one of {unit}, but evaluate names no {lacks}", "metrics", i)
        return tuple(metrics)

    def _primary(self, metrics: tuple[str, ...]) -> str:
        primary: str = self.get("primary", str, metrics[0])
        if primary not in metrics:
            raise self.fault(f"primary {primary!r} is none of the metrics; they are {', '.join(metrics)}", "primary")
        if self.over is not None and {"metrics", "primary"} & set(self.others):
            for key in ("equivalence", "power"):
                if key in self.content and key not in self.others:
                    why = f"{key} is of the primary metric, which {self.over} may replace; name it there, or null"
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
        given = self.content.get("equivalence")
        if given is None:
            return None
        margin = self._number(given, "equivalence", "equivalence", above=1 if primary in RATIOS else 0)
        if primary in SHARES and margin >= 1:
            raise self.fault(f"equivalence is {given!r}; {primary} is a share, so it must be below 1", "equivalence")
        return margin

    def _power(self, primary: str) -> dict[str, Any]:
        given: dict[str, Any] = self.get("power", dict, None) or {}
        for key in given:
            if key not in POWER:
                raise self.fault(f"unknown key {key!r} of power; it takes {', '.join(POWER)}", "power", key)
        if "values" in given:
            if len(given) > 1 or not isinstance(given["values"], str):
                why = "power takes values, the path of an earlier study's values.csv.gz, alone, or prompt_sd and run_sd"
                raise self.fault(why, "power", "values")
            return given
        if given and not {"prompt_sd", "run_sd"} <= set(given):
            raise self.fault(f"power has {', '.join(given)}; it takes prompt_sd and run_sd together", "power")
        found = {key: self._number(value, f"power.{key}", "power", key) for key, value in given.items()}
        for key, value in found.items() if primary in SHARES else ():
            if value > MOST[key]:
                why = f"power.{key} is {value:g}; {primary} is a share, so it is at most {MOST[key]:g}"
                raise self.fault(f"{why}: 12 points are 0.12", "power", key)
        if found and not any(found.values()):
            raise self.fault("power says that nothing varies; prompt_sd or run_sd must be above 0", "power")
        return found

    def _files(self, given: list[Any], *place: Any) -> tuple[str, ...]:
        """Names of config files."""
        for file in given:
            if not isinstance(file, str):
                why = f"YAML does not read {file!r:.60} as a file name; put it in quotes if it is one"
                raise self.fault(why, *place)
        return tuple(given)

    def _split(self, given: Mapping[str, Any], place: tuple[Any, ...]) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Config files and options of an arm."""
        own = dict(given)
        files = own.pop(OBJECTIVE, None)
        files = files if isinstance(files, list) else [] if files is None else [files]
        return self._files(files, *place, OBJECTIVE), own

    def _crossed(self) -> list[tuple[str, tuple[str, ...], dict[str, Any], tuple[Any, ...]]]:
        """Arms times axes: (name, config files, options, place)."""
        named: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = []
        for name, own in self.get("arms", dict, {}).items():
            if own is not None and not isinstance(own, dict):
                raise self.fault(f"arm {name!r} is {own!r}; it takes objective: and dotted options", "arms", name)
            if not isinstance(name, str):
                raise self.fault(f"YAML reads the name of an arm as {name!r}; put it in quotes", "arms")
            if not name.isprintable():
                raise self.fault(f"the name of arm {name!r} has a character that cannot be shown; remove it", "arms")
            named.append((name, own or {}, ("arms", name)))
        axes = self.get("axes", dict, {})
        for key, values in axes.items():
            for name, own, _ in named:
                if key in own:  # the axis would win without a word
                    raise self.fault(f"{key} is an axis, and set by arm {name!r} as well", "arms", name, key)
            if not isinstance(values, list) or not values:
                raise self.fault(f"axis {key} has no values, so the grid is empty; give it a list", "axes", key)
        if axes:
            grid = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
            last = list(axes)[-1]
            many = [
                (" ".join(filter(None, (name, _label(point)))), {**own, **point}, place or ("axes", last))
                for name, own, place in (named or [("", {}, ())])
                for point in grid
            ]
        else:
            many = named
        sample = self.get("sample", dict, None)
        if sample is not None:
            whole = all(type(sample.get(key, 0)) is int for key in ("size", "seed"))
            if set(sample) - {"size", "seed"} or not whole or sample.get("size", 0) < 1:
                raise self.fault(f"sample is {sample}; it takes size, at least 1, and seed, whole numbers", "sample")
            if sample["size"] > len(many):
                raise self.fault(f"sample.size is {sample['size']}, but there are only {len(many)} arms", "sample")
            # The baseline, where one is named, is always among them.
            kept = [i for i, (name, *_) in enumerate(many) if name == self.content.get("baseline")]
            others = [i for i in range(len(many)) if i not in kept]
            drawn = random.Random(sample.get("seed", 0)).sample(others, sample["size"] - len(kept))
            many = [many[i] for i in sorted(kept + drawn)]
        return [(name, *self._split(own, place), place) for name, own, place in many]


def _label(point: Mapping[str, Any]) -> str:
    """A grid point in few words: the last part of each key, unless it is the objective."""

    def value(given: Any) -> str:
        text = given if isinstance(given, str) else json.dumps(given)
        return Path(text).stem if text.endswith(".yaml") else text

    parts = []
    for key, given in point.items():
        parts.append(value(given) if key == OBJECTIVE else f"{key.rpartition('.')[2]}={value(given)}")
    return " ".join(parts)


def load_study(path: str | Path, over: str | Path | None = None) -> Study:
    """The study of a file.

    Args:
        path: the file.
        over: another one, whose keys (of ``OVER``) replace those of the study, and whose options come last.

    Raises:
        StudyError: naming the line of what is wrong with it.
    """
    return _Reader(Path(path), None if over is None else Path(over)).study()


def default_folder(study: str | Path, over: str | Path | None) -> Path:
    """Where a study goes unless told otherwise: below runs/, by the names of its files."""
    return Path("runs") / "-".join(Path(path).stem for path in (study, over) if path)


@dataclass(frozen=True)
class Checked:
    """What trying out an arm has found.

    Attributes:
        steps: optimizer steps of one run.
        digest: of the resolved config, without seed and folder.
        examples: prompts that the primary metric will be measured on.
    """

    steps: int
    digest: str
    examples: int = 0


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """While entered, Lightning's log says nothing twice, as most arms have the same data and devices."""
    known: set[str] = set()

    def is_news(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return said not in known and not known.add(said)  # type: ignore[func-returns-value]

    handlers = [h for name in ("lightning.pytorch", "lightning.fabric") for h in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(is_news)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_news)


#: Where a run computes, with what any machine has.
PLACEMENT = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.strategy": "auto",
}


@_said_once()
def check(study: Study) -> dict[str, Checked]:
    """Parses each arm with the real command line, builds its module and reads its data; loads no model.

    Returns:
        what was found, by the arm's name.

    Raises:
        StudyError: for the first arm that is not valid, and for two that come to the same.
    """
    from halos_pl.cli.lightning_cli import USER_ERRORS, HalosCLI

    try:
        assumed(study)
    except ValueError as error:
        raise StudyError(f"{study.places['power']}: power: {error}") from error
    answered = _check_evaluation(study)
    found: dict[str, Checked] = {}
    known: dict[str, Arm] = {}
    first: Any = None
    for arm in study.arms:
        words = arm.words("unused", study.seeds[0])[1:]
        # A cluster's machines are not like this one; the digest is of what they are given all the same.
        placed = {} if study.cluster is None else {k: v for k, v in arm.options.items() if k in PLACEMENT}
        if study.cluster is not None:
            words += [f"--{key}={value}" for key, value in PLACEMENT.items()]
        said, place = io.StringIO(), f"{study.path}:{arm.line}: arm {arm.name!r}"
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                cli = HalosCLI(words, run=False)
                config = cli.config.clone()
                config.run_dir, config.seed_everything = "", 0
                config.trainer.default_root_dir = None
                steps = _steps(cli)
                data = [store.digest for store in cli.datamodule.stores("train")]
                dumped = cli.parser.dump(config, skip_none=False)
                code = _own_code(dumped)
                resolved = dumped + repr(data) + "".join(map(repr, filter(None, (placed, code))))
                digest = hashlib.sha256(resolved.encode()).hexdigest()
        except SystemExit as error:
            raise StudyError(f"{place}: {_parser_error(said.getvalue()) or error}") from error
        except USER_ERRORS as error:
            raise StudyError(f"{place}: {error}") from error
        except Exception as error:  # of Lightning, of another library, of a plug-in
            raise StudyError(f"{place}: {type(error).__name__}: {error}") from error
        if digest in known:
            raise StudyError(
                f"{study.path}:{arm.line}: arm {arm.name!r} comes to the same config as arm {known[digest].name!r}"
                f" (line {known[digest].line}); change one, or leave it out"
            )
        known[digest] = arm
        found[arm.name] = Checked(steps, digest)
        first = first or cli
    held_out = _check_held_out(study, first.model.tokenizer, first.datamodule)
    examples = answered if METRICS[study.primary][0] == "prompts" else held_out
    return {name: replace(each, examples=examples) for name, each in found.items()}


def _own_code(config: str) -> list[str]:
    """The SHA-256 of each file with a plug-in that a config names, but for those of installed packages and of ours.

    Those have a version or a revision, which a report names; a file of the user's own may change between two runs.
    """
    ours = {Path(halos_pl.__file__).parent, Path(value_functions.__file__).parent}
    installed = {Path(path) for path in {*sysconfig.get_paths().values()}}
    digests = set()
    for path in set(re.findall(r"class_path: (\S+)", config)):
        home = sys.modules.get(path.rpartition(".")[0])
        file = Path(getattr(home, "__file__", None) or "")
        if file.is_file() and not (ours | installed) & set(file.parents):
            digests.add(hashlib.sha256(file.read_bytes()).hexdigest())
    return sorted(digests)


def _parser_error(said: str) -> str:
    """What a parser has printed, without usage and hints."""
    words = said.partition("error: ")[2] or said
    lines = words.partition("\nAll options: ")[0].splitlines()
    return "\n".join(line for line in lines if line.strip())


def _parsed(study: Study) -> dict[str, Any]:
    """The arguments of ``evaluate`` as its command reads them.

    Raises:
        StudyError: where it does not take them.
    """
    from halos_pl.cli.commands import tool_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tool_parser("evaluate").parse_args(study.evaluation(Run(study.arms[0], 0, Path("unused")))[1:])
    except SystemExit as error:
        raise StudyError(f"{study.places['evaluate']}: evaluate: {_parser_error(said.getvalue())}") from error
    arguments: dict[str, Any] = parsed.as_dict()
    return {name: arguments[name] for name in EVALUATE}


def measuring_of(study: Study) -> dict[str, Any]:
    """How and on what the study's runs are measured, as each of them says it when it has been."""
    return measuring(_parsed(study))


def _check_evaluation(study: Study) -> int:
    """Tries out the command that measures a run: its arguments, the functions it calls, its prompts.

    Returns:
        the number of different prompts that are answered.
    """
    arguments = _parsed(study)
    try:
        check_arguments(**arguments)
    except DataError as error:
        raise StudyError(f"{study.places['evaluate']}: evaluate: {error}") from error
    for key in CODE:
        if arguments[key]:
            try:
                judged_by(arguments[key], key)
            except ValueError as error:
                raise StudyError(f"{study.places[key]}: {key}: {error}") from error
    if arguments["prompts"]:
        try:
            rows = read_prompt_rows(
                Path(arguments["prompts"]), arguments["text_prompts"] or "chat", arguments["prompt_column"]
            )
        except DataError as error:
            raise StudyError(f"{study.places['prompts']}: prompts: {error}") from error
        return len({json.dumps(row.prompt) for row in rows})  # one that is listed twice is one example
    return 0


def _steps(cli: Any) -> int:
    """Optimizer steps of a fit, after its data have been read and checked."""
    trainer, data = cli.trainer, cli.datamodule
    trainer.strategy._lightning_module = cli.model
    data.trainer = trainer
    trainer.state.fn = "fit"
    data.setup("fit")
    check_monitors(trainer, cli.model, data)
    return fit_steps(trainer, epoch_steps(trainer, data))


# Which rows a metric is made from.
_GOOD, _BAD = {1: "desirable"}, {0: "undesirable"}
WANTED = {"nll_desirable": _GOOD, "nll_undesirable": _BAD, "reward_auroc": _GOOD | _BAD}


def _check_held_out(study: Study, tokenizer: Any, data: Any) -> int:
    """Refuses held-out data with faults, read as ``data`` reads text, and a metric that they cannot give.

    Returns:
        the number of prompts that the primary metric is measured on.
    """
    from halos_pl.data.datamodule import _sources
    from halos_pl.data.store import fault_list, open_store
    from halos_pl.data.table import Table
    from halos_pl.data.transforms import ThresholdScores

    arguments = _parsed(study)
    given = arguments["held_out"]
    if not given:
        return 0
    text = {name: getattr(data, name) for name in TEXT_SETTINGS}
    text["text_prompts"] = arguments["text_prompts"] or data.text_prompts
    try:
        sources = _sources("predict", given)
        stores = [open_store(s, tokenizer, **text) for s in sources]
    except (DataError, OSError, ValueError) as error:
        raise StudyError(f"{study.places['evaluate']}: held_out: {error}") from error
    for store in stores:
        if store.fault_count:
            raise StudyError(f"{study.places['evaluate']}: held_out: {fault_list(store.causes, store.fault_count)}")
    table = Table.of(stores)
    if bool((table.label < 0).any()):  # scores: what they come to depends on the other rows of their prompts
        table, counts = ThresholdScores()(table, random.Random(0))
        if not len(table):
            raise StudyError(
                f"{study.places['held_out']}: held_out: no row is left with a label, as none scores above or below"
                f" others of its prompt ({counts['dropped_at_threshold']} were dropped)"
            )
    paired = table.pair >= 0
    if paired.any() and not paired.all():
        raise StudyError(
            f"{study.places['evaluate']}: held_out: pairs and single rows; a study measures one or the other"
        )
    for metric in study.metrics:
        if METRICS[metric][0] == "pairs" and not paired.any():
            raise StudyError(f"{study.places['metrics']}: {metric} is one of pairs, but the held-out data have none")
        labels = set(table.label.tolist())
        for label, kind in WANTED.get(metric, {}).items():
            if label not in labels:
                raise StudyError(f"{study.places['metrics']}: {metric} wants {kind} rows; the held-out data have none")
    wanted = list(WANTED.get(study.primary, {0: "", 1: ""}))
    return len(set(table.prompt[np.isin(table.label, wanted)].tolist()))
