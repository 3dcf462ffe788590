"""The canonical value function of prospect theory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from value_functions.base import ValueFunction
from value_functions.ranges import POSITIVE, Range


class KahnemanTversky(ValueFunction):
    """With x = beta * u: v = x^alpha for gains, -loss_aversion * (-x)^loss_curvature for losses.

    Tversky & Kahneman, "Advances in Prospect Theory" (1992), who fit alpha = loss_curvature = 0.88 and
    loss_aversion = 2.25 to median choices between gambles; eq. 4 of Ethayarajh et al., ICML 2024.

    |x|^alpha has an infinite slope at 0, where every run starts (the policy equals its reference). So each side is
    smoothed as (|x| + eps)^alpha - eps^alpha, which makes the slope finite and preserves v(0) = 0, monotonicity and
    the curvature of both sides. At exactly 0 the gradient is that of gains.

    Args:
        alpha: curvature of gains, in (0, 1].
        loss_curvature: curvature of losses, in (0, 1].
        loss_aversion: factor of losses (lambda), above 0.
        beta: factor by which outcomes are multiplied first, 1 / nats; above 0.
        eps: width of the smoothing at 0, in units of x; above 0.

    Raises:
        ValueError: a parameter is outside its range.
    """

    ranges: Mapping[str, Range] = {
        "alpha": Range(0, 1, with_high=True),
        "loss_curvature": Range(0, 1, with_high=True),
        "loss_aversion": POSITIVE,
        "beta": POSITIVE,
        "eps": POSITIVE,
    }

    def __init__(
        self,
        *,
        alpha: float = 0.88,
        loss_curvature: float = 0.88,
        loss_aversion: float = 2.25,
        beta: float = 0.1,
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        self.alpha = self.accepted("alpha", alpha)
        self.loss_curvature = self.accepted("loss_curvature", loss_curvature)
        self.loss_aversion = self.accepted("loss_aversion", loss_aversion)
        self.beta, self.eps = self.accepted("beta", beta), self.accepted("eps", eps)

    def _power(self, size: Tensor, curvature: float) -> Tensor:
        at_zero: float = self.eps**curvature
        return (size + self.eps) ** curvature - at_zero

    def forward(self, u: Tensor) -> Tensor:
        x = self.beta * u
        # Each branch is clamped to its side, so that the unused one has a finite gradient too.
        gain = self._power(x.clamp(min=0), self.alpha)
        loss = -self.loss_aversion * self._power((-x).clamp(min=0), self.loss_curvature)
        return torch.where(x >= 0, gain, loss)
