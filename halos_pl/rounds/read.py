"""Reads a file for ``halos rounds``; every fault names its line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halos_pl.common.experiments import PresetError, config_file, hint, presets, shipped_paths
from halos_pl.common.misplaced import misplaced, read_config
from halos_pl.common.yaml_files import YAMLFileError
from halos_pl.evaluation.evaluate import ARGUMENTS
from halos_pl.labelling.label import label
from halos_pl.rounds.spec import SAMPLED, Rounds, RoundsError
from halos_pl.sampling.sample import sample
from halos_pl.study.read import PER_RUN
from halos_pl.study.read_tune import LAST_SEED

REQUIRED = ("model", "prompts", "held_out_prompts", "rounds", "window", "label", "fit")
KEYS = (*REQUIRED, "sample", "reference", "optimizer", "seed", "evaluate", "answers", "offline", "note")
FIT = ("objective", "configs", "options")
_HERE = "halos rounds sets it"
#: Options that are set for each stage, and why a file cannot set them.
SET = {
    "sample": {"engine": "the policy is sampled in this process", "endpoint": "the policy is sampled in this process"}
    | dict.fromkeys(("prompts", "out", "seed", "overwrite", "one_per_row", "ckpt_path", "skip_failed"), _HERE),
    "label": dict.fromkeys(("file", "out", "keep_empty", "overwrite"), _HERE),
    "evaluate": {"rule": "name the rule in label.by", "reference": "answers are compared with the first model's"}
    | dict.fromkeys(("prompts", "prompt_column", "ckpt_path", "held_out"), _HERE),
    "options": PER_RUN
    | {
        "model.policy.path": "name the model in model",
        "data.train": "each round trains on its own labels",
        "config": "name files in configs",
    },
}


def load_rounds(path: str | Path) -> Rounds:
    """The content of a file, or of a shipped one such as ``online/kto``.

    Raises:
        RoundsError: Names the line at fault.
    """
    try:
        file = config_file(str(path), presets(), "the file of rounds") if str(path) in presets() else Path(path)
        content, lines = read_config(file)
    except (PresetError, YAMLFileError) as error:
        raise RoundsError(str(error)) from error
    except OSError as error:
        if Path(path).is_dir():
            raise RoundsError(f"{misplaced(path)}; halos rounds takes a YAML file") from error
        raise RoundsError(f"{path} cannot be read: {error.strerror or error}{hint(path, presets())}") from error
    places = {".".join(key): f"{file}:{line}" for key, line in lines.items()}
    return _Reader(file, shipped_paths(content), places).rounds()


class _Reader:
    def __init__(self, path: Path, content: Mapping[str, Any], places: Mapping[str, str]) -> None:
        self.path, self.content, self.places = path, content, places

    def fault(self, message: str, *keys: str) -> RoundsError:
        return RoundsError(f"{self.places.get('.'.join(keys), f'{self.path}:1')}: {message}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.content.get(key, default)
        if value is not default and not isinstance(value, kind):
            names: dict[Any, str] = {dict: "a mapping", str: "a text"}
            raise self.fault(f"{key} is {value!r}; it must be {names[kind]}", key)
        return value

    def whole(self, key: str, least: int, most: int | None = None, default: int | None = None) -> int:
        value = self.content.get(key, default)
        if type(value) is not int or value < least or (most is not None and value > most):
            bound = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise self.fault(f"{key} is {value!r}; it must be a whole number {bound}", key)
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str | None) -> Any:
        value = self.content.get(key, default)
        if value is not default and value not in choices:
            raise self.fault(f"{key} is {value!r}; it must be {' or '.join(choices)}", key)
        return value

    def rounds(self) -> Rounds:
        for key in self.content:
            if key not in KEYS:
                raise self.fault(f"unknown key {key!r}; the file takes {', '.join(KEYS)}", str(key))
        if missing := [key for key in REQUIRED if key not in self.content]:
            raise self.fault(f"the key {missing[0]} is missing")
        number = self.whole("rounds", 1)
        fit = self._fit()
        return Rounds(
            path=self.path,
            model=self.get("model", str),
            prompts=Path(self.get("prompts", str)),
            held_out_prompts=Path(self.get("held_out_prompts", str)),
            rounds=number,
            window=self.whole("window", 1),
            seed=self.whole("seed", 0, LAST_SEED - number, default=0),
            sample=self._options("sample", sample),
            label=self._label(),
            objective=fit["objective"],
            configs=tuple(fit.get("configs") or ()),
            options=fit.get("options") or {},
            reference=self.choice("reference", ("first", "last"), None),
            optimizer=self.choice("optimizer", ("carried", "fresh"), "carried"),
            evaluate=self._options("evaluate", {name: None for name in ARGUMENTS}),
            answers=self.whole("answers", 1, default=1),
            offline=self._offline(),
            note=self.get("note", str, ""),
            places=self.places,
        )

    def _options(self, key: str, takes: Callable[..., Any] | Mapping[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = self.get(key, dict, {})
        names = list(takes if isinstance(takes, Mapping) else list(inspect.signature(takes).parameters)[1:])
        for name in options:
            if name in SET[key]:
                raise self.fault(f"{key}.{name} cannot be set: {SET[key][name]}", key, name)
            if name not in names:
                choices = ", ".join(each for each in names if each not in SET[key])
                raise self.fault(f"unknown key {name!r} of {key}; it takes {choices}", key, str(name))
        return options

    def _label(self) -> dict[str, Any]:
        options = self._options("label", label)
        by = options.get("by")
        labellers = by if isinstance(by, list) else [by]
        if not labellers or not all(isinstance(each, str) and each for each in labellers):
            kinds = "'rule: path/to/file.py:function', 'reward: FOLDER', 'judge: NAME' or a list of these"
            why = f"label.by is {by!r}; it must be {kinds}"
            raise self.fault(why, "label", "by")
        for i, each in enumerate(labellers):  # experiments/... below a kind
            kind, colon, name = each.partition(":")
            labellers[i] = f"{kind}{colon} {shipped_paths(name.strip())}" if colon else each
        return options | {"by": labellers if isinstance(by, list) else labellers[0]}

    def _fit(self) -> dict[str, Any]:
        fit: dict[str, Any] = self.get("fit", dict)
        for key in fit:
            if key not in FIT:
                raise self.fault(f"unknown key {key!r} of fit; it takes {', '.join(FIT)}", "fit", str(key))
        if not isinstance(fit.get("objective"), str):
            raise self.fault("fit.objective is missing; name an objective, such as dpo", "fit", "objective")
        configs, options = fit.get("configs") or [], fit.get("options") or {}
        if not isinstance(configs, list) or not all(isinstance(each, str) for each in configs):
            raise self.fault(f"fit.configs is {configs!r}; it must be a list of files", "fit", "configs")
        if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
            raise self.fault(f"fit.options is {options!r}; it must be a mapping", "fit", "options")
        for key in options:
            if key in SET["options"]:
                raise self.fault(f"{key} cannot be set: {SET['options'][key]}", "fit", "options", key)
        return fit

    def _offline(self) -> str | None:
        offline: str | None = self.get("offline", str, None)
        if offline not in (None, SAMPLED) and not Path(str(offline)).is_file():
            raise self.fault(f"offline is {offline!r}; it must be {SAMPLED} or a file of feedback", "offline")
        return offline
