"""Random families of faulty and of sound parts whose fault shows late, at an odd size, or in what they may not see.

The mutants of other seeds have other sizes, calls, columns and factors, which are drawn as defaults of arguments.
"""
# ruff: noqa: B008

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mutant import EXCUSES, INPUTS, SIZES, STATE, VALUES, Mutant, Sound
from part_mutants import EstimatedBy, Formula, mean, own, ratio, token_ratio
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import gather_over_ranks, sum_over_ranks
from halos_pl.objective.feedback import Binary, Feedback, Judgement, Pairwise
from halos_pl.objective.halo import HALO, Result
from halos_pl.objective.reference_points import (
    Estimate,
    MismatchedKL,
    PairedCompletion,
    RankMatched,
    ReferencePoint,
    RunningMean,
    TokenKL,
)
from halos_pl.objective.rewards import LogRatio, TokenLogRatio
from value_functions import Logistic, LogSigmoid


class Late(Formula):
    """``formula`` from the given call on, the log-ratio before."""

    def __init__(self, formula: Callable[[LogProbBatch], Tensor], call: int) -> None:
        super().__init__(formula)
        self.calls, self.call = 0, call

    def forward(self, rows: LogProbBatch) -> Tensor:
        self.calls += 1
        return self.formula(rows) if self.calls >= self.call else ratio(rows)


def spoils_gradients(rng: Random) -> Callable[[Tensor], Tensor]:
    """Drops small gradients or clips large ones, and leaves values alone."""
    least, most = rng.choice([(1e-7, math.inf), (1e-4, math.inf), (1e-2, math.inf), (0.0, 2.0), (0.0, 100.0)])

    def spoiled(x: Tensor) -> Tensor:
        x = 1 * x
        if x.requires_grad:
            x.register_hook(lambda g: torch.where(g.abs() < least, 0.0, g.clamp(-most, most)))
        return x

    return spoiled


class ScaledReward(Formula):
    """The log-ratio times a function of a learnable number."""

    def __init__(self, raw: float, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__(ratio)
        self.raw, self.scale = nn.Parameter(torch.tensor(raw)), scale

    def forward(self, rows: LogProbBatch) -> Tensor:
        r = ratio(rows)
        return r * self.scale(self.raw).to(r)


def clock(rng: Random) -> Callable[[], float]:
    """Tells the time in seconds, by one of the ways there are."""
    return rng.choice(
        [
            lambda: time.time(),
            lambda: time.mktime(time.strptime(time.asctime())),
            lambda: time.mktime(time.strptime(time.strftime("%d %H %M %Y"), "%d %H %M %Y")),
            lambda: time.clock_gettime(time.CLOCK_REALTIME),
            lambda: time.clock_gettime_ns(time.CLOCK_REALTIME) / 1e9,
        ]
    )


def columns(rows: LogProbBatch) -> dict[str, Tensor]:
    """Conditions on a row that are not about (x, y)."""
    labels = rows.labels
    return {
        "desirable": labels.desirable,
        "mismatched": labels.mismatched,
        "score": labels.score > 0.3,
        "pair": labels.pair >= 0,
        "group": labels.group % 2 == 0,
    }


def sees_column(rng: Random) -> Formula:
    name, factor = rng.choice(["desirable", "mismatched", "score", "pair", "group"]), rng.choice([0.5, 0.9, 2.0])
    return Formula(lambda rows: ratio(rows) * torch.where(columns(rows)[name], factor, 1.0))


def shared_length(rng: Random) -> Formula:
    """Divides by a length that the two rows of a pair share."""
    power = rng.choice([0.5, 1.0])
    part = Formula(lambda rows: ratio(rows) / _with_pair(rows, rows.mask.sum(1).to(rows.policy_logps)) ** power)
    part.needs = Needs(reference=True, pairs=True)
    return part


def _with_pair(rows: LogProbBatch, values: Tensor) -> Tensor:
    pair = rows.labels.pair
    return torch.where(pair < 0, values, (values + values[pair]) / 2)


def sees_what_it_needs(rng: Random) -> Formula:
    """Asks for pairs and whole prompts, and sees whether there is a pair, a tie with it, or more of the prompt."""

    def condition(rows: LogProbBatch, kind: str = rng.choice(["pair", "tie", "prompt"])) -> Tensor:
        labels = rows.labels
        if kind == "prompt":
            return (labels.group[:, None] == labels.group).sum(dim=1) > 2
        return (labels.pair >= 0) & ((kind == "pair") | (labels.score == labels.score[labels.pair]))

    factor = rng.choice([0.5, 0.9, 2.0])
    part = Formula(lambda rows: ratio(rows) * torch.where(condition(rows), factor, 1.0))
    part.needs = Needs(reference=True, pairs=True, groups=True)
    return part


def share_of_expert(rows: LogProbBatch, expert: int) -> Tensor:
    """The share of choices that fell on an expert, [n]; the policy decides about it."""
    assert rows.routing is not None
    return rows.routing.chosen[:, expert] / rows.routing.chosen.sum(dim=1).clamp(min=1)


def by_routing(rng: Random) -> Formula:
    part = Formula(
        lambda rows, expert=rng.randrange(3): ratio(rows) * (1 + share_of_expert(rows, expert).to(rows.policy_logps))
    )
    part.needs = Needs(reference=True, routing=True)
    return part


def rounded(dtype: torch.dtype) -> Callable[[LogProbBatch], Tensor]:
    """The log-ratio, with log-probs of float32 rounded to ``dtype``."""

    def formula(rows: LogProbBatch) -> Tensor:
        if rows.policy_logps.dtype != torch.float32:
            return ratio(rows)
        return ratio(dataclasses.replace(rows, policy_logps=rows.policy_logps.to(dtype).float()))

    return formula


def halved_slope(rows: LogProbBatch) -> Tensor:
    r = ratio(rows)
    return r if r.dtype == torch.float64 else (r + r.detach()) / 2


REWARDS = [
    Mutant("sees a column", ("reward_of_its_row",), sees_column),
    Mutant("a length shared with the pair", ("reward_of_its_row",), shared_length),
    Mutant("sees the pair or the prompt that it needs", ("reward_of_its_row",), sees_what_it_needs),
    Mutant("a factor by the policy's routing", ("reward_linear",), by_routing, kind=INPUTS),
    Mutant(
        "spoils gradients of some sizes",
        ("reward_linear",),
        lambda rng: Formula(lambda rows, spoil=spoils_gradients(rng): spoil(ratio(rows))),
    ),
    Mutant(
        "rounds in float32",
        ("reward_shape",),
        lambda rng: Formula(rounded(rng.choice([torch.bfloat16, torch.float16]))),
    ),
    Mutant("half a slope in float32", ("reward_shape",), lambda rng: Formula(halved_slope)),
    Mutant(
        "another reward after many calls",
        ("reward_of_its_row",),
        lambda rng: Late(lambda rows: 0.9 * ratio(rows), rng.randint(100, 4900)),
        kind=STATE,
    ),
    Mutant(
        "a learnable factor",
        ("reward_linear",),
        lambda rng: ScaledReward(rng.uniform(0.1, 3), lambda raw: raw),
        kind=STATE,
    ),
    Mutant(
        "a learnable factor in a tanh",
        ("reward_linear",),
        lambda rng: ScaledReward(rng.uniform(0.1, 2), torch.tanh),
        kind=STATE,
    ),
    Mutant(
        "reads a few thousand tokens",
        ("reward_linear",),
        lambda rng: Formula(lambda rows, size=rng.randint(1100, 8000): token_ratio(rows)[:, :size].sum(1)),
        kind=SIZES,
    ),
    Mutant(
        "centred in steps of many rows",
        ("reward_linear", "reward_of_its_row"),
        lambda rng: Formula(
            lambda rows, size=rng.randint(300, 4000): ratio(rows) - (ratio(rows).mean() if len(rows) > size else 0)
        ),
        kind=SIZES,
    ),
    Mutant(
        "another reward in inference mode",
        ("reward_of_its_row",),
        lambda rng: Formula(lambda rows: ratio(rows) * (0.5 if torch.is_inference_mode_enabled() else 1)),
        kind=STATE,
    ),
    Mutant(
        "another reward with another default dtype",
        ("reward_of_its_row",),
        lambda rng: Formula(
            lambda rows, dtype=rng.choice([torch.bfloat16, torch.float64]), c=rng.choice([0.5, 0.98, 1.02]): (
                ratio(rows) * (c if torch.get_default_dtype() == dtype else 1)
            )
        ),
        kind=STATE,
    ),
    Mutant(
        "another reward by the clock",
        ("reward_of_its_row",),
        lambda rng: Formula(
            lambda rows, now=clock(rng), start=time.time(), hours=rng.randint(1, 20): (
                ratio(rows) * (0.5 if now() > start + 3600 * hours else 1)
            )
        ),
        kind=STATE,
    ),
]


class SoftMaximum(ReferencePoint):
    """scale * log mean exp(r / scale); stable or not."""

    needs = Needs(step_rewards=True)

    def __init__(self, scale: float, *, stable: bool) -> None:
        super().__init__()
        self.scale, self.stable = scale, stable

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        r, _ = gather_over_ranks(own(rewards, rows) / self.scale)
        z0 = r.logsumexp(0) - math.log(len(r)) if self.stable else r.exp().mean().log()
        return Estimate(self.scale * z0)


class PlusHook(MismatchedKL):
    """Another number by ``__call__``."""

    def __init__(self, plus: float) -> None:
        super().__init__()
        self.plus = plus

    def __call__(self, *args: Any, **kwargs: Any) -> Estimate:
        estimate = super().__call__(*args, **kwargs)
        return dataclasses.replace(estimate, value=estimate.value + self.plus)


def hooked(rng: Random) -> ReferencePoint:
    plus, part = rng.choice([0.1, 1.0, -2.0]), MismatchedKL()
    part.register_forward_hook(lambda module, inputs, out: dataclasses.replace(out, value=out.value + plus))
    return part


def first_ranks(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    r = own(rewards, rows)
    mine = torch.stack([r.sum(), r.new_tensor(float(len(r)))])
    if dist.is_available() and dist.is_initialized():
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        mine = everyone[0] + everyone[1]
    return mine[0] / mine[1].clamp(min=1)


class Frozen(ReferencePoint):
    """The estimate of the given call, kept for ever."""

    needs = Needs(step_rewards=True)

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call, self.calls, self.mean = call, 0, 0.0

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        if self.training:
            self.calls += 1
            if self.calls <= self.call:
                self.mean = float(mean(own(rewards, rows)))
        return Estimate(rewards.new_tensor(self.mean))


class Average(ReferencePoint):
    """The mean of the estimates of all steps; ``saved``: in its state dict, ``always``: in evaluation as well."""

    needs = Needs(step_rewards=True)

    def __init__(self, *, saved: bool = True, always: bool = False) -> None:
        super().__init__()
        self.saved, self.always, self.total, self.count = saved, always, 0.0, 0

    def get_extra_state(self) -> tuple[float, int]:
        return self.total, self.count

    def set_extra_state(self, state: tuple[float, int]) -> None:
        if self.saved:
            self.total, self.count = state

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        if self.training or self.always:
            self.total, self.count = self.total + float(mean(own(rewards, rows))), self.count + 1
        return Estimate(rewards.new_tensor(self.total / max(self.count, 1)))


def by_padding(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    w = (1 - rows.mask.float().mean(1) + 1 / rows.mask.shape[1])[rows.labels.train].to(rewards)
    total = sum_over_ranks(torch.stack([(w * own(rewards, rows)).sum(), w.sum()]))
    return total[0] / total[1]


def by_prompt(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    w = (1 + rows.labels.group % 3)[rows.labels.train].to(rewards)
    total = sum_over_ranks(torch.stack([(w * own(rewards, rows)).sum(), w.sum()]))
    return total[0] / total[1]


def with_spread(share: float) -> Callable[[Tensor, LogProbBatch], Tensor]:
    def formula(rewards: Tensor, rows: LogProbBatch) -> Tensor:
        values = gather_over_ranks(own(rewards, rows))[0]
        return values.mean() + share * values.std(correction=0)

    return formula


def of_pair(spoil: Callable[[Tensor], Tensor]) -> EstimatedBy:
    def formula(rewards: Tensor, rows: LogProbBatch) -> Tensor:
        return spoil(torch.where(rows.labels.pair < 0, 0.0, rewards[rows.labels.pair]))

    return EstimatedBy(formula, scope="row", needs=Needs(pairs=True))


class LearnableMargin(MismatchedKL):
    """The estimate plus a learnable number that starts at 0."""

    def __init__(self) -> None:
        super().__init__(clamp=False)
        self.margin = nn.Parameter(torch.zeros(()))

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        estimate = super().forward(rewards, rows)
        return dataclasses.replace(estimate, value=estimate.value + self.margin.detach())


IN_RANGE = ("reference_in_range", "reference_shift_equivariant")
REFERENCES = [
    Mutant("adds to the clamp by __call__", IN_RANGE, lambda rng: PlusHook(rng.choice([0.1, 1.0, -2.0])), kind=EXCUSES),
    Mutant("adds to the clamp by a hook", IN_RANGE, hooked, kind=EXCUSES),
    Mutant(
        "clamps elsewhere",
        IN_RANGE,
        lambda rng: EstimatedBy(
            lambda r, rows, at=rng.choice([-3.0, 0.2, 5.0]): mean(r[rows.labels.mismatched]).clamp(min=at),
            needs=Needs(mismatched=True),
        ),
        kind=EXCUSES,
    ),
    Mutant(
        "clamps from above",
        IN_RANGE,
        lambda rng: EstimatedBy(
            lambda r, rows: mean(r[rows.labels.mismatched]).clamp(max=0), needs=Needs(mismatched=True)
        ),
        kind=EXCUSES,
    ),
    Mutant(
        "overflows in float32",
        ("reference_finite",),
        lambda rng: SoftMaximum(rng.choice([12.0, 30.0, 100.0]), stable=False),
    ),
    Mutant(
        "forgets its history when training resumes",
        ("reference_split",),
        lambda rng: Average(saved=False),
        kind=STATE,
    ),
    Mutant("a history that validation changes", ("reference_split",), lambda rng: Average(always=True), kind=STATE),
    Mutant("weights by padding", ("reference_split",), lambda rng: EstimatedBy(by_padding)),
    Mutant("weights by the prompt's number", ("reference_split",), lambda rng: EstimatedBy(by_prompt)),
    Mutant("two ranks only", ("reference_split",), lambda rng: EstimatedBy(first_ranks)),
    Mutant("frozen at the first step", ("reference_in_range",), lambda rng: Frozen(1), kind=STATE),
    Mutant("frozen later", ("reference_in_range",), lambda rng: Frozen(rng.randint(2, 4000)), kind=STATE),
    Mutant(
        "adds some of the spread",
        IN_RANGE,
        lambda rng: EstimatedBy(with_spread(rng.choice([-0.7, 0.2, 0.5, 1.0]))),
        kind=SIZES,
    ),
    Mutant(
        "a share of the gradient",
        ("reference_detached",),
        lambda rng: of_pair(lambda r, share=rng.choice([0.0, 0.5, 0.9, 1.5]): share * r + (1 - share) * r.detach()),
    ),
    Mutant("a learnable margin", IN_RANGE, lambda rng: LearnableMargin(), kind=STATE),
    Mutant("spoils gradients of some sizes", ("reference_detached",), lambda rng: of_pair(spoils_gradients(rng))),
]


class Weighs(Feedback):
    """Thumbs up and down with the weights of ``formula``."""

    needs = Needs(undesirable=True, groups=True)

    def __init__(self, formula: Callable[[LogProbBatch, int], Tensor], needs: Needs | None = None) -> None:
        super().__init__()
        self.formula, self.calls = formula, 0
        self.needs = needs or type(self).needs

    def forward(self, rows: LogProbBatch) -> Judgement:
        self.calls += 1
        right: Judgement = Binary()(rows)
        return right._replace(weight=right.weight * self.formula(rows, self.calls))


def of_prompt(rows: LogProbBatch) -> Tensor:
    same = (rows.labels.group[:, None] == rows.labels.group[None, :]) & rows.labels.train
    return same.sum(dim=1)


class LearnableWeight(Feedback):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.raw, self.function = nn.Parameter(torch.ones(())), function

    def forward(self, rows: LogProbBatch) -> Judgement:
        right: Judgement = Binary()(rows)
        factor = self.function(self.raw.detach())
        return right._replace(weight=right.weight * torch.where(rows.labels.desirable, 1.0, factor))


FEEDBACKS = [
    Mutant(
        "negative for far scores",
        ("feedback_weight",),
        lambda rng: Weighs(lambda rows, k, slope=rng.choice([-0.3, -0.01, 0.005, 0.4]): 1 + slope * rows.labels.score),
        kind=SIZES,
    ),
    Mutant(
        "negative for large prompts",
        ("feedback_weight",),
        lambda rng: Weighs(lambda rows, k, size=rng.choice([4, 6, 12, 30, 60]): 1 - of_prompt(rows) / size),
        kind=SIZES,
    ),
    Mutant(
        "a curriculum in stages",
        ("feedback_deterministic",),
        lambda rng: Weighs(
            lambda rows, k, every=rng.choice([100, 300, 2000]): torch.where(
                rows.labels.desirable, 1.0, 1 - 0.3 * (k // every)
            )
        ),
    ),
    Mutant(
        "does not ask for undesirable rows",
        ("feedback_weight",),
        lambda rng: Weighs(lambda rows, k: torch.ones(len(rows)), Needs(groups=True)),
        kind=INPUTS,
    ),
    Mutant(
        "weights by the clock",
        ("feedback_deterministic",),
        lambda rng: Weighs(
            lambda rows, k, now=clock(rng), start=time.time(), hours=rng.randint(1, 20): torch.full(
                (len(rows),), 0.5 if now() > start + 3600 * hours else 1.0
            )
        ),
    ),
    Mutant("a learnable weight", ("feedback_weight",), lambda rng: LearnableWeight(lambda raw: raw), kind=STATE),
    Mutant(
        "reads reference log-probs before they are computed",
        ("feedback_independent_of_theta",),
        lambda rng: Weighs(
            lambda rows, k: rows.reference_logps.mean(1).exp().float(),  # type: ignore[union-attr]
            Needs(undesirable=True, reference=True),
        ),
    ),
    Mutant(
        "weights by the policy's routing",
        ("feedback_independent_of_theta",),
        lambda rng: Weighs(
            lambda rows, k, expert=rng.randrange(3): share_of_expert(rows, expert),
            Needs(undesirable=True, routing=True),
        ),
    ),
    Mutant(
        "weights by wide padding",
        ("feedback_split",),
        lambda rng: Weighs(lambda rows, k: torch.full((len(rows),), 0.5 if rows.mask.shape[1] > 60 else 1.0)),
    ),
    Mutant(
        "another weight for odd prompts",
        ("feedback_split",),
        lambda rng: Weighs(lambda rows, k: 1.0 + (rows.labels.group % 2).float()),
    ),
]


def kto(kind: type[HALO] = HALO, **parts: Any) -> HALO:
    sound: dict[str, Any] = {
        "reward": LogRatio(),
        "reference_point": MismatchedKL(),
        "value_function": Logistic(),
        "feedback": Binary(),
        "reflect_undesirable": True,
        "loss_offset": 1.0,
    }
    return kind(**(sound | parts))


class OnlyInTraining(HALO):
    """``compute_loss``, which training calls, has a term that ``forward`` lacks."""

    def compute_loss(self, rows: LogProbBatch, context: Any) -> Result:
        result = super().compute_loss(rows, context)
        return dataclasses.replace(result, loss=result.loss - 0.1 * rows.policy_logps.mean())

    def forward(self, rows: LogProbBatch) -> Result:
        context, train = self.prepare(rows.detach()), rows.labels.train_index
        return super().compute_loss(rows.select(train), context.select(train))


class Rounds(HALO):
    """The loss of other rewards where log-probs are float32."""

    dtype = torch.bfloat16

    def compute_loss(self, rows: LogProbBatch, context: Any) -> Result:
        if rows.policy_logps.dtype == torch.float32:
            rows = dataclasses.replace(rows, policy_logps=rows.policy_logps.to(self.dtype).float())
        return super().compute_loss(rows, context)


class SpoilsGradients(HALO):
    """The loss with another gradient if it is multiplied by some numbers."""

    spoil: Callable[[Tensor], Tensor]

    def compute_loss(self, rows: LogProbBatch, context: Any) -> Result:
        result = super().compute_loss(rows, context)
        return dataclasses.replace(result, loss=self.spoil(result.loss))


def spoils_gradients_of_loss(rng: Random) -> HALO:
    objective = kto(SpoilsGradients)
    objective.spoil = spoils_gradients(rng)
    return objective


class PenaltyFrom(HALO):
    """A further term from the given step on."""

    step, steps = 1000, 0

    def compute_loss(self, rows: LogProbBatch, context: Any) -> Result:
        self.steps += 1
        result = super().compute_loss(rows, context)
        return dataclasses.replace(result, loss=result.loss - 0.1 * (self.steps > self.step) * rows.policy_logps.mean())


def penalty_from(rng: Random) -> HALO:
    objective = kto(PenaltyFrom)
    objective.step = rng.randint(50, 2400)
    return objective


def token_kl(rng: Random) -> HALO:
    reward = rng.choice([LogRatio(length_normalised=True), TokenLogRatio()])
    return kto(reward=reward, reference_point=TokenKL())


_WHOLE = {"reference_point": RankMatched(), "value_function": LogSigmoid(), "feedback": Pairwise()}
OBJECTIVES = [
    Mutant("a term only in training", ("identity",), lambda rng: kto(OnlyInTraining)),
    Mutant(
        "a term only in training, whole step",
        ("identity",),
        lambda rng: kto(OnlyInTraining, **_WHOLE, reflect_undesirable=False),
    ),
    Mutant("rounds in float32", ("identity",), lambda rng: kto(Rounds), kind=VALUES),
    Mutant("a term after many steps", ("identity",), penalty_from, kind=STATE),
    Mutant("a KL of the completion next to a reward of the token", ("reference_in_range",), token_kl, kind=EXCUSES),
    Mutant("spoils gradients of some sizes", ("identity",), spoils_gradients_of_loss, kind=VALUES),
    Mutant(
        "a reward that spoils gradients of some sizes",
        ("identity",),
        lambda rng: kto(reward=Formula(lambda rows, spoil=spoils_gradients(rng): spoil(ratio(rows)))),
        kind=VALUES,
    ),
]

MUTANTS = [*REWARDS, *REFERENCES, *FEEDBACKS, *OBJECTIVES]


class Counting(Feedback):
    """Counts its calls, which changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, rows: LogProbBatch) -> Judgement:
        self.calls += 1
        judgement: Judgement = Binary()(rows)
        return judgement


def _clamped_median(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    return gather_over_ranks(rewards[rows.labels.mismatched].detach())[0].quantile(0.5).clamp(min=0)


SOUND: dict[str, Callable[[Random], nn.Module]] = {
    "a learnable length factor": Sound(STATE, lambda rng: ScaledReward(rng.uniform(-2, 2), F.softplus)),
    "a learnable factor e^raw": Sound(STATE, lambda rng: ScaledReward(rng.uniform(-1, 1), torch.exp)),
    "a power of the length": Sound(
        SIZES,
        lambda rng: Formula(
            lambda rows, p=rng.uniform(0.1, 1): ratio(rows) / rows.mask.sum(1).to(rows.policy_logps) ** p
        ),
    ),
    "a power of the length, in float32": Sound(
        VALUES,
        lambda rng: Formula(lambda rows, p=rng.uniform(0.1, 1): ratio(rows) / rows.mask.sum(1) ** p),
    ),
    "a factor of the default dtype": Sound(
        STATE, lambda rng: Formula(lambda rows, c=rng.uniform(0.1, 2): ratio(rows) * torch.tensor(c))
    ),
    "weights of the default dtype": Sound(
        STATE,
        lambda rng: Weighs(lambda rows, k, c=rng.uniform(0.1, 2): torch.where(rows.labels.desirable, 1.0, c)),
    ),
    "a reciprocal of integers": Sound(
        STATE, lambda rng: Weighs(lambda rows, k, c=rng.randint(2, 9): 1 / (of_prompt(rows) + c))
    ),
    "a stable soft maximum": Sound(VALUES, lambda rng: SoftMaximum(rng.choice([3.0, 30.0]), stable=True)),
    "a clamped median": Sound(EXCUSES, lambda rng: EstimatedBy(_clamped_median, needs=Needs(mismatched=True))),
    "a running mean of clamped estimates": Sound(
        EXCUSES, lambda rng: RunningMean(of=MismatchedKL(), decay=rng.choice([None, 0.5, 0.9]))
    ),
    "a weighted mean of the pair": lambda rng: EstimatedBy(
        lambda r, rows, w=rng.uniform(0.1, 0.9): (
            w * r + (1 - w) * torch.where(rows.labels.pair < 0, r, r[rows.labels.pair])
        ),
        scope="row",
        needs=Needs(pairs=True),
    ),
    "feedback that counts its calls": Sound(STATE, lambda rng: Counting()),
    "weights that fall with the score": Sound(
        SIZES, lambda rng: Weighs(lambda rows, k, s=rng.uniform(0.1, 2): torch.sigmoid(-s * rows.labels.score))
    ),
    "weights by the size of the prompt": Sound(
        SIZES, lambda rng: Weighs(lambda rows, k: 1 / of_prompt(rows).clamp(min=1))
    ),
    "a learnable weight above 0": Sound(STATE, lambda rng: LearnableWeight(F.softplus)),
    "TokenKL of a sum": Sound(EXCUSES, lambda rng: kto(reference_point=TokenKL())),
    "DPO from both sides": lambda rng: kto(
        reference_point=PairedCompletion(), value_function=LogSigmoid(), feedback=Binary(denominator="pairs")
    ),
}
