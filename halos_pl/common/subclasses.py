"""Subclasses of a class."""

from __future__ import annotations

import inspect
from collections.abc import Iterator


def every_subclass(base: type) -> Iterator[type]:
    """``base`` and all imported classes that extend it."""
    todo = [base]
    while todo:
        yield (cls := todo.pop())
        todo += type.__subclasses__(cls)


def subclasses(base: type) -> list[type]:
    """The imported concrete classes that extend ``base``, and ``base`` if it is concrete, sorted by name."""
    by_name: dict[str, type] = {}
    for cls in every_subclass(base):
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            by_name.setdefault(cls.__name__, cls)
    return [by_name[name] for name in sorted(by_name)]
