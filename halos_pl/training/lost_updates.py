"""Warns if updates are too small for the precision of the weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from halos_pl.policy.sharding import local

HALF = (torch.bfloat16, torch.float16)
#: Advice for updates that float32 weights lose.
RAISE = "Raise model.optimizer.init_args.lr"


def _is_zero(value: Any) -> bool:
    return isinstance(value, float | int | Tensor) and float(value) == 0


class LostUpdates:
    """Warns if an optimizer's step leaves a share of the weights unchanged, as measured on a sample.

    Measured at the first step with a learning rate above 0, and at the first step at the peak rate. With half-precision
    weights 1% is worth a warning; with float32, some weights never move, as their gradients are small.

    Args:
        optimizer: the optimizer that steps on them.
        hint: the advice that ends the warning about half-precision weights.
    """

    SAMPLE = 4096
    NOTABLE = 0.01
    NOTABLE_IN_FLOAT32 = 0.99

    def __init__(self, optimizer: Optimizer, hint: str) -> None:
        self.hint = hint
        every = [p for group in optimizer.param_groups for p in group["params"]]
        self._half = any(p.dtype in HALF for p in every)
        self._parameters = [p for p in every if p.dtype in HALF or not self._half]
        self._before: list[Tensor] = []
        self._measured = self._done = False
        optimizer.register_step_pre_hook(lambda *_: self._look(optimizer))
        optimizer.register_step_post_hook(lambda *_: self._compare(optimizer))
        if all(_is_zero(group.get("lr")) for group in optimizer.param_groups):
            rank_zero_warn("halos: model.optimizer.init_args.lr is 0, so no weight will change")

    def _sample(self, values: Tensor) -> Tensor:
        each = max(1, self.SAMPLE // len(self._parameters))
        values = local(values.detach())
        return values.flatten()[:: max(1, values.numel() // each)]

    @staticmethod
    def _height(optimizer: Optimizer) -> tuple[float, bool]:
        """The learning rate, and whether it is at its peak."""
        group = max(optimizer.param_groups, key=lambda group: float(group["lr"]))
        return float(group["lr"]), float(group["lr"]) >= float(group.get("initial_lr", group["lr"]))

    def _look(self, optimizer: Optimizer) -> None:
        if self._done:
            return
        lr, full = self._height(optimizer)
        if lr > 0 and (full or not self._measured):
            self._before = [self._sample(p).clone() for p in self._parameters]

    def _compare(self, optimizer: Optimizer) -> None:
        if not self._before:
            return
        counts = []
        for parameter, before in zip(self._parameters, self._before, strict=True):
            if parameter.grad is not None:
                moving = self._sample(parameter.grad) != 0
                counts.append(torch.stack([moving.sum(), (moving & (self._sample(parameter) == before)).sum()]))
        with_gradient, kept = torch.stack(counts).sum(dim=0).tolist() if counts else (0, 0)
        lr, full = self._height(optimizer)
        self._before, self._measured, self._done = [], True, full
        if with_gradient and kept > with_gradient * (self.NOTABLE if self._half else self.NOTABLE_IN_FLOAT32):
            kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in self._parameters}))
            rank_zero_warn(
                f"halos: {100 * kept / with_gradient:.0f}% of the {kinds} weights with a gradient kept their value in"
                f" a step of {type(optimizer).__name__} at a learning rate of {lr:g}: updates below their precision"
                f" are lost. {self.hint if self._half else RAISE}"
            )
