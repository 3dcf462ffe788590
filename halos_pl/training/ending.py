"""The planned length of a fit, and why it has ended."""

from __future__ import annotations

import math
import sys
from datetime import timedelta
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer


def planned_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run as configured, including those before a resumption; None without a limit."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else None


class NotingTrainer(Trainer):
    """Lightning's Trainer, which also records what stopped it.

    Attributes:
        stopped_by: the callback, module or other object that stopped it, or the name of a function; None if nothing
            has.
    """

    stopped_by: Any = None
    _stopping = False

    @property
    def should_stop(self) -> bool:
        return self._stopping

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if value and not self._stopping:
            caller = sys._getframe(1)
            self.stopped_by = caller.f_locals.get("self", caller.f_code.co_qualname)
        if not value:
            self.stopped_by = None
        self._stopping = bool(value)


def why_ended(trainer: Trainer) -> str:
    """Why a fit ended without an error: the limit that was reached, or the callback that stopped it."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return f"max_steps={trainer.max_steps} reached"
    planned = planned_steps(trainer)
    if planned is not None and trainer.global_step >= planned:
        return f"max_epochs={trainer.max_epochs} reached"
    by = getattr(trainer, "stopped_by", None)
    name = by if isinstance(by, str) else type(by).__name__
    if isinstance(by, EarlyStopping):
        now = trainer.callback_metrics.get(by.monitor)
        value = "" if now is None else f" ({by.monitor} is {now.item():.6g})"
        reason = (by.stopping_reason_message or "").replace(" Signaling Trainer to stop.", "")
        return f"stopped early by {name}{value}: {reason}"
    if isinstance(by, Timer):
        return f"max_time reached, {timedelta(seconds=round(by.time_elapsed()))} of training"
    if by is not None:
        return f"stopped by {name}"
    return "stopped by a callback" if trainer.should_stop else "the epoch has ended early"


def record(trainer: Trainer, ended: str, finished: bool) -> dict[str, Any]:
    """The entries of ``summary.json`` on a run's end.

    Returns:
        ``steps`` taken, ``planned_steps`` (None without a limit), ``ended`` in words, and ``finished``: whether the
        run ended as configured, so that ``--ckpt_path last`` would find nothing left to train.
    """
    return {
        "steps": trainer.global_step,
        "planned_steps": planned_steps(trainer),
        "ended": ended,
        "finished": finished,
    }


def epoch_steps(trainer: Trainer, data: Any) -> int:
    """Number of optimizer steps of an epoch; the data must be set up."""
    batches, limit = len(data.train_dataloader()), trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def fit_steps(trainer: Trainer, epoch: int) -> int:
    """Number of optimizer steps of a fit with ``epoch`` steps per epoch, by the limit that is reached first."""
    ends = []
    if trainer.max_epochs and trainer.max_epochs > 0:
        ends.append(epoch * trainer.max_epochs)
    if trainer.max_steps and trainer.max_steps > 0:
        ends.append(trainer.max_steps)
    return int(min(ends, default=epoch))
