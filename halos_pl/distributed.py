"""Sums and gathers over ranks: the objective's only contact with distributed training."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among those that train together, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` (same shape on every rank) over all ranks, without gradient.

    Every rank must call it the same number of times. Means are computed from reduced sums and counts, not averaged over
    ranks, which may have different numbers of rows, or no rows of a class.
    """
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


class _Gather(torch.autograd.Function):
    """Stacks the tensors of all ranks; the backward pass sums the gradients of this rank's tensor over all ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        everyone = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(everyone, local.contiguous())
        return torch.stack(everyone)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])[dist.get_rank()]


def gather_over_ranks(values: Tensor) -> tuple[Tensor, int]:
    """Gathers values [n] from all ranks, in rank order, *with* gradient; n may differ between ranks.

    Every rank must call it, and back-propagate through it, the same number of times.

    Returns:
        The values, float [N], and the index at which this rank's values begin.
    """
    if world_size() == 1:
        return values, 0
    counts = values.new_zeros(world_size(), dtype=torch.long)
    counts[dist.get_rank()] = len(values)
    sizes = sum_over_ranks(counts).tolist()
    padded: Any = _Gather.apply(F.pad(values, (0, max(sizes) - len(values))))  # type: ignore[no-untyped-call]
    gathered = torch.cat([part[:size] for part, size in zip(padded, sizes, strict=True)])
    return gathered, sum(sizes[: dist.get_rank()])
