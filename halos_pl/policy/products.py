"""float32 matrix products by oneDNN on CPUs with AVX-512.

torch hands them to MKL, which is slower on CPUs that are not Intel's; ``benchmarks/products.py`` measures both.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TERMS = 1024  # with longer sums its rounding moves a gradient up to three times as far from that in float64


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # What torch.compile makes of a linear layer; only from there has torch a way to oneDNN for float32.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


@cache
def _has_onednn() -> bool:
    """Whether this CPU has what makes it worth while, and this torch the operation, which is not a public one."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_avx512_supported():
        return False
    x, weight, bias = torch.ones(2, 3, 4), torch.full((5, 4), 2.0), torch.ones(5)
    try:
        return bool((_onednn(x, weight, bias) == 9).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether both are what oneDNN is quicker with, and exact enough."""
    single = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    return single and x.dim() > 1 and x.shape[-1] <= TERMS and _has_onednn()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.t()``, without gradient.

    Args:
        x: [..., k].
        weight: [n, k]; it may be a transposed view.

    Returns:
        [..., n].
    """
    return _onednn(x, weight, None) if _fits(x, weight) else x @ weight.t()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        # Each is kept for the gradient of the other one.
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        return (
            None if weight is None else product(gradient, weight.t()),
            None if x is None else flat.t() @ x.flatten(0, -2),  # oneDNN would copy the gradient to transpose it
            flat.sum(0) if ctx.needs_input_grad[2] else None,
        )


class Linear(nn.Linear):
    """A linear layer whose float32 products on the CPU are oneDNN's, and torch's elsewhere."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[..., in_features] to [..., out_features]."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or not _fits(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]


def quicken(model: nn.Module, head: nn.Module | None) -> None:
    """Makes the linear layers of ``model`` :class:`Linear` ones; their weights, names and hooks stay as they are.

    But for its ``head``: what is rounded there goes straight into log-probs.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            module.__class__ = Linear
