"""The figures that a training step logs, and those that it passes to callbacks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from halos_pl.training.metrics import Losses, Means, Suspects, derived, finite_scores, row_figures
from halos_pl.training.non_finite import non_finite
from halos_pl.training.parts import Part

_IN_BAR = ("loss", "rewards/margins")


class StepFigures:
    """The figures of a step, on the device until they are read.

    Reading them waits for the device. So they are read once, together with the norm of the gradient, before the
    optimizer steps.

    Args:
        module: the LightningModule.
        parts: this rank's parts of the step.
    """

    def __init__(self, module: Any, parts: Sequence[Part]) -> None:
        self._module, self._parts = module, parts
        self._means, losses = Means(), Losses()
        for part in parts:
            losses.add(part.result)
            self._means.add(row_figures(part.rows, part.result, module.objective.halo))
        # The ranks' losses sum to the step's loss, so their counts must sum to 1.
        once = torch.full((), float(module.global_rank == 0), dtype=torch.float32, device=module.device)
        self._means.add({name: (value, once) for name, value in losses.items()})

    def read(self, *others: Tensor) -> list[float]:
        """Logs the figures over all ranks, and keeps them as ``module.figures``.

        Args:
            others: scalars on the device to read in the same transfer.

        Returns:
            The values of ``others``.

        Raises:
            NonFiniteLossError: if the loss is not finite.
        """
        totals = self._means.totals()
        numbers = torch.cat([totals.flatten(), *(other.detach().to(totals).view(1) for other in others)]).tolist()
        pairs = list(zip(numbers[: totals.numel() : 2], numbers[1 : totals.numel() : 2], strict=True))
        module = self._module
        figures = module.figures = derived(self._means.compute(pairs))
        if not math.isfinite(figures["loss"]):
            raise self._error(f"the loss is {figures['loss']}")
        rows, shown = len(self._parts[0].batch), on_host(figures)
        module.log_dict({k: v for k, v in shown.items() if k not in _IN_BAR}, batch_size=rows)
        module.log_dict({k: shown[k] for k in _IN_BAR if k in shown}, prog_bar=True, batch_size=rows)
        return numbers[totals.numel() :]

    def _error(self, what: str) -> Exception:
        suspects = Suspects()
        for part in self._parts:
            suspects.add(part.row_ids, part.rows, part.result)
        finite = all(bool(finite_scores(part.rows).all()) for part in self._parts)
        return non_finite(self._module, what, self._module.row_ids, suspects.names, diverged=not finite)


def on_host(figures: Mapping[str, float]) -> dict[str, Tensor]:
    """Figures in the form in which Lightning keeps them on the host: it would copy plain numbers to the device."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return {name: torch.tensor(value, dtype=dtype, device="cpu") for name, value in figures.items()}


def outcomes_of(parts: Sequence[Part]) -> dict[str, Tensor]:
    """``outcome`` (u in nats, float [n]) and ``desirable`` (BoolTensor [n]) of a HALO's rows; empty for baselines."""
    outcomes = [part.result.outcomes.outcome for part in parts if part.result.outcomes is not None]
    if not outcomes:
        return {}
    return {"outcome": torch.cat(outcomes), "desirable": torch.cat([part.rows.labels.desirable for part in parts])}
