"""Finds the user's plug-ins by their bare names in the Python files of the working folder.

The files are searched as text. A file is executed only if a command names one of its classes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType
from typing import Any

from halos_pl.common.subclasses import every_subclass

_CLASS = re.compile(r"^class (\w+)\(([^)]*)\)", re.MULTILINE)
_LARGEST = 1_000_000  # bytes; a larger file is not a plug-in


class OwnPluginError(ValueError):
    """A bare name that two classes have, or whose class cannot be imported."""


def import_all(package: ModuleType) -> None:
    """Imports every module of a package, so that its classes are found by their bare names."""
    for module in walk_packages(package.__path__, f"{package.__name__}."):
        import_module(module.name)


def _classes_here() -> dict[str, list[tuple[Path, set[str]]]]:
    """For each class name in the files of the working folder: file and names of the base classes."""
    classes: dict[str, list[tuple[Path, set[str]]]] = {}
    for path in sorted(Path().glob("*.py")):
        if path.stem.isidentifier() and path.is_file() and path.stat().st_size <= _LARGEST:
            for name, bases in _CLASS.findall(path.read_text(encoding="utf-8", errors="ignore")):
                named = {base.partition("=")[0].strip().rpartition(".")[2] for base in bases.split(",")}
                classes.setdefault(name, []).append((path, named))
    return classes


def own_plugins(base: type) -> dict[str, list[Path]]:
    """Classes in the working folder that extend ``base``, according to the text: for each name, the files with it."""
    classes = _classes_here()
    names = {base.__name__, *(cls.__name__ for cls in every_subclass(base))}
    plugins: dict[str, list[Path]] = {}
    while more := {
        name: [path for path, bases in places if bases & (names | plugins.keys())]
        for name, places in classes.items()
        if name not in plugins and any(bases & (names | plugins.keys()) for _, bases in places)
    }:
        plugins |= more
    return plugins


def import_own(values: Any, kinds: Collection[type]) -> None:
    """Imports the files of the working folder with plug-ins whose bare names are among ``values``.

    Args:
        values: plain data, such as a config.
        kinds: base classes of plug-ins.

    Raises:
        OwnPluginError: if a name is in two files, or in a file and the library, or if a file cannot be imported.
    """
    names = set(_strings(values))
    for kind in kinds:
        for name, files in own_plugins(kind).items():
            if name not in names:
                continue
            installed = {cls.__module__ for cls in every_subclass(kind) if cls.__name__ == name}
            dotted = [f"{module}.{name}" for module in sorted({*installed, *(file.stem for file in files)})]
            if len(dotted) > 1:
                raise OwnPluginError(f"{name} is ambiguous; use one of {' or '.join(dotted)}")
            if not hasattr(_imported(files[0]), name):
                raise OwnPluginError(f"{files[0]} is hidden by an installed module of that name; rename the file")


def _imported(file: Path) -> ModuleType:
    try:
        return import_module(file.stem)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OwnPluginError(f"{file} does not import: {reason}") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
