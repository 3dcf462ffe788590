"""Bare names of torch's classes, such as ``SGD``, also where another library has a class of that name.

bitsandbytes calls its optimizers as torch does. peft imports it wherever it is installed, and jsonargparse would then
refuse the name as ambiguous.
"""

from __future__ import annotations

from typing import Any

from jsonargparse import _typehints

_resolve = _typehints.resolve_class_path_by_name


def resolve(cls: Any, name: str) -> str:
    """The path of the class with a bare name; torch's if several extend a class of torch.

    Raises:
        ValueError: if the name remains ambiguous.
    """
    try:
        return _resolve(cls, name)
    except ValueError:
        if isinstance(cls, tuple) or not cls.__module__.startswith("torch."):
            raise
        paths = [path for path in _typehints.get_all_subclass_paths(cls) if path.rpartition(".")[2] == name]
        of_torch = [path for path in paths if path.startswith("torch.")]
        if len(of_torch) != 1:
            raise
        return of_torch[0]


def prefer_torch() -> None:
    """Makes jsonargparse use :func:`resolve`."""
    _typehints.resolve_class_path_by_name = resolve
