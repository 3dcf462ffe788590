"""The value function of SAPO."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.bounded import LIMIT
from value_functions.ranges import POSITIVE, Range


class SoftGate(ValueFunction):
    """v(u) = 4 / temperature * sigmoid(temperature * (e^u - 1)): a soft clip of the ratio, with slope 1 at 0.

    SAPO (Gao et al. 2025, "Soft adaptive policy optimization", eq. 6), in place of PPO's hard clip. The slope in u is
    sech^2(temperature * (e^u - 1) / 2) * e^u. It first rises on gains, so this is not the value function of a HALO.

    Args:
        temperature: how fast the slope decays away from a ratio of 1, above 0.

    Raises:
        ValueError: the temperature is not above 0.
    """

    ranges: Mapping[str, Range] = {"temperature": POSITIVE}
    violates: Mapping[str, str] = {"concave_on_gains": "the ratio e^u grows faster than the gate closes near u = 0"}

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = self.accepted("temperature", temperature)

    def forward(self, u: Tensor) -> Tensor:
        # Far out the gate is closed, and e^u must stay finite.
        return 4 / self.temperature * torch.sigmoid(self.temperature * (torch.exp(u.clamp(max=LIMIT)) - 1))
