"""Sound value functions whose state, parameters, size or rounding a careless check would hold against them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from mutant import STATE, Sound, Value
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from value_state_mutants import Learnable

from value_functions import ValueFunction


def flat_sum(rng: Random) -> ValueFunction:
    """Rises to a place and is flat beyond, as a sum of pieces whose slopes cancel there."""
    places = sorted(rng.uniform(0.5, 99) for _ in range(5))
    falls = [rng.uniform(0.05, 3) for _ in places]
    return Value(lambda u: sum(f * (u - p).clamp(max=0) for f, p in zip(falls, places, strict=True)) + 3 * (u - u))


def flat_beyond(rng: Random) -> ValueFunction:
    """The same by subtraction, so that the value beyond is the difference of large numbers."""
    places = sorted(rng.uniform(0.5, 99) for _ in range(5))
    falls = [rng.uniform(0.05, 3) for _ in places]

    def v(u: Tensor) -> Tensor:
        return sum(falls) * u - sum(f * F.relu(u - p) for f, p in zip(falls, places, strict=True))

    return Value(v)


def two_kinks_that_cancel(rng: Random) -> ValueFunction:
    """Flat from a place on, by two kinks at another, at which autograd takes another side of each."""
    first, second, slope = rng.uniform(1, 20), rng.uniform(100, 2000), rng.uniform(0.1, 5)
    return Value(lambda u: 3 * (u - F.relu(u - first)) - slope * F.relu(u - second) + slope * (u - second).clamp(min=0))


def kink_at_zero(rng: Random) -> ValueFunction:
    """A kink at 0, where u is lost beside what is added to it."""
    offset, slope = rng.uniform(0.3, 30), rng.uniform(0.05, 2)
    return Value(lambda u: (slope * u + offset).clamp(max=offset))


def tail_of_a_difference(rng: Random) -> ValueFunction:
    size = rng.uniform(0.5, 20)
    return Value(lambda u: u - torch.sqrt(u.square() + size))


def two_jumps_at_zero(rng: Random) -> ValueFunction:
    slope, before, after = rng.uniform(0.01, 1), rng.uniform(0.1, 2), rng.uniform(0.1, 2)
    return Value(lambda u: slope * u + before * (u >= 0).to(u) + after * (u > 0).to(u))


def jumps_on_losses(rng: Random) -> ValueFunction:
    places = [-float(rng.randint(1, 9)), -rng.uniform(1, 90)]
    return Value(lambda u: torch.tanh(0.1 * u) + sum(0.5 * (u > p).to(u) + 0.5 * (u >= p).to(u) for p in places))


def default_dtype(rng: Random) -> ValueFunction:
    scale = rng.uniform(0.05, 2)
    return Value(lambda u: torch.tanh(torch.tensor(scale) * u))


def in_single_precision(u: Tensor) -> Tensor:
    """As code that refuses whatever it has no kernel for."""
    if u.dtype not in (torch.float32, torch.float64):
        raise NotImplementedError("no kernel for half")
    return torch.arctan(0.1 * u)


class NotInBfloat16(torch.autograd.Function):
    """sigmoid, as an operation without a kernel for bfloat16."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:  # type: ignore[override]
        if u.dtype == torch.bfloat16:
            raise NotImplementedError("\"sigmoid_cpu\" not implemented for 'BFloat16'")
        value = torch.sigmoid(0.3 * u)
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (value,) = ctx.saved_tensors
        return gradient * 0.3 * value * (1 - value)


class KnowsItself(ValueFunction):
    """Holds itself, in a tuple, a list and a dictionary."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.me, self.us, self.names = (self,), [self], {"me": [self]}

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(self.me[0].scale * self.us[0].names["me"][0].scale * u)


class Knots(ValueFunction):
    """The lowest of many lines, with knots in a buffer."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-50, 90, count))

    def forward(self, u: Tensor) -> Tensor:
        return torch.minimum(u[..., None], self.knots.to(u.dtype)).mean(-1)


class Spline(ValueFunction):
    """Learnable positive weights of ramps that end at places on gains."""

    def __init__(self, count: int, start: float) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.linspace(start, start + 1, count))
        self.register_buffer("knots", torch.linspace(1, 60, count))

    def forward(self, u: Tensor) -> Tensor:
        return (F.softplus(self.raw).to(u.dtype) * torch.minimum(u[..., None], self.knots.to(u.dtype))).sum(-1)


class Product(ValueFunction):
    """A network with matrix products, which autocast rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Parameter(torch.zeros(1, 6)), nn.Parameter(torch.zeros(6, 1))
        self.places = nn.Parameter(torch.linspace(-3, 3, 6))

    def forward(self, u: Tensor) -> Tensor:
        inner, outer, places = (p.to(u.dtype) for p in (self.inner, self.outer, self.places))
        hidden = F.logsigmoid(u[..., None] @ F.softplus(inner) + places)
        return (hidden.to(u.dtype) @ F.softplus(outer)).squeeze(-1).to(u.dtype)


class Positive(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return F.softplus(raw)


def parametrised(rng: Random) -> ValueFunction:
    v = Learnable(lambda u, p: torch.tanh(p * u), rng.uniform(0.1, 2))
    parametrize.register_parametrization(v, "p", Positive(), unsafe=True)
    return v


class Watched(ValueFunction):
    """Counts calls, notes the time and keeps its last input, all of which change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seconds, self.last = 0, 0.0, None

    def forward(self, u: Tensor) -> Tensor:
        start = time.perf_counter()
        self.calls += 1
        self.last = u.detach()
        value = torch.sigmoid(0.2 * u)
        self.seconds += time.perf_counter() - start
        return value


class KeepsConstants(ValueFunction):
    """A complete cache: constants by dtype and device."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.kept = scale, {}

    def forward(self, u: Tensor) -> Tensor:
        key = (u.dtype, u.device)
        if key not in self.kept:
            self.kept[key] = torch.tensor([self.scale], dtype=u.dtype, device=u.device)
        return torch.tanh(self.kept[key] * u)


def learnable(
    formula: Callable[[Tensor, Tensor], Tensor], low: float, high: float
) -> Callable[[Random], ValueFunction]:
    return lambda rng: Learnable(formula, rng.uniform(low, high))


def _power(u: Tensor, p: Tensor) -> Tensor:
    return torch.where(u >= 0, (u.clamp(min=0) + 1e-3) ** torch.sigmoid(p) - 1e-3 ** torch.sigmoid(p), u)


def with_scale(
    formula: Callable[[Tensor, float], Tensor], low: float, high: float
) -> Callable[[Random], ValueFunction]:
    def make(rng: Random) -> ValueFunction:
        scale = math.exp(rng.uniform(math.log(low), math.log(high)))
        return Value(lambda u: formula(u, scale))

    return make


SOUND_VALUES: dict[str, Callable[[Random], ValueFunction]] = {
    "a flat sum": flat_sum,
    "flat beyond, by subtraction": flat_beyond,
    "two kinks that cancel": two_kinks_that_cancel,
    "a kink at 0 beside an offset": kink_at_zero,
    "the tail of a difference": tail_of_a_difference,
    "two jumps at 0": two_jumps_at_zero,
    "jumps on losses": jumps_on_losses,
    "refuses half precision": lambda rng: Value(in_single_precision),
    "no kernel for bfloat16": lambda rng: Value(NotInBfloat16.apply),
    "no kernel for the slope in bfloat16": with_scale(
        lambda u, s: torch.special.i1e(s * u) / torch.special.i0e(s * u), 0.02, 0.2
    ),
    "u less a softplus": with_scale(lambda u, s: u - F.softplus(s * u) / s, 0.3, 3),
    "logarithm of a normal distribution": with_scale(lambda u, s: torch.special.log_ndtr(s * u), 0.05, 0.5),
    "a steep root": with_scale(lambda u, s: u / (u.abs() + s).sqrt(), 1e-12, 1e-4),
    "holds itself": lambda rng: KnowsItself(rng.uniform(0.2, 1)),
    "60 knots": lambda rng: Knots(60),
    "learnable: softplus": Sound(STATE, learnable(lambda u, p: F.logsigmoid(F.softplus(p) * u), -3, 3)),
    "learnable: exponential": Sound(STATE, learnable(lambda u, p: torch.tanh(p.exp() * u), -3, 1)),
    "learnable: square": Sound(STATE, learnable(lambda u, p: torch.arctan(p.square() * u), 0.1, 2)),
    "learnable: mixture": Sound(
        STATE, learnable(lambda u, p: torch.lerp(torch.tanh(u), 0.1 * u, torch.sigmoid(p)), -2, 2)
    ),
    "learnable: power": Sound(STATE, learnable(_power, -2, 2)),
    "learnable: place of a kink": Sound(STATE, learnable(lambda u, p: torch.minimum(u, p.expand_as(u)), -3, 20)),
    "learnable spline": Sound(STATE, lambda rng: Spline(rng.randint(2, 12), rng.uniform(-1, 1))),
    "matrix products": lambda rng: Product(),
    "a checkpoint that computes again": lambda rng: Value(
        lambda u: checkpoint(lambda x: torch.tanh(0.1 * x), u, use_reentrant=False)
    ),
    "a parametrised scale": Sound(STATE, parametrised),
    "watched": Sound(STATE, lambda rng: Watched()),
    "keeps constants": Sound(STATE, lambda rng: KeepsConstants(rng.uniform(0.1, 2))),
    "a scale of the default dtype": Sound(STATE, default_dtype),
    "constants on the device of u": lambda rng: Value(
        lambda u: torch.minimum(u[..., None], torch.linspace(0, 50, 9, dtype=u.dtype, device=u.device)).mean(-1)
    ),
}
