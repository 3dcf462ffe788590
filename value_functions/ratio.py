"""Value of a probability ratio, clipped or not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.bounded import bounded_exp


class RatioClip(ValueFunction):
    """v(u) = e^u kept between ``low`` and ``high``: the clipped ratio of PPO.

    With only ``high`` = 1 + epsilon the value of a good action, with only ``low`` = 1 - epsilon that of a bad one
    (Schulman et al. 2017, eq. 7). e^u is convex on (0, log high), so by the letter it is no value function of a
    HALO; ``Clipped`` over ``Identity`` clips in log-space and is one. Beyond 40 nats it continues linearly.

    Args:
        low, high: ratios, 0 < low < 1 < high; null for no bound.

    Raises:
        ValueError: for bounds that do not enclose 1.
    """

    violates: Mapping[str, str] = {"concave_on_gains": "e^u is convex on (0, log high)"}

    def __init__(self, *, low: float | None = None, high: float | None = None) -> None:
        super().__init__()
        if not (low is None or 0 < low < 1) or not (high is None or high > 1):
            raise ValueError(f"RatioClip: the bounds are {low} and {high}; it must be 0 < low < 1 < high, or null")
        self.low, self.high = low, high

    def forward(self, u: Tensor) -> Tensor:
        # u is clamped, not e^u: past 88 nats that would be infinite, with a NaN gradient behind the clamp.
        low = None if self.low is None else math.log(self.low)
        high = None if self.high is None else math.log(self.high)
        return bounded_exp(u if low is None and high is None else torch.clamp(u, low, high))
