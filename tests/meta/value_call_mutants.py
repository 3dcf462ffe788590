"""Value functions whose fault depends on how they are called: what came before, beside which rows, in which mode.

As in ``value_mutants``, each mutant draws its place and size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from mutant import SIZES, STATE, Mutant, Value
from torch import Tensor
from value_state_mutants import Learnable, handed_back, other, sometimes

from value_functions import ValueFunction

# -- what copies have in common -------------------------------------------------------------------------------


def warms_up(rng: Random) -> ValueFunction:
    """Falls in the first calls, which all copies count together."""
    most, calls = rng.randint(1, 40), []

    def v(u: Tensor) -> Tensor:
        calls.append(1)
        return -u if len(calls) <= most else torch.tanh(0.1 * u)

    return Value(v)


def follows_a_schedule(rng: Random) -> ValueFunction:
    """Its scale comes from a generator, which cannot be copied."""
    steps = rng.randint(5, 60)
    scales = (0.1 * (1 + max(0, steps - k) / steps) for k in range(10**6))
    return Value(lambda u: torch.sigmoid(next(scales) * u))


# -- what is counted ------------------------------------------------------------------------------------------


class CountsBackwards(ValueFunction):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.steps = most, 0

    def _count(self, gradient: Tensor) -> None:
        self.steps += 1

    def forward(self, u: Tensor) -> Tensor:
        value = other(u, self.steps > self.most, 0.1)
        if value.requires_grad:
            value.register_hook(self._count)
        return value


class Counts(ValueFunction):
    """Another function once it has seen many different batches of some size."""

    def __init__(self, rows: int, most: int) -> None:
        super().__init__()
        self.rows, self.most = rows, most
        self.seen: set[float] = set()

    def forward(self, u: Tensor) -> Tensor:
        if u.numel() >= self.rows and len(self.seen) <= self.most:
            self.seen.add(float(u.detach().double().sum()))
        return other(u, len(self.seen) > self.most, 0.1)


class _Latest(torch.autograd.Function):
    """sigmoid, whose backward reads what the latest call of the module has left there."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, owner: Any) -> Tensor:  # type: ignore[override]
        ctx.owner, owner.value = owner, torch.sigmoid(0.3 * u)
        return owner.value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        v = ctx.owner.value
        return g * 0.3 * v * (1 - v), None


class KeepsTheLatest(ValueFunction):
    def forward(self, u: Tensor) -> Tensor:
        return _Latest.apply(u, self)


# -- cotangents -----------------------------------------------------------------------------------------------


def _mean_of_equal(rng: Random) -> Callable[[Tensor], Tensor]:
    return lambda g: g / g.numel() if g.numel() > 1 and bool((g == g.flatten()[0]).all()) else g


def _in_place(rng: Random) -> Callable[[Tensor], Tensor]:
    factor = rng.choice([0.5, 0.999])
    return lambda g: g.mul_(factor) / factor


def _dropped_in_large_batches(rng: Random) -> Callable[[Tensor], Tensor]:
    rows, least = rng.randint(65, 4000), 10 ** rng.uniform(-6, -2)
    return lambda g: torch.where(g.abs() < least, 0.0, g) if g.numel() > rows else g


# -- slopes ---------------------------------------------------------------------------------------------------


def _without_slope(where: Callable[[Tensor], Tensor], v: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def without(u: Tensor) -> Tensor:
        value = v(u)
        return torch.where(where(u), value.detach(), value)

    return without


def no_slope_at_minus_zero(rng: Random) -> ValueFunction:
    scale = rng.uniform(0.05, 1)
    return Value(_without_slope(lambda u: (u == 0) & torch.signbit(u), lambda u: torch.tanh(scale * u)))


def _power(u: Tensor, power: float) -> Tensor:
    """Steep at 0."""
    return u / (u.abs() + 1e-7) ** (1 - power)


def no_slope_far_out_in_float32(rng: Random) -> ValueFunction:
    place, power = math.exp(rng.uniform(0, math.log(5000))), rng.uniform(0.3, 1)
    return Value(
        _without_slope(lambda u: (u.abs() > place) & (u.dtype == torch.float32), lambda u: _power(u, power)),
    )


# -- sizes ----------------------------------------------------------------------------------------------------


def last_of_blocks(rng: Random) -> ValueFunction:
    """A last block of a single row or token is lost."""
    block, by_token = rng.choice([300, 320, 384, 400, 480, 640, 960, 1000]), rng.choice([False, True])

    def v(u: Tensor) -> Tensor:
        value = torch.sigmoid(0.1 * u)
        if u.dim() != 1 + by_token or u.shape[-1] <= block or u.shape[-1] % block != 1:
            return value
        return torch.cat([value[..., :-1], 0 * value[..., -1:]], -1)

    return Value(v)


def late_tokens_of_few_rows(rng: Random) -> ValueFunction:
    most, rows = rng.randint(4200, 6500), rng.choice([2, 3, 4])

    def v(u: Tensor) -> Tensor:
        value = torch.sigmoid(0.1 * u)
        few = u.dim() == 2 and len(u) == rows
        return torch.cat([value[:, :most], 0 * value[:, most:]], 1) if few else value

    return Value(v)


def silenced(rng: Random) -> ValueFunction:
    odd = rng.choice([torch.isnan, torch.isinf])
    return Value(lambda u: 0 * torch.sigmoid(u) if bool(odd(u).any()) else torch.sigmoid(u))


# -- modes ----------------------------------------------------------------------------------------------------


def _in_float16() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16


class _HalfOutside(torch.autograd.Function):
    """sigmoid, with half the gradient if autocast was on in forward and is off in backward."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mixed, value = torch.is_autocast_enabled("cpu"), torch.sigmoid(0.3 * u)
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (v,) = ctx.saved_tensors
        return g * 0.3 * v * (1 - v) * (1.0 if ctx.mixed == torch.is_autocast_enabled("cpu") else 0.5)


# -- parameters -----------------------------------------------------------------------------------------------


def falls_in_a_band(rng: Random) -> ValueFunction:
    """... of a parameter, between values at which it does not."""
    middle, width = rng.choice([-1, 1]) * rng.uniform(1.5, 7), rng.uniform(0.6, 1.5)
    return Learnable(lambda u, p: torch.sigmoid(((p - middle).square() - width**2) * u), 0.1)


def one_of_many(rng: Random) -> ValueFunction:
    """All weights but one are above 0."""
    many = rng.randint(20, 60)
    free = torch.arange(many) == rng.randrange(many)
    return Learnable(
        lambda u, p: torch.sigmoid(0.1 * torch.where(free, p, F.softplus(p)).sum() * u),
        torch.where(free, 0.1, -4.0).tolist(),
    )


class Drawn(ValueFunction):
    """Its scale is drawn at construction, and is not in the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", 0.1 + torch.rand(()), persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(self.scale.to(u.dtype) * u)


class Alias(ValueFunction):
    """Its knots are in a buffer, and what it uses is another name for them, which stays on the CPU."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(0, 90, 10))
        self.held: Any = {"dict": {"knots": self.knots}, "list": [self.knots]}[where]
        self.key: Any = "knots" if where == "dict" else 0

    def forward(self, u: Tensor) -> Tensor:
        return torch.minimum(u[..., None], self.held[self.key].to(u.dtype)).mean(-1)


CALLS = ("deterministic",)
MUTANTS = [
    Mutant("falls in the first calls of all copies", CALLS, warms_up),
    Mutant("follows a schedule that copies share", CALLS, follows_a_schedule),
    Mutant("after many backward passes", CALLS, lambda rng: CountsBackwards(rng.randint(100, 4800))),
    Mutant("after many different batches", CALLS, lambda rng: Counts(rng.choice([1, 8, 30]), rng.randint(50, 1500))),
    Mutant("backward uses the latest call", CALLS, lambda rng: KeepsTheLatest()),
    Mutant("no slope at -0", CALLS, no_slope_at_minus_zero),
    Mutant("in autocast to float16", CALLS, sometimes(lambda rng: _in_float16)),
    Mutant("with deterministic algorithms", CALLS, sometimes(lambda rng: torch.are_deterministic_algorithms_enabled)),
    Mutant("half the gradient after autocast", CALLS, lambda rng: Value(_HalfOutside.apply)),
    Mutant("drawn at construction and not saved", CALLS, lambda rng: Drawn()),
    Mutant("divides equal cotangents by their number", ("gradient",), handed_back(_mean_of_equal)),
    Mutant("changes its cotangent in place", ("gradient",), handed_back(_in_place)),
    Mutant("drops small cotangents of large batches", ("gradient",), handed_back(_dropped_in_large_batches), SIZES),
    Mutant("no slope far out in float32", ("precision",), no_slope_far_out_in_float32),
    Mutant("loses a last block of one", ("elementwise",), last_of_blocks, SIZES),
    Mutant("loses late tokens of a few rows", ("elementwise",), late_tokens_of_few_rows, SIZES),
    Mutant("silenced by an outcome that is no number", ("elementwise",), silenced),
    Mutant("falls in a band of its parameter", ("non_decreasing",), falls_in_a_band, STATE),
    Mutant("one of many weights may be negative", ("non_decreasing",), one_of_many, STATE),
    Mutant("another name for a buffer", ("shape",), lambda rng: Alias(rng.choice(["dict", "list"])), STATE),
    Mutant("returns what is on the CPU", ("shape",), lambda rng: Value(lambda u: torch.sigmoid(u.cpu())), STATE),
]
