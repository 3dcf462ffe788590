"""The hash of all that decides what a value function computes, so that a certificate of older code is refused."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), BuiltinFunctionType)
_OF_TORCH = {*vars(nn.Module())} - {"training"}
# Folders of packages that are no part of v, other than its own: Python's, those installed, and this program.
_FOLDERS = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib", "platstdlib")]
_FOLDERS.insert(0, Path(__file__).resolve().parents[1])


def source_hash(v: nn.Module) -> str:
    """SHA-256 of the code and the state of v.

    Of the code: the whole files of its classes and functions, and of what those import, other than Python's own
    modules, packages that are installed and halos_pl. Of the state: buffers, attributes, hooks and parameters that are
    not learnable. The values of those that are may change: training moves them.
    """
    digest, files = hashlib.sha256(), set[Path]()
    for text in _described(v, files, frozenset()):
        digest.update(b"%d %s" % (len(text), text))
    for content in sorted(file.read_bytes() for file in _reached(files)):
        digest.update(b"%d %s" % (len(content), content))
    return digest.hexdigest()


def _described(value: Any, files: set[Path], above: frozenset[int]) -> Iterator[bytes]:
    """Texts that differ where values do. The files of the classes and functions within are added to ``files``."""
    if isinstance(value, _PLAIN):
        yield repr(value).encode() if not callable(value) else value.__qualname__.encode()
        return
    yield type(value).__qualname__.encode()
    if id(value) not in above:  # else it contains itself
        for part in _parts(value, files):
            yield from _described(part, files, above | {id(value)})


def _parts(value: Any, files: set[Path]) -> list[Any]:
    if isinstance(value, nn.Parameter) and value.requires_grad:
        return [*value.shape]
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous().reshape(-1)
        return [str(value.dtype), *value.shape, plain.view(torch.uint8).numpy().tobytes()]
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        return [*value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, type | ModuleType):
        files |= _files_of(value)
        return [value.__name__]
    if isinstance(value, FunctionType):
        files |= _files_of(value)
        cells = [inspect.getclosurevars(value).nonlocals, value.__defaults__, value.__kwdefaults__]
        return [value.__qualname__, value.__code__.co_firstlineno, *cells]
    for cls in type(value).__mro__:
        files |= _files_of(cls)
    if isinstance(value, nn.Module):
        own = {key: part for key, part in vars(value).items() if key not in _OF_TORCH}
        hooks = [[*part.values()] for key, part in vars(value).items() if key.endswith("hooks") and part]
        return [own, value._parameters, value._buffers, hooks, value._modules]
    try:
        function, arguments, *state = value.__reduce_ex__(2)
    except Exception:  # such as a lock: it has no state that a copy would have
        return []
    return [getattr(function, "__qualname__", ""), arguments, *([*x] if hasattr(x, "__next__") else x for x in state)]


def _files_of(thing: Any) -> set[Path]:
    """The Python file of a class, function or module, if it has one and is not torch's or Python's."""
    try:
        file = Path(inspect.getsourcefile(thing) or "").resolve()
    except (TypeError, OSError):
        return set()
    name = str(getattr(thing, "__module__", thing.__name__)).partition(".")[0]
    return {file} if file.is_file() and name not in ("torch", *sys.stdlib_module_names) else set()


def _reached(files: set[Path]) -> set[Path]:
    """The files, and those that they import, also within functions."""
    todo, reached = [*files], set[Path]()
    while todo:
        if (file := todo.pop()) not in reached:
            reached.add(file)
            todo += [other for other in _imported(file) if _package(other) in (None, _package(file))]
    return reached


def _package(file: Path) -> Path | None:
    """The package in one of ``_FOLDERS`` that a file belongs to."""
    inside = next((folder for folder in _FOLDERS if file.is_relative_to(folder)), None)
    return None if inside is None else inside / file.relative_to(inside).parts[0]


def _imported(file: Path) -> Iterator[Path]:
    """The Python files that the imports of a file may name: ``from a import b`` is a, and b in it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = [*filter(None, (node.module or "").split("."))]
            names, level = [[*base, alias.name] for alias in node.names], node.level
        elif isinstance(node, ast.Import):
            names, level = [alias.name.split(".") for alias in node.names], 0
        else:
            continue
        for root in [file.parents[level - 1]] if level else [file.parent, *map(Path, sys.path)]:
            for parts in (name[:i] for name in names for i in range(0 if level else 1, len(name) + 1)):
                for place in (root.joinpath(*parts, "__init__.py"), root.joinpath(*parts).with_suffix(".py")):
                    if place.is_file():
                        yield place.resolve()
