"""From plug-ins, or from the file that names them, to an objective."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

import halos_pl.objective
from halos_pl.common.experiments import config_file, is_shipped, objectives
from halos_pl.common.messages import cause
from halos_pl.common.own_plugins import import_all, import_own
from halos_pl.common.parser_errors import cause_in
from halos_pl.common.renamed import new_value, renamed
from halos_pl.common.yaml_files import read_yaml
from halos_pl.objective.feedback import Feedback
from halos_pl.objective.halo import HALO, Objective, Sum
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import Reward
from value_functions import ValueFunction

import_all(halos_pl.objective)

#: The kinds of plug-ins of an objective, by the argument that takes them. Those in the files of this package and of the
#: working folder are found by their bare names.
PARTS: dict[str, type] = {
    "value_function": ValueFunction,
    "reference_point": ReferencePoint,
    "reward": Reward,
    "feedback": Feedback,
    "extra_terms": Objective,
}


def module_of_file(path: Path, prefix: str) -> ModuleType:
    """A file of the user's own, executed as a module that may import what lies beside it.

    Args:
        path: the file.
        prefix: put before its name, so that it hides no library's.

    Raises:
        ImportError: where it is no Python file.
        Exception: whatever its code raises.
    """
    spec = importlib.util.spec_from_file_location(f"{prefix}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: what lies there hides no library
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
    """One objective from the plug-ins: a HALO, a sum with extra terms, or the extra terms alone.

    Raises:
        ValueError: where some, but not all, parts of a HALO are given, or nothing is.
        TypeError: for a part that is something else.
    """
    parts = {
        "reward": reward,
        "reference_point": reference_point,
        "value_function": value_function,
        "feedback": feedback,
        "reflect_undesirable": reflect_undesirable,
    }
    terms = list(extra_terms or [])
    for name, part in [*parts.items(), *(("extra_terms", term) for term in terms)]:
        if name in PARTS and part is not None and not isinstance(part, PARTS[name]):
            what = f"the class {part.__name__}" if inspect.isclass(part) else f"a {type(part).__name__}"
            raise TypeError(f"{name} is {what}; it takes an instance of a {PARTS[name].__name__}")
    missing = [name for name, part in parts.items() if part is None]
    if not missing:
        halo = HALO(**parts, loss_offset=loss_offset)  # type: ignore[arg-type]
        terms.insert(0, halo)
    elif len(missing) < len(parts):
        raise ValueError(
            f"the objective lacks {', '.join(missing)}: a HALO is a reward, a reference_point, a value_function, a"
            " feedback and reflect_undesirable (true or false)"
        )
    if not terms:
        raise ValueError(
            "no objective: choose one with --objective NAME (halos objectives lists them), or set model.reward,"
            " model.reference_point, model.value_function, model.feedback and model.reflect_undesirable"
        )
    return terms[0] if len(terms) == 1 else Sum(terms)


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(build_objective, as_group=False)
    return parser


def load_objective(path: str | Path) -> Objective:
    """The objective of a YAML file, built from its plug-ins alone: no model, no data.

    Policy, reference model and optimizer in its ``model:`` part are ignored.

    Args:
        path: the file, or the name of a shipped objective such as ``kto``.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a name that is unknown or ambiguous, or a file that is no objective; names what is wrong.
    """
    if Path(path).suffix not in (".yaml", ".yml"):
        path = config_file(str(path), objectives(), "objective")
    content, _ = read_yaml(path)
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{path}: no objective file; it has no model: part that names plug-ins")
    names = inspect.signature(build_objective).parameters
    parts: dict[str, Any] = {name: value for name, value in model.items() if name in names}
    for key, value in model.items():
        if new := renamed(key, names):
            raise ValueError(f"{path}: model.{key} is now model.{new}{_was(new, value)}")
    try:
        if not is_shipped(path):
            import_own(parts, PARTS.values())
        return build_objective(**_parser().instantiate(_parser().parse_object(parts)))
    except ArgumentError as error:
        raise ValueError(f"{path}: {cause_in(error) or cause(str(error))}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _was(name: str, value: object) -> str:
    return f": {value} is {new}" if (new := new_value(name, value)) else ""
