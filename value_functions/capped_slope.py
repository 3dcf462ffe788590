"""The value function of CISPO."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.bounded import LIMIT


class CappedSlope(ValueFunction):
    """v(u) = e^u up to u = log cap, and its tangent beyond: the slope is min(e^u, cap).

    CISPO (MiniMax 2025, eq. 4) weights log pi_theta with the capped ratio, without gradient, which gives this loss's
    gradient: unlike with PPO's clip, no token loses its gradient. e^u is convex on (0, log cap), so it is not the value
    function of a HALO.

    Args:
        cap: largest weight, above 1 and at most e^40.

    Raises:
        ValueError: the cap is outside its range.
    """

    violates: Mapping[str, str] = {"concave_on_gains": "e^u is convex on (0, log cap)"}

    def __init__(self, *, cap: float = 5.0) -> None:
        super().__init__()
        if not 1 < cap <= math.exp(LIMIT):
            raise ValueError(f"CappedSlope: cap is {cap}; it must be above 1 and at most e^{LIMIT:g}")
        self.cap = float(cap)

    def forward(self, u: Tensor) -> Tensor:
        edge = math.log(self.cap)
        return torch.where(u < edge, torch.exp(u.clamp(max=edge)), self.cap * (1 + u - edge))
