"""Warns once if a run with a finite loss does not learn: its gradients are zero, or all of them are clipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from halos_pl.policy.sharding import by_kind, local, total_norm
from halos_pl.training.checks import check_clipping
from halos_pl.training.non_finite import NonFiniteLossError, highest_lr, lower_lr, non_finite
from halos_pl.training.step_log import StepFigures, on_host

#: Consecutive steps after which a warning is due.
ZERO, CLIPPED = 2, 20
#: A shorter run causes the warning at its end if it has at least this many steps and all of them were clipped.
SHORT = 5
#: Clipping by value leaves little but signs if it cuts at least this share of a gradient's entries.
MOST = 0.99


def mostly_cut(gradients: Iterable[Tensor], value: float) -> Tensor:
    """Whether clipping by value cuts at least ``MOST`` of the nonzero entries; a BoolTensor scalar on their device."""
    parts = list(gradients)
    counts = [[torch.count_nonzero(local(g).abs() > limit) for g in parts] for limit in (value, 0)]
    cut, nonzero = (torch.stack(each).sum() for each in counts)
    return (nonzero > 0) & (cut >= MOST * nonzero)


class GradientWatch:
    """Watches the norm of each step's gradient, which is already on the host."""

    def __init__(self) -> None:
        self._steps = self._zero = 0
        self._clipped: list[float] = []
        self._learned = False  # some step had a gradient
        self._by_value = False
        self._warned: set[str] = set()

    def see(
        self,
        norm: float,
        clip: float | None,
        *,
        lr: float,
        step: int,
        figures: Mapping[str, float],
        cut: bool | None = None,
    ) -> None:
        """Records a step.

        Args:
            norm: norm of the gradient before clipping, finite.
            clip: limit of the norm or of each entry; None or 0 for no clipping.
            lr: the run's highest learning rate.
            step: number of optimizer steps before this one.
            figures: figures that the step logs.
            cut: with clipping by value, whether (nearly) all entries are cut.
        """
        self._by_value = cut is not None
        self._steps += 1
        self._zero = self._zero + 1 if norm == 0 else 0
        if self._zero == ZERO:
            self._warn_once(
                "zero", f"the gradient is exactly 0 since step {step - ZERO + 2}: {self._why_zero(lr, figures)}"
            )
        self._learned = self._learned or norm > 0
        if clip and (norm > clip if cut is None else cut):
            self._clipped.append(norm)
            if len(self._clipped) == CLIPPED:
                self._say_clipped(clip, lr, f"each of the last {CLIPPED} steps was")
        else:
            self._clipped = []

    def finish(self, clip: float | None, *, lr: float, scale: float | None = None) -> None:
        """Issues the warnings that depend on the whole run.

        Args:
            clip: limit that gradients were clipped to.
            lr: the run's highest learning rate.
            scale: loss scale, if float16's scaler sets one.
        """
        if clip and len(self._clipped) == self._steps >= SHORT:
            self._say_clipped(clip, lr, f"all {self._steps} steps were")
        if scale is not None and scale < 1:
            self._warn_once(
                "scale",
                f"the loss scale has fallen to {scale:g}: gradients overflow in float16, and such steps are skipped."
                f" Lower model.optimizer.init_args.lr (it is {lr:g}), or choose trainer.precision bf16-mixed",
            )

    def _why_zero(self, lr: float, figures: Mapping[str, Any]) -> str:
        weights = [figures.get(f"outcome/weight_{side}", math.nan) for side in ("chosen", "rejected")]
        if not any(weight > 0 for weight in weights) and not all(map(math.isnan, weights)):
            return (
                "nothing is learned, as no row has a weight (outcome/weight_chosen, outcome/weight_rejected). Use data"
                " with rows of the class, or with differences of score within a prompt, that model.feedback weights"
            )
        lower = f"lower model.optimizer.init_args.lr (it is {lr:g})"
        if not self._learned:
            lower = "the first gradient was 0 already, so the learning rate is not the cause"
        saturated, outcome = figures.get("outcome/saturation", 0.0), figures.get("outcome/u")
        if saturated > 0.9 and outcome is not None:
            return (
                f"nothing is learned, as the value function is flat at the outcomes (outcome/u is {outcome:.3g} nats,"
                f" {100 * saturated:.0f}% of the rows are saturated). {lower[:1].upper()}{lower[1:]}; or lower the"
                " value function's beta"
            )
        return f"nothing is learned. Unless the loss is at its minimum, the policy has diverged: {lower}"

    def _say_clipped(self, clip: float, lr: float, which: str) -> None:
        low, high = min(self._clipped), max(self._clipped)
        where = " in nearly all entries" if self._by_value else ""
        self._warn_once(
            "clipped",
            f"{which} clipped{where}: grad_norm is {low:.3g} to {high:.3g}, trainer.gradient_clip_val is {clip:g}. If"
            f" the loss does not fall, lower model.optimizer.init_args.lr (it is {lr:g}); if it does, raise the"
            " clipping value",
        )

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(f"halos: {text}")


def finish_watch(module: Any, watch: GradientWatch) -> None:
    """Ends ``watch`` with the module's run, so that it issues its last warnings."""
    scaler = getattr(module.trainer.precision_plugin, "scaler", None)
    scale = scaler.get_scale() if scaler is not None else None
    watch.finish(module.trainer.gradient_clip_val, lr=highest_lr(module.optimizers()), scale=scale)


def clip_gradients(
    module: Any, watch: GradientWatch, step: StepFigures, optimizer: Any, value: float | None, algorithm: str | None
) -> None:
    """Clips by norm or value, and logs the step's figures and, as ``grad_norm``, the norm before clipping.

    It waits for the device once, where the optimizer has not stepped yet.

    Args:
        module: the LightningModule.
        watch: records the step.
        step: figures of the step.
        optimizer: the optimizer whose gradients are clipped.
        value: limit of the norm or of each entry; None or 0 for no clipping.
        algorithm: ``norm``, ``value`` or None.

    Raises:
        NonFiniteLossError: if the loss or the norm is not finite, so that the step would make the policy NaN.
        ValueError: if the clipping value, which a callback may have set, is invalid.
    """
    check_clipping(value, algorithm)
    plugin = module.trainer.precision_plugin
    if getattr(plugin, "scaler", None) is not None:  # float16's scaler skips such steps, and knows the scale
        step.read()
        module.clip_gradients(optimizer, value, algorithm)
        return
    parameters = [p for p in plugin.main_params(optimizer) if p.grad is not None]
    norm = total_norm([p.grad for p in parameters])
    by_value = algorithm == "value"
    cut = [mostly_cut((p.grad for p in parameters), value)] if value and by_value and parameters else []
    size, *was_cut = step.read(norm, *cut)
    if not math.isfinite(size):
        what = f"the loss is finite, but the norm of its gradient is {size}"
        slopes = "check that the value function has a finite slope everywhere, also at u = 0: halos check"
        hint = f"{lower_lr(module)}. If that does not help, {slopes}" if module.global_step else slopes
        raise NonFiniteLossError(f"{non_finite(module, what, module.row_ids)}\n{hint}")
    module.log_dict(on_host({"grad_norm": size}))
    watch.see(
        size,
        value,
        lr=highest_lr(optimizer),
        step=module.global_step,
        figures=module.figures,
        cut=bool(was_cut[0]) if was_cut else None,
    )
    limit = float(value or 0.0)
    for kind in by_kind(parameters) if limit else ():
        if by_value:
            torch.nn.utils.clip_grad_value_(kind, limit)
        else:
            torch.nn.utils.clip_grads_with_norm_(kind, limit, norm)
