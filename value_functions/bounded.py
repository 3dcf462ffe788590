"""An exponential that stays finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIMIT = 40.0


def bounded_exp(x: Tensor) -> Tensor:
    """e^x up to x = 40, and its tangent beyond: finite in float32 and bfloat16, convex, with a finite slope.

    e^x itself overflows float32 at 88.7, and clamping the result gives a NaN gradient there.
    """
    # The unused branch is clamped too: an infinite value there would make the gradient NaN.
    return torch.where(x < LIMIT, torch.exp(x.clamp(max=LIMIT)), math.exp(LIMIT) * (1 + x - LIMIT))
