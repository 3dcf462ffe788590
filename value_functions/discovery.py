"""Discovery of plug-ins: classes in the files of a package, without registration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any


def plug_ins(package: str, base: type) -> dict[str, type[Any]]:
    """Imports the files of ``package`` and returns the concrete subclasses of ``base`` in them, by name.

    Raises:
        ImportError: two files define a class of the same name.
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
    """A plug-in that declares which clauses of the definition it violates, and why.

    A subclass that defines ``forward`` inherits none of these declarations.

    Attributes:
        violates: clause (see ``halos check --explain``) to reason. Reports show the reason next to a failure, which
            still counts. The library's tests require that each of its plug-ins violates exactly these clauses.
    """

    violates: Mapping[str, str] = MappingProxyType({})

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in vars(cls) and "violates" not in vars(cls):
            cls.violates = MappingProxyType({})
