"""One arm compared with the reference arm on one metric, as a report states it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from halos_pl.study.power import FARTHEST, Noise, detectable

#: The decision on a comparison. Only the first three are claims, and only the primary metric gets them.
Decision = Literal[
    "significant over seeds",
    "differs in these runs only",
    "equivalent",
    "not significant",
    "identical",
    "one seed so far",
    "exploratory",
]
Scale = Literal["difference", "ratio"]


def ratio(size: float) -> str:
    """A ratio above 1 with two significant digits or, near 1, with two digits of its excess over 1."""
    beyond = 0 if size <= 1 else math.floor(math.log10(size - 1))
    return f"{size:.{max(2, 1 - beyond)}g}"


@dataclass(frozen=True)
class Comparison:
    """An arm against the reference arm, paired by example, and by seed where both have seeds.

    Attributes:
        metric, arm, reference: names of the metric and of the two arms.
        scale: ``difference`` (arm - reference, in the metric's unit) or ``ratio`` (arm / reference, of geometric means
            over runs; for positive metrics, which are tested on the log scale).
        effect: the estimate, on that scale.
        low, high: its 95% interval, not corrected for the other comparisons; within -1 and 1 for shares.
        p: p of the test behind the decision, uncorrected; NaN without a test.
        adjusted: p corrected for all comparisons on the primary metric; None for an exploratory metric.
        decision: see ``Decision``.
        df: degrees of freedom of the test; NaN if it has none.
        examples: number of prompts.
        seeds: number of seeds that both sides have; the arm's if the reference is the untrained model, which has none.
        planned: number of seeds of the study.
        margin: margin of equivalence, on that scale; None if the study has none, or if it is a ratio and the means are
            not positive.
        noise: variances of the difference, on the scale of the test; None if unknown.
        level: level of the strictest step of the correction.
        share: whether the metric lies between 0 and 1, so that no difference exceeds 1.
    """

    metric: str
    arm: str
    reference: str
    scale: Scale
    effect: float
    low: float
    high: float
    p: float
    adjusted: float | None
    decision: Decision
    df: float
    examples: int
    seeds: int
    planned: int
    margin: float | None = None
    noise: Noise | None = None
    level: float = 0.05
    share: bool = False

    @cached_property
    def detectable(self) -> float | None:
        """The smallest effect on that scale that the test detects with a power of 0.8 at the strictest step.

        None if it is unknown, or larger than the metric allows.
        """
        size = None if self.noise is None or self.exploratory else detectable(self.noise, self.level)
        if size is None or (self.share and size > 1) or (self.scale == "ratio" and size > FARTHEST):
            return None
        return math.exp(size) if self.scale == "ratio" else size

    @property
    def null(self) -> float:
        """The effect of no difference: 0, or 1 as a ratio."""
        return 1.0 if self.scale == "ratio" else 0.0

    @property
    def significant(self) -> bool:
        """Whether the difference is significant over seeds, so that other runs of these arms would differ too."""
        return self.decision == "significant over seeds"

    @property
    def runs_only(self) -> bool:
        """Whether these runs differ, but other runs need not."""
        return self.decision == "differs in these runs only"

    @property
    def exploratory(self) -> bool:
        """Whether the metric is not the primary one: it has an estimate and an interval, but no decision."""
        return self.adjusted is None

    @property
    def figure(self) -> str:
        """The effect with its interval: ``+0.12 [+0.03, +0.21]``, or ``x 1.4 [1.1, 1.8]``."""
        if self.scale == "ratio":
            return f"x {self.effect:.3g} [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.effect:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"

    @property
    def verdict(self) -> str:
        """The decision in a few words, with the number of seeds if some are missing."""
        if self.decision == "equivalent":
            return f"equivalent within {'a factor of' if self.scale == 'ratio' else '±'} {self.margin:.3g}"
        if self.decision == "not significant":
            if self.detectable is None:
                return "not significant (too few values for 80% power at any difference)"
            ratios = self.scale == "ratio"
            size = f"a factor of {ratio(self.detectable)}" if ratios else f"a difference of {self.detectable:.2g}"
            return f"not significant (80% power for {size})"
        some = 1 < self.seeds < self.planned and self.decision in ("significant over seeds", "equivalent")
        return f"{self.decision} ({self.seeds} of {self.planned} seeds)" if some else self.decision
