"""A callback that sends its own process a signal at a chosen moment. Chosen in YAML by dotted path."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from typing import Any

from lightning.pytorch.callbacks import Callback


class SignalAt(Callback):
    """Sends a signal once.

    Args:
        name: of the signal.
        moment: name of the hook in which it is sent, or ``writing``, which is when a checkpoint is being written.
        step: number of optimizer steps that have been taken by then.
        times: how often it is sent, with ``pause`` seconds between.
        rank: the rank that gets it; None for each.
        pause: seconds.
        group: whether the data loader's processes get it as well.
    """

    def __init__(
        self,
        name: str,
        moment: str,
        step: int = 0,
        times: int = 1,
        rank: int | None = None,
        pause: float = 0.3,
        group: bool = False,
    ) -> None:
        self.group = group
        self.number, self.step, self.times, self.rank, self.pause = signal.Signals[name], step, times, rank, pause
        self.moment = moment
        if moment != "writing":
            setattr(self, moment, self._now)

    def _now(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and self.times and self.rank in (None, trainer.global_rank):
            times, self.times = self.times, 0
            for number in range(times):
                time.sleep(self.pause * bool(number))
                children = multiprocessing.active_children() if self.group else []
                for process in (*(child.pid for child in children), os.getpid()):
                    os.kill(process, self.number)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        save = trainer.strategy.checkpoint_io.save_checkpoint

        def save_and_send(*args: Any, **kwargs: Any) -> None:
            if self.moment == "writing":
                self._now(trainer)
            save(*args, **kwargs)

        trainer.strategy.checkpoint_io.save_checkpoint = save_and_send
