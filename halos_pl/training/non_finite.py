"""A run stops at the first number that is not finite, and says which rows it comes from and where to go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from halos_pl.batch import TokenBatch
from halos_pl.distributed import sum_over_ranks
from halos_pl.training.checkpoint import LastCheckpoint


class NonFiniteLossError(FloatingPointError):
    """The loss of a step is not a finite number; the message names its rows and the last checkpoint."""


def highest_lr(optimizer: Any) -> float:
    """The learning rate as the config gives it, before warm-up and decay."""
    return max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)


def lower_lr(module: Any) -> str:
    """What to do about a policy that has diverged."""
    lr = highest_lr(module.optimizers())
    return f"the policy has probably diverged: lower model.optimizer.init_args.lr (it is {lr:g})"


def last_good(trainer: Any, diverged_at: int | None = None) -> str:
    """Which checkpoint to go on from.

    Args:
        trainer: Lightning's.
        diverged_at: the step before which the policy's weights were lost; None where they are sound.
    """
    kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)]
    return kept[0].good(diverged_at) if kept else "no checkpoints are kept"


def non_finite(
    module: Any, what: str, rows: Sequence[str], suspects: Sequence[str] = (), *, diverged: bool = False
) -> NonFiniteLossError:
    """The error that ends a run.

    Args:
        module: the LightningModule.
        what: is not finite.
        rows: names of the batch's rows.
        suspects: those that it comes from.
        diverged: the policy's own log-probs are not finite.
    """
    named = f"rows with a non-finite log-prob or value: {', '.join(suspects)}\n" if suspects else ""
    step, trainer = module.global_step, module.trainer
    if not module.training:
        weights = f"step {step}" if step else f"{trainer.ckpt_path or 'the policy'}"
        return NonFiniteLossError(f"{what} with the weights of {weights}.\n{named}rows of the batch: {', '.join(rows)}")
    return NonFiniteLossError(
        f"{what} at optimizer step {step}, so the run stops before it takes that step.\n"
        f"{named}rows of the step: {', '.join(rows)}\n"
        + last_good(trainer, step if diverged else None)
        + (f"\n{lower_lr(module)}" if diverged and step else "")
    )


def check_policy(module: Any, batch: TokenBatch) -> None:
    """Checks on one row that the last step has not made the policy diverge; of earlier steps the next loss tells.

    Raises:
        NonFiniteLossError: where the policy has no finite log-probs for it.
    """
    device = module.device
    cuda = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda), module.trainer.precision_plugin.train_step_context():
        logps = module.scorer(batch.select(torch.tensor([0], device=device)))
    if float(sum_over_ranks((~logps.isfinite()).any().float())):
        raise NonFiniteLossError(
            f"after the last optimizer step, {module.global_step}, the policy has no finite log-probs for"
            f" {batch.row_ids[0]}: it has diverged. Lower the learning rate (model.optimizer.init_args.lr).\n"
            + last_good(module.trainer, module.global_step)
        )
