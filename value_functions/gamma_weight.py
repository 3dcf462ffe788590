"""The value function of VESPO."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from value_functions.by_slope import BySlope
from value_functions.ranges import POSITIVE, Range

# Beyond it the slope stays as it is. e^u would be infinite and the exponent's gradient NaN; the slope is 0 long before.
_LAST = 40.0


class GammaWeight(BySlope):
    """v'(u) = e^(decay + power * u - decay * e^u): the weight of VESPO, 1 at u = 0.

    In the ratio w = e^u the slope is that of a gamma density, w^power * e^(-decay * w), normalised to 1 at w = 1 (Shen
    et al. 2026, "VESPO", eq. 14; TRL 1.16, ``vespo_k_pos`` and ``vespo_lambda_pos``). It vanishes for ratios far from 1
    on both sides. Concave on gains if and only if ``power`` is at most ``decay``.

    Args:
        power: exponent k of the ratio, above 0.
        decay: rate lambda at which large ratios lose their weight, above 0.

    Raises:
        ValueError: an argument is not above 0, or the largest slope, e^(power * log(power / decay) - power + decay), is
            above e^40.
    """

    ranges: Mapping[str, Range] = {"power": POSITIVE, "decay": POSITIVE}
    kinks = (_LAST,)

    def __init__(self, *, power: float = 2.0, decay: float = 3.0) -> None:
        super().__init__()
        self.power, self.decay = self.accepted("power", power), self.accepted("decay", decay)
        peak = self.power * (math.log(self.power) - math.log(self.decay)) - self.power + self.decay
        if not peak <= 40:
            raise ValueError(
                f"GammaWeight: power is {power} and decay {decay}; the slope would reach e^{peak:.3g}, more than e^40:"
                " bring them closer together"
            )

    def slope(self, u: Tensor) -> Tensor:
        u = u.clamp(max=_LAST)
        return torch.exp(self.decay + self.power * u - self.decay * torch.exp(u))
