"""Sums and collections over ranks, the only thing the objective knows of distributed training."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` (same shape on every rank) over all ranks, without gradient.

    Every rank must call it the same number of times. A mean over ranks is never taken anywhere: ranks may
    hold different numbers of rows, or none of a class, so sums and counts are reduced and divided after.
    """
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


class _Gather(torch.autograd.Function):
    """The tensors of all ranks, stacked; back, what all ranks' losses say of this rank's own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        everyone = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(everyone, own.contiguous())
        return torch.stack(everyone)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])[dist.get_rank()]


def gather_over_ranks(values: Tensor) -> tuple[Tensor, int]:
    """The values [n] of all ranks, in the order of the ranks, *with* gradient; ranks may hold different numbers.

    Every rank must call it the same number of times, and back-propagate through it the same number of times.

    Returns:
        float [N], and the place where this rank's own values begin.
    """
    if world_size() == 1:
        return values, 0
    counts = values.new_zeros(world_size(), dtype=torch.long)
    counts[dist.get_rank()] = len(values)
    sizes = sum_over_ranks(counts).tolist()
    padded: Any = _Gather.apply(F.pad(values, (0, max(sizes) - len(values))))  # type: ignore[no-untyped-call]
    gathered = torch.cat([part[:size] for part, size in zip(padded, sizes, strict=True)])
    return gathered, sum(sizes[: dist.get_rank()])
