"""Repeats the random numbers of an earlier pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """The random state of this process and of its GPU."""

    cpu: Tensor
    cuda: Tensor | None

    @staticmethod
    def now(device: torch.device) -> Draw:
        return Draw(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)


def forked(device: torch.device) -> AbstractContextManager[None]:
    """Restores the random state on exit."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def replayed(draw: Draw | None, device: torch.device) -> Iterator[None]:
    """Replays the random numbers that followed ``draw``, so that dropout repeats; does nothing for None."""
    if draw is None:
        yield
        return
    with forked(device):
        torch.set_rng_state(draw.cpu)
        if draw.cuda is not None:
            torch.cuda.set_rng_state(draw.cuda, device)
        yield
