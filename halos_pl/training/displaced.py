"""Warns once if a run makes its chosen completions much less likely while their margin over the others is positive."""

from __future__ import annotations

import math
from collections.abc import Mapping

from halos_pl.training.watch import Watch

#: Nats per token by which chosen completions must have become less likely; their perplexity is then 1.6 times as high.
FALL = 0.5


class DisplacementWatch(Watch[tuple[float, ...]]):
    """Keeps the displacement (nats), length (tokens) and margin of each step that has all three.

    The reference must be the policy before training. Another model's log-probs may differ as much at the first step.
    """

    def shown(self, figures: Mapping[str, float]) -> tuple[float, ...] | None:
        names = ("logps/displacement", "lengths/chosen", "rewards/margins")
        seen = tuple(figures.get(name, math.nan) for name in names)
        return None if any(map(math.isnan, seen)) else seen

    def warning(self, steps: list[tuple[float, ...]], of: int) -> str | None:
        displacement, length, margin = (sum(column) / len(steps) for column in zip(*steps, strict=True))
        if margin <= 0 or displacement > -FALL * length:
            return None
        return (
            f"over the last {of} steps, the chosen completions are {-displacement / length:.2g} nats per token less"
            f" likely than under the reference (logps/displacement: {displacement:.3g} nats a completion), although the"
            f" margin over the rejected ones is positive (rewards/margins: {margin:.3g}): the policy unlearns both."
            " What it means and what to do: docs/faq.md#chosen-log-probs-fall-is-that-bad"
        )
