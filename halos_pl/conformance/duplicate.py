"""Fresh copies of a plug-in, so that no clause sees state left by another."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn

from halos_pl.batch import Needs

T = TypeVar("T", bound=nn.Module)
_UNCHANGED = frozenset((int, float, complex, str, bytes, bool, type(None), type(lambda: None), type(len), Needs))


def _copy(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of ``value``; ``copies`` maps the ids of objects to their copies, as in :func:`copy.deepcopy`."""
    kind = type(value)
    if kind in _UNCHANGED or isinstance(value, type):
        return value
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, nn.Module):
        return _of_module(value, copies)
    copy: Any
    if kind in (dict, OrderedDict):
        copy = copies[id(value)] = kind()
        copy.update((key, _copy(item, copies)) for key, item in value.items())
    elif kind is list:
        copy = copies[id(value)] = []
        copy.extend(_copy(item, copies) for item in value)
    elif kind in (tuple, set):
        copy = kind(_copy(item, copies) for item in value)
    elif isinstance(value, nn.Parameter):
        copy = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    elif isinstance(value, Tensor):
        copy = value.detach().clone().requires_grad_(value.requires_grad and value.is_leaf)
    else:
        try:
            copy = deepcopy(value, copies)
        except (TypeError, RuntimeError):  # locks, files, generators, inner tensors: what cannot be copied is shared
            return value
    copies[id(value)] = copy
    return copy


def _of_module(module: nn.Module, copies: dict[int, Any]) -> Any:
    copy = copies[id(module)] = module.__class__.__new__(module.__class__)
    state = copy.__dict__
    state.update(module.__dict__)
    for name, value in module.__dict__.items():
        kind = type(value)
        if kind is OrderedDict and not value:  # hooks, of which a module has many, most of them empty
            state[name] = OrderedDict()
        elif kind not in _UNCHANGED:
            state[name] = _copy(value, copies)
    state["training"] = True
    return copy


def duplicate(module: T) -> T:
    """A copy of ``module`` that shares no state with it, in training mode.

    Like ``copy.deepcopy``, but ten times as fast (a check makes thousands of copies), and tensors may have a graph.
    What is one object in the module, including the module itself, is one in the copy.
    """
    copy: T = _of_module(module, {})
    return copy
