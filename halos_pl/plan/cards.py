"""Accelerators by name, and their memory.

A card's memory is the number in its name, in units of 10^9 bytes. Drivers report more (nvidia-smi: 85.5 for an H100
80GB, 85.9 for an A100 80GB, 150.8 for an H200); the difference is left to the CUDA context, NCCL's buffers and
fragments of freed memory.
"""

from __future__ import annotations

import difflib

from halos_pl.plan.error import PlanError

#: 10^9 bytes by name.
CARDS = {
    "a10-24gb": 24,
    "rtx4090-24gb": 24,
    "a100-40gb": 40,
    "a6000-48gb": 48,
    "l40s-48gb": 48,
    "a100-80gb": 80,
    "h100-80gb": 80,
    "h100-94gb": 94,
    "gh200-96gb": 96,
    "h200-141gb": 141,
    "b200-180gb": 180,
    "mi300x-192gb": 192,
}


def memory_of(card: str) -> float:
    """Memory of a card in bytes.

    Raises:
        PlanError: if no card has that name.
    """
    name = card.lower()
    if name not in CARDS:
        near = difflib.get_close_matches(name, CARDS, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise PlanError(f"--device {card}: no such card{guess}; there is {', '.join(CARDS)}; or give --memory GB")
    return CARDS[name] * 1e9
