"""Value functions that are faulty only in some state, at some size, for some cotangent or after an optimizer step.

As in ``value_mutants``, each mutant draws its place and size.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from mutant import SIZES, STATE, Mutant, Value
from torch import Tensor, nn

from value_functions import ValueFunction


def other(u: Tensor, when: bool, off: float) -> Tensor:
    """A logistic function, or another one."""
    return torch.sigmoid(0.3 * u) * (1 + off * when)


def sometimes(when: Callable[[Random], Callable[[], bool]]) -> Callable[[Random], ValueFunction]:
    """Another function whenever the drawn condition holds."""

    def make(rng: Random) -> ValueFunction:
        condition, off = when(rng), rng.choice([-0.2, 0.01, 0.5])
        return Value(lambda u: other(u, condition(), off))

    return make


def _after(rng: Random, clock: Callable[[], float]) -> Callable[[], bool]:
    start, delay = clock(), rng.choice([0.4, 50, 3000, 80_000, 7e6])
    return lambda: clock() > start + delay


class OwnClock(ValueFunction):
    """Another function some time after it was made, by a clock that it holds."""

    def __init__(self, delay: float) -> None:
        super().__init__()
        self.now, self.delay = time.monotonic, delay
        self.start = self.now()

    def forward(self, u: Tensor) -> Tensor:
        return other(u, self.now() > self.start + self.delay, 0.1)


def _every_other(rng: Random) -> Callable[[], bool]:
    half = rng.choice([0.5, 3600, 86_400])
    start = time.time()
    return lambda: int((time.time() - start) / half) % 2 == 1


def _on_a_later_day(rng: Random) -> Callable[[], bool]:
    today = datetime.date.today()
    return lambda: datetime.datetime.now().date() > today + datetime.timedelta(days=3)


class Stateful(ValueFunction):
    """Another function once ``step`` has returned True."""

    def __init__(self, step: Callable[[Stateful, Tensor], bool], off: float) -> None:
        super().__init__()
        self.step, self.off = step, off
        self.calls, self.rows, self.changed = 0, 0, False

    def forward(self, u: Tensor) -> Tensor:
        self.calls += 1
        self.rows += u.numel()
        self.changed |= self.step(self, u)
        return other(u, self.changed, self.off)


class CountsEpochs(ValueFunction):
    """Another function after ``most`` turns to training, as after each validation."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.epochs = most, 0

    def train(self, mode: bool = True) -> CountsEpochs:
        self.epochs = getattr(self, "epochs", 0) + mode
        return super().train(mode)

    def forward(self, u: Tensor) -> Tensor:
        return other(u, self.epochs > self.most, 0.1)


def once(step: Callable[[Random], Callable[[Stateful, Tensor], bool]]) -> Callable[[Random], ValueFunction]:
    return lambda rng: Stateful(step(rng), rng.choice([-0.2, 0.01, 0.5]))


def _calls(rng: Random) -> Callable[[Stateful, Tensor], bool]:
    most = rng.randint(150, 4900)
    return lambda v, u: v.calls > most


class EveryNthCall(ValueFunction):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.calls = n, 0

    def forward(self, u: Tensor) -> Tensor:
        self.calls += 1
        return other(u, self.calls % self.n == 0, 0.1)


_KEYS: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda u: round(float(u.sum()), 6),
    "sorted outcomes": lambda u: tuple(u.flatten().sort().values.tolist()),
    "first and last": lambda u: tuple(u.flatten()[[0, -1]].tolist()) if u.numel() else (),
    "range": lambda u: (float(u.max()), float(u.min())) if u.numel() else (),
    "size": lambda u: round(float(u.abs().sum()), 9),
    "rounded outcomes": lambda u: tuple((1e3 * u).round().flatten().tolist()),
    "address": lambda u: u.data_ptr(),
}


class Cached(ValueFunction):
    """Values are kept by an incomplete key; the gradient is right."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key, self.kept = _KEYS[key], {}

    def forward(self, u: Tensor) -> Tensor:
        v = torch.sigmoid(0.1 * u)
        key = (
            tuple(u.shape),
            u.dtype,
            self.key(u.detach().double()) if self.key is not _KEYS["address"] else u.data_ptr(),
        )
        kept = self.kept.setdefault(key, v.detach().clone())
        return kept + (v - v.detach()) if u.requires_grad or v.requires_grad else kept


class LosesItsScaleInACopy(ValueFunction):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def __deepcopy__(self, memo: Any) -> LosesItsScaleInACopy:
        return LosesItsScaleInACopy(1.0)

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(self.scale * u)


class LosesItsScaleInACheckpoint(ValueFunction):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.scale.clamp_(max=0.01)

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(self.scale.to(u.dtype) * u)


# -- sizes ----------------------------------------------------------------------------------------------------


def beyond_a_token(rng: Random) -> ValueFunction:
    most = round(math.exp(rng.uniform(math.log(40), math.log(8000))))

    def v(u: Tensor) -> Tensor:
        value = torch.sigmoid(0.1 * u)
        return torch.cat([value[:, :most], 0 * value[:, most:]], 1) if u.dim() == 2 else value

    return Value(v)


def beyond_a_row(rng: Random) -> ValueFunction:
    most = round(math.exp(rng.uniform(math.log(200), math.log(4000))))

    def v(u: Tensor) -> Tensor:
        value = torch.sigmoid(0.1 * u)
        return torch.cat([value[:most], 0.5 * value[most:]]) if u.dim() == 2 else value

    return Value(v)


def long_completions(rng: Random) -> ValueFunction:
    most = rng.randint(300, 4000)
    return Value(lambda u: other(u, u.dim() == 2 and u.shape[-1] > most, 0.1))


# -- gradients ------------------------------------------------------------------------------------------------


class _Backward(torch.autograd.Function):
    """sigmoid, whose backward does ``change`` to its cotangents."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        v = torch.sigmoid(0.1 * u)
        ctx.save_for_backward(v)
        ctx.change = change
        return v

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        (v,) = ctx.saved_tensors
        return ctx.change(g) * 0.1 * v * (1 - v), None


def handed_back(change: Callable[[Random], Callable[[Tensor], Tensor]]) -> Callable[[Random], ValueFunction]:
    def make(rng: Random) -> ValueFunction:
        drawn = change(rng)
        return Value(lambda u: _Backward.apply(u, drawn))

    return make


def _drop(rng: Random) -> Callable[[Tensor], Tensor]:
    least = 10 ** rng.uniform(-7, -1)
    return lambda g: torch.where(g.abs() < least, 0.0, g)


def _clip(rng: Random) -> Callable[[Tensor], Tensor]:
    most = 10 ** rng.uniform(0.7, 3.5)
    return lambda g: g.clamp(-most, most)


def _round(rng: Random) -> Callable[[Tensor], Tensor]:
    step = 10 ** rng.uniform(-7, -2)
    return lambda g: (g / step).round() * step


def _flush(rng: Random) -> Callable[[Tensor], Tensor]:
    return lambda g: g.half().to(g) if g.dtype == torch.float32 else g


# -- learnable parameters ---------------------------------------------------------------------------------------


class Learnable(ValueFunction):
    """v(u; p) = ``formula(u, p)`` with a learnable parameter p."""

    def __init__(self, formula: Callable[[Tensor, Tensor], Tensor], start: float | list[float]) -> None:
        super().__init__()
        self.p, self.formula = nn.Parameter(torch.tensor(start)), formula

    def forward(self, u: Tensor) -> Tensor:
        return self.formula(u, self.p.to(u.dtype))


def loss_aversion(u: Tensor, p: Tensor) -> Tensor:
    return torch.where(u >= 0, torch.tanh(u), p * u)


def knots(u: Tensor, p: Tensor) -> Tensor:
    """Free slopes between places, which fall only at the start."""
    places = [0.0, 4.0, 17.0, 50.0]
    return u.clamp(max=0) + sum(
        p[i] * (u.clamp(min=low, max=high) - low)
        for i, (low, high) in enumerate(zip(places, [*places[1:], 1e30], strict=True))
    )


def learnable(
    formula: Callable[[Tensor, Tensor], Tensor], low: float, high: float
) -> Callable[[Random], ValueFunction]:
    return lambda rng: Learnable(formula, rng.uniform(low, high))


def jumps_behind_a_softplus(rng: Random) -> ValueFunction:
    place, size = rng.uniform(5, 99), 10 ** rng.uniform(-7, -5)

    def v(u: Tensor, p: Tensor) -> Tensor:
        return F.softplus(p).mean() * u - size * (u > place).to(u)

    return Learnable(v, rng.choice([0.5413, [0.5, 0.6, 0.7]]))


# -- far out ----------------------------------------------------------------------------------------------------


def falls_far_out(rng: Random) -> ValueFunction:
    place, slope = 10 ** rng.uniform(4.01, 6.5), 10 ** rng.uniform(-5, -1)
    return Value(lambda u: u.clamp(max=place) - slope * F.relu(u - place))


def falls_for_a_nat(rng: Random) -> ValueFunction:
    """... in a function without branches, so that only the grid can find it."""
    place = rng.choice([-1, 1]) * rng.uniform(1e3, 9.9e3)
    return Value(lambda u: 0.1 * u - 0.2 * torch.sigmoid(4 * (u - place)))


def convex_beyond(rng: Random) -> ValueFunction:
    place = 10 ** rng.uniform(4.01, 6)
    return Value(lambda u: u + F.relu(u - place))


# -- devices ----------------------------------------------------------------------------------------------------


class PlainKnots(ValueFunction):
    """Knots that are no buffer stay on the CPU."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.knots = torch.linspace(0, 90, n)

    def forward(self, u: Tensor) -> Tensor:
        return torch.minimum(u[..., None], self.knots.to(u.dtype)).mean(-1)


def knots_made_in_forward(rng: Random) -> ValueFunction:
    n = rng.randint(3, 12)
    return Value(lambda u: torch.minimum(u[..., None], torch.linspace(0, 90, n, dtype=u.dtype)).mean(-1))


class _ByNumPy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:  # type: ignore[override]
        v = torch.from_numpy(u.detach().numpy().clip(max=3.0))
        ctx.save_for_backward(u)
        return v

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * (ctx.saved_tensors[0] <= 3)


class KeepsItsFirstScale(ValueFunction):
    """What it computed from its parameter at the first call stays after an optimizer step."""

    def __init__(self, raw: float) -> None:
        super().__init__()
        self.raw, self.scale = nn.Parameter(torch.tensor(raw)), None

    def forward(self, u: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = F.softplus(self.raw).detach()
        return torch.tanh(self.scale.to(u.dtype) * u)


def no_slope_at_zero_in_float32(rng: Random) -> ValueFunction:
    scale = rng.uniform(0.1, 1)

    def v(u: Tensor) -> Tensor:
        value = torch.sigmoid(scale * u)
        return value if u.dtype == torch.float64 else torch.where(u == 0, value.detach(), value)

    return Value(v)


MUTANTS = [
    Mutant("keeps its first scale", ("deterministic",), lambda rng: KeepsItsFirstScale(rng.uniform(-2, 2))),
    Mutant(
        "lower at -0", ("deterministic",), lambda rng: Value(lambda u: torch.tanh(u) - 0.01 * torch.signbit(u).to(u))
    ),
    Mutant("no slope at 0 in float32", ("precision",), no_slope_at_zero_in_float32),
    Mutant(
        "another function of long and wide batches",
        ("elementwise",),
        lambda rng: Value(lambda u: other(u, u.dim() == 2 and u.numel() > 10**5, 0.1)),
        kind=SIZES,
    ),
    Mutant("in inference mode", ("deterministic",), sometimes(lambda rng: torch.is_inference_mode_enabled)),
    Mutant("in autocast", ("deterministic",), sometimes(lambda rng: lambda: torch.is_autocast_enabled("cpu"))),
    *(
        Mutant(
            f"with {dtype} as default",
            ("deterministic",),
            sometimes(lambda rng, d=dtype: lambda: torch.get_default_dtype() == d),
        )
        for dtype in (torch.bfloat16, torch.float64)
    ),
    Mutant(
        "later by perf_counter", ("deterministic",), sometimes(lambda rng: _after(rng, lambda: time.perf_counter()))
    ),
    Mutant("later by monotonic", ("deterministic",), sometimes(lambda rng: _after(rng, lambda: time.monotonic()))),
    Mutant("later by time_ns", ("deterministic",), sometimes(lambda rng: _after(rng, lambda: time.time_ns() / 1e9))),
    Mutant("every other half second, hour or day", ("deterministic",), sometimes(_every_other)),
    Mutant("later by a clock of its own", ("deterministic",), lambda rng: OwnClock(10 ** rng.uniform(1.5, 8))),
    Mutant("on a later day", ("deterministic",), sometimes(_on_a_later_day)),
    Mutant("after many calls", ("deterministic",), once(_calls)),
    Mutant("after a large batch", ("deterministic", "elementwise"), once(lambda rng: lambda v, u: u.numel() > 3000)),
    Mutant("after a call in inference mode", ("deterministic",), once(lambda rng: lambda v, u: u.is_inference())),
    Mutant("after a call in evaluation", ("deterministic",), once(lambda rng: lambda v, u: not v.training)),
    Mutant("after some epochs", ("deterministic",), lambda rng: CountsEpochs(rng.randint(3, 40))),
    Mutant("on every n-th call", ("deterministic",), lambda rng: EveryNthCall(rng.randint(130, 4000))),
    *(Mutant(f"cached by {key}", ("deterministic", "elementwise"), lambda rng, key=key: Cached(key)) for key in _KEYS),
    Mutant("another one as a deep copy", ("deterministic",), lambda rng: LosesItsScaleInACopy(rng.uniform(0.1, 0.9))),
    Mutant(
        "another one from a checkpoint",
        ("deterministic",),
        lambda rng: LosesItsScaleInACheckpoint(rng.uniform(0.1, 0.9)),
    ),
    Mutant("nothing beyond a token", ("elementwise",), beyond_a_token, kind=SIZES),
    Mutant("half beyond a row", ("elementwise",), beyond_a_row, kind=SIZES),
    Mutant("another function of long completions", ("elementwise",), long_completions, kind=SIZES),
    Mutant("drops small cotangents", ("gradient",), handed_back(_drop)),
    Mutant("clips large cotangents", ("gradient", "elementwise"), handed_back(_clip)),
    Mutant("rounds cotangents", ("gradient",), handed_back(_round)),
    Mutant("cotangents in float16 if in float32", ("gradient",), handed_back(_flush)),
    Mutant("NaN for a cotangent of 0", ("gradient",), handed_back(lambda rng: lambda g: g * g / g)),
    Mutant(
        "cotangents relative to the largest",
        ("gradient", "elementwise"),
        handed_back(lambda rng: lambda g: g / g.abs().max().clamp(min=1)),
    ),
    Mutant("free beta", ("non_decreasing",), learnable(lambda u, p: torch.sigmoid(p * u), 0.01, 3), kind=STATE),
    Mutant("free loss aversion", ("non_decreasing",), learnable(loss_aversion, 0.5, 3), kind=STATE),
    Mutant(
        "free share of a mixture",
        ("non_decreasing",),
        learnable(lambda u, p: p * torch.sigmoid(u) + (1 - p) * torch.tanh(0.1 * u), 0.1, 0.9),
        kind=STATE,
    ),
    Mutant(
        "free vector of betas",
        ("non_decreasing",),
        lambda rng: Learnable(
            lambda u, p: torch.tanh(u[..., None] * p).sum(-1), [rng.uniform(0.1, 1) for _ in range(4)]
        ),
        kind=STATE,
    ),
    Mutant(
        "free slopes between knots",
        ("concave_on_gains", "non_decreasing"),
        lambda rng: Learnable(knots, sorted((rng.uniform(0.1, 1) for _ in range(4)), reverse=True)),
        kind=STATE,
    ),
    Mutant(
        "positive slopes in any order",
        ("concave_on_gains",),
        lambda rng: Learnable(lambda u, p: knots(u, F.softplus(p)), [0.9, 0.7, 0.5, 0.3]),
        kind=STATE,
    ),
    Mutant(
        "free power",
        ("concave_on_gains", "finite", "non_decreasing"),
        learnable(lambda u, p: torch.where(u >= 0, (u.clamp(min=0) + 1e-3) ** p, u), 0.5, 0.95),
        kind=STATE,
    ),
    Mutant("logarithm of a free parameter", ("finite",), learnable(lambda u, p: u + p.log(), 0.5, 2), kind=STATE),
    Mutant("jumps down behind a softplus of a parameter", ("non_decreasing",), jumps_behind_a_softplus),
    Mutant("falls beyond 10,000", ("non_decreasing",), falls_far_out),
    Mutant("falls for a nat between 1,000 and 10,000", ("non_decreasing",), falls_for_a_nat),
    Mutant("convex beyond 10,000", ("concave_on_gains",), convex_beyond),
    Mutant("knots that stay on the CPU", ("shape",), lambda rng: PlainKnots(rng.randint(2, 20)), kind=STATE),
    Mutant("knots made on the CPU", ("shape",), knots_made_in_forward, kind=STATE),
    Mutant("by NumPy", ("shape",), lambda rng: Value(_ByNumPy.apply), kind=STATE),
]
