"""What a value function computes on the way to its value: how much, and how large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[[Tensor], Tensor]


class _Counted(TorchDispatchMode):
    """Counts the elements of all tensors that are computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: skipping it means importing it, which takes as long as a check."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements += sum(
            part.numel() for part in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(part)
        )
        return out


def values_per_outcome(v: Function, rows: int = 64) -> float:
    """How many numbers v computes for each outcome, at least 1: the memory that its graph takes."""
    mode = _Counted()
    with torch.no_grad(), mode:
        v(torch.linspace(-3, 3, rows, dtype=torch.float64))
    return max(1.0, mode.elements / rows)


class _Kept(TorchFunctionMode):
    """Keeps all intermediate results of a call that have a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.requires_grad and out.grad_fn is not None:
            self.results.append(out)
        return out


def sums(v: Function, u: Tensor) -> Tensor:
    """The size of what v rounds on the way: sum over its intermediate results x of |x dv/dx|, utility, float64 [n].

    Each result is off by a relative rounding error, which changes v by that share of x dv/dx: the first-order bound of
    a running error analysis (Higham 2002, sec. 3.3). Results that do not count, such as those of the branch that
    ``torch.where`` drops, add nothing; nor do results without a gradient, or those inside an autograd function.

    Args:
        v: a value function.
        u: nats, float64 [n].
    """
    mode = _Kept()
    with torch.enable_grad():
        leaf = u.detach().clone().requires_grad_()
        inputs = leaf.clone()
        with mode:
            value = v(inputs)
        total = torch.zeros_like(u)
        if not value.requires_grad:
            return total
        kept = [result for result in mode.results if result.numel() and result.shape[:1] == u.shape]
        if not kept:
            return total
        for result, slope in zip(kept, torch.autograd.grad(value.sum(), kept, allow_unused=True), strict=True):
            if slope is not None:
                total += (result * slope).detach().abs().double().reshape(len(u), -1).sum(1)
    return total.nan_to_num(nan=0.0, posinf=0.0)
