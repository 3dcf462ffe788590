"""A callback that kills its own process, for the tests of resuming. Chosen in YAML by dotted path."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import Callback


class KillAt(Callback):
    """Sends SIGKILL to this process: nothing can be tidied up.

    Args:
        step: number of optimizer steps that have been taken.
        moment: ``after_step``: before the step's checkpoint is written; ``writing``: when half of its bytes
            are; ``after_checkpoint``: when it lies in its place.
    """

    def __init__(self, step: int, moment: Literal["after_step", "writing", "after_checkpoint"]) -> None:
        self.step = step
        self.moment = moment

    @staticmethod
    def _kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        save = trainer.strategy.checkpoint_io.save_checkpoint

        def save_half(checkpoint: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            save(checkpoint, path, *args, **kwargs)
            if trainer.global_step == self.step and self.moment == "writing":
                file = Path(path)
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
                self._kill()

        trainer.strategy.checkpoint_io.save_checkpoint = save_half

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        # The next step has begun, so everything that belongs to the last one is done.
        if trainer.global_step == self.step and self.moment == "after_checkpoint":
            self._kill()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and self.moment == "after_step":
            self._kill()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        # Right after an epoch's last step, before the next epoch has begun.
        if trainer.global_step == self.step and self.moment == "after_checkpoint":
            self._kill()
