"""A checkpoint's contents besides Lightning's own entries: the reference, random states and settings."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from halos_pl.training.checks import check_limits
from halos_pl.training.non_finite import check_finite, last_good
from halos_pl.training.random_state import random_states, set_random_state
from halos_pl.training.resume import finished_progress


def fill(module: Any, checkpoint: dict[str, Any]) -> None:
    """Drops frozen weights from a checkpoint, and adds everything else that a run resumes from.

    Raises:
        NonFiniteWeightsError: if the policy has diverged.
    """
    if module.models.bound and (state := module.models.reference_model.state()):
        checkpoint["reference_model"] = state
    trained = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):  # a tied weight has two names
        if parameter.requires_grad:
            trained.add(name)
        else:
            checkpoint["state_dict"].pop(name, None)
    check_finite(checkpoint, trained, last_good(module.trainer))
    checkpoint["rng_states"] = random_states(module.device)
    checkpoint["settings"] = module.record.state(module.trainer)


def take(module: Any, checkpoint: dict[str, Any]) -> None:
    """Adds the loaded policy's frozen weights to a checkpoint; refuses to resume a different run.

    Raises:
        ValueError: naming what differs from the checkpoint's run, or the limit that it has already reached.
    """
    trainer = module.trainer
    spec = module.models.spec
    start_matters = module.models.bound or spec is None or spec.lora is not None
    module.record.compare(checkpoint, trainer, start_matters=start_matters)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            checkpoint["state_dict"].setdefault(name, parameter.detach())
    _check_state(module, checkpoint["state_dict"])
    if module.models.bound:
        module.models.reference_model.restore(checkpoint.get("reference_model", {}))
    module.rng_states = checkpoint.get("rng_states")
    if trainer.state.fn == TrainerFn.FITTING:
        epoch, step = finished_progress(checkpoint["loops"]["fit_loop"])
        check_limits(trainer, epoch, checkpoint["global_step"])
        resume_at = getattr(trainer.datamodule, "resume_at", None)
        if resume_at is not None:
            resume_at(epoch, step)
            # A strategy that restores after it has set up the optimizer has made a loader already.
            trainer.fit_loop._combined_loader = None


def restore_random_state(module: Any) -> None:
    """Restores this rank's random state, which :func:`take` has read."""
    states, module.rng_states = module.rng_states, None
    if states and module.global_rank < len(states):
        set_random_state(states[module.global_rank], module.device)


def entry_kind(value: Any) -> Any:
    """Shape of a state dict's entry, and whether it is floating-point; a replacement must have the same."""
    return (value.shape, value.is_floating_point()) if isinstance(value, Tensor) else None


def _check_state(module: Any, saved: dict[str, Any]) -> None:
    kinds = [{k: entry_kind(v) for k, v in state.items()} for state in (module.state_dict(), saved)]
    differing = sorted(k for k in kinds[0].keys() | kinds[1].keys() if kinds[0].get(k, "-") != kinds[1].get(k, "-"))
    if differing:
        raise ValueError(
            f"{module.trainer.ckpt_path} does not fit this policy and objective: {len(differing)} entries differ,"
            f" first {', '.join(differing[:3])}. Resume with the config of its own run, or start a new run"
        )
