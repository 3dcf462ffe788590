"""Fresh copies of what is checked, so that no clause sees what another one left behind."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound=nn.Module)
_AS_IT_IS = (int, float, complex, str, bytes, bool, type(None), type, type(lambda: None), type(len))


def _copy(value: Any) -> Any:
    if isinstance(value, _AS_IT_IS):
        return value
    if isinstance(value, nn.Module):
        return duplicate(value)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad and value.is_leaf)
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(map(_copy, value))
    return deepcopy(value)


def duplicate(module: T) -> T:
    """A copy of ``module`` that shares no state with it, in training mode.

    As ``copy.deepcopy``, ten times as fast and at ease with tensors that have a graph; a check makes thousands. Two
    attributes that are one object become two.
    """
    copy: T = module.__class__.__new__(module.__class__)
    copy.__dict__.update({name: _copy(value) for name, value in module.__dict__.items()})
    copy.__dict__["training"] = True
    return copy
