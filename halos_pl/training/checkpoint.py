"""The callback that saves a run's last checkpoint, so that a kill leaves an intact one."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from halos_pl.run_dir import LAST, PREVIOUS
from halos_pl.training.checkpoint_files import CheckpointFiles
from halos_pl.training.checkpoint_links import recover_all, remove_checkpoint
from halos_pl.training.checkpoint_reading import CheckpointError, refused_class


def check_callbacks(trainer: Trainer) -> None:
    """Refuses a callback whose state could be saved, but not loaded again without running code.

    Raises:
        CheckpointError: naming the callback.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        file = io.BytesIO()
        torch.save(callback.state_dict(), file)
        file.seek(0)
        try:
            torch.load(file, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"trainer.callbacks: the state of {type(callback).__name__} contains"
                f" {refused_class(error) or 'an object'}, which a checkpoint cannot contain: let its state_dict return"
                " tensors, numbers, strings, lists and dicts"
            ) from error


def _after(loop: Any, then: Callable[[], None]) -> None:
    """Calls ``then`` whenever a loop of Lightning's finishes a step or an epoch, as Lightning has no hook there."""
    finish = loop.on_advance_end

    def on_advance_end(*args: Any) -> None:
        finish(*args)
        then()

    loop.on_advance_end = on_advance_end


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run's folder, and the one before as ``checkpoints/previous.ckpt``.

    It is written every few steps and at the end of the fit, once the step is complete: the step is logged, and a
    validation that was due has run. All its weights are finite. A kill at any moment leaves an intact file. Add
    Lightning's ``ModelCheckpoint`` to keep the best one by some metric.

    Args:
        every_n_steps: number of optimizer steps between checkpoints.
        keep: number of checkpoints to keep, 1 or 2.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, every_n_steps: int = 50, keep: int = 2) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps is {every_n_steps}; it must be at least 1")
        if keep not in (1, 2):
            raise ValueError(f"checkpoint.keep is {keep}; it must be 1 (last.ckpt) or 2 (previous.ckpt as well)")
        self.every_n_steps, self.keep = every_n_steps, keep
        self.last_model_path = ""
        self._saved_step = self._first_step = -1
        self._previous: tuple[str, int] | None = None
        self._batch: Any = None
        self._last_is_valid = False  # last.ckpt is this run's, and was verified when it was loaded or written

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes :class:`CheckpointFiles` read and write all checkpoints, and checks that the folder is writable.

        Raises:
            ValueError: if the Trainer has another checkpoint plug-in.
            OSError: if the folder is not writable.
        """
        plugin: CheckpointIO = trainer.strategy.checkpoint_io
        if type(plugin) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = plugin = CheckpointFiles()
        elif not isinstance(plugin, CheckpointFiles):
            raise ValueError(
                f"trainer.plugins: {type(plugin).__name__} is not supported: halos writes and verifies checkpoints"
                " itself; remove it"
            )
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / LAST.parent
            folder.mkdir(parents=True, exist_ok=True)
            recover_all(folder)
            plugin.check_folder(folder)
        loop = trainer.fit_loop
        _after(loop.epoch_loop, lambda: None if self._epoch_ends(trainer) else self._save_if_due(trainer))
        _after(loop, lambda: self._save_if_due(trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop):
            vars(loop).pop("on_advance_end", None)

    @staticmethod
    def _epoch_ends(trainer: Trainer) -> bool:
        """Whether the epoch ends with this step, which then includes what callbacks do at the end of an epoch."""
        loop = trainer.fit_loop
        return loop.epoch_loop._is_training_done or (trainer.should_stop and loop._can_stop_early)

    def _save_if_due(self, trainer: Trainer) -> None:
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step > self._first_step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Writes ``last.ckpt`` unless this step has already been saved; all ranks must call it.

        Raises:
            NonFiniteWeightsError: if the policy has diverged; earlier checkpoints are left unchanged.
            OSError: if the file cannot be written.
        """
        if self._saved_step == trainer.global_step:
            return
        folder = Path(trainer.default_root_dir)
        keep = self.keep == 2 and self._last_is_valid
        options = {"rotate": True, "keep": folder / PREVIOUS if keep else None}
        trainer.save_checkpoint(folder / LAST, weights_only=False, storage_options=options)
        if keep:
            self._previous = (str(folder / PREVIOUS), self._saved_step)
        elif trainer.is_global_zero and not (self._previous and self.keep == 2):
            remove_checkpoint(folder / PREVIOUS)  # left from before the run resumed from elsewhere
        self.last_model_path, self._saved_step, self._last_is_valid = str(folder / LAST), trainer.global_step, True

    def good(self, diverged: int | None = None) -> str:
        """A line that names the last good checkpoint and the one before it.

        Args:
            diverged: step whose checkpoint is left out, because its weights have diverged.
        """
        named = [(self.last_model_path, self._saved_step)] if self.last_model_path else []
        named += [self._previous] if self._previous else []
        good = [f"{path} (optimizer step {step})" if step >= 0 else path for path, step in named if step != diverged]
        if not good:
            return f"last good checkpoint: none{'' if named else ' was written yet'}"
        return f"last good checkpoint: {'; before it: '.join(good)}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the checkpoint that the run resumes from.

        Raises:
            CheckpointError: if a callback's state could not be loaded again.
        """
        self._first_step = trainer.global_step
        check_callbacks(trainer)
        if not trainer.ckpt_path:
            return
        folder, loaded = Path(trainer.default_root_dir), Path(trainer.ckpt_path)
        self.last_model_path = str(loaded)
        last, previous = folder / LAST, folder / PREVIOUS
        # A network file system may show an earlier state to other ranks, which must save at the same steps.
        is_last, is_previous = trainer.strategy.broadcast(
            [name.exists() and name.samefile(loaded) for name in (last, previous)]
        )
        if is_last:
            self._saved_step, self._last_is_valid = trainer.global_step, True
            if self.keep == 1 and trainer.is_global_zero:
                remove_checkpoint(previous)
        elif is_previous:
            self._previous = (str(previous), trainer.global_step)  # kept, as last.ckpt may be damaged

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the policy still gives finite log-probs after the last step, and saves it.

        A trial run (fast_dev_run) leaves the run in the folder unchanged.
        """
        batch, self._batch = self._batch, None
        check: Any = getattr(pl_module, "check_policy", None)
        if batch is not None and check is not None:
            check(batch)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.save(trainer)
