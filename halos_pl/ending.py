"""How long a fit was planned to be, and why it has ended."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer

SUMMARY = "summary.json"


def planned_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run as configured, including those before a resumption; None without a limit."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else None


def why_ended(trainer: Trainer) -> str:
    """What ended a fit regularly: the setting whose limit was reached, or the callback that stopped it."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return f"max_steps={trainer.max_steps} reached"
    planned = planned_steps(trainer)
    if planned is not None and trainer.global_step >= planned:
        return f"max_epochs={trainer.max_epochs} reached"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"stopped early: {callback.stopping_reason_message}"
        if isinstance(callback, Timer) and (callback.time_remaining() or 1) <= 0:
            return "max_time reached"
    return "stopped by a callback" if trainer.should_stop else "the epoch has ended early"


def record(trainer: Trainer, ended: str, finished: bool) -> dict[str, Any]:
    """What ``summary.json`` records of a run's end.

    Returns:
        ``steps`` taken, ``planned_steps`` (None without a limit), ``ended`` in words, and ``finished``: whether it
        ended as configured, so that ``--ckpt_path last`` would find nothing left to train.
    """
    return {
        "steps": trainer.global_step,
        "planned_steps": planned_steps(trainer),
        "ended": ended,
        "finished": finished,
    }


def shortfall(folder: Path) -> str | None:
    """Why the training in a run's folder does not count as finished; None where it does.

    A summary of an older version, which wrote one at a regular end only, has no ``finished``; see :func:`untold`.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return f"it has no {SUMMARY}: its training did not finish"
    said = _said(path)
    if said is None:
        return f"its {SUMMARY} cannot be read"
    if said.get("finished", True) is True:
        return None
    steps, planned = said.get("steps"), said.get("planned_steps")
    return f"ended by {said.get('ended')} after {steps} of {planned} steps"


def untold(folder: Path) -> bool:
    """Whether the summary in a run's folder is of an older version, and does not say if training was finished."""
    path = folder / SUMMARY
    said = _said(path) if path.is_file() else None
    return said is not None and "finished" not in said


def _said(path: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def epoch_steps(trainer: Trainer, data: Any) -> int:
    """Optimizer steps of an epoch, of data that are set up."""
    batches, limit = len(data.train_dataloader()), trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def fit_steps(trainer: Trainer, epoch: int) -> int:
    """Optimizer steps of a fit with so many in an epoch, by what limits it first."""
    ends = []
    if trainer.max_epochs and trainer.max_epochs > 0:
        ends.append(epoch * trainer.max_epochs)
    if trainer.max_steps and trainer.max_steps > 0:
        ends.append(trainer.max_steps)
    return int(min(ends, default=epoch))
