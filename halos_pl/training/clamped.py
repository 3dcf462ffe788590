"""Warns once if a run's reference point is mostly clamped: the loss is then one with z0 = 0."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn

#: Last steps that are looked at.
LAST = 20
#: A shorter run causes the warning at its end, if it has at least this many steps.
SHORT = 5


class ClampWatch:
    """Watches the figures of each step, which are already on the host."""

    def __init__(self) -> None:
        # Of the last steps: the estimate of those in which z0 was clamped to 0, None for the others.
        self._last: deque[float | None] = deque(maxlen=LAST)
        self._warned = False

    def see(self, figures: Mapping[str, float]) -> None:
        """Records a step.

        Args:
            figures: figures that the step logs.
        """
        clamped = figures.get("outcome/z0_clamped", 0.0) > 0.5 and figures.get("outcome/z0") == 0.0
        self._last.append(figures["outcome/z0_estimate"] if clamped else None)
        if len(self._last) == LAST:
            self._warn()

    def finish(self) -> None:
        """Issues the warning of a run that was too short for it."""
        if len(self._last) >= SHORT:
            self._warn()

    def _warn(self) -> None:
        estimates = [estimate for estimate in self._last if estimate is not None]
        if self._warned or 2 * len(estimates) <= len(self._last):
            return
        self._warned = True
        mean = sum(estimates) / len(estimates)
        rank_zero_warn(
            f"halos: the estimate of the reference point was negative and clamped to 0 in {len(estimates)} of the last"
            f" {len(self._last)} steps (its mean there is {mean:.3g} nats): the run trains as with z0 = 0, the"
            " reference point Zero, and the logged kl of 0 is not the KL divergence."
            " What it means: docs/findings/z0.md; what to do: docs/concepts/reference_point.md#why-is-my-kl-0"
        )
