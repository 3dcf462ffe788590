"""Value functions: v(u), one file each, torch only.

A class in any file of this folder is found by itself: ``from value_functions import Logistic`` works, the command line
takes the bare class name, and the tests hold it to the clauses of a value function.
"""

from __future__ import annotations

from typing import Any

from value_functions.base import ValueFunction
from value_functions.base import reward_scale as reward_scale
from value_functions.discovery import plug_ins

_FOUND = plug_ins(__name__, ValueFunction)
__all__ = ["ValueFunction", *sorted(_FOUND)]


def __getattr__(name: str) -> Any:
    if name in _FOUND:
        return _FOUND[name]
    raise AttributeError(f"value_functions has no {name!r}; it has {', '.join(__all__)}")
