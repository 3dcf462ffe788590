"""Correct but unusual value functions: non-decreasing everywhere, concave on gains, finite, elementwise.

Each is drawn with other places and scales for each seed. On losses and at 0 the definition asks for nothing but that
they do not fall, so some of these are convex there, or jump.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

Make = Callable[[Random], Callable[[Tensor], Tensor]]


def with_scale(formula: Callable[[Tensor, float], Tensor], low: float = 0.02, high: float = 3.0) -> Make:
    """``formula`` with a scale that is log-uniform between ``low`` and ``high``."""

    def make(rng: Random) -> Callable[[Tensor], Tensor]:
        scale = math.exp(rng.uniform(math.log(low), math.log(high)))
        return lambda u: formula(u, scale)

    return make


def lowest_of_lines(rng: Random) -> Callable[[Tensor], Tensor]:
    """A concave piecewise linear function: slopes fall at places that no grid hits."""
    places = sorted(rng.uniform(-90, 90) for _ in range(4))
    falls = [rng.uniform(0.01, 0.2) for _ in range(4)]

    def v(u: Tensor) -> Tensor:
        value = (0.01 + sum(falls)) * u
        for place, fall in zip(places, falls, strict=True):
            value = value - fall * F.relu(u - place)
        return value

    return v


def cara(u: Tensor, scale: float) -> Tensor:
    """1 - e^-x for x >= -1, and its tangent below."""
    x = scale * u
    return torch.where(x >= -1, 1 - torch.exp(-x.clamp(min=-1)), 1 - math.e + math.e * (x + 1))


def symmetric_log(u: Tensor, scale: float) -> Tensor:
    return torch.where(u >= 0, torch.log1p(scale * u.clamp(min=0)), -torch.log1p(-scale * u.clamp(max=0)))


def log1p_of_gains(u: Tensor, scale: float) -> Tensor:
    x = scale * u
    return torch.where(x >= 0, torch.log1p(x.clamp(min=0)), 2.25 * x)


def ripples_far_out(u: Tensor, scale: float) -> Tensor:
    """Rises everywhere, beyond -200 in waves that are short beside u."""
    return torch.where(u >= -200, u, u - 0.3 / scale * torch.sin(scale * (u + 200)))


def smoothed_root(u: Tensor, scale: float) -> Tensor:
    x = scale * u
    return torch.where(x >= 0, (x.clamp(min=0) + 1e-3).sqrt() - 1e-3**0.5, x)


def step_up_on_losses(rng: Random) -> Callable[[Tensor], Tensor]:
    place, size = -rng.uniform(0.1, 90), rng.uniform(0.01, 2)
    return lambda u: 0.1 * u + size * (u > place).to(u)


def step_up_at_zero(rng: Random) -> Callable[[Tensor], Tensor]:
    size = rng.uniform(0.01, 2)
    return lambda u: torch.tanh(u) + size * (u > 0).to(u)


def staircase_on_losses(rng: Random) -> Callable[[Tensor], Tensor]:
    step = rng.choice([0.5, 1.0, 2.0])
    return lambda u: torch.where(u < 0, torch.floor(u / step), 0.1 * u)


def mixture(rng: Random) -> Callable[[Tensor], Tensor]:
    share, b = rng.uniform(0.1, 0.9), rng.uniform(0.05, 1)
    return lambda u: share * torch.sigmoid(b * u) + (1 - share) * torch.tanh(0.1 * u)


UNUSUAL: dict[str, Make] = {
    "linear, huge": with_scale(lambda u, s: 1e6 * s * u, 0.5, 2.0),
    "linear, tiny": with_scale(lambda u, s: 1e-9 * s * u, 0.5, 2.0),
    "flat": lambda rng: lambda u: 0 * u,
    "flat, not zero": lambda rng: lambda u: 0 * u + 3.7,
    "min(u, 1)": with_scale(lambda u, s: (s * u).clamp(max=1.0)),
    "clamped on both sides": with_scale(lambda u, s: u.clamp(-10 * s, 10 * s)),
    "clamped log-ratio": lambda rng: lambda u: u.clamp(math.log(0.8), math.log(1.2)),
    "linear until far out": with_scale(lambda u, s: u.clamp(max=s), 10.0, 99.0),
    "log1p of gains, linear losses": with_scale(log1p_of_gains),
    "symmetric logarithm": with_scale(symmetric_log),
    "softplus, turned": with_scale(lambda u, s: -F.softplus(-s * u)),
    "softplus, turned, sharp": with_scale(lambda u, s: -F.softplus(-50 * s * u), 0.5, 2.0),
    "arctan": with_scale(lambda u, s: torch.arctan(s * u)),
    "erf": with_scale(lambda u, s: torch.erf(s * u)),
    "normal distribution": with_scale(lambda u, s: torch.special.ndtr(s * u)),
    "rational": with_scale(lambda u, s: s * u / (1 + (s * u).abs())),
    "inverse hyperbolic sine": with_scale(lambda u, s: torch.asinh(s * u)),
    "tanh of gains, linear losses": with_scale(lambda u, s: torch.where(u >= 0, torch.tanh(s * u), s * u)),
    "CARA with a linear continuation": with_scale(cara),
    "mixture": mixture,
    "kink at 0, steeper on losses": with_scale(lambda u, s: torch.where(u >= 0, s * u, 2.25 * s * u)),
    "kink at 0, steeper on gains": with_scale(lambda u, s: torch.where(u >= 0, 2.25 * s * u, s * u)),
    "gains only": with_scale(lambda u, s: F.relu(s * u)),
    "losses only": with_scale(lambda u, s: -F.relu(-s * u)),
    "hinge": with_scale(lambda u, s: (s * u - 1).clamp(max=0.0)),
    "lowest of lines": lowest_of_lines,
    "soft minimum of two lines": with_scale(lambda u, s: -torch.logaddexp(-s * u, -(0.3 * s * u + 1))),
    "smoothed square root of gains": with_scale(smoothed_root),
    "logistic, huge": with_scale(lambda u, s: 1e6 * torch.sigmoid(s * u)),
    "logistic, tiny": with_scale(lambda u, s: 1e-9 * torch.sigmoid(s * u)),
    "logistic, nearly a step": with_scale(lambda u, s: torch.sigmoid(1e3 * s * u), 0.5, 2.0),
    "tanh, nearly linear": with_scale(lambda u, s: torch.tanh(1e-3 * s * u), 0.5, 2.0),
    "step up on losses": step_up_on_losses,
    "step up at 0": step_up_at_zero,
    "staircase on losses": staircase_on_losses,
    "ripples far out on losses": with_scale(ripples_far_out, 3.0, 20.0),
}
