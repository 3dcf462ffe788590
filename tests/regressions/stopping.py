"""Fits that a signal stops at a chosen moment."""

from __future__ import annotations

from pathlib import Path

import torch


def signal_at(name: str, moment: str, step: int = 0, **more: object) -> list[str]:
    given = {"name": name, "moment": moment, "step": step, **more}
    plugin = "plugins.signal_at.SignalAt"
    return [f"--trainer.callbacks+={plugin}", *(f"--trainer.callbacks.{k}={v}" for k, v in given.items())]


def saved(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
