"""Says once what keeps a run from learning although its loss is finite: no gradient, or none that is not clipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from halos_pl.training.checks import check_clipping
from halos_pl.training.non_finite import NonFiniteLossError, highest_lr, lower_lr, non_finite

#: Steps in a row after which it is said.
ZERO, CLIPPED = 2, 20
#: A shorter run, of at least so many steps all of which were clipped, is told at its end.
SHORT = 5
#: Clipping by value leaves nothing but signs where it cuts so large a share of a gradient's entries.
MOST = 0.99


def mostly_cut(gradients: Iterable[Tensor], value: float) -> bool:
    """Whether clipping by value cuts at least ``MOST`` of the entries that are not 0."""
    parts = list(gradients)
    cut, all_of_them = (sum(torch.count_nonzero(g.abs() > limit) for g in parts) for limit in (value, 0))
    return bool(all_of_them) and bool(cut >= MOST * all_of_them)


class GradientWatch:
    """Looks at the norm of each step's gradient, which is on the host already."""

    def __init__(self) -> None:
        self._steps = self._zero = 0
        self._clipped: list[float] = []
        self._learned = False  # some step had a gradient
        self._by_value = False
        self._said: set[str] = set()

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
        """Takes note of a step.

        Args:
            norm: of the gradient before clipping, finite.
            clip: the norm that it is clipped to, or each of its entries; None or 0 for none.
            lr: the highest of the run.
            step: optimizer steps before this one.
            figures: what the step logs.
            cut: where entries are clipped, whether (nearly) all of them are.
        """
        self._by_value = cut is not None
        self._steps += 1
        self._zero = self._zero + 1 if norm == 0 else 0
        if self._zero == ZERO:
            self._say("zero", f"the gradient is exactly 0 since step {step - ZERO + 2}: {self._why_zero(lr, figures)}")
        self._learned = self._learned or norm > 0
        if clip and (norm > clip if cut is None else cut):
            self._clipped.append(norm)
            if len(self._clipped) == CLIPPED:
                self._say_clipped(clip, lr, f"each of the last {CLIPPED} steps was")
        else:
            self._clipped = []

    def finish(self, clip: float | None, *, lr: float, scale: float | None = None) -> None:
        """Warns at the end of a run of what applies to all of its steps.

        Args:
            clip: what gradients were clipped to.
            lr: the highest of the run.
            scale: of the loss, where float16's scaler has one.
        """
        if clip and len(self._clipped) == self._steps >= SHORT:
            self._say_clipped(clip, lr, f"all {self._steps} steps were")
        if scale is not None and scale < 1:
            self._say(
                "scale",
                f"the scale of the loss has fallen to {scale:g}: gradients overflow in float16, and such steps are"
                f" skipped. Lower model.optimizer.init_args.lr (it is {lr:g}), or choose trainer.precision bf16-mixed",
            )

    def _why_zero(self, lr: float, figures: Mapping[str, Any]) -> str:
        lower = f"lower model.optimizer.init_args.lr (it is {lr:g})"
        if not self._learned:
            lower = "it was so before the first step, so the learning rate is not the cause"
        saturated, outcome = figures.get("outcome/saturation", 0.0), figures.get("outcome/u")
        if saturated > 0.9 and outcome is not None:
            return (
                f"nothing is learned, as the value function is flat where the outcomes are (outcome/u is {outcome:.3g}"
                f" nats, {100 * saturated:.0f} % of the rows are saturated). {lower[:1].upper()}{lower[1:]}; or lower"
                " beta, the value function's"
            )
        return f"nothing is learned. Unless the loss is as small as it can be, the policy has diverged: {lower}"

    def _say_clipped(self, clip: float, lr: float, which: str) -> None:
        low, high = min(self._clipped), max(self._clipped)
        where = " in nearly all entries" if self._by_value else ""
        self._say(
            "clipped",
            f"{which} clipped{where}: grad_norm is {low:.3g} to {high:.3g}, trainer.gradient_clip_val is {clip:g}. If"
            f" the loss does not fall, lower model.optimizer.init_args.lr (it is {lr:g}); if it does, raise the"
            " clipping value",
        )

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            rank_zero_warn(f"halos: {text}")


def finish_watch(module: Any, watch: GradientWatch) -> None:
    """Has ``watch`` warn of what applies to all steps of the module's run."""
    scaler = getattr(module.trainer.precision_plugin, "scaler", None)
    scale = scaler.get_scale() if scaler is not None else None
    watch.finish(module.trainer.gradient_clip_val, lr=highest_lr(module.optimizers()), scale=scale)


def clip_gradients(
    module: Any, watch: GradientWatch, optimizer: Any, value: float | None, algorithm: str | None
) -> None:
    """Clips by norm or value, and logs the norm before clipping as ``grad_norm``.

    Args:
        module: the LightningModule.
        watch: is told of the step.
        optimizer: what it steps with.
        value: the norm, or the value of each entry, that gradients are clipped to; None or 0 for none.
        algorithm: ``norm``, ``value`` or None.

    Raises:
        NonFiniteLossError: where the norm is not finite, so that the step would make the policy NaN.
        ValueError: for an invalid clipping value, which a callback may have set.
    """
    check_clipping(value, algorithm)
    plugin = module.trainer.precision_plugin
    if getattr(plugin, "scaler", None) is not None:  # float16's scaler skips such steps, and knows the scale
        module.clip_gradients(optimizer, value, algorithm)
        return
    parameters = [p for p in plugin.main_params(optimizer) if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    size = norm.item()
    if not math.isfinite(size):
        what = f"the loss is finite, but its gradient's norm is {size}"
        slopes = "is each slope of the value function finite, also at u = 0? halos check looks"
        hint = f"{lower_lr(module)}. If not: {slopes}" if module.global_step else slopes
        raise NonFiniteLossError(f"{non_finite(module, what, module.row_ids)}\n{hint}")
    module.log("grad_norm", norm)
    by_value = algorithm == "value"
    cut = mostly_cut((p.grad for p in parameters), value) if value and by_value else None
    watch.see(size, value, lr=highest_lr(optimizer), step=module.global_step, figures=module.figures, cut=cut)
    if by_value:
        module.clip_gradients(optimizer, value, algorithm)
    elif value:
        torch.nn.utils.clip_grads_with_norm_(parameters, float(value), norm)
