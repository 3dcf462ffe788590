"""Value functions: v(u), one file each, torch only.

Every class in this folder is found here by itself: ``from value_functions import Logistic`` works, the
command line takes the bare class name, and the tests hold it to its contract.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from value_functions.base import ValueFunction
from value_functions.base import reward_scale as reward_scale

_FOUND: dict[str, type[ValueFunction]] = {
    name: cls
    for module in iter_modules(__path__)
    for name, cls in vars(import_module(f"{__name__}.{module.name}")).items()
    if inspect.isclass(cls) and issubclass(cls, ValueFunction) and not inspect.isabstract(cls)
}
__all__ = ["ValueFunction", *sorted(_FOUND)]


def __getattr__(name: str) -> Any:
    if name in _FOUND:
        return _FOUND[name]
    raise AttributeError(f"value_functions has no {name!r}; it has {', '.join(__all__)}")
