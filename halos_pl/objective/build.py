"""Builds an objective from plug-ins, or from the YAML file that names them."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

import halos_pl.objective
from halos_pl.common.config_keys import KEYS, check_groups
from halos_pl.common.experiments import config_file, is_shipped, objectives
from halos_pl.common.messages import cause
from halos_pl.common.own_plugins import import_all, import_own
from halos_pl.common.parser_errors import cause_in
from halos_pl.common.refused_settings import check_nulls, check_numbers, naming_keys, settings_of
from halos_pl.common.renamed import new_value, renamed
from halos_pl.common.type_words import near, shown
from halos_pl.common.yaml_files import Lines, read_yaml
from halos_pl.objective.composite import Sum
from halos_pl.objective.feedback import Feedback
from halos_pl.objective.halo import HALO, Objective
from halos_pl.objective.policy_weights import PolicyWeight
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import Reward
from value_functions import ValueFunction

import_all(halos_pl.objective)

#: The base class of each kind of plug-in, by the argument that takes it. Plug-ins in this package and in the working
#: folder are available by their bare names.
PARTS: dict[str, type] = {
    "value_function": ValueFunction,
    "reference_point": ReferencePoint,
    "reward": Reward,
    "feedback": Feedback,
    "extra_terms": Objective,
}
#: All kinds of plug-ins in an objective.
KINDS: tuple[type, ...] = (*PARTS.values(), PolicyWeight)


def module_of_file(path: Path, prefix: str) -> ModuleType:
    """Executes a user's file as a module, which may import the files beside it.

    Args:
        path: path of the file.
        prefix: prefix of the module's name, so that it hides no library.

    Raises:
        ImportError: it is not a Python file.
        Exception: any error that its code raises.
    """
    spec = importlib.util.spec_from_file_location(f"{prefix}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that these files hide no library
    spec.loader.exec_module(module)
    return module


def build_objective(
    *,
    reward: Reward | None = None,
    reference_point: ReferencePoint | None = None,
    value_function: ValueFunction | None = None,
    feedback: Feedback | None = None,
    reflect_undesirable: bool | None = None,
    loss_offset: float = 0.0,
    extra_terms: list[Objective] | None = None,
) -> Objective:
    """Builds an objective from plug-ins: a HALO, its sum with extra terms, or the extra terms alone.

    Raises:
        ValueError: some, but not all, parts of a HALO are set; or nothing is.
        TypeError: a part is not an instance of its kind.
    """
    parts = {
        "reward": reward,
        "reference_point": reference_point,
        "value_function": value_function,
        "feedback": feedback,
        "reflect_undesirable": reflect_undesirable,
    }
    if not isinstance(extra_terms, list | tuple | None):
        raise TypeError(f"extra_terms is a {type(extra_terms).__name__}; it must be a list of objectives")
    terms = list(extra_terms or [])
    for name, part in [*parts.items(), *(("extra_terms", term) for term in terms)]:
        if name in PARTS and part is not None and not isinstance(part, PARTS[name]):
            actual = f"the class {part.__name__}" if inspect.isclass(part) else f"a {type(part).__name__}"
            raise TypeError(f"{name} is {actual}; it must be an instance of {PARTS[name].__name__}")
    missing = [name for name, part in parts.items() if part is None]
    if not missing:
        halo = HALO(**parts, loss_offset=loss_offset)  # type: ignore[arg-type]
        terms.insert(0, halo)
    elif len(missing) < len(parts):
        raise ValueError(
            f"the objective lacks {', '.join(missing)}; a HALO needs reward, reference_point, value_function,"
            " feedback and reflect_undesirable (true or false)"
        )
    elif loss_offset:
        raise ValueError(
            f"loss_offset is {loss_offset:g}, but the objective has no HALO that it could belong to; leave it out"
        )
    if not terms:
        raise ValueError(
            "no objective: choose one with --objective NAME (halos objectives lists them), or set model.reward,"
            " model.reference_point, model.value_function, model.feedback and model.reflect_undesirable"
        )
    return terms[0] if len(terms) == 1 else Sum(terms)


#: Keys of a file's ``model`` section that make its objective.
OF_THE_OBJECTIVE = inspect.signature(build_objective).parameters.keys()
#: Its other keys: the other settings of ``HALOModule``.
NOT_OF_THE_OBJECTIVE = (
    "policy",
    "reference_model",
    "micro_batch_rows",
    "prefix_sharing",
    "reference_store",
    "optimizer",
    "lr_schedule",
    "warmup_ratio",
    "master_weights",
)


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(build_objective, as_group=False)
    return parser


def load_objective(path: str | Path, changes: Mapping[str, Any] | None = None) -> Objective:
    """The objective in a YAML file. Loads neither a model nor data.

    Policy, reference model and optimizer in its ``model`` section, and the values in other sections, are ignored.

    Args:
        path: path of the file, or name of a shipped objective such as ``kto``.
        changes: values that replace those of the file's ``model`` section, by dotted key such as
            ``value_function.init_args.beta``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name is unknown or ambiguous, or the file is not a valid objective; names the fault.
    """
    if Path(path).suffix not in (".yaml", ".yml"):
        path = config_file(str(path), objectives(), "objective")
    content, lines = read_yaml(path)
    check_groups(path, content, lines)
    if not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} is not an objective file: it has no model section that names plug-ins")
    _check_keys(path, content, lines)
    parts: dict[str, Any] = {name: value for name, value in content["model"].items() if name in OF_THE_OBJECTIVE}
    for key, value in (changes or {}).items():
        _change(parts, key, deepcopy(value))
    try:
        if not is_shipped(path):
            import_own(parts, KINDS)
        config = _parser().parse_object(parts)
        check_nulls(build_objective, settings_of(config), "model")
        check_numbers(config, "model")
        with naming_keys({"model": config}, (ValueError, TypeError)):
            return build_objective(**_parser().instantiate(config))
    except ArgumentError as error:
        raise ValueError(f"{path}: {cause_in(error) or cause(str(error))}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _change(parts: dict[str, Any], key: str, value: Any) -> None:
    """Replaces a value by its dotted key.

    Raises:
        ValueError: the objective has no such setting.
    """
    *outer, last = key.split(".")
    if (first := key.partition(".")[0]) not in OF_THE_OBJECTIVE:
        raise ValueError(f"an objective has no setting {key}{_meant(first, OF_THE_OBJECTIVE)}")
    for name in outer:
        if not isinstance(parts.get(name), dict):
            raise ValueError(f"{key} cannot be changed: the objective's file has no mapping {name}")
        inner = dict(parts[name])
        parts[name], parts = inner, inner
    parts[last] = value


def _check_keys(path: str | Path, content: dict[str, Any], lines: Lines) -> None:
    """Refuses keys that no command takes, and dotted keys of the objective, whose effect depends on their place.

    Raises:
        ValueError: names file, line and key.
    """
    known = (*OF_THE_OBJECTIVE, *NOT_OF_THE_OBJECTIVE)
    places: list[tuple[str, ...]] = [(_written(key),) for key in content]
    places += [("model", _written(key)) for key in content["model"]]
    for place in places:
        written = ".".join(place)
        section, _, setting = written.partition(".")
        name, dot, _ = setting.partition(".")
        file = f"{path}:{lines[place]}" if place in lines else path
        if section not in KEYS:
            where = f"; {section} belongs below model" if section in known else _meant(section, KEYS)
            raise ValueError(f"{file}: a config has no key {written}{where}")
        if section != "model" or not setting:
            continue
        if new := renamed(setting, known):
            raise ValueError(f"{file}: {written} is now model.{new}{_was(new, content['model'].get(setting))}")
        if name not in known:
            raise ValueError(f"{file}: model has no setting {setting}{_meant(setting, known)}")
        if name in OF_THE_OBJECTIVE and (dot or len(place) == 1):
            raise ValueError(f"{file}: {place[-1]} is a dotted key; nest it, with a line for each of its names")


def _written(key: Any) -> str:
    """A key as in the file: not only texts can be one."""
    return key if isinstance(key, str) else shown(key)


def _meant(key: str, names: Iterable[str]) -> str:
    return f"; did you mean {guess}?" if (guess := near(key, names)) else ""


def _was(name: str, value: object) -> str:
    return f": {value} is {new}" if (new := new_value(name, value)) else ""
