"""Value functions built from others, and the properties that they preserve."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from value_functions.base import ValueFunction, reward_scale
from value_functions.ranges import ANY, NOT_NEGATIVE, NOT_POSITIVE, POSITIVE, Range


class Scaled(ValueFunction):
    """by * v(u). Preserves monotonicity, curvature and v(0) = 0.

    Args:
        value_function: v.
        by: factor, above 0.

    Raises:
        ValueError: the factor is not above 0.
    """

    ranges: Mapping[str, Range] = {"by": POSITIVE}

    def __init__(self, value_function: ValueFunction, *, by: float) -> None:
        super().__init__()
        self.value_function, self.beta = value_function, reward_scale(value_function)
        self.by = self.accepted("by", by)

    def forward(self, u: Tensor) -> Tensor:
        value: Tensor = self.value_function(u)
        return self.by * value


class Shifted(ValueFunction):
    """v(u - by): a margin that outcomes have to exceed to count as gains.

    Preserves monotonicity. Curvature shifts: the result is concave on gains if v is concave on (-by, infinity), as log
    sigmoid and the identity are; a logistic with a margin above 0 is convex on (0, by).

    Args:
        value_function: v.
        by: margin, nats. SimPO's target margin gamma corresponds to by = gamma / beta.

    Raises:
        ValueError: the margin is not finite.
    """

    ranges: Mapping[str, Range] = {"by": ANY}

    def __init__(self, value_function: ValueFunction, *, by: float) -> None:
        super().__init__()
        self.value_function, self.beta = value_function, reward_scale(value_function)
        self.by = self.accepted("by", by)

    def forward(self, u: Tensor) -> Tensor:
        value: Tensor = self.value_function(u - self.by)
        return value


class LossAverse(ValueFunction):
    """v(0) + loss_aversion * (v(u) - v(0)) for losses, v(u) for gains: a kink at the reference point.

    Kahneman & Tversky 1979: losses loom larger than gains. Preserves monotonicity, concavity on gains and v(0). It only
    affects u < 0, so with ``reflect_undesirable`` it weights the losses of both classes.

    Args:
        value_function: v.
        loss_aversion: factor of losses (lambda), above 0; 2.25 in Tversky & Kahneman 1992.

    Raises:
        ValueError: lambda is not above 0.
    """

    ranges: Mapping[str, Range] = {"loss_aversion": POSITIVE}

    def __init__(self, value_function: ValueFunction, *, loss_aversion: float) -> None:
        super().__init__()
        self.value_function, self.beta = value_function, reward_scale(value_function)
        self.loss_aversion = self.accepted("loss_aversion", loss_aversion)

    def forward(self, u: Tensor) -> Tensor:
        value = self.value_function(u)
        at_zero = self.value_function(torch.zeros_like(u))
        return torch.where(u < 0, at_zero + self.loss_aversion * (value - at_zero), value)


class Clipped(ValueFunction):
    """v(u) with u clamped to [``low``, ``high``]: outcomes outside have no gradient.

    Clips in log-space. Preserves monotonicity and, for high >= 0, concavity on gains. With low > 0 it would be flat
    before it rises on gains, which is convex, so low must be at most 0.

    Args:
        value_function: v.
        low, high: bounds of u, nats, low <= 0 <= high; null for no bound.

    Raises:
        ValueError: the bounds do not enclose 0.
    """

    ranges: Mapping[str, Range] = {"low": NOT_POSITIVE, "high": NOT_NEGATIVE}

    def __init__(self, value_function: ValueFunction, *, low: float | None = None, high: float | None = None) -> None:
        super().__init__()
        self.low = -math.inf if low is None else float(low)
        self.high = math.inf if high is None else float(high)
        if not self.low <= 0 <= self.high:
            raise ValueError(
                f"Clipped: the bounds are {low} and {high}; they must satisfy low <= 0 <= high, or be null"
            )
        self.value_function, self.beta = value_function, reward_scale(value_function)

    def forward(self, u: Tensor) -> Tensor:
        value: Tensor = self.value_function(u.clamp(self.low, self.high))
        return value


class Mixture(ValueFunction):
    """sum_k weights[k] * v_k(u), a blend of attitudes to risk. Preserves properties shared by all v_k.

    Args:
        value_functions: at least one v_k. Rewards are logged with the beta of the first.
        weights: one weight per v_k, at least 0.

    Raises:
        ValueError: there are no v_k, the number of weights differs, or a weight is negative.
    """

    ranges: Mapping[str, Range] = {"weights": NOT_NEGATIVE}

    def __init__(self, value_functions: list[ValueFunction], *, weights: list[float]) -> None:
        super().__init__()
        if not value_functions or len(weights) != len(value_functions):
            raise ValueError(f"Mixture: there are {len(value_functions)} value functions and {len(weights)} weights")
        self.value_functions = nn.ModuleList(value_functions)
        self.weights = [self.accepted("weights", weight) for weight in weights]
        self.beta = reward_scale(value_functions[0])

    def forward(self, u: Tensor) -> Tensor:
        parts = zip(self.weights, self.value_functions, strict=True)
        return torch.stack([weight * v(u) for weight, v in parts]).sum(dim=0)
