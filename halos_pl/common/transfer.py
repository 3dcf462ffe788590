"""Copies tensors to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors [m] on the CPU, one after the other; larger types first, so that all are aligned."""
    return torch.cat([tensors[i].contiguous().view(torch.uint8) for i in _by_size(tensors)])


def unpacked(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in ``buffer``, as views; their types and lengths are those of ``like``."""
    order = _by_size(like)
    ends = accumulate((like[i].nbytes for i in order), initial=0)
    views = {i: buffer[a:b].view(like[i].dtype) for i, (a, b) in zip(order, pairwise(ends), strict=True)}
    return [views[i] for i in range(len(like))]


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors [m] on ``device``; from the CPU to a GPU, all in one asynchronous copy from pinned memory."""
    if device.type == "cpu" or any(tensor.device.type != "cpu" for tensor in tensors):
        return [tensor.to(device) for tensor in tensors]
    buffer = packed(tensors)
    buffer = buffer.pin_memory() if device.type == "cuda" else buffer
    return unpacked(buffer.to(device, non_blocking=True), tensors)


def _by_size(tensors: Sequence[Tensor]) -> list[int]:
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
