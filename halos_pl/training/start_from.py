"""Starts a fit from the weights of an earlier run of the same policy, as the rounds of online training do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from halos_pl.training.checkpoint_reading import CheckpointError, read_checkpoint
from halos_pl.training.trained import check_weights


class StartFrom(Callback):
    """Starts training from a checkpoint of another run, with a new schedule and step count.

    The policy takes the trained weights of that run, its adapter included; a reference that follows the policy
    (``SyncedCopy``) takes its weights too. A fixed reference stays the model in ``model.policy.path``. A run that
    resumes from its own checkpoint ignores this callback.

    Args:
        checkpoint: Checkpoint file of the earlier run, which trained the same policy.
        optimizer: Whether the optimizer takes its state too, such as AdamW's moments; otherwise it starts fresh.

    Raises:
        FileNotFoundError: There is no such checkpoint.
    """

    def __init__(self, checkpoint: str, optimizer: bool = True) -> None:
        self.checkpoint, self.optimizer = checkpoint, optimizer
        if not Path(checkpoint).exists():
            raise FileNotFoundError(f"StartFrom: {checkpoint}: no such checkpoint")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads the checkpoint once the policy, its reference and the optimizer are there.

        Raises:
            CheckpointError: The checkpoint cannot be read, or is one of a sharded run.
            ValueError: It does not fit the policy or the optimizer, or the policy is sharded.
        """
        if trainer.ckpt_path:
            return
        module: Any = pl_module
        path = Path(self.checkpoint)
        if module.models.sharding is not None:
            raise ValueError(
                "StartFrom does not work with a sharded policy; use trainer.strategy ddp, or train from the exported"
                " model"
            )
        if path.is_dir():
            raise CheckpointError(f"StartFrom: {path} is a checkpoint of a sharded run; name a file")
        content = read_checkpoint(path, resume=self.optimizer)
        check_weights(module, content["state_dict"], path)
        module.load_state_dict(content["state_dict"], strict=False)
        self._set_masters(module)
        if module.models.bound:
            reference = content.get("reference_model", {})
            if module.models.reference_model.state().keys() != reference.keys():
                raise ValueError(f"StartFrom: {path} has another model.reference_model than this run")
            module.models.reference_model.restore(reference)
        if self.optimizer:
            self._take_optimizer(trainer, content)
        rank_zero_info(
            f"halos: starts from {path}, at its optimizer step {content['global_step']},"
            f" {'with' if self.optimizer else 'without'} the optimizer's state"
        )

    @staticmethod
    @torch.no_grad()
    def _set_masters(module: Any) -> None:
        for parameter, master in module._masters.pairs:
            master.copy_(parameter)

    def _take_optimizer(self, trainer: Trainer, content: dict[str, Any]) -> None:
        optimizers, states = trainer.optimizers, content["optimizer_states"]
        for optimizer, saved in zip(optimizers, states, strict=True):
            # The learning rate is that of this run's schedule; the saved one is where the other schedule ended.
            rates = [(group["lr"], group.get("initial_lr")) for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, (lr, initial) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr
                if initial is not None:
                    group["initial_lr"] = initial
