"""How a plug-in is found: as a class in a file of its package, without being registered anywhere."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any


def plug_ins(package: str, base: type) -> dict[str, type[Any]]:
    """The concrete subclasses of ``base`` in the files of ``package``, by name; imports these files.

    Raises:
        ImportError: if two files define a class of the same name.
    """
    classes: dict[str, type[Any]] = {}
    for file in iter_modules(import_module(package).__path__):
        for name, cls in vars(import_module(f"{package}.{file.name}")).items():
            if not inspect.isclass(cls) or not issubclass(cls, base) or inspect.isabstract(cls):
                continue
            if classes.setdefault(name, cls) is not cls:
                first = classes[name].__module__
                raise ImportError(f"{package} has two classes named {name}: in {first} and in {cls.__module__}")
    return classes


class Declared:
    """A plug-in that states which clauses of the definition it does not keep, and why.

    A subclass with a ``forward`` of its own answers for itself: it inherits none of these statements.

    Attributes:
        violates: clause (see ``halos check --explain``) to reason. Reports show the reason beside a failure, which
            counts all the same; the tests of the library hold each of its parts to exactly what it states.
    """

    violates: Mapping[str, str] = MappingProxyType({})
    _statements: tuple[str, ...] = ("violates",)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            for statement in cls._statements:
                if statement not in vars(cls):
                    setattr(cls, statement, MappingProxyType({}))
