"""Value functions v(u), one per file, depending on torch only.

Classes in the files of this folder are discovered: ``from value_functions import Logistic`` works, the command line
takes their bare names, and the tests check them against the clauses of a value function.
"""

from __future__ import annotations

from typing import Any

from value_functions.base import ValueFunction
from value_functions.base import reward_scale as reward_scale
from value_functions.discovery import plug_ins

_PLUG_INS = plug_ins(__name__, ValueFunction)
__all__ = ["ValueFunction", *sorted(_PLUG_INS)]


def __getattr__(name: str) -> Any:
    if name in _PLUG_INS:
        return _PLUG_INS[name]
    raise AttributeError(f"value_functions has no {name!r}; it has {', '.join(__all__)}")
