"""Targets of a check: an object, a class, the path of a class in a file or module, or an objective's YAML file.

The code of the target is executed.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from halos_pl.batch import Needs
from halos_pl.common.experiments import hint, objectives
from halos_pl.common.messages import cause
from halos_pl.common.misplaced import misplaced
from halos_pl.common.parser_errors import cause_in
from halos_pl.objective.build import KINDS as PLUG_INS
from halos_pl.objective.build import load_objective, module_of_file
from halos_pl.objective.feedback import Feedback
from halos_pl.objective.halo import Objective
from halos_pl.objective.policy_weights import PolicyWeight
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import Reward
from value_functions import ValueFunction

Target = Objective | ValueFunction | ReferencePoint | Reward | Feedback
#: What can be checked by itself: all plug-ins but policy weights.
KINDS = (Objective, ValueFunction, ReferencePoint, Reward, Feedback)


ACCEPTED = "give an objective's YAML file, path/to/file.py:Class, a dotted class, or the bare name of a plug-in"


class TargetError(ValueError):
    """The target cannot be checked; the message says why in one line."""


class UncheckableError(TargetError):
    """The code of the target gives no answer: it takes too long or too much memory, or ends its process."""


def one_line(error: BaseException) -> str:
    """An exception from foreign code as ``Class: message``, in at most 300 characters."""
    text = f"{type(error).__name__}: {cause_in(error) or cause(str(error))}"
    return " ".join(text.split())[:300].removesuffix(":")


def _imported() -> list[type]:
    """All imported plug-ins."""
    classes, todo = [], [*PLUG_INS]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if not inspect.isabstract(cls):
            classes.append(cls)
    return classes


def _plug_in_named(name: str) -> type | None:
    """The imported plug-in with this bare name, preferably from the library; else None."""
    candidates = [cls for cls in _imported() if cls.__name__ == name]
    return min(candidates, key=lambda c: not c.__module__.startswith(("halos_pl", "value_functions")), default=None)


def _classes_of(home: Any) -> list[str]:
    """Names of the plug-ins that a module or class defines."""
    named = ((name, part) for name, part in vars(home).items() if inspect.isclass(part) and issubclass(part, KINDS))
    inside = getattr(home, "__name__", None)
    return [name for name, part in named if part.__module__ in (inside, getattr(home, "__module__", inside))]


def _like(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, set(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _from_file(path: Path, name: str) -> Any:
    if not path.is_file():
        raise TargetError(f"{path}: no such file")
    try:
        place: Any = module_of_file(path, "target")
    except (Exception, SystemExit) as error:
        raise TargetError(f"{path} does not import: {one_line(error)}") from error
    for part in filter(None, name.split(".")):  # Outer.Inner as well
        if not hasattr(place, part):
            raise TargetError(f"{path} has no {name!r}{_like(part, _classes_of(place))}")
        place = getattr(place, part)
    return place


def _from_module(path: str) -> Any:
    if path.endswith(".py"):
        names = _classes_of(_from_file(Path(path), ""))
        listed = f"; it has {', '.join(names)}" if names else ""
        raise TargetError(f"{path}: name a class in it, as in {path}:{names[0] if names else 'Class'}{listed}")
    module, _, name = path.rpartition(".")
    if not module:
        cls = _plug_in_named(name)
        if cls is None:
            like = _like(name, (plug_in.__name__ for plug_in in _imported()))
            raise TargetError(f"{path!r} is not a known plug-in{like}; {ACCEPTED}")
        return cls
    try:
        home = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise TargetError(f"{module} does not import: {one_line(error)}") from error
    if not hasattr(home, name):
        raise TargetError(f"{module} has no {name!r}{_like(name, _classes_of(home))}")
    return getattr(home, name)


def _instance(cls: type, arguments: dict[str, Any], what: str) -> Any:
    """An instance of ``cls`` from plain data, with plug-ins among its arguments instantiated."""
    try:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "it", fail_untyped=False)
        return parser.instantiate(parser.parse_object({"it": arguments})).as_dict()["it"]
    except (Exception, SystemExit) as error:
        if unknown := [name for name in arguments if f"does not accept option '{name}'" in str(error)]:
            like = _like(unknown[0], inspect.signature(cls).parameters)
            raise TargetError(f"{what}: {cls.__name__} has no argument {unknown[0]!r}{like}") from error
        raise TargetError(f"{what}: {one_line(error).replace('ArgumentError: it.', '')}") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name is given twice."""
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise ValueError(f"it gives {name!r} {times} times")
    return dict(pairs)


def objective_of(path: str | Path) -> Target:
    """The objective of a YAML file, built from its plug-ins alone: no policy, no data.

    Raises:
        TargetError: the file cannot be read, or does not describe an objective.
    """
    try:
        return load_objective(path)
    except OSError as error:
        raise TargetError(f"{path}: {error.strerror or error}{hint(path, objectives())}") from error
    except (ValueError, yaml.YAMLError, SystemExit) as error:
        message = " ".join(str(error).split())  # most messages already name the file
        raise TargetError(message if str(path) in message else f"{path}: {message}") from error


def load_target(target: str | os.PathLike[str], init_args: str | None = None) -> Target:
    """The object that ``halos check TARGET`` and ``check_halo(TARGET)`` check.

    Args:
        target: an objective's YAML file, ``path/to/file.py:Class``, a dotted class, or the bare name of a plug-in.
        init_args: the class's arguments as JSON; plug-ins among them as {"class_path": ..., "init_args": ...}.

    Raises:
        TargetError: there is nothing to check; the message is one line.
    """
    target = os.fspath(target)
    if target.endswith((".yaml", ".yml")):
        if init_args is not None:
            raise TargetError("--init_args is for classes; a YAML file states its own arguments")
        return objective_of(target)
    if (what := misplaced(target)) and not target.endswith(".py"):
        raise TargetError(f"{what}; {ACCEPTED}")
    path, colon, name = target.rpartition(":")
    target_object = _from_file(Path(path), name) if colon else _from_module(target)
    arguments: Any = {}
    if init_args is not None:
        try:
            arguments = json.loads(init_args, object_pairs_hook=_once_each)
        except ValueError as error:
            raise TargetError(f"--init_args is not a JSON object: {error}") from error
        if not isinstance(arguments, dict) or not inspect.isclass(target_object):
            raise TargetError('--init_args takes a class\'s arguments as an object, such as {"beta": 0.1}')
    if inspect.isclass(target_object) and issubclass(target_object, KINDS) and not inspect.isabstract(target_object):
        missing = [name for name in required_arguments(target_object) if name not in arguments]
        if missing:
            raise TargetError(f"{target} lacks required arguments: {', '.join(missing)}; see --init_args")
        if arguments:
            instance: Target = _instance(target_object, arguments, f"{target} with {init_args}")
            return instance
    try:
        return as_target(target_object)
    except (Exception, SystemExit) as error:
        raise TargetError(f"{target}: {' '.join(str(error).split())[:300]}") from error


def as_target(target: object) -> Target:
    """The target itself, an instance of a class without required arguments, or the target of a name or path.

    Raises:
        TargetError: the name or path leads to nothing that can be checked.
        TypeError: the target has the wrong type; the message is one line.
    """
    kinds = ", ".join(kind.__name__ for kind in KINDS)
    if isinstance(target, str | os.PathLike):
        return load_target(target)
    cls = target if inspect.isclass(target) else type(target)
    if issubclass(cls, PolicyWeight):
        raise TypeError(
            f"{cls.__name__} is a policy weight, which is checked with the HALO that it weights: name an objective's"
            f" YAML file, or pass PolicyWeighted(halo=..., policy_weight={cls.__name__}())"
        )
    if inspect.isclass(target):
        if not issubclass(target, KINDS):
            raise TypeError(f"{target.__name__} is not a class of {kinds}")
        if inspect.isabstract(target):
            lacks = ", ".join(sorted(target.__abstractmethods__))
            raise TypeError(f"{target.__name__} is abstract: it lacks {lacks}")
        missing = required_arguments(target)
        if missing:
            raise TypeError(f"{target.__name__} lacks required arguments: {', '.join(missing)}")
        return target()
    if not isinstance(target, KINDS):
        raise TypeError(
            f"{type(target).__name__} object is not an instance of {kinds}, nor the name of one: {ACCEPTED}"
        )
    return target


def refuse_wrong_needs(target: Target) -> None:
    """Raises a TargetError if ``needs`` of the target, or of a part of it, is no ``Needs``."""
    for part in target.modules():
        try:
            needs = getattr(part, "needs", None) if isinstance(part, KINDS) else None
        except Exception:  # an objective's follow from its parts, which are in turn here
            continue
        if needs is not None and not isinstance(needs, Needs):
            raise TargetError(
                f"{type(part).__name__}.needs is a {type(needs).__name__}; it must be Needs(...), such as"
                " Needs(reference=True)"
            )


def required_arguments(cls: type) -> list[str]:
    """Names of the constructor's arguments that have no default."""
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in free]
