"""Fits that are killed, or fail on one rank, at a chosen moment, and comparisons of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def kill_at(step: int, moment: str) -> list[str]:
    name = "plugins.kill_at.KillAt"
    return [
        f"--trainer.callbacks+={name}",
        f"--trainer.callbacks.step={step}",
        f"--trainer.callbacks.moment={moment}",
    ]


def fail_at(**options: object) -> list[str]:
    name = "plugins.fail_at.FailAt"
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{k}={v}" for k, v in options.items())]


def equal(a: Any, b: Any, where: str = "") -> list[str]:
    """The places where two checkpoints differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [place for key in a for place in equal(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} items"]
        return [place for i, (x, y) in enumerate(zip(a, b, strict=True)) for place in equal(x, y, f"{where}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [where]


def checkpoint(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return found
