"""Correct plug-ins that are written otherwise than the library's: other collectives, locks, learnable parameters."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mutant import EXCUSES, SIZES, STATE, Sound
from part_mutants import EstimatedBy, Formula, Judge, mean, own, token_ratio
from torch import Tensor, nn
from torch.distributed import all_reduce as reduce_everywhere
from torch.distributed import is_initialized

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import sum_over_ranks
from halos_pl.objective.composite import Sum, SumContext
from halos_pl.objective.feedback import Judgement
from halos_pl.objective.halo import Result
from halos_pl.objective.reference_points import Estimate, MismatchedKL, ReferencePoint
from value_functions import ValueFunction


class LearnableBeta(ValueFunction):
    """tanh(softplus(raw) * u); the parameter has the given shape."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full(shape, -2.0))

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(F.softplus(self.raw).to(u.dtype) * u)


class Locked(ValueFunction):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, u: Tensor) -> Tensor:
        with self.lock:
            return torch.sigmoid(u)


class BoundedBelow(ValueFunction):
    """1 - e^-u down to -10 nats, and its tangent below."""

    domain = (-10, None)

    def forward(self, u: Tensor) -> Tensor:
        above = u.clamp(min=-10)
        return 1 - torch.exp(-above) + torch.e**10 * (u - above)


class Network(ValueFunction):
    """A sum of turned softplus functions: linear where their arguments are large."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.slopes = nn.Parameter(torch.rand(8, generator=draw) + 0.1)
        self.places = nn.Parameter(torch.randn(8, generator=draw) * 20)

    def forward(self, u: Tensor) -> Tensor:
        wide = u if u.dtype == torch.float64 else u.float()
        x = wide[..., None] * F.softplus(self.slopes).to(wide) + self.places.to(wide)
        return -F.softplus(-x).sum(-1).to(u.dtype)


class Passes(torch.autograd.Function):
    """sigmoid, with a backward of its own that is right."""

    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:  # type: ignore[override]
        value = torch.sigmoid(u)
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (value,) = ctx.saved_tensors
        return gradient * value * (1 - value)


class OwnBackward(ValueFunction):
    def forward(self, u: Tensor) -> Tensor:
        return Passes.apply(u)


def _all_reduced(total: Tensor) -> Tensor:
    reduce_everywhere(total)
    return total


def _waited_for(total: Tensor) -> Tensor:
    dist.all_reduce(total, async_op=True).wait()
    return total


def _gathered(total: Tensor) -> Tensor:
    everyone = total.new_zeros(dist.get_world_size() * 2)
    dist.all_gather_into_tensor(everyone, total)
    return everyone.view(-1, 2).sum(0)


def _reduced_and_broadcast(total: Tensor) -> Tensor:
    dist.reduce(total, 0)
    dist.broadcast(total, 0)
    return total


class MeanBy(ReferencePoint):
    """The mean over all ranks by some collective operation."""

    needs = Needs(step_rewards=True)

    def __init__(self, everywhere: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.everywhere = everywhere

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        total = torch.stack([own(rewards, rows).sum(), rows.labels.train.sum().to(rewards)])
        if is_initialized():
            total = self.everywhere(total)
        return Estimate(total[0] / total[1].clamp(min=1))


class AverageInABuffer(ReferencePoint):
    """An exponential moving average whose first step has nothing to keep."""

    needs = Needs(step_rewards=True)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(torch.nan))

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        estimate = mean(own(rewards, rows)).float()
        if self.training:
            self.mean = torch.where(self.mean.isnan(), estimate, 0.9 * self.mean + 0.1 * estimate)
        return Estimate(self.mean.to(rewards))


class NamedKL(MismatchedKL):
    """Adds nothing to the estimate."""

    title = "KL"


class LoggingSum(Sum):
    """Counts its calls."""

    calls = 0

    def compute_loss(self, rows: LogProbBatch, context: SumContext) -> Result:
        self.calls += 1
        return super().compute_loss(rows, context)


def _balanced(judgement: Judgement, rows: LogProbBatch) -> Judgement:
    """Both classes weigh the same in the step."""
    own = sum_over_ranks(
        torch.stack(
            [(rows.labels.train & rows.labels.desirable).sum(), (rows.labels.train & ~rows.labels.desirable).sum()]
        )
    )
    return judgement._replace(weight=judgement.weight / torch.where(rows.labels.desirable, own[0], own[1]).clamp(min=1))


SOUND_PARTS: dict[str, Callable[[], nn.Module]] = {
    "learnable beta": Sound(STATE, LearnableBeta),
    "learnable beta of shape (1,)": Sound(STATE, lambda: LearnableBeta((1,))),
    "a lock": Locked,
    "a domain without an upper bound": BoundedBelow,
    "a network of softplus functions": Sound(STATE, Network),
    "a backward of its own": OwnBackward,
    "reward, tokens by length": lambda: Formula(lambda rows: token_ratio(rows) / rows.mask.sum(1, keepdim=True)),
    "all_reduce by a name of its own": Sound(SIZES, lambda: MeanBy(_all_reduced)),
    "all_reduce that is waited for": Sound(SIZES, lambda: MeanBy(_waited_for)),
    "all_gather_into_tensor": Sound(SIZES, lambda: MeanBy(_gathered)),
    "reduce and broadcast": Sound(SIZES, lambda: MeanBy(_reduced_and_broadcast)),
    "an average in a buffer": Sound(STATE, AverageInABuffer),
    "mean of the pair": lambda: EstimatedBy(
        lambda r, rows: (r + torch.where(rows.labels.pair < 0, r, r[rows.labels.pair])) / 2,
        scope="row",
        needs=Needs(pairs=True),
    ),
    "a subclass of MismatchedKL with its forward": Sound(EXCUSES, NamedKL),
    "weights by the share of the class on all ranks": Sound(SIZES, lambda: Judge(_balanced)),
    "weights by length": lambda: Judge(lambda j, rows: j._replace(weight=j.weight / rows.mask.sum(1))),
}
