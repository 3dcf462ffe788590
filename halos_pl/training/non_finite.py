"""Stops a run at the first number that is not finite, and names the rows or weights and where to resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from halos_pl.batch import TokenBatch
from halos_pl.distributed import sum_over_ranks, world_size
from halos_pl.policy.quantized_weights import flattened
from halos_pl.training.checkpoint import LastCheckpoint
from halos_pl.training.checkpoint_tree import local_of


class NonFiniteLossError(FloatingPointError):
    """The loss of a step is not finite; the message names its rows and the last checkpoint."""


class NonFiniteWeightsError(FloatingPointError):
    """The weights to be saved are not finite; the message names the first tensors and the last good checkpoint."""


def highest_lr(optimizer: Any) -> float:
    """The highest learning rate that the config sets, before warm-up and decay."""
    return max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)


def lower_lr(module: Any) -> str:
    """Advice for a policy that has diverged."""
    lr = highest_lr(module.optimizers())
    return f"the policy has probably diverged: lower model.optimizer.init_args.lr (it is {lr:g})"


def last_good(trainer: Any, diverged_at: int | None = None) -> str:
    """A line that names the checkpoint to resume from.

    Args:
        trainer: Lightning's Trainer.
        diverged_at: step before which the weights diverged; None if they are finite.
    """
    kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)]
    return kept[0].good(diverged_at) if kept else "no checkpoints are kept"


def non_finite(
    module: Any, what: str, rows: Sequence[str], suspects: Sequence[str] = (), *, diverged: bool = False
) -> NonFiniteLossError:
    """The error that ends a run.

    Args:
        module: the LightningModule.
        what: a clause that names the figure, such as "the loss is nan".
        rows: names of the batch's rows on this rank.
        suspects: names of the rows that cause it.
        diverged: whether the policy's own log-probs are not finite.
    """
    named = f"rows with a non-finite log-prob or value: {', '.join(suspects)}\n" if suspects else ""
    step, trainer = module.global_step, module.trainer
    here = f" on rank {trainer.global_rank}" if trainer.world_size > 1 else ""
    if not module.training:
        weights = f"step {step}" if step else f"{trainer.ckpt_path or 'the policy'}"
        return NonFiniteLossError(
            f"{what} with the weights of {weights}.\n{named}rows of the batch{here}: {', '.join(rows)}"
        )
    return NonFiniteLossError(
        f"{what} at optimizer step {step}, so the run stops before it takes that step.\n"
        f"{named}rows of the step{here}: {', '.join(rows)}\n"
        + last_good(trainer, step if diverged else None)
        + (f"\n{lower_lr(module)}" if diverged and step else "")
    )


def check_policy(module: Any, batch: TokenBatch) -> None:
    """Checks on one row that the last step did not make the policy diverge; for earlier steps, the next loss shows it.

    Raises:
        NonFiniteLossError: if the policy's log-probs or scalar for that row are not finite.
    """
    device = module.device
    cuda = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda), module.trainer.precision_plugin.train_step_context():
        row = batch.select(torch.tensor([0], device=device))
        scores = module.scorer(row, wanted="scores", needs=replace(module.objective.needs, routing=False))
    finite = torch.stack([values.isfinite().all() for values in (scores.logps, scores.scalar) if values is not None])
    if float(sum_over_ranks((~finite).any().float())):
        raise NonFiniteLossError(
            f"after the last optimizer step, {module.global_step}, the policy has no finite"
            f" {'log-probs' if scores.scalar is None else 'scores'} for {batch.row_ids[0]}: it has diverged. Lower the"
            " learning rate (model.optimizer.init_args.lr).\n" + last_good(module.trainer, module.global_step)
        )


def check_finite(checkpoint: Mapping[str, Any], trained: set[str], good: str) -> None:
    """Refuses to save weights that have diverged. Reads each tensor once and copies one number from each device.

    All ranks must call it; each checks its own parts of sharded tensors.

    Args:
        checkpoint: the checkpoint to be written.
        trained: names of the trained entries of its ``state_dict``; others, such as masks, may contain infinities.
        good: last line of the message, which names the last good checkpoint.

    Raises:
        NonFiniteWeightsError: on all ranks, naming the first tensors that are not finite.
    """
    state = [(name, local_of(t)) for name, t in checkpoint["state_dict"].items() if isinstance(t, Tensor)]
    fixed = [(name, torch.where(t.isinf(), 0, t)) for name, t in state if name not in trained and t.is_floating_point()]
    checked = [(name, t) for name, t in state if name in trained]
    checked += fixed + list(_tensors(checkpoint.get("reference_model", {}), "reference_model"))
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        checked += _tensors(optimizer.get("state", {}), f"optimizer_states.{number}")
    checked = [(name, t) for name, t in checked if t.is_floating_point() and t.numel()]
    finite = not checked or bool(torch.nn.utils.get_total_norm([t for _, t in checked]).isfinite())
    device = state[0][1].device if state else torch.device("cpu")  # also on a rank whose parts are all empty
    if not float(sum_over_ranks(torch.tensor(0.0 if finite else 1.0, device=device))):
        return
    names, what = [name for name, tensor in checked if not tensor.isfinite().all()], "are not finite"
    names = _of_all_ranks(names)
    if not names:  # no policy can be computed with weights whose squares overflow
        names = [n for n, t in state if n in trained and t.numel() and not t.float().norm().isfinite()]
        names, what = _of_all_ranks(names), "are so large that their squares are not finite"
    if not names:
        return
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise NonFiniteWeightsError(
        f"after optimizer step {checkpoint['global_step']}, these tensors {what}: {', '.join(names[:3])}{more};"
        f" nothing was saved. Lower the learning rate (model.optimizer.init_args.lr).\n{good}"
    )


def _of_all_ranks(names: list[str]) -> list[str]:
    """The names on any rank, each once."""
    everywhere: list[Any] = [names] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(everywhere, names)
    return list(dict.fromkeys(name for part in everywhere for name in part))


def _tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield from flattened(local_of(tree), name)
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, f"{name}.{key}")
