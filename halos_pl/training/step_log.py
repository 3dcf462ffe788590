"""The figures that a training step logs, and those that it passes to callbacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halos_pl.training.engine import Part
from halos_pl.training.metrics import Losses, Means, Suspects, row_figures, with_margin
from halos_pl.training.non_finite import non_finite

_IN_BAR = ("loss", "rewards/margins")


def log_step(module: Any, parts: Sequence[Part]) -> None:
    """Logs the figures of a step over all ranks, and keeps them as ``module.figures``.

    Args:
        module: the LightningModule.
        parts: this rank's parts of the step.

    Raises:
        NonFiniteLossError: if the loss is not finite.
    """
    means, losses, suspects = Means(), Losses(), Suspects()
    for part in parts:
        losses.add(part.result)
        means.add(row_figures(part.rows, part.result, module.objective.halo))
        suspects.add(part.row_ids, part.rows, part.result)
    # The ranks' losses sum to the step's loss, so their counts must sum to 1.
    once = torch.tensor(float(module.global_rank == 0), dtype=torch.float32, device=module.device)
    means.add({name: (value, once) for name, value in losses.items()})
    figures = module.figures = with_margin(means.compute())
    if not math.isfinite(figures["loss"]):
        finite = all(bool(part.rows.policy_logps.isfinite().all()) for part in parts)
        what = f"the loss is {figures['loss']}"
        raise non_finite(module, what, module.row_ids, suspects.names, diverged=not finite)
    rows = len(parts[0].batch)
    module.log_dict({k: v for k, v in figures.items() if k not in _IN_BAR}, batch_size=rows)
    module.log_dict({k: figures[k] for k in _IN_BAR if k in figures}, prog_bar=True, batch_size=rows)


def outcomes_of(parts: Sequence[Part]) -> dict[str, Tensor]:
    """``outcome`` (u in nats, float [n]) and ``desirable`` (BoolTensor [n]) of a HALO's rows; empty for baselines."""
    outcomes = [part.result.outcomes.outcome for part in parts if part.result.outcomes is not None]
    if not outcomes:
        return {}
    return {"outcome": torch.cat(outcomes), "desirable": torch.cat([part.rows.labels.desirable for part in parts])}
