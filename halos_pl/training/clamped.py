"""Warns once if a run's reference point is mostly clamped: the loss is then one with z0 = 0."""

from __future__ import annotations

from collections.abc import Mapping

from halos_pl.training.watch import Watch


class ClampWatch(Watch[float]):
    """Keeps the estimates that were clamped to 0."""

    def shown(self, figures: Mapping[str, float]) -> float | None:
        clamped = figures.get("outcome/z0_clamped", 0.0) > 0.5 and figures.get("outcome/z0") == 0.0
        return figures["outcome/z0_estimate"] if clamped else None

    def warning(self, steps: list[float], of: int) -> str:
        mean = sum(steps) / len(steps)
        return (
            f"the estimate of the reference point was negative and clamped to 0 in {len(steps)} of the last {of} steps"
            f" (its mean there is {mean:.3g} nats): the run trains as with z0 = 0, the reference point Zero, and the"
            " logged kl of 0 is not the KL divergence."
            " What it means: docs/findings/z0.md; what to do: docs/concepts/reference_point.md#why-is-my-kl-0"
        )
