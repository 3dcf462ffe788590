"""Value functions made from others. Each says what it preserves of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from value_functions.base import ValueFunction, reward_scale


class Scaled(ValueFunction):
    """by * v(u): stakes. Preserves monotonicity, curvature and v(0) = 0.

    Args:
        value_function: v.
        by: above 0.

    Raises:
        ValueError: for a factor that is not above 0.
    """

    def __init__(self, value_function: ValueFunction, *, by: float) -> None:
        super().__init__()
        if not by > 0:
            raise ValueError(f"Scaled: by is {by}; it must be above 0")
        self.value_function, self.by, self.beta = value_function, float(by), reward_scale(value_function)

    def forward(self, u: Tensor) -> Tensor:
        value: Tensor = self.value_function(u)
        return self.by * value


class Shifted(ValueFunction):
    """v(u - by): a margin that outcomes have to clear before they count as gains.

    Preserves monotonicity. Curvature moves along: concave on gains remains so where v is concave on
    (-by, infinity) too, as log sigmoid and the identity are; a logistic with a margin above 0 is convex on (0, by).

    Args:
        value_function: v.
        by: nats. SimPO's target margin gamma is by = gamma / beta.
    """

    def __init__(self, value_function: ValueFunction, *, by: float) -> None:
        super().__init__()
        self.value_function, self.by, self.beta = value_function, float(by), reward_scale(value_function)

    def forward(self, u: Tensor) -> Tensor:
        value: Tensor = self.value_function(u - self.by)
        return value


class LossAverse(ValueFunction):
    """v(0) + loss_aversion * (v(u) - v(0)) for losses, v(u) for gains: a kink at the reference point.

    Kahneman & Tversky 1979: losses loom larger than gains. Preserves monotonicity, concavity on gains and v(0). It acts
    on u < 0 only, so under ``reflect`` it weighs the losses of either class.

    Args:
        value_function: v.
        loss_aversion: lambda, above 0; 2.25 in Tversky & Kahneman 1992.

    Raises:
        ValueError: for a lambda that is not above 0.
    """

    def __init__(self, value_function: ValueFunction, *, loss_aversion: float) -> None:
        super().__init__()
        if not loss_aversion > 0:
            raise ValueError(f"LossAverse: loss_aversion is {loss_aversion}; it must be above 0")
        self.value_function, self.loss_aversion = value_function, float(loss_aversion)
        self.beta = reward_scale(value_function)

    def forward(self, u: Tensor) -> Tensor:
        value = self.value_function(u)
        at_zero = self.value_function(torch.zeros_like(u))
        return torch.where(u < 0, at_zero + self.loss_aversion * (value - at_zero), value)


class Clipped(ValueFunction):
    """v(u) with u kept between ``low`` and ``high``: outcomes beyond them have no gradient.

    Clipping in log-space. Preserves monotonicity and, for high >= 0, concavity on gains. With low > 0 it would be flat
    and then rise on gains, which is convex: low must be at most 0.

    Args:
        value_function: v.
        low, high: nats, low <= 0 <= high; null for no bound.

    Raises:
        ValueError: for bounds that do not enclose 0.
    """

    def __init__(self, value_function: ValueFunction, *, low: float | None = None, high: float | None = None) -> None:
        super().__init__()
        self.low = -math.inf if low is None else float(low)
        self.high = math.inf if high is None else float(high)
        if not self.low <= 0 <= self.high:
            raise ValueError(f"Clipped: the bounds are {low} and {high}; it must be low <= 0 <= high, or null")
        self.value_function, self.beta = value_function, reward_scale(value_function)

    def forward(self, u: Tensor) -> Tensor:
        value: Tensor = self.value_function(u.clamp(self.low, self.high))
        return value


class Mixture(ValueFunction):
    """sum_k weights[k] * v_k(u): between two attitudes. Preserves what all its parts have in common.

    Args:
        value_functions: at least one v_k. The first one's beta is the scale that rewards are shown in.
        weights: as many, at least 0.

    Raises:
        ValueError: for no parts, another number of weights, or a negative one.
    """

    def __init__(self, value_functions: list[ValueFunction], *, weights: list[float]) -> None:
        super().__init__()
        if not value_functions or len(weights) != len(value_functions):
            raise ValueError(f"Mixture: {len(value_functions)} value functions and {len(weights)} weights")
        if not all(weight >= 0 for weight in weights):
            raise ValueError(f"Mixture: the weights are {weights}; each must be at least 0")
        self.value_functions = nn.ModuleList(value_functions)
        self.weights = [float(weight) for weight in weights]
        self.beta = reward_scale(value_functions[0])

    def forward(self, u: Tensor) -> Tensor:
        parts = zip(self.weights, self.value_functions, strict=True)
        return torch.stack([weight * v(u) for weight, v in parts]).sum(dim=0)
