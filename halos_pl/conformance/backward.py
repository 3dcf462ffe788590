"""What a backward pass of a value function does beside computing a gradient."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from halos_pl.conformance.rounding import Function


class _Hooks(TorchFunctionMode):
    """Notes whether a hook is registered, which may be a function that is not written in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.registered = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.registered |= "hook" in getattr(func, "__name__", "")
        return func(*args, **(kwargs or {}))


def runs_code_backwards(v: Function, u: Tensor) -> bool:
    """Whether a backward pass of v runs code that is not torch's own: of an autograd function or a hook.

    Such code may count the passes, or keep something of one for the next.
    """
    with torch.enable_grad():
        leaf = u.detach().clone().requires_grad_()
        inputs, hooks = leaf.clone(), _Hooks()
        with hooks:
            value = v(inputs)
        total = (value * 2).sum()  # so that each value has a cotangent of its own in memory
    if not total.requires_grad:
        return False
    called: list[FrameType] = []

    def enter(frame: FrameType, event: str, arg: Any) -> None:
        called.append(frame)

    before, engine = sys.gettrace(), torch.autograd.Variable._execution_engine
    sys.settrace(enter)
    try:
        engine.run_backward((total,), (torch.ones_like(total),), False, False, (leaf,), True, accumulate_grad=False)
    finally:
        sys.settrace(before)
    return hooks.registered or bool(called)


def alike_graphs(values: Sequence[Tensor]) -> bool:
    """Whether as many operations with a gradient led to each of the values, which were computed one after another."""
    numbers = [-1 if value.grad_fn is None else value.grad_fn._sequence_nr() for value in values]
    return len({after - before for before, after in pairwise(numbers)}) <= 1
