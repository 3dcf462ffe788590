"""Why a value does not fit the type of its option, in one line.

jsonargparse lists the fault of a value under each alternative of a type. Here, type and value are walked together down
to the innermost part at fault; of several alternatives, the one that the value fits best counts.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentParser, _typehints

from halos_pl.common.renamed import lacks
from halos_pl.common.subclasses import every_subclass, subclasses
from halos_pl.common.type_words import (
    MAPPINGS,
    SEQUENCES,
    WORDS,
    alternatives,
    choices,
    class_of,
    in_words,
    is_factory,
    near,
    plain_data,
    shown,
)

_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")


@dataclass
class Misfit:
    """The fault of one value.

    Attributes:
        key: dotted key of the part at fault, starting with the option: ``a.init_args.b``, ``a[0]``.
        value: the part at fault.
        reason: the fault, if it is more than a wrong type.
        accepts: values that the option accepts, in words.
        near: the name that was probably meant.
        depth: how far type and value agree.
    """

    key: str
    value: Any
    reason: str = ""
    accepts: tuple[str, ...] = ()
    near: str = ""
    depth: float = 0.0

    def __str__(self) -> str:
        accepts = sorted(dict.fromkeys(self.accepts), key="null".__eq__)
        taken = ", ".join(accepts[:-1]) + (" or " if accepts[1:] else "") + "".join(accepts[-1:])
        # YAML does not read 123, 1e5, no and null as texts.
        quotes = WORDS[str] in accepts and not isinstance(self.value, str | list | dict) and not self.reason
        reason, guess = f": {self.reason}" if self.reason else "", f" (did you mean {self.near}?)" if self.near else ""
        parts = [
            f"{self.key} is {shown(self.value)}{reason}{guess}",
            f"it takes {taken}" if taken else "",
            "put it in quotes if it is a name" if quotes else "",
        ]
        return "; ".join(filter(None, parts))


def misfit(key: str, hint: Any, value: Any) -> Misfit | None:
    """The innermost part of ``value`` that does not fit ``hint``; None if all of it fits, or no fault is found.

    Args:
        key: name of the option.
        hint: type of the option.
        value: plain data, as read from YAML.
    """
    value = plain_data(value)
    if (error := _parser_error(hint, value)) is None:
        return None
    misfits = [part for one in alternatives(hint) if (part := _within(key, one, value))]
    best = max(misfits, key=lambda part: part.depth, default=Misfit(key, value))
    if best.depth >= 1:
        return best
    accepts = tuple(in_words(hint))
    guess = near(value, choices(hint)) if isinstance(value, str) else ""
    reason = best.reason or ("" if accepts else " ".join(str(error).split()))
    return Misfit(key, value, reason, accepts, best.near or guess)


def _parser_error(hint: Any, value: Any) -> Exception | None:
    """jsonargparse's error about ``value`` for an option of type ``hint``."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--it", type=hint)
    except Exception:  # a type that it does not check
        return None
    try:
        parser.parse_object({"it": value})
    except Exception as error:
        return error
    return None


def _within(key: str, hint: Any, value: Any) -> Misfit | None:
    """The fault inside a value that has the shape of this one alternative; None if it has another shape."""
    inner = get_args(hint)
    parts: list[tuple[str, Any, Any]] = []
    if get_origin(hint) in SEQUENCES and isinstance(value, list) and inner:
        if get_origin(hint) is tuple and inner[-1] is not ...:
            if len(value) != len(inner):
                return Misfit(key, value, accepts=(f"a list of {len(inner)}",), depth=1)
            parts = [(f"{key}[{i}]", *pair) for i, pair in enumerate(zip(inner, value, strict=True))]
        else:
            parts = [(f"{key}[{i}]", inner[0], one) for i, one in enumerate(value)]
    elif get_origin(hint) in MAPPINGS and isinstance(value, dict) and len(inner) == 2:
        parts = [(f"{key}.{name}", inner[1], one) for name, one in value.items()]
    elif base := class_of(hint):
        return _within_class(key, hint, base, value)
    first = next((part for where, kind, one in parts if (part := misfit(where, kind, one))), None)
    return dataclasses.replace(first, depth=first.depth + 1) if first else None


def _within_class(key: str, hint: Any, base: type, value: Any) -> Misfit | None:
    if isinstance(value, str):
        value = {"class_path": value}
    if not isinstance(value, dict):
        return None
    path, settings, inside = value.get("class_path"), value.get("init_args", {}), f"{key}.init_args"
    if other := [name for name in value if "class_path" in value and name not in _OF_A_CLASS]:
        return Misfit(f"{key}.{other[0]}", value[other[0]], f"it takes {', '.join(_OF_A_CLASS)}", depth=1)
    if path is None:  # the settings of the base itself
        if "init_args" in value and not dataclasses.is_dataclass(base):
            return Misfit(key, value, "it names no class_path", depth=1)
        if inspect.isabstract(base):
            return None
        cls, settings, inside = base, value.get("init_args", value), key
    elif not isinstance(path, str):
        return Misfit(f"{key}.class_path", path, accepts=("the name of a class",), depth=1)
    else:
        cls, reason, guess = _class_at(base, path)
        if reason:
            article = "an" if base.__name__[0] in "AEIOU" else "a"
            by_name = [f"{article} {base.__name__} by its name, or the dotted path of a class"]
            accepts = tuple(by_name if guess else in_words(hint))
            return Misfit(key, path, reason, accepts, guess, depth=1 if "." in path or guess else 0.5)
    if not inspect.isclass(cls):  # a function that returns the object
        return None
    if not isinstance(settings, dict):
        return Misfit(inside, settings, accepts=("a mapping",), depth=2)
    fault = _within_settings(inside, cls, settings, factory=is_factory(hint))
    return dataclasses.replace(fault, depth=fault.depth + 2) if fault else None


def classes_of(hint: Any) -> Iterator[type]:
    """The imported classes that a type accepts."""
    for part in alternatives(hint):
        if base := class_of(part):
            yield from subclasses(base)


def class_named(hint: Any, name: str) -> bool:
    """Whether a name or dotted path is that of a class that a type accepts."""
    return any(_class_at(base, name)[0] is not None for part in alternatives(hint) if (base := class_of(part)))


def _class_at(base: type, path: str) -> tuple[Any, str, str]:
    """The class with that name or dotted path; else None, the reason, and the name that was probably meant."""
    module, _, name = path.rpartition(".")
    by_name = {cls.__name__: cls for cls in subclasses(base)}
    if not module:
        cls = by_name.get(name)
        if name == base.__name__ and inspect.isabstract(base):
            return None, "it is abstract: name a class that extends it", ""
        unfinished = [] if cls else [part for part in every_subclass(base) if part.__name__ == name]
        if unfinished:
            return None, f"it is abstract: it lacks {lacks(unfinished[0])}", ""
        with suppress(ValueError):  # such as fsdp2, the name of a strategy
            if cls is None and "." in (alias := _typehints.resolve_class_path_by_name(base, name)):
                return _class_at(base, alias)
        return cls, "" if cls else f"no {base.__name__} has that name", near(name, by_name)
    try:
        home = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and module.split(".")[0] == (error.name or "").split(".")[0]:
            return None, f"no module {error.name} is installed or in the working folder", ""
        return None, f"{module} does not import: {type(error).__name__}: {' '.join(str(error).split())}", ""
    cls = getattr(home, name, None)
    if cls is None:
        fitting = [label for label, part in vars(home).items() if inspect.isclass(part) and issubclass(part, base)]
        guess = near(name, fitting)
        return None, f"{module} has no {name}", guess and f"{module}.{guess}"
    if inspect.isclass(cls) and not issubclass(cls, base):
        return None, f"{name} does not extend {base.__name__}", ""
    if inspect.isclass(cls) and inspect.isabstract(cls):
        return None, f"{name} is abstract: it lacks {lacks(cls)}", ""
    return cls, "", ""


def _within_settings(key: str, cls: type, settings: dict[str, Any], *, factory: bool) -> Misfit | None:
    """The first setting of a class that is unknown, has a wrong type, or is missing."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        # The argument of a factory, such as an optimizer's parameters, is not a setting.
        parser.add_class_arguments(cls, fail_untyped=False, skip=set[str | int]([1]) if factory else None)
    except Exception:
        return None
    named = {a.dest: getattr(a, "_typehint", Any) for a in parser._actions if a.dest.rpartition(".")[2] != "help"}
    # The settings of a dataclass have their own actions.
    hints = {name: hint for name, hint in named.items() if not any(other.startswith(f"{name}.") for other in named)}
    flat = dict(_flattened(settings, hints))
    for name, value in flat.items():
        if name not in hints:
            guess = near(name, hints)
            others = "" if guess else f"; it has {', '.join(hints) or 'none'}"
            return Misfit(f"{key}.{name}", value, f"{cls.__name__} has no such setting{others}", (), guess)
        if hints[name] is not Any and (fault := misfit(f"{key}.{name}", hints[name], value)):
            return fault
    try:
        parser.parse_object(_without_nulls(settings))
    except Exception as error:
        reason = " ".join(str(error).split())
        missing = re.search("arguments are required: (.*)", reason)
        return Misfit(key.removesuffix(".init_args"), cls.__name__, f"it needs {missing[1]}" if missing else reason)
    return None


def _without_nulls(settings: Any) -> Any:
    """Nested settings without those that are null."""
    if not isinstance(settings, dict):
        return settings
    return {name: _without_nulls(value) for name, value in settings.items() if value is not None}


def _flattened(settings: Mapping[str, Any], names: Iterable[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name, no deeper than the names of a parser's options."""
    for name, value in settings.items():
        dotted = f"{prefix}{name}"
        if dotted not in names and isinstance(value, dict) and any(one.startswith(f"{dotted}.") for one in names):
            yield from _flattened(value, names, f"{dotted}.")
        else:
            yield dotted, value
