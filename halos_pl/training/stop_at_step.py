"""Lets a signal stop a fit only between two steps, on all ranks at once, with a checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from halos_pl.common import stopping
from halos_pl.distributed import world_size
from halos_pl.run_dir import LAST
from halos_pl.training.checkpoint import LastCheckpoint
from halos_pl.training.monitors import given_up
from halos_pl.training.slurm import requeue


class AgreedSignals:
    """Replaces Lightning's signal connector, whose handler communicates with other ranks mid-step and hangs.

    Lightning's loops read ``received_sigterm`` after each training step, each evaluation batch and each epoch, and end
    the run with ``SIGTERMException`` if it is true. All ranks read it at the same points, so they can agree on whether
    to stop: one number per step is reduced over the ranks. The handlers are in :mod:`halos_pl.common.stopping`.

    Args:
        trainer: the Trainer whose loops read it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def received_sigterm(self) -> bool:
        """Whether some rank has received a signal to stop. Every rank must read this equally often."""
        number = stopping.received() or 0
        if world_size() > 1:
            flag = torch.tensor(number, dtype=torch.int32, device=self.trainer.strategy.root_device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            number = int(flag)
        if number:
            stopping.agree(number)
        return number > 0

    def register_signal_handlers(self) -> None:
        """Does nothing: the command handles all signals, SLURM's for requeueing included."""

    def teardown(self) -> None:
        """Does nothing."""


class StopAtStep(Callback):
    """Delays a signal until the step is done; then saves ``checkpoints/last.ckpt`` and prints how to resume."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopping.wait_for_step(True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A single process may stop anywhere; with several, the other ranks would wait for it.
        if trainer.world_size > 1 and not trainer.sanity_checking:
            stopping.wait_for_step(True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_predict_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stops like Lightning's other loops."""
        if trainer.received_sigterm:
            raise SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if error := given_up(exception):
            self._save(trainer)
            raise error from exception
        if not isinstance(exception, (SIGTERMException, stopping.Stopped)):
            return
        launcher: Any = trainer.strategy.launcher
        children = list(launcher.procs) if isinstance(launcher, _SubprocessScriptLauncher) else []
        if children:
            # Its observer would kill this process when a child ends with a nonzero exit status.
            launcher.procs.clear()
        if isinstance(exception, stopping.Stopped):
            for child in children:
                child.send_signal(signal.SIGTERM)
        elif trainer.state.fn == "fit":
            saved = self._save(trainer)
            self._report(trainer, saved)
            if saved:
                requeue(trainer, stopping.received())
        stopping.wait_for(children)

    @staticmethod
    def _save(trainer: Trainer) -> bool:
        """Writes ``checkpoints/last.ckpt`` if it lacks the last step; returns False if there is nothing to save."""
        step = trainer.global_step
        if not step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        last = next(c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint))
        if trainer.validating:  # the resumed run repeats the whole validation, so its figures are dropped
            progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.total.ready = progress.total.started = 1
        last.save(trainer)
        return True

    @staticmethod
    def _report(trainer: Trainer, saved: bool) -> None:
        number = stopping.received()
        why = stopping.name_of(number) if number else "a signal"
        if not saved:
            rank_zero_info(f"halos: stopped by {why} before the first step; nothing was saved")
            return
        step, path = trainer.global_step, Path(trainer.default_root_dir) / LAST
        resume = stopping.command_line("--ckpt_path", "last", without=("--ckpt_path",))
        rank_zero_info(f"halos: stopped by {why} after step {step}; {path} is saved. Resume with:\n{resume}")
