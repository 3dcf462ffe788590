"""Sums over ranks, the only thing the objective knows of distributed training."""

from __future__ import annotations

import torch.distributed as dist
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
