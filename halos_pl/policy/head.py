"""Log-probs of tokens from hidden states, a few rows of logits at a time: memory does not grow with the vocabulary."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS = 1 << 23  # at most so many logits are in memory at a time (32 MB in float32)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """float32 [m, V]; the product itself in the dtype of both."""
    return (hidden @ weight.t()).float()


class _LogProbs(torch.autograd.Function):
    """log softmax(h W')[target] by parts, whose logits are made again in the backward pass and then overwritten.

    With p the softmax of a row and g the gradient of its log-prob, the gradient of its logits is g (onehot - p). The
    last part's exponentials are kept: they are in memory anyway when the backward pass begins with them.
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
        found, sums, last = [], [], None
        cast = weight.to(dtype)
        for h, t in zip(hidden.to(dtype).tensor_split(parts), targets.tensor_split(parts), strict=True):
            last = None  # gone before the next ones are made
            logits = _logits(h, cast)
            of_targets = logits.gather(1, t[:, None]).squeeze(1)
            # logsumexp, in the memory of the logits.
            largest = logits.amax(dim=1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(dim=1)
            sums.append(total.log().add_(largest.squeeze(1)))
            found.append(of_targets - sums[-1])
            last = logits, total
            del logits
        ctx.save_for_backward(hidden, weight, targets, torch.cat(sums))
        ctx.dtype, ctx.parts, ctx.last = dtype, parts, last if keep else None
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, weight, targets, sums = ctx.saved_tensors
        dtype, parts = ctx.dtype, ctx.parts
        into_hidden, into_weight = ctx.needs_input_grad[:2]
        cast, given = weight.to(dtype), hidden.to(dtype)
        # Of a single part the product is the gradient itself; several are added up in float32.
        total: Tensor | None = None
        slopes = []
        split = [x.tensor_split(parts)[::-1] for x in (given, targets, sums, gradient.float())]
        for h, t, s, g in zip(*split, strict=True):
            if ctx.last is None:
                slope = _logits(h, cast).sub_(s[:, None]).exp_().mul_(-g[:, None])
            else:
                exponentials, of_row = ctx.last
                slope, ctx.last = exponentials.mul_((-g / of_row)[:, None]), None  # a second backward makes them again
                del exponentials
            slope.scatter_add_(1, t[:, None], g[:, None])
            slope = slope.to(dtype)
            if into_hidden:
                slopes.append(slope @ cast)
            if into_weight:
                own = slope.t()
                if total is None:
                    total = (own @ h).float() if parts > 1 else own @ h
                elif dtype == torch.float32:
                    total.addmm_(own, h)
                else:
                    total += own @ h
                del own
            del slope
        into = total.to(weight.dtype) if total is not None else None
        return (torch.cat(slopes[::-1]).to(hidden.dtype) if into_hidden else None, into, *[None] * 4)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_plain(head: nn.Module) -> bool:
    """Whether ``head`` is a matrix and nothing else: no bias, no adapter, no hooks."""
    return type(head) is nn.Linear and head.bias is None and not _has_hooks(head)


def token_logps(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p of each target.

    Args:
        head: from hidden states to logits: a linear layer, or any other module.
        hidden: [m, size], what each target is predicted from.
        targets: LongTensor [m].

    Returns:
        float32 [m].
    """
    weight: Any = head.weight
    parts = max(1, math.ceil(len(targets) * len(weight) / LOGITS))
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
    # Parts of equal size: a last one of a single row would be multiplied by another kernel, which may round otherwise.
    both = zip(hidden.tensor_split(parts), targets.tensor_split(parts), strict=True)
    return torch.cat([checkpoint(part, h, t, use_reentrant=False) for h, t in both])
