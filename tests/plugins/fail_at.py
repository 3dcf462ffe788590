"""A callback that fails on one rank. Chosen in YAML by dotted path."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from lightning.pytorch.callbacks import Callback


class FailAt(Callback):
    """Fails once on one rank.

    Args:
        step: Number of optimizer steps that have been taken by then.
        rank: The rank that fails.
        how: ``user``: with an error that a user can fix; ``bug``: with another error; ``kill``: by SIGKILL; ``block``:
            with an error, while the other ranks wait outside a collective; ``stuck``: the same, and nothing interrupts
            them, as a collective of NCCL.
        moment: Name of the hook in which it fails.
    """

    def __init__(self, rank: int, how: str, step: int = 1, moment: str = "on_before_zero_grad") -> None:
        self.rank, self.how, self.step = rank, how, step
        setattr(self, moment, self._now)

    def _now(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step != self.step:
            return
        if trainer.global_rank != self.rank:
            if self.how == "stuck":
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
            if self.how in ("block", "stuck"):
                time.sleep(100)
        elif self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "bug":
            raise RuntimeError("the widget is broken")
        else:
            raise ValueError("row 7 of data.jsonl has no widget")
