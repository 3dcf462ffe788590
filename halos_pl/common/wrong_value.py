"""Why a value does not fit the type of its option, in one line.

jsonargparse lists what each alternative of a type has against the value. Here the type is walked along with the value,
down to the innermost part that is at fault; of several alternatives the one counts that the value is most like.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import importlib
import inspect
import json
import re
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace, add_instantiator
from jsonargparse._actions import _ActionHelpClassPath
from jsonargparse._typehints import ActionTypeHint
from jsonargparse._util import NestedArg

from halos_pl.common.own_plugins import own_plugins
from halos_pl.common.renamed import RENAMED
from halos_pl.common.subclasses import subclasses

_SEQUENCES = (list, tuple, set, frozenset, collections.abc.Iterable, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_WORDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}
_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")
# So many names of classes are listed where a class is wanted.
LISTED = 30
_OURS = ("halos_pl", "value_functions")


@dataclass
class Misfit:
    """What is wrong with one value.

    Attributes:
        key: of the option, with what leads to the part that is at fault: ``a.init_args.b``, ``a[0]``.
        value: that part.
        said: what is wrong with it, where that is more than another type.
        accepts: what is taken instead, in words.
        near: what was probably meant.
        depth: how far the value has gone along with the type.
    """

    key: str
    value: Any
    said: str = ""
    accepts: tuple[str, ...] = ()
    near: str = ""
    depth: float = 0.0

    def __str__(self) -> str:
        accepts = sorted(dict.fromkeys(self.accepts), key="null".__eq__)
        taken = ", ".join(accepts[:-1]) + (" or " if accepts[1:] else "") + "".join(accepts[-1:])
        # YAML reads 123, 1e5, no and null as something else than a text.
        quotes = _WORDS[str] in accepts and not isinstance(self.value, str | list | dict) and not self.said
        said, guess = f": {self.said}" if self.said else "", f" (did you mean {self.near}?)" if self.near else ""
        parts = [
            f"{self.key} is {shown(self.value)}{said}{guess}",
            f"it takes {taken}" if taken else "",
            "put it in quotes if it is a name" if quotes else "",
        ]
        return "; ".join(filter(None, parts))


def shown(value: Any) -> str:
    """A value as a user may have written it, at most 120 characters of it."""
    data = plain_data(value)
    text = repr(data) if isinstance(data, str) else json.dumps(data, default=str, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def plain_data(value: Any) -> Any:
    """Namespaces as mappings, all the way down."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): plain_data(part) for key, part in value.items() if key != "__path__"}
    return [plain_data(part) for part in value] if isinstance(value, list | tuple) else value


# -- types ----------------------------------------------------------------------------------------------------------


def _alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [inner for part in get_args(hint) for inner in _alternatives(part)]
    if isinstance(hint, TypeVar):
        return list(hint.__constraints__) or _alternatives(hint.__bound__ or Any)
    return [hint]


def _class_of(hint: Any) -> type | None:
    """The class that ``hint`` wants an object of, or a factory of objects of."""
    if get_origin(hint) is collections.abc.Callable:
        returned = [part for part in _alternatives(get_args(hint)[-1]) if inspect.isclass(part)]
        return _class_of(returned[0]) if returned else None
    if not inspect.isclass(hint) or get_origin(hint) or hint.__module__ in ("builtins", "datetime", "pathlib", "os"):
        return None
    try:
        inspect.signature(hint)
    except ValueError:  # written in C, such as a tensor: nothing that a config could make
        return None
    return hint


def _is_factory(hint: Any) -> bool:
    return get_origin(hint) is collections.abc.Callable


def _in_words(hint: Any) -> list[str]:
    if hint in _WORDS:
        return [_WORDS[hint]]
    if get_origin(hint) is Literal:
        return [repr(choice) if isinstance(choice, str) else shown(choice) for choice in get_args(hint)]
    if get_origin(hint) in _SEQUENCES:
        inner = get_args(hint)
        if get_origin(hint) is tuple and inner and inner[-1] is not ...:
            return [f"a list of {len(inner)}"]
        return ["a list"]
    if get_origin(hint) in _MAPPINGS:
        return ["a mapping"]
    if (base := _class_of(hint)) is None:
        if _is_factory(hint):
            return ["the dotted path of a function"]
        # A tensor, say, is nothing that a config could give.
        made_in_c = inspect.isclass(hint) and hint.__module__.startswith("torch")
        return [] if made_in_c else [getattr(hint, "__name__", str(hint))]
    if dataclasses.is_dataclass(base):
        return [f"a mapping of {', '.join(field.name for field in dataclasses.fields(base))}"]
    names = [cls.__name__ for cls in subclasses(base)]
    if len(names) > LISTED:  # with those of the user's own modules
        names = [cls.__name__ for cls in subclasses(base) if cls.__module__.partition(".")[0] in _OURS]
    names += sorted(own_plugins(base).keys() - {*names})
    few = f" ({', '.join(names)}; or the dotted path of your own)" if 0 < len(names) <= LISTED else " by its name"
    return [f"a class that extends {base.__module__.removesuffix('.base')}.{base.__name__}{few}"]


def _in_words_of(hint: Any) -> list[str]:
    return [words for part in _alternatives(hint) for words in _in_words(part)]


def near(given: Any, known: Iterable[str]) -> str:
    """Which of the known names was probably meant; nothing where none is like it."""
    by_case = {name.lower(): name for name in known}
    if (new := RENAMED.get(str(given), "")).lower() in by_case:
        return new
    found = difflib.get_close_matches(str(given).lower(), by_case, n=1, cutoff=0.7)
    return by_case[found[0]] if found else ""


def _choices(hint: Any) -> Iterator[str]:
    for part in _alternatives(hint):
        if get_origin(part) is Literal:
            yield from map(str, get_args(part))
        elif base := _class_of(part):
            yield from (cls.__name__ for cls in subclasses(base))


def fault_of(hint: Any, value: Any) -> Exception | None:
    """What jsonargparse has against ``value`` for an option of type ``hint``."""
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


# -- down to the part at fault --------------------------------------------------------------------------------------


def misfit(key: str, hint: Any, value: Any) -> Misfit | None:
    """The innermost part of ``value`` that does not fit ``hint``; None where all of it does, or nothing is known.

    Args:
        key: of the option.
        hint: its type.
        value: plain data, as YAML gives them.
    """
    value = plain_data(value)
    if (error := fault_of(hint, value)) is None:
        return None
    found = [part for one in _alternatives(hint) if (part := _within(key, one, value))]
    best = max(found, key=lambda part: part.depth, default=Misfit(key, value))
    if best.depth >= 1:
        return best
    accepts = tuple(_in_words_of(hint))
    guess = near(value, _choices(hint)) if isinstance(value, str) else ""
    said = best.said or ("" if accepts else " ".join(str(error).split()))
    return Misfit(key, value, said, accepts, best.near or guess)


def _within(key: str, hint: Any, value: Any) -> Misfit | None:
    """What is wrong inside of a value that has the shape of this one alternative; None for one that has not."""
    inner = get_args(hint)
    parts: list[tuple[str, Any, Any]] = []
    if get_origin(hint) in _SEQUENCES and isinstance(value, list) and inner:
        if get_origin(hint) is tuple and inner[-1] is not ...:
            if len(value) != len(inner):
                return Misfit(key, value, accepts=(f"a list of {len(inner)}",), depth=1)
            parts = [(f"{key}[{i}]", *pair) for i, pair in enumerate(zip(inner, value, strict=True))]
        else:
            parts = [(f"{key}[{i}]", inner[0], one) for i, one in enumerate(value)]
    elif get_origin(hint) in _MAPPINGS and isinstance(value, dict) and len(inner) == 2:
        parts = [(f"{key}.{name}", inner[1], one) for name, one in value.items()]
    elif base := _class_of(hint):
        return _within_class(key, hint, base, value)
    found = next((part for where, kind, one in parts if (part := misfit(where, kind, one))), None)
    return dataclasses.replace(found, depth=found.depth + 1) if found else None


def _within_class(key: str, hint: Any, base: type, value: Any) -> Misfit | None:
    if isinstance(value, str):
        value = {"class_path": value}
    if not isinstance(value, dict):
        return None
    path, given, inside = value.get("class_path"), value.get("init_args", {}), f"{key}.init_args"
    if other := [name for name in value if "class_path" in value and name not in _OF_A_CLASS]:
        return Misfit(f"{key}.{other[0]}", value[other[0]], f"it takes {', '.join(_OF_A_CLASS)}", depth=1)
    if path is None:  # the settings of the base itself
        if "init_args" in value and not dataclasses.is_dataclass(base):
            return Misfit(key, value, "it names no class_path", depth=1)
        if inspect.isabstract(base):
            return None
        cls, given, inside = base, value.get("init_args", value), key
    elif not isinstance(path, str):
        return Misfit(f"{key}.class_path", path, accepts=("the name of a class",), depth=1)
    else:
        cls, said, guess = found_class(base, path)
        if said:
            article = "an" if base.__name__[0] in "AEIOU" else "a"
            by_name = [f"{article} {base.__name__} by its name, or the dotted path of a class"]
            accepts = tuple(by_name if guess else _in_words(hint))
            return Misfit(key, path, said, accepts, guess, depth=1 if "." in path or guess else 0.5)
    if not inspect.isclass(cls):  # a function that returns what is wanted
        return None
    if not isinstance(given, dict):
        return Misfit(inside, given, accepts=("a mapping",), depth=2)
    found = _within_settings(inside, cls, given, factory=_is_factory(hint))
    return dataclasses.replace(found, depth=found.depth + 2) if found else None


def found_class(base: type, path: str) -> tuple[Any, str, str]:
    """The class of that name; else None, why there is none, and which was probably meant."""
    module, _, name = path.rpartition(".")
    known = {cls.__name__: cls for cls in subclasses(base)}
    if not module:
        cls = known.get(name)
        if name == base.__name__ and inspect.isabstract(base):
            return None, "it is abstract: name a class that extends it", ""
        return cls, "" if cls else f"no {base.__name__} has that name", near(name, known)
    try:
        home = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and module.split(".")[0] == (error.name or "").split(".")[0]:
            return None, f"there is no module {error.name} in the working folder or among what is installed", ""
        return None, f"{module} does not import: {type(error).__name__}: {' '.join(str(error).split())}", ""
    cls = getattr(home, name, None)
    if cls is None:
        public = [found for found, part in vars(home).items() if inspect.isclass(part) and issubclass(part, base)]
        guess = near(name, public)
        return None, f"{module} has no {name}", guess and f"{module}.{guess}"
    if inspect.isclass(cls) and not issubclass(cls, base):
        return None, f"{name} does not extend {base.__name__}", ""
    if inspect.isclass(cls) and inspect.isabstract(cls):
        lacks = ", ".join(sorted(cls.__abstractmethods__))  # type: ignore[attr-defined]
        return None, f"{name} is abstract: it lacks {lacks}", ""
    return cls, "", ""


def _within_settings(key: str, cls: type, given: dict[str, Any], *, factory: bool) -> Misfit | None:
    """The first of a class's settings that is unknown, of another type, or missing."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        # What a factory is called with, such as the parameters of an optimizer, is no setting.
        parser.add_class_arguments(cls, fail_untyped=False, skip=set[str | int]([1]) if factory else None)
    except Exception:
        return None
    named = {a.dest: getattr(a, "_typehint", Any) for a in parser._actions if a.dest.rpartition(".")[2] != "help"}
    # The settings of a dataclass have actions of their own.
    hints = {name: hint for name, hint in named.items() if not any(other.startswith(f"{name}.") for other in named)}
    flat = dict(_flattened(given, hints))
    for name, value in flat.items():
        if name not in hints:
            guess = near(name, hints)
            known = "" if guess else f"; it has {', '.join(hints) or 'none'}"
            return Misfit(f"{key}.{name}", value, f"{cls.__name__} has no such setting{known}", (), guess)
        if hints[name] is not Any and (found := misfit(f"{key}.{name}", hints[name], value)):
            return found
    try:
        parser.parse_object(_without_nulls(given))
    except Exception as error:
        said = " ".join(str(error).split())
        missing = re.search("arguments are required: (.*)", said)
        return Misfit(key.removesuffix(".init_args"), cls.__name__, f"it needs {missing[1]}" if missing else said)
    return None


def _without_nulls(given: Any) -> Any:
    """Settings without those that no value was given."""
    if not isinstance(given, dict):
        return given
    return {name: _without_nulls(value) for name, value in given.items() if value is not None}


def _flattened(given: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name, down to the names that a parser knows."""
    for name, value in given.items():
        dotted = f"{prefix}{name}"
        if dotted not in known and isinstance(value, dict) and any(one.startswith(f"{dotted}.") for one in known):
            yield from _flattened(value, known, f"{dotted}.")
        else:
            yield dotted, value


def known_classes(help_of: str | None) -> str:
    """Which classes there are, where the help of an abstract one is asked for.

    Args:
        help_of: what jsonargparse calls such a help.
    """
    path = re.match(r"Help for --\S+\.help=(\S+)$", help_of or "")
    cls = imported(path[1]) if path else None
    return f"There is {', '.join(_in_words(cls))}." if inspect.isclass(cls) and inspect.isabstract(cls) else ""


# -- from an error --------------------------------------------------------------------------------------------------


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _given(before: Any, key: str, value: Any) -> Any:
    """What an option such as ``--optimizer.lr`` makes of the value that its class has already."""
    if isinstance(before, list):
        return _given(before[-1] if before else {}, key, value)
    before = plain_data(before) if isinstance(before, Namespace | Mapping) else {}
    name, _, rest = key.removeprefix("init_args.").partition(".")
    if isinstance(before.get("class_path"), str) and name not in ("class_path", "init_args"):
        known = before.get("init_args") or {}
        inner = _given(known.get(name), rest, value) if rest else value
        return {"class_path": before["class_path"], "init_args": {name: inner}}
    return {name: _given(before.get(name), rest, value) if rest else value}


def cause_in(error: BaseException | None) -> str | None:
    """What is wrong, in one line, of an error of jsonargparse about the value of an option; None for another error.

    The option and its value are those that jsonargparse was checking when it failed, the outermost of them.
    """
    for one in _chain(error):
        for frame, _ in traceback.walk_tb(one.__traceback__):
            if frame.f_code is _ActionHelpClassPath.resolve_help_type.__code__:
                action, value = frame.f_locals["self"], frame.f_locals["value"]
                found = misfit(action.dest, Union[action._help_types], value)  # noqa: UP007
                return str(found) if found else None
            if frame.f_code is not ActionTypeHint._check_type.__code__:
                continue
            action, value = frame.f_locals["self"], frame.f_locals.get("orig_val")
            before = frame.f_locals.get("prev_val")
            if isinstance(value, NestedArg):
                value = _given(before, value.key, value.val)
            elif isinstance(value, str) and value[:1] in "[{":
                with suppress(yaml.YAMLError, ValueError):
                    value = yaml.safe_load(value)
            value = plain_data(value)
            path = before.get("class_path") if isinstance(before, Namespace | Mapping) else None
            if isinstance(value, dict) and "class_path" not in value and isinstance(path, str):  # of an earlier file
                value = {"class_path": path, "init_args": value.get("init_args", value)}
            found = misfit(action.dest, action._typehint, value)
            return str(found) if found else None
    return None


# -- what a class has against its settings ---------------------------------------------------------------------------


class Refused(BaseException):
    """A class was not made; not an ``Exception``, or the alternatives of a type would be tried one after the other.

    Args:
        cls: the class.
        error: what its constructor raised.
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
    """Says of a class that refuses its settings which key of ``config`` names it.

    Args:
        config: with the classes that are made inside of the context.
        errors: with which classes refuse settings; any other is a fault of the class, and keeps its traceback.

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
        own, said = refused.cls.__name__, " ".join(str(refused.error).split())
        named = own in said or re.match(r"\w+\.\w", said)
        parts = [*keys[:1], *([] if named else [own]), said]
        raise ValueError(": ".join(parts)) from refused.error
    finally:
        _NAMING.reset(token)


def imported(path: str) -> Any:
    """The class of that path, where a parser has imported it."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


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
