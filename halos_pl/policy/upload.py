"""Index lists that are built on the host and copied to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from halos_pl.common.transfer import moved

# All on the CPU, even while Lightning creates tensors on a GPU by default.


def _numbers(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long, device="cpu")


def ramps(runs: Sequence[tuple[int, int]]) -> Tensor:
    """The concatenation of ``start, start + 1, ...`` over runs (start, length), LongTensor on the CPU."""
    starts, lengths = _numbers(a for a, _ in runs), _numbers(n for _, n in runs)
    total = sum(n for _, n in runs)
    shift = torch.repeat_interleave(starts - lengths.cumsum(0) + lengths, lengths, output_size=total)
    return torch.arange(total, device="cpu") + shift


def repeats(runs: Sequence[tuple[int, int]]) -> Tensor:
    """The concatenation of each value, repeated, over runs (value, count), LongTensor on the CPU."""
    total = sum(n for _, n in runs)
    return torch.repeat_interleave(_numbers(v for v, _ in runs), _numbers(n for _, n in runs), output_size=total)


def upload(columns: Sequence[Tensor | Sequence[int]], device: torch.device) -> list[Tensor]:
    """Integers on a device, copied to a GPU all at once.

    Args:
        columns: Lists of integers or LongTensors [m] on the CPU, of any lengths.
        device: Device to copy to. The copy to a GPU is asynchronous, from pinned memory.

    Returns:
        A LongTensor on ``device`` for each column.
    """
    tensors = [column if isinstance(column, Tensor) else _numbers(column) for column in columns]
    return moved(tensors, device)
