"""Types and values in words, for error messages."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import inspect
import json
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from jsonargparse import Namespace

from halos_pl.common.own_plugins import own_plugins
from halos_pl.common.renamed import RENAMED
from halos_pl.common.subclasses import subclasses

SEQUENCES = (list, tuple, set, frozenset, collections.abc.Iterable, collections.abc.Sequence)
MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
WORDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}
#: An error lists at most this many class names.
LISTED = 30
_OURS = ("halos_pl", "value_functions")


def shown(value: Any) -> str:
    """A value as a user may have written it, cut to 120 characters."""
    data = plain_data(value)
    text = repr(data) if isinstance(data, str) else json.dumps(data, default=str, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def plain_data(value: Any) -> Any:
    """The value with all its namespaces as mappings."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): plain_data(part) for key, part in value.items() if key != "__path__"}
    return [plain_data(part) for part in value] if isinstance(value, list | tuple) else value


def alternatives(hint: Any) -> list[Any]:
    """The types of a union; any other type alone."""
    if get_origin(hint) in (Union, types.UnionType):
        return [inner for part in get_args(hint) for inner in alternatives(part)]
    if isinstance(hint, TypeVar):
        return list(hint.__constraints__) or alternatives(hint.__bound__ or Any)
    return [hint]


def class_of(hint: Any) -> type | None:
    """The class of the objects that ``hint`` accepts or its factories make; None if no config can make them."""
    if is_factory(hint):
        returned = [part for part in alternatives(get_args(hint)[-1]) if inspect.isclass(part)]
        return class_of(returned[0]) if returned else None
    if not inspect.isclass(hint) or get_origin(hint) or hint.__module__ in ("builtins", "datetime", "pathlib", "os"):
        return None
    try:
        inspect.signature(hint)
    except ValueError:  # written in C, such as a tensor
        return None
    return hint


def is_factory(hint: Any) -> bool:
    """Whether a type is a function that makes objects, such as an optimizer from parameters."""
    return get_origin(hint) is collections.abc.Callable


def in_words(hint: Any) -> list[str]:
    """The values that a type accepts, in words; empty for a type that no config can make."""
    return [words for part in alternatives(hint) for words in _one_in_words(part)]


def _one_in_words(hint: Any) -> list[str]:
    if hint in WORDS:
        return [WORDS[hint]]
    if get_origin(hint) is Literal:
        return [repr(choice) if isinstance(choice, str) else shown(choice) for choice in get_args(hint)]
    if get_origin(hint) in SEQUENCES:
        inner = get_args(hint)
        if get_origin(hint) is tuple and inner and inner[-1] is not ...:
            return [f"a list of {len(inner)}"]
        return ["a list"]
    if get_origin(hint) in MAPPINGS:
        return ["a mapping"]
    if (base := class_of(hint)) is None:
        if is_factory(hint):
            return ["the dotted path of a function"]
        written_in_c = inspect.isclass(hint) and hint.__module__.startswith("torch")
        return [] if written_in_c else [getattr(hint, "__name__", str(hint))]
    if dataclasses.is_dataclass(base):
        return [f"a mapping of {', '.join(field.name for field in dataclasses.fields(base))}"]
    names = [cls.__name__ for cls in subclasses(base)]
    if len(names) > LISTED:  # the user's own classes are listed all the same
        names = [cls.__name__ for cls in subclasses(base) if cls.__module__.partition(".")[0] in _OURS]
    names += sorted(own_plugins(base).keys() - {*names})
    few = f" ({', '.join(names)}; or the dotted path of your own)" if 0 < len(names) <= LISTED else " by its name"
    return [f"a class that extends {base.__module__.removesuffix('.base')}.{base.__name__}{few}"]


def near(name: Any, candidates: Iterable[str]) -> str:
    """The candidate that was probably meant; empty if none is similar."""
    by_case = {candidate.lower(): candidate for candidate in candidates}
    if (new := RENAMED.get(str(name), "")).lower() in by_case:
        return new
    matches = difflib.get_close_matches(str(name).lower(), by_case, n=1, cutoff=0.7)
    return by_case[matches[0]] if matches else ""


def choices(hint: Any) -> Iterator[str]:
    """The names that a type accepts: literals and classes."""
    for part in alternatives(hint):
        if get_origin(part) is Literal:
            yield from map(str, get_args(part))
        elif base := class_of(part):
            yield from (cls.__name__ for cls in subclasses(base))


def known_classes(help_of: str | None) -> str:
    """The classes to choose from, if this is jsonargparse's help of an abstract class; else empty.

    Args:
        help_of: the description of jsonargparse's parser, which names the class.
    """
    path = re.match(r"Help for --\S+\.help=(\S+)$", help_of or "")
    cls = imported(path[1]) if path else None
    return f"Choose {', '.join(in_words(cls))}." if inspect.isclass(cls) and inspect.isabstract(cls) else ""


def imported(path: str) -> Any:
    """The class with that dotted path; None if its module is not imported."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
