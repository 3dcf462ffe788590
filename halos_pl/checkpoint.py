"""A run's checkpoints: how they are written, so that a kill leaves a good one, and how they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

LAST = Path("checkpoints") / "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run's folder: every few steps and at the end of the fit.

    The file is written beside its place and then moved there, so that a kill at any moment leaves either the
    old checkpoint or the new one. Add Lightning's ``ModelCheckpoint`` for the best one by some metric.

    Args:
        every_n_steps: optimizer steps from one checkpoint to the next.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps is {every_n_steps}; it must be at least 1")
        self.every_n_steps = every_n_steps
        self.last_model_path = ""
        self._saved_step = -1

    def _save(self, trainer: Trainer) -> None:
        path = Path(trainer.default_root_dir) / LAST
        beside = path.with_name(f"{path.name}.part")
        trainer.save_checkpoint(beside, weights_only=False)  # False: the optimizer's state as well
        if trainer.is_global_zero:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
        trainer.strategy.barrier("LastCheckpoint")
        self.last_model_path = str(path)
        self._saved_step = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_model_path = self.last_model_path or str(trainer.ckpt_path or "")  # of a run that goes on

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Trying out a config (fast_dev_run) leaves the run that is in the folder alone.
        if self._saved_step != trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer)


def load_trained(run: Path) -> dict[str, torch.Tensor]:
    """The state dict of a run's last checkpoint.

    Raises:
        FileNotFoundError: where the run has none.
    """
    path = run / LAST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint; {run} is not the folder of a run that reached one")
    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
    return state
