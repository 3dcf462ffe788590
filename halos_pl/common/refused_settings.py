"""Names the key in the config of a setting that a class refuses, or that no class can use."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse import Namespace, add_instantiator

from halos_pl.common.type_words import imported, plain_data


class Refused(BaseException):
    """A constructor has failed; not an ``Exception``, or jsonargparse would try the other alternatives of the type.

    Args:
        cls: the class.
        error: the error of its constructor.
    """

    def __init__(self, cls: type, error: Exception) -> None:
        super().__init__(str(error))
        self.cls, self.error = cls, error


_NAMING: ContextVar[bool] = ContextVar("naming", default=False)


def _make(class_type: type, *args: Any, **kwargs: Any) -> Any:
    try:
        return class_type(*args, **kwargs)
    except Exception as error:
        if _NAMING.get():
            raise Refused(class_type, error) from error
        raise


add_instantiator(_make, object)


@contextmanager
def naming_keys(config: Any, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Adds the key of ``config`` that names a class to the error with which the class refuses its settings.

    Args:
        config: the config whose classes are instantiated inside the context.
        errors: errors by which classes refuse settings; any other is a bug in the class and keeps its traceback.

    Raises:
        ValueError: in one line.
    """
    token = _NAMING.set(True)
    try:
        yield
    except Refused as refused:
        if not isinstance(refused.error, errors):
            raise refused.error from None
        keys = [key for key, path in _classes(plain_data(config)) if imported(path) is refused.cls]
        name, reason = refused.cls.__name__, " ".join(str(refused.error).split())
        named = name in reason or re.match(r"\w+\.\w", reason)
        parts = [*keys[:1], *([] if named else [name]), reason]
        raise ValueError(": ".join(parts)) from refused.error
    finally:
        _NAMING.reset(token)


def _classes(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Key and path of each class in a config."""
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield key, value["class_path"].strip()
        for name, part in value.items():
            yield from _classes(part, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _classes(part, f"{key}[{i}]")


def check_nulls(kind: Any, settings: Mapping[str, Any], where: str) -> None:
    """Refuses null for settings that cannot be null; the parser accepts it, and the class would fail later.

    Args:
        kind: the class or function.
        settings: its parsed settings; those of nested classes are checked too.
        where: key of the settings.

    Raises:
        ValueError: names the key.
    """
    try:
        hints = get_type_hints(kind.__init__ if inspect.isclass(kind) else kind)
        parameters = inspect.signature(kind).parameters
    except (AttributeError, NameError, TypeError, ValueError):  # it does not declare its settings
        return
    for name, value in settings.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Mapping | Namespace) and isinstance(part.get("class_path"), str):
                check_nulls(
                    imported(part["class_path"]), settings_of(part.get("init_args")), f"{where}.{name}.init_args"
                )
        hint = hints.get(name, Any)
        group = next((each for each in (hint, *get_args(hint)) if is_dataclass(each)), None)
        if group is not None and isinstance(value, Mapping | Namespace) and "class_path" not in value:
            check_nulls(group, settings_of(value), f"{where}.{name}")
        optional = hint is Any or isinstance(hint, TypeVar) or type(None) in get_args(hint)
        if value is None and not optional and name in parameters and parameters[name].default is not None:
            raise ValueError(f"{where}.{name} is null; set it to a value, or leave it out")


def check_numbers(setting: Any, where: str) -> None:
    """Refuses numbers that are not finite: the loss would be NaN, and its rows would be blamed.

    Args:
        setting: parsed value, or nested settings.
        where: key of the setting.

    Raises:
        ValueError: names the key.
    """
    if isinstance(setting, float) and not math.isfinite(setting):
        raise ValueError(f"{where} is {setting}; it must be finite")
    if isinstance(setting, list | tuple):
        for i, each in enumerate(setting):
            check_numbers(each, f"{where}[{i}]")
    if isinstance(setting, Mapping | Namespace):
        bounds = str(setting.get("class_path")).endswith(".Clipped")  # its bounds may be infinite
        for name, value in settings_of(setting).items():
            if not bounds or name != "init_args":
                check_numbers(value, f"{where}.{name}")
            elif (inner := settings_of(value).get("value_function")) is not None:
                check_numbers(inner, f"{where}.{name}.value_function")


def settings_of(parsed: Any) -> Mapping[str, Any]:
    """Parsed settings as a mapping."""
    return vars(parsed) if isinstance(parsed, Namespace) else parsed or {}
