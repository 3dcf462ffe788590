"""A callback that kills its own process, for the tests of resuming. Chosen in YAML by dotted path."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback

from halos_pl.training.checkpoint_files import CheckpointFiles

Moment = Literal["after_step", "validating", "validated", "writing", "written", "after_checkpoint"]


class KillAt(Callback):
    """Sends SIGKILL to this process: nothing can be tidied up.

    Args:
        step: number of optimizer steps that have been taken.
        moment: ``after_step``: before the step's line is logged; ``validating`` and ``validated``: when the validation
            that is due then begins, and when its figures are in the log; ``writing``: when half of the step's
            checkpoint is written; ``written``: when it lies in its place, and nothing has been done since;
            ``after_checkpoint``: when the next step or epoch has begun, or the training has ended.
    """

    def __init__(self, step: int, moment: Moment) -> None:
        self.step = step
        self.moment = moment

    def _kill(self, trainer: Any, moment: Moment) -> None:
        if trainer.global_step == self.step and self.moment == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        save, write = CheckpointFiles.save_checkpoint, torch.save

        def save_half(checkpoint: Any, file: Any, **kwargs: Any) -> None:
            write(checkpoint, file, **kwargs)
            if (trainer.global_step, self.moment) == (self.step, "writing") and isinstance(file, Path):
                os.truncate(file, file.stat().st_size // 2)
                self._kill(trainer, "writing")

        def then_kill(*args: Any, **kwargs: Any) -> None:
            save(*args, **kwargs)
            self._kill(trainer, "written")

        torch.save = save_half
        CheckpointFiles.save_checkpoint = then_kill  # type: ignore[method-assign]

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._kill(trainer, "after_checkpoint")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._kill(trainer, "after_step")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._kill(trainer, "validating")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._kill(trainer, "validated")

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._kill(trainer, "after_checkpoint")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._kill(trainer, "after_checkpoint")
