"""Copies from the host to a device that nothing waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(columns: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Copies lists of integers to a device, all in one copy.

    Args:
        columns: Lists of any lengths.
        device: Device to copy to. The copy to a GPU is asynchronous, from pinned memory.

    Returns:
        A LongTensor on ``device`` for each list, views of one buffer.
    """
    # On the CPU, even while Lightning creates tensors on a GPU by default.
    buffer = torch.tensor([i for column in columns for i in column], dtype=torch.long, device="cpu")
    if device.type != "cpu":
        buffer = buffer.pin_memory().to(device, non_blocking=True)
    return list(buffer.split([len(column) for column in columns]))
