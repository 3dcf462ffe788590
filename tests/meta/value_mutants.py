"""Value functions with one mistake each. ``MUTANTS`` are checked as bare value functions.

Places are drawn from |u| < 100 as floats of full precision, so that no grid of round numbers hits them; the narrow
faults are 0.01 wide and 1e-4 in slope unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from mutant import SIZES, Mutant, Value
from torch import Tensor, nn

from value_functions import Logistic, LogSigmoid, ValueFunction

WIDTH, SLOPE = 0.01, 1e-4


def gain(rng: Random) -> float:
    return rng.uniform(0.01, 99.9)


def anywhere(rng: Random) -> float:
    return rng.choice([-1, 1]) * gain(rng)


def beta(rng: Random) -> float:
    return rng.choice([0.05, 0.1, 0.3, 1.0])


def gone_into(u: Tensor, place: float, width: float = WIDTH) -> Tensor:
    """How far u has gone into [place, place + width]: 0 before, ``width`` behind it."""
    return (u - place).clamp(0, width)


# -- shape ------------------------------------------------------------------------------------------------


def wrong_shapes() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "sums over the batch": lambda u: torch.sigmoid(u).sum(),
        "averages over the batch": lambda u: torch.sigmoid(u).mean(),
        "squeezes a batch of one": lambda u: torch.sigmoid(u).squeeze(),
        "adds a dimension": lambda u: torch.sigmoid(u).unsqueeze(-1),
        "flattens": lambda u: torch.sigmoid(u).flatten(),
        "answers in float32": lambda u: torch.sigmoid(u).float(),
        "beta is a float64 vector that promotes": lambda u: torch.sigmoid(torch.tensor([0.1], dtype=torch.float64) * u),
        "rounds to bfloat16 and stays there": lambda u: torch.sigmoid(u.bfloat16()),
    }


# -- rows that see each other -------------------------------------------------------------------------------


def mixed_rows() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "subtracts the batch's mean": lambda u: torch.sigmoid(u - u.mean()),
        "divides by the batch's spread": lambda u: torch.tanh(u / (u.std(correction=0) + 1e-3)),
        "divides by the batch's largest": lambda u: u / (u.abs().max() + 1e-6),
        "softmax": lambda u: torch.softmax(u.flatten(), 0).view_as(u) * u.numel(),
        "sorts": lambda u: torch.sigmoid(u.flatten().sort().values.view_as(u)),
        "cumulative sum": lambda u: torch.sigmoid(u.flatten()).cumsum(0).view_as(u) / u.numel(),
        "ranks": lambda u: 0.1 * u + 0.01 * u.flatten().argsort().argsort().view_as(u).to(u),
        "the first row counts half": lambda u: torch.cat(
            [0.5 * torch.sigmoid(u).flatten()[:1], torch.sigmoid(u).flatten()[1:]]
        ).view_as(u),
        "reverses": lambda u: torch.sigmoid(u.flatten().flip(0).view_as(u)),
    }


def only_in_large_batches(rng: Random) -> ValueFunction:
    rows, off = rng.randint(65, 1000), rng.choice([0.01, 0.1, -0.2])
    return Value(lambda u: torch.sigmoid(u) * (1 + off * (u.numel() > rows)))


def chunk_without_the_rest(rng: Random) -> ValueFunction:
    chunk = rng.choice([64, 128, 256])

    def v(u: Tensor) -> Tensor:
        flat = u.flatten()
        whole = max(len(flat) // chunk, 1) * chunk
        return torch.cat([torch.sigmoid(flat[:whole]), 0 * flat[whole:]]).view_as(u)

    return Value(v)


def _by_tokens(u: Tensor) -> dict[str, Tensor]:
    return {
        "subtracts a row's mean over tokens": torch.sigmoid(u - u.mean(-1, keepdim=True)),
        "softmax over tokens": torch.softmax(u, -1),
        "reads tokens in the wrong order": torch.sigmoid(u.t().reshape(u.shape)),
    }


def only_by_tokens(name: str) -> Callable[[Tensor], Tensor]:
    """Right for outcomes of rows, [n], and wrong for those of tokens, [n, T]."""
    return lambda u: _by_tokens(u)[name] if u.dim() == 2 else torch.sigmoid(u)


def misreads_views(u: Tensor) -> Tensor:
    """Takes the memory of a strided view for the view, as a kernel does that ignores strides."""
    return torch.sigmoid(u if u.is_contiguous() else u.as_strided(u.shape, torch.empty(u.shape).stride()))


def other_where_all_are_alike(u: Tensor) -> Tensor:
    flat = u.flatten()
    return torch.sigmoid(u) + (0.3 if len(flat) > 1 and bool((flat == flat[0]).all()) else 0.0)


def whole_chunks(rng: Random) -> ValueFunction:
    chunk = rng.choice([128, 256, 512])
    return Value(lambda u: torch.sigmoid(u) * (1.1 if u.numel() and u.numel() % chunk == 0 else 1.0))


def one_size(rng: Random) -> ValueFunction:
    rows = rng.randint(2, 300)
    return Value(lambda u: torch.sigmoid(u) * (1.1 if u.numel() == rows else 1.0))


def leaks_a_gradient(u: Tensor) -> Tensor:
    """The values are right; a neighbour gets a share of each row's gradient."""
    flat = u.flatten()
    beside = flat.roll(1) - flat
    return (torch.sigmoid(flat) + 0.1 * (beside - beside.detach())).view_as(u)


# -- state --------------------------------------------------------------------------------------------------


class OnLaterCalls(ValueFunction):
    """Another function from the given call on."""

    def __init__(self, call: int, off: float) -> None:
        super().__init__()
        self.calls, self.call, self.off = 0, call, off

    def forward(self, u: Tensor) -> Tensor:
        self.calls += 1
        return torch.sigmoid(u) * (1 + self.off * (self.calls >= self.call))


class RunningScale(ValueFunction):
    """Normalises by a running scale that moves in training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, u: Tensor) -> Tensor:
        if self.training and u.numel():
            self.scale = 0.9 * self.scale + 0.1 * float(u.detach().abs().mean())
        return torch.tanh(u / (1 + self.scale))


class OtherInEval(ValueFunction):
    def forward(self, u: Tensor) -> Tensor:
        return torch.sigmoid(u) if self.training else (torch.sigmoid(u) > 0.5).to(u)


class OtherWithoutGradient(ValueFunction):
    def forward(self, u: Tensor) -> Tensor:
        return torch.sigmoid(u if torch.is_grad_enabled() else 1.001 * u)


class OtherAfterAnEvaluation(ValueFunction):
    """A call without gradient leaves it in another state."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def forward(self, u: Tensor) -> Tensor:
        value = torch.sigmoid(u * (0.9 if self.seen else 1.0))
        self.seen |= not torch.is_grad_enabled()
        return value


class Dropout(ValueFunction):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, u: Tensor) -> Tensor:
        return self.dropout(torch.sigmoid(u))


class Remembered(ValueFunction):
    """A cache with the shape as its key."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[torch.Size, Tensor] = {}

    def forward(self, u: Tensor) -> Tensor:
        if u.shape not in self.answers or self.answers[u.shape].dtype != u.dtype:
            self.answers[u.shape] = torch.sigmoid(u)
        return self.answers[u.shape]


def noise(rng: Random) -> ValueFunction:
    size = rng.choice([1e-3, 1e-2])
    return Value(lambda u: torch.sigmoid(u) + size * torch.rand_like(u))


# -- in place -----------------------------------------------------------------------------------------------


def scales_its_input(rng: Random) -> ValueFunction:
    b = beta(rng) * 0.9

    def v(u: Tensor) -> Tensor:
        u.data.mul_(b)
        return torch.sigmoid(u)

    return Value(v)


def rectifies_its_input(rng: Random) -> ValueFunction:
    return Value(lambda u: torch.relu_(u.detach()) + 0 * u)


def clamps_far_values_in_place(rng: Random) -> ValueFunction:
    bound = rng.uniform(5, 90)

    def v(u: Tensor) -> Tensor:
        u.detach().clamp_(-bound, bound)
        return 0.1 * u

    return Value(v)


def multiplies_a_leaf(rng: Random) -> ValueFunction:
    return Value(lambda u: torch.sigmoid(u.mul_(0.1)))


def clamps_tokens_in_place(rng: Random) -> ValueFunction:
    def v(u: Tensor) -> Tensor:
        if u.dim() == 2:
            u.data.clamp_(-1, 1)
        return torch.sigmoid(u)

    return Value(v)


# -- not finite ---------------------------------------------------------------------------------------------


def naive_where(rng: Random) -> ValueFunction:
    b = rng.choice([0.5, 1.0, 2.0])
    return Value(lambda u: torch.where(u > 0, 1 - torch.exp(-b * u), b * u))


# -- precision ----------------------------------------------------------------------------------------------


def other_in_bfloat16(rng: Random) -> ValueFunction:
    b = beta(rng)
    return Value(
        lambda u: (0.25 * b * u + 0.5).clamp(0, 1) if u.dtype == torch.bfloat16 else torch.sigmoid(b * u),
    )


def wrong_sign_far_out_in_bfloat16(rng: Random) -> ValueFunction:
    place = rng.uniform(20, 90)
    return Value(lambda u: torch.where((u.dtype == torch.bfloat16) & (u > place), -0.1 * u, 0.1 * u))


def float16_on_the_way(rng: Random) -> ValueFunction:
    b = rng.choice([0.1, 0.5, 1.0])
    return Value(lambda u: torch.tanh(b * (u.half() if u.dtype == torch.float32 else u)).to(u))


def cancels(rng: Random) -> ValueFunction:
    offset = rng.choice([1e3, 1e4])
    return Value(lambda u: (offset + torch.tanh(0.3 * u)) - offset)


def smoothing_of_machine_precision(rng: Random) -> ValueFunction:
    many = rng.choice([10, 20])
    return Value(lambda u: torch.sigmoid(u) * (1 - many * torch.finfo(u.dtype).eps))


def nan_at_a_number_of_bfloat16(rng: Random) -> ValueFunction:
    at = float(torch.tensor(rng.uniform(0.2, 4)).bfloat16())
    return Value(
        lambda u: torch.where(u == at, torch.nan, torch.sigmoid(u)) if u.dtype == torch.bfloat16 else torch.sigmoid(u)
    )


def narrow_dip_in(dtype: torch.dtype, width: float) -> Callable[[Random], ValueFunction]:
    def make(rng: Random) -> ValueFunction:
        place = rng.uniform(0.3, 0.9)
        return Value(
            lambda u: torch.sigmoid(u) - 0.3 * ((u > place) & (u < place + width)).to(u) * float(u.dtype == dtype)
        )

    return make


def detached_but_in_float64(rng: Random) -> ValueFunction:
    return Value(lambda u: torch.sigmoid(u if u.dtype == torch.float64 else u.detach()) + 0 * u)


def twice_the_gradient_in_bfloat16(rng: Random) -> ValueFunction:
    def v(u: Tensor) -> Tensor:
        value = torch.sigmoid(0.3 * u)
        return 2 * value - value.detach() if u.dtype == torch.bfloat16 else value

    return Value(v)


def no_gradient_far_out_in_bfloat16(rng: Random) -> ValueFunction:
    bound = rng.uniform(2, 8)

    def v(u: Tensor) -> Tensor:
        far = (u.abs() > bound) & (u.dtype == torch.bfloat16)
        return torch.tanh(0.05 * torch.where(far, u.detach(), u))

    return Value(v)


# -- falls --------------------------------------------------------------------------------------------------


def falls_narrowly(rng: Random) -> ValueFunction:
    b, place = beta(rng), anywhere(rng)
    return Value(lambda u: b * u - (b + SLOPE) * gone_into(u, place))


def falls_narrowly_where_flat(rng: Random) -> ValueFunction:
    place = 1 + 0.98 * gain(rng)
    return Value(lambda u: u.clamp(max=1) - SLOPE * gone_into(u, place))


def falls_narrowly_on_losses(rng: Random) -> ValueFunction:
    b, place = beta(rng), -gain(rng)
    return Value(lambda u: b * u - (b + SLOPE) * gone_into(u, place))


def falls_narrowly_and_smoothly(rng: Random) -> ValueFunction:
    """The slope of arctan dips as a sin^2 and is -1e-4 in the middle only."""
    place = anywhere(rng)
    middle = place + WIDTH / 2
    depth = 1 / (1 + middle**2) + SLOPE

    def v(u: Tensor) -> Tensor:
        t = gone_into(u, place)
        return torch.arctan(u) - depth * (t / 2 - WIDTH / (4 * torch.pi) * torch.sin(2 * torch.pi * t / WIDTH))

    return Value(v)


def falls_beyond(rng: Random) -> ValueFunction:
    place = rng.uniform(50, 99)
    return Value(lambda u: u.clamp(max=1) - SLOPE * F.relu(u - place))


def jumps_down(rng: Random) -> ValueFunction:
    b, place, size = beta(rng), anywhere(rng), 10 ** rng.uniform(-4, -1)
    return Value(lambda u: b * u - size * (u > place).to(u))


def jumps_down_at_zero(rng: Random) -> ValueFunction:
    size = 10 ** rng.uniform(-4, -1)
    return Value(lambda u: 0.1 * u - size * (u >= 0).to(u))


def jumps_down_on_losses(rng: Random) -> ValueFunction:
    place, size = -gain(rng), 10 ** rng.uniform(-4, -1)
    return Value(lambda u: torch.arctan(u) - size * (u > place).to(u))


def jumps_down_a_little(rng: Random) -> ValueFunction:
    """By a millionth, where v itself is large."""
    place = rng.choice([-1, 1]) * rng.uniform(20, 99)
    return Value(lambda u: u - 1e-6 * (u > place).to(u))


def jumps_down_at_a_bucket(rng: Random) -> ValueFunction:
    """... with no comparison that could be seen."""
    place = torch.tensor([rng.choice([-1, 1]) * rng.uniform(20, 99)], dtype=torch.float64)
    return Value(lambda u: u - 1e-6 * torch.bucketize(u.double().contiguous(), place).to(u))


def jumps_down_far_out(rng: Random) -> ValueFunction:
    place = rng.choice([-1, 1]) * rng.uniform(1000, 9000)
    return Value(lambda u: u - 1e-5 * (u > place).to(u))


def falls_in_less_than_a_cell(rng: Random) -> ValueFunction:
    place, steepness = anywhere(rng), 800.0
    return Value(lambda u: 0.1 * u - (0.1 + 3 * SLOPE) * 4 / steepness * torch.sigmoid(steepness * (u - place)))


def falls_behind_the_backward(rng: Random) -> ValueFunction:
    """The dip is there, the gradient does not know of it."""
    place = 2 + 0.97 * gain(rng)
    return Value(lambda u: u.clamp(max=1) - SLOPE * gone_into(u, place).detach())


def ripples(rng: Random) -> ValueFunction:
    often = rng.uniform(1, 9)
    return Value(lambda u: 0.1 * u + 0.101 / often * torch.sin(often * u))


def forgets_the_sign_of_losses(rng: Random) -> ValueFunction:
    return Value(lambda u: torch.where(u >= 0, 0.1 * u, 0.225 * u.abs()))


def squared_error(rng: Random) -> ValueFunction:
    peak = rng.uniform(0.5, 60)
    return Value(lambda u: -((u - peak) ** 2) / 100)


# -- convex on gains ----------------------------------------------------------------------------------------


def rises_more_narrowly(rng: Random) -> ValueFunction:
    b, place = beta(rng), gain(rng)
    return Value(lambda u: b * u + SLOPE * gone_into(u, place))


def rises_more_narrowly_on_a_curve(rng: Random) -> ValueFunction:
    place = gain(rng)
    return Value(lambda u: Logistic(beta=0.1)(u) + SLOPE * gone_into(u, place))


def smoothly_convex_narrowly(rng: Random) -> ValueFunction:
    """The slope of a line grows by 1e-4 over 0.01 and stays there: convex in the interval only."""
    b, place = beta(rng), gain(rng)

    def v(u: Tensor) -> Tensor:
        return b * u + SLOPE * (gone_into(u, place).square() / (2 * WIDTH) + F.relu(u - place - WIDTH))

    return Value(v)


def jumps_up_on_gains(rng: Random) -> ValueFunction:
    b, place, size = beta(rng), gain(rng), 10 ** rng.uniform(-4, -1)
    return Value(lambda u: b * u + size * (u > place).to(u))


def kink_the_wrong_way(rng: Random) -> ValueFunction:
    b, place, size = beta(rng), gain(rng), rng.choice([1e-3, 1e-2, 0.1])
    return Value(lambda u: b * u + size * F.relu(u - place))


def staircase(rng: Random) -> ValueFunction:
    step = rng.uniform(0.1, 3)
    return Value(lambda u: 0.1 * u + 0.1 * torch.floor(u / step))


def power_above_one(rng: Random) -> ValueFunction:
    alpha = rng.uniform(1.01, 1.3)
    return Value(lambda u: torch.sign(u) * ((u.abs() + 1e-3) ** alpha - 1e-3**alpha))


def convex_far_out(rng: Random) -> ValueFunction:
    place = rng.uniform(40, 95)
    return Value(lambda u: torch.tanh(u / 50) + 1e-4 * F.relu(u - place).square())


def clipped_ratio(rng: Random) -> ValueFunction:
    high = rng.uniform(0.1, 0.5)
    return Value(lambda u: torch.exp(u.clamp(max=high)))


def jumps_up_a_little(rng: Random) -> ValueFunction:
    place = rng.uniform(20, 99)
    return Value(lambda u: u + 1e-6 * torch.heaviside(u.detach() - place, torch.zeros((), dtype=u.dtype)))


def rises_behind_the_backward(rng: Random) -> ValueFunction:
    place = rng.uniform(20, 99)
    return Value(lambda u: 0.1 * u + SLOPE * gone_into(u, place).detach())


# -- wrong gradient -----------------------------------------------------------------------------------------


class _WrongBackward(torch.autograd.Function):
    """sigmoid(scale * u), whose backward forgets the scale; or gets the losses' or the far rows' gradient wrong."""

    @staticmethod
    def forward(ctx, u: Tensor, scale: float, kind: str) -> Tensor:  # type: ignore[override]
        value = torch.sigmoid(scale * u)
        ctx.save_for_backward(u, value)
        ctx.scale, ctx.kind = scale, kind
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        u, value = ctx.saved_tensors
        right = ctx.scale * value * (1 - value)
        wrong = {
            "forgets the scale": right / ctx.scale,
            "on losses": torch.where(u < 0, 2.25 * right, right),
            "constant": torch.full_like(right, 0.25 * ctx.scale),
            "clipped far out": torch.where(u.abs() > 5, torch.zeros_like(right), right),
        }[ctx.kind]
        return gradient * wrong, None, None


def wrong_backward(kind: str) -> Callable[[Random], ValueFunction]:
    def make(rng: Random) -> ValueFunction:
        scale = rng.uniform(0.1, 0.6)
        return Value(lambda u: _WrongBackward.apply(u, scale, kind))

    return make


class _OtherCotangent(torch.autograd.Function):
    """sigmoid, whose backward does something else to what it is handed than passing it on."""

    @staticmethod
    def forward(ctx, u: Tensor, kind: str) -> Tensor:  # type: ignore[override]
        value = torch.sigmoid(u)
        ctx.save_for_backward(value)
        ctx.kind = kind
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        (value,) = ctx.saved_tensors
        handed = {
            "ignored": torch.ones_like(gradient),
            "averaged": gradient.mean().expand_as(gradient),
            "without its sign": gradient.abs(),
            "clamped": gradient.clamp(-1, 1),
            "clamped from below": gradient.clamp(min=-0.5),
        }[ctx.kind]
        return handed * value * (1 - value), None


def other_cotangent(kind: str) -> Callable[[Random], ValueFunction]:
    return lambda rng: Value(lambda u: _OtherCotangent.apply(u, kind))


def clips_by_a_hook(rng: Random) -> ValueFunction:
    def v(u: Tensor) -> Tensor:
        if u.requires_grad:
            u.register_hook(lambda gradient: gradient.clamp(-0.5, 0.5))
        return torch.sigmoid(u)

    return Value(v)


def log_sigmoid_by_hand(rng: Random) -> ValueFunction:
    """The formula is right; at exactly 0 autograd takes 0 for the slope of |u| and of relu."""
    b = beta(rng)
    return Value(lambda u: -(F.relu(-b * u) + torch.log1p(torch.exp(-(b * u).abs()))))


def straight_through_clamp(rng: Random) -> ValueFunction:
    bound = rng.uniform(1, 60)
    return Value(lambda u: u + (u.clamp(-bound, bound) - u).detach())


def straight_through_sign(rng: Random) -> ValueFunction:
    return Value(lambda u: 0.1 * u + (torch.sign(u) - 0.1 * u).detach())


def detached_factor(rng: Random) -> ValueFunction:
    b = beta(rng)
    return Value(lambda u: u / (1 + b * u.abs()).detach())


def detached_half(rng: Random) -> ValueFunction:
    return Value(lambda u: 0.5 * torch.sigmoid(u) + 0.5 * torch.tanh(0.1 * u).detach())


def fully_detached(rng: Random) -> ValueFunction:
    return Value(lambda u: torch.sigmoid(0.1 * u.detach()))


# -- both sides ---------------------------------------------------------------------------------------------


def concave_losses(rng: Random) -> ValueFunction:
    """A power above 1 for losses: people get more, not less, sensitive the more they lose."""
    power = rng.uniform(1.05, 1.4)
    return Value(
        lambda u: torch.where(u >= 0, 0.1 * u, -2.25 * ((0.1 * u.clamp(max=0).abs() + 1e-3) ** power - 1e-3**power))
    )


def narrowly_concave_losses(rng: Random) -> ValueFunction:
    b, place = beta(rng), -gain(rng)
    return Value(lambda u: b * u + SLOPE * gone_into(u, place))


def _all(clauses: tuple[str, ...], formulas: dict[str, Callable[[Tensor], Tensor]]) -> list[Mutant]:
    return [Mutant(name, clauses, lambda rng, formula=f: Value(formula)) for name, f in formulas.items()]


MUTANTS = [
    *_all(("shape",), wrong_shapes()),
    *_all(("elementwise",), mixed_rows()),
    *(
        Mutant(name, ("elementwise",), lambda rng, name=name: Value(only_by_tokens(name)))
        for name in _by_tokens(torch.zeros(1, 1))
    ),
    *_all(
        ("elementwise",),
        {"misreads strided views": misreads_views, "another function where all are alike": other_where_all_are_alike},
    ),
    *_all(("elementwise", "gradient"), {"leaks a gradient to the neighbour": leaks_a_gradient}),
    Mutant("another function for whole chunks", ("elementwise",), whole_chunks, kind=SIZES),
    Mutant("another function for one batch size", ("elementwise",), one_size, kind=SIZES),
    Mutant("another function in large batches", ("elementwise",), only_in_large_batches, kind=SIZES),
    Mutant("processes chunks and drops the rest", ("elementwise",), chunk_without_the_rest, kind=SIZES),
    Mutant("another function on the second call", ("deterministic",), lambda rng: OnLaterCalls(2, 0.01)),
    Mutant("another function on the third call", ("deterministic",), lambda rng: OnLaterCalls(3, 0.1)),
    Mutant("running scale", ("deterministic",), lambda rng: RunningScale()),
    Mutant("another function in eval", ("deterministic",), lambda rng: OtherInEval()),
    Mutant("another function without gradient", ("deterministic",), lambda rng: OtherWithoutGradient()),
    Mutant("another function after an evaluation", ("deterministic",), lambda rng: OtherAfterAnEvaluation()),
    Mutant("another function on the 100th call", ("deterministic",), lambda rng: OnLaterCalls(100, 0.01)),
    Mutant("dropout", ("deterministic",), lambda rng: Dropout()),
    Mutant("random noise", ("deterministic",), noise),
    Mutant("remembers answers by shape", ("elementwise", "deterministic"), lambda rng: Remembered()),
    Mutant("scales its input in place", ("no_in_place_change",), scales_its_input),
    Mutant("rectifies its input in place", ("no_in_place_change",), rectifies_its_input),
    Mutant("clamps far values in place", ("no_in_place_change",), clamps_far_values_in_place),
    Mutant("clamps tokens in place", ("no_in_place_change",), clamps_tokens_in_place),
    Mutant("multiplies a leaf in place", ("no_in_place_change",), multiplies_a_leaf),
    *_all(
        ("finite",),
        {
            "unsmoothed power": lambda u: torch.sign(u) * u.abs() ** 0.88,
            "square root at 0": lambda u: u.clamp(min=0).sqrt(),
            "size as a square root of the square": lambda u: -torch.sqrt(u * u) + 2 * u,
            "u / |u| at 0": lambda u: torch.tanh(u) * u / u.abs() * torch.sign(u),
            "log of a sigmoid": lambda u: torch.log(torch.sigmoid(u)),
            "log(1 + e^-u)": lambda u: -torch.log(1 + torch.exp(-u)),
            "CARA without a linear continuation": lambda u: 1 - torch.exp(-u),
            "log1p behind a where": lambda u: torch.where(u > 0, torch.log1p(u), u),
            "ratio clamped after the exponential": lambda u: torch.exp(u).clamp(max=1.0),
        },
    ),
    Mutant("e^-u behind a where", ("finite",), naive_where),
    Mutant("nan at a number of bfloat16", ("finite", "precision"), nan_at_a_number_of_bfloat16),
    Mutant("narrow dip in bfloat16", ("precision",), narrow_dip_in(torch.bfloat16, 0.01)),
    Mutant("computes in float32 inside", ("precision",), lambda rng: Value(lambda u: torch.tanh(u.float()).to(u))),
    Mutant("narrow dip in float32", ("precision",), narrow_dip_in(torch.float32, 0.01)),
    Mutant("detached but in float64", ("precision",), detached_but_in_float64),
    Mutant("twice the gradient in bfloat16", ("precision",), twice_the_gradient_in_bfloat16),
    Mutant("no gradient far out in bfloat16", ("precision",), no_gradient_far_out_in_bfloat16),
    Mutant("another function in bfloat16", ("precision",), other_in_bfloat16),
    Mutant("wrong sign far out in bfloat16", ("precision",), wrong_sign_far_out_in_bfloat16),
    Mutant("float16 on the way", ("precision",), float16_on_the_way),
    Mutant("cancels", ("precision",), cancels),
    Mutant("a factor of the machine precision", ("precision",), smoothing_of_machine_precision),
    Mutant("falls narrowly", ("non_decreasing",), falls_narrowly),
    Mutant("falls narrowly at another place", ("non_decreasing",), falls_narrowly),
    Mutant("falls narrowly where flat", ("non_decreasing",), falls_narrowly_where_flat),
    Mutant("falls narrowly on losses", ("non_decreasing",), falls_narrowly_on_losses),
    Mutant("falls narrowly and smoothly", ("non_decreasing",), falls_narrowly_and_smoothly),
    Mutant("falls beyond", ("non_decreasing",), falls_beyond),
    Mutant("jumps down", ("non_decreasing",), jumps_down),
    Mutant("jumps down at another place", ("non_decreasing",), jumps_down),
    Mutant("jumps down at zero", ("non_decreasing",), jumps_down_at_zero),
    Mutant("jumps down on losses", ("non_decreasing",), jumps_down_on_losses),
    Mutant("jumps down by a millionth", ("non_decreasing",), jumps_down_a_little),
    Mutant("jumps down by a millionth at a bucket", ("non_decreasing",), jumps_down_at_a_bucket),
    Mutant("jumps down a little far out", ("non_decreasing",), jumps_down_far_out),
    Mutant("falls in less than a cell of the grid", ("non_decreasing",), falls_in_less_than_a_cell),
    Mutant("falls behind the back of its gradient", ("non_decreasing", "gradient"), falls_behind_the_backward),
    Mutant("ripples", ("non_decreasing",), ripples),
    Mutant("forgets the sign of losses", ("non_decreasing",), forgets_the_sign_of_losses),
    Mutant("squared error, as in IPO", ("non_decreasing",), squared_error),
    *_all(("non_decreasing",), {"swish": lambda u: F.silu(u), "gelu": lambda u: F.gelu(u)}),
    Mutant("rises more narrowly", ("concave_on_gains",), rises_more_narrowly),
    Mutant("rises more narrowly at another place", ("concave_on_gains",), rises_more_narrowly),
    Mutant("rises more narrowly on a curve", ("concave_on_gains",), rises_more_narrowly_on_a_curve),
    Mutant("smoothly convex in a narrow interval", ("concave_on_gains",), smoothly_convex_narrowly),
    Mutant("jumps up on gains", ("concave_on_gains",), jumps_up_on_gains),
    Mutant("jumps up on gains at another place", ("concave_on_gains",), jumps_up_on_gains),
    Mutant("jumps up by a millionth on gains", ("concave_on_gains",), jumps_up_a_little),
    Mutant("convex behind the back of its gradient", ("concave_on_gains", "gradient"), rises_behind_the_backward),
    Mutant("kink the wrong way", ("concave_on_gains",), kink_the_wrong_way),
    Mutant("staircase", ("concave_on_gains",), staircase),
    Mutant("power above one", ("concave_on_gains",), power_above_one),
    Mutant("convex far out", ("concave_on_gains",), convex_far_out),
    Mutant("ratio clipped at 1 + epsilon", ("concave_on_gains",), clipped_ratio),
    *_all(("concave_on_gains",), {"softplus": lambda u: F.softplus(u), "square": lambda u: u * F.relu(u) / 100 + u}),
    *(
        Mutant(f"wrong backward: {kind}", ("gradient",), wrong_backward(kind))
        for kind in ("forgets the scale", "on losses", "constant", "clipped far out")
    ),
    *(
        Mutant(f"what it is handed back is {kind}", ("gradient", "elementwise"), other_cotangent(kind))
        for kind in ("ignored", "averaged", "without its sign", "clamped", "clamped from below")
    ),
    Mutant("clips its gradient by a hook", ("gradient", "elementwise"), clips_by_a_hook),
    *_all(
        ("gradient",),
        {
            "sign times a function of the size: no slope at 0": lambda u: torch.sign(u) * torch.log1p(u.abs()),
            "two clamps: twice the slope at 0": lambda u: 0.1 * (u.clamp(min=0) + u.clamp(max=0)),
        },
    ),
    Mutant("log sigmoid by hand: no slope at 0", ("gradient",), log_sigmoid_by_hand),
    Mutant("straight-through clamp", ("gradient",), straight_through_clamp),
    Mutant("straight-through sign", ("gradient",), straight_through_sign),
    Mutant("detached factor", ("gradient",), detached_factor),
    Mutant("detached half", ("gradient",), detached_half),
    Mutant("fully detached", ("gradient",), fully_detached),
    # Reported for a bare value function, required of an objective that reads ``reflect``.
    Mutant("falls narrowly on losses, v~", ("undesirable_non_decreasing",), falls_narrowly_on_losses),
    Mutant("jumps down on losses, v~", ("undesirable_non_decreasing",), jumps_down_on_losses),
    Mutant("log sigma, v~", ("undesirable_concave_on_gains",), lambda rng: LogSigmoid(beta=beta(rng))),
    Mutant("power above one on losses, v~", ("undesirable_concave_on_gains",), concave_losses),
    Mutant("narrowly concave losses, v~", ("undesirable_concave_on_gains",), narrowly_concave_losses),
]

# What an objective that reads ``reflect`` must not hold.
REFLECTED = {
    "log sigma": (("undesirable_concave_on_gains",), lambda rng: LogSigmoid(beta=beta(rng))),
    "power above one on losses": (("undesirable_concave_on_gains",), concave_losses),
    "narrowly concave losses": (("undesirable_concave_on_gains",), narrowly_concave_losses),
    "falls narrowly on losses": (("undesirable_non_decreasing",), falls_narrowly_on_losses),
    "jumps down on losses": (("undesirable_non_decreasing",), jumps_down_on_losses),
}
