"""Fresh copies of a plug-in, so that no clause sees state left by another."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn

from halos_pl.batch import Needs

T = TypeVar("T", bound=nn.Module)
_UNCHANGED = frozenset((int, float, complex, str, bytes, bool, type(None), type(lambda: None), type(len), Needs))


def _copy(value: Any) -> Any:
    kind = type(value)
    if kind in _UNCHANGED or isinstance(value, type):
        return value
    if kind in (dict, OrderedDict):
        return kind((key, _copy(item)) for key, item in value.items()) if value else kind()
    if kind in (list, tuple, set):
        return kind(map(_copy, value))
    if isinstance(value, nn.Module):
        return duplicate(value)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad and value.is_leaf)
    try:
        return deepcopy(value)
    except TypeError:  # locks, files, generators: a value that cannot be copied is shared
        return value


def duplicate(module: T) -> T:
    """A copy of ``module`` that shares no state with it, in training mode.

    Like ``copy.deepcopy``, but ten times as fast (a check makes thousands of copies), and tensors may have a graph. Two
    attributes that are one object become two.
    """
    copy: T = module.__class__.__new__(module.__class__)
    state = copy.__dict__
    state.update(module.__dict__)
    for name, value in module.__dict__.items():
        if type(value) not in _UNCHANGED:
            state[name] = _copy(value)
    state["training"] = True
    return copy
