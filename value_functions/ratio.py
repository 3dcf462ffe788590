"""The value of a probability ratio, optionally clipped."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.bounded import bounded_exp


class RatioClip(ValueFunction):
    """v(u) = e^u, clamped to [``low``, ``high``]: the clipped ratio of PPO.

    ``high`` = 1 + epsilon alone is for good actions, ``low`` = 1 - epsilon alone for bad ones (Schulman et al. 2017,
    eq. 7). e^u is convex on (0, log high), so strictly it is not the value function of a HALO; ``Clipped`` around
    ``Identity`` clips in log-space and is one. Beyond 40 nats it continues linearly.

    Args:
        low, high: bounds of the ratio, 0 < low < 1 < high; null for no bound.

    Raises:
        ValueError: the bounds do not enclose 1.
    """

    violates: Mapping[str, str] = {"concave_on_gains": "e^u is convex on (0, log high)"}

    def __init__(self, *, low: float | None = None, high: float | None = None) -> None:
        super().__init__()
        if not (low is None or 0 < low < 1) or not (high is None or high > 1):
            raise ValueError(
                f"RatioClip: the bounds are {low} and {high}; they must satisfy 0 < low < 1 < high, or be null"
            )
        self.low, self.high = low, high

    def forward(self, u: Tensor) -> Tensor:
        # u is clamped instead of e^u, which is infinite above 88 nats and would have a NaN gradient there.
        low = None if self.low is None else math.log(self.low)
        high = None if self.high is None else math.log(self.high)
        return bounded_exp(u if low is None and high is None else torch.clamp(u, low, high))
