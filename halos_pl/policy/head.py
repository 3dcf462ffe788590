"""Log-probs of tokens from hidden states, in parts, so that memory does not grow with the vocabulary."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from halos_pl.policy.cast_once import cast as weight_in
from halos_pl.policy.sharding import plain_type

LOGITS = 1 << 23  # maximum number of logits in memory at a time on a CPU (32 MB in float32)
GPU_LOGITS = 1 << 28  # on a GPU (1 GB in float32), where smaller products would leave it idle


def most_logits(device: torch.device) -> int:
    """Maximum number of logits in memory at a time: on a GPU, in float32, at most a 64th of its memory.

    It depends on the GPU's total memory, not on what is free, so that runs on equal GPUs round alike.
    """
    if device.type != "cuda":
        return LOGITS
    return min(GPU_LOGITS, torch.cuda.get_device_properties(device).total_memory // (64 * 4))


def _is_mixed(tensor: Tensor) -> bool:
    """Whether torch can return products of such tensors in float32, the precision in which a GPU sums them."""
    return tensor.device.type == "cuda" and torch.version.cuda is not None and tensor.dtype.itemsize == 2


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product in float32; except on a GPU, it is first rounded to the dtype of its factors."""
    return torch.mm(a, b, out_dtype=torch.float32) if _is_mixed(a) else (a @ b).float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a matrix product to a float32 matrix, without a copy of it if possible."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif _is_mixed(a):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """float32 [m, V]."""
    return _product(hidden, weight.t())


class _LogProbs(torch.autograd.Function):
    """log softmax(h W')[target], in parts whose logits are recomputed, and then overwritten, in the backward pass.

    With p the softmax of a row and g the gradient of its log-prob, the gradient of its logits is g (onehot - p). The
    exponentials of the last part are kept: the backward pass begins with them, so they would be in memory anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        parts: int,
        keep: bool,
    ) -> Tensor:
        logps, sums, last = [], [], None
        cast = weight_in(weight, dtype)
        for h, t in zip(hidden.to(dtype).tensor_split(parts), targets.tensor_split(parts), strict=True):
            last = None  # freed before the next part is computed
            logits = _logits(h, cast)
            of_targets = logits.gather(1, t[:, None]).squeeze(1)
            # logsumexp, in place.
            largest = logits.amax(dim=1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(dim=1)
            sums.append(total.log().add_(largest.squeeze(1)))
            logps.append(of_targets - sums[-1])
            last = logits, total
            del logits
        ctx.save_for_backward(hidden, weight, targets, torch.cat(sums))
        ctx.dtype, ctx.parts, ctx.last = dtype, parts, last if keep else None
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, weight, targets, sums = ctx.saved_tensors
        dtype, parts = ctx.dtype, ctx.parts
        into_hidden, into_weight = ctx.needs_input_grad[:2]
        cast, cast_hidden = weight_in(weight, dtype), hidden.to(dtype)
        # With one part, the product is the gradient itself; several are accumulated in float32.
        total: Tensor | None = None
        slopes = []
        split = [x.tensor_split(parts)[::-1] for x in (cast_hidden, targets, sums, gradient.float())]
        for h, t, s, g in zip(*split, strict=True):
            if ctx.last is None:
                slope = _logits(h, cast).sub_(s[:, None]).exp_().mul_(-g[:, None])
            else:
                exponentials, of_row = ctx.last
                slope = exponentials.mul_((-g / of_row)[:, None])
                ctx.last = None  # a second backward pass recomputes them
                del exponentials
            slope.scatter_add_(1, t[:, None], g[:, None])
            slope = slope.to(dtype)
            if into_hidden:
                slopes.append(slope @ cast)
            if into_weight:
                slope_t = slope.t()
                if total is None:
                    total = _product(slope_t, h) if parts > 1 else slope_t @ h
                else:
                    _add_product(total, slope_t, h)
                del slope_t
            del slope
        into = total.to(weight.dtype) if total is not None else None
        return (torch.cat(slopes[::-1]).to(hidden.dtype) if into_hidden else None, into, *[None] * 4)


def is_plain(head: nn.Module) -> bool:
    """Whether ``head`` is just a matrix, without bias, adapter or hooks."""
    hooks = len(head._forward_hooks) + len(head._forward_pre_hooks)
    sharded = isinstance(head, FSDPModule)  # by hooks, which gather its weight
    return plain_type(head) is nn.Linear and head.bias is None and (sharded or not hooks)


def token_logps(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p of each target.

    Args:
        head: linear layer or other module that maps hidden states to logits.
        hidden: [m, size], the hidden states that predict the targets.
        targets: LongTensor [m].

    Returns:
        float32 [m].
    """
    weight: Any = head.weight
    parts = max(1, math.ceil(len(targets) * len(weight) / most_logits(hidden.device)))
    if is_plain(head):
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(hidden.dtype, weight.dtype)
        with torch.autocast(device, enabled=False):
            keep = torch.is_grad_enabled()
            return _LogProbs.apply(hidden, weight, targets, dtype, parts, keep)  # type: ignore[no-any-return, no-untyped-call]

    def part(h: Tensor, t: Tensor) -> Tensor:
        return -F.cross_entropy(head(h).float(), t, reduction="none")

    if parts == 1:
        return part(hidden, targets)
    # Parts of equal size: a last part of one row would be computed by another kernel, which may round differently.
    both = zip(hidden.tensor_split(parts), targets.tensor_split(parts), strict=True)
    return torch.cat([checkpoint(part, h, t, use_reentrant=False) for h, t in both])
