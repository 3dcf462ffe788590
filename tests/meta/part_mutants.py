"""Rewards, reference points and feedbacks with one mistake each."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from mutant import INPUTS, SIZES, STATE, Mutant
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import sum_over_ranks
from halos_pl.objective.feedback import Binary, Feedback, Judgement
from halos_pl.objective.reference_points import Estimate, ReferencePoint
from halos_pl.objective.rewards import Reward

# -- rewards ------------------------------------------------------------------------------------------------


class Formula(Reward):
    """r = ``formula(rows)``."""

    needs = Needs(reference=True)

    def __init__(self, formula: Callable[[LogProbBatch], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, rows: LogProbBatch) -> Tensor:
        return self.formula(rows)


class ReadsKL(Formula):
    needs = Needs(reference=True, exact_kl=True)


def token_ratio(rows: LogProbBatch) -> Tensor:
    """log pi_theta / pi_ref of each token, [n, T]."""
    assert rows.reference_logps is not None
    return rows.policy_logps - rows.reference_logps


def ratio(rows: LogProbBatch) -> Tensor:
    """... of each row, [n]."""
    return token_ratio(rows).sum(dim=1)


def reward(
    name: str, clauses: tuple[str, ...] | str, formula: Callable[[LogProbBatch], Tensor], kind: str = ""
) -> Mutant:
    clauses = (clauses,) if isinstance(clauses, str) else clauses
    return Mutant(name, clauses, lambda rng: Formula(formula), kind)


def scaled(
    name: str, clause: str, formula: Callable[[LogProbBatch, Any], Tensor], *sizes: float, kind: str = ""
) -> Mutant:
    """As ``reward`` with a number that is drawn from ``sizes``."""

    def make(rng: Random) -> Reward:
        size = rng.choice(sizes)
        return Formula(lambda rows: formula(rows, size))

    return Mutant(name, (clause,), make, kind)


def by_nonzero_ratio(rows: LogProbBatch) -> Tensor:
    tokens = token_ratio(rows)
    return tokens.sum(dim=1) / (tokens != 0).sum(dim=1)


def by_nonzero_logp(rows: LogProbBatch) -> Tensor:
    return ratio(rows) / (rows.policy_logps != 0).sum(dim=1).clamp(min=1)


class Counted(Reward):
    """Another reward from the given call on."""

    needs = Needs(reference=True)

    def __init__(self, call: int) -> None:
        super().__init__()
        self.calls, self.call = 0, call

    def forward(self, rows: LogProbBatch) -> Tensor:
        self.calls += 1
        return ratio(rows) * (0.9 if self.calls >= self.call else 1.0)


class ClampedInEval(Reward):
    needs = Needs(reference=True)

    def forward(self, rows: LogProbBatch) -> Tensor:
        return ratio(rows) if self.training else ratio(rows).clamp(-1, 1)


REWARDS = [
    reward(
        "divides by the batch's mean length",
        "reward_of_its_row",
        lambda rows: ratio(rows) / rows.mask.sum(1).to(rows.policy_logps).mean(),
    ),
    reward(
        "divides by the batch's total",
        "reward_of_its_row",
        lambda rows: ratio(rows) / (1 + rows.reference_logps.abs().sum()),  # type: ignore[union-attr]
    ),
    reward(
        "times the number of desirable rows",
        "reward_of_its_row",
        lambda rows: ratio(rows) * (1 + rows.labels.desirable.sum()),
    ),
    Mutant(
        "another reward on a later call",
        ("reward_of_its_row", "reward_linear"),
        lambda rng: Counted(rng.randint(2, 4)),
        kind=STATE,
    ),
    Mutant("another reward in evaluation", ("reward_of_its_row",), lambda rng: ClampedInEval(), kind=STATE),
    reward(
        "clamps only in float32",
        "reward_shape",
        lambda rows: ratio(rows) if rows.policy_logps.dtype == torch.float64 else ratio(rows).clamp(-5, 5),
    ),
    scaled(
        "truncates the completion",
        "reward_linear",
        lambda rows, size: token_ratio(rows)[:, :size].sum(dim=1),
        8,
        64,
        512,
        kind=SIZES,
    ),
    reward(
        "negative factor for long completions",
        "reward_linear",
        lambda rows: ratio(rows) * (1 - rows.mask.sum(1).to(rows.policy_logps) / 20),
        kind=SIZES,
    ),
    scaled("clamps far rewards", "reward_linear", lambda rows, size: ratio(rows).clamp(-size, size), 500.0, 1000.0),
    reward(
        "centred in large steps",
        ("reward_linear", "reward_of_its_row"),
        lambda rows: ratio(rows) - (ratio(rows).mean() if len(rows) > 32 else 0),
        kind=SIZES,
    ),
    Mutant(
        "less the exact KL divergence",
        ("reward_linear",),
        lambda rng: ReadsKL(lambda rows: ratio(rows) - rows.kl.sum(1)),  # type: ignore[union-attr]
    ),
    reward(
        "half of it in wide batches",
        "reward_padding",
        lambda rows: ratio(rows) * (1 if rows.mask.shape[1] < 12 else 0.5),
    ),
    reward(
        "tokens outside of the mask are nan",
        "reward_padding",
        lambda rows: torch.where(rows.mask, token_ratio(rows), torch.nan),
    ),
    reward("keeps the token dimension", "reward_shape", lambda rows: token_ratio(rows).sum(dim=1, keepdim=True)),
    reward("sums over the rows", "reward_shape", lambda rows: token_ratio(rows).sum()),
    reward("sums the wrong dimension", "reward_shape", lambda rows: token_ratio(rows).sum(dim=0)),
    reward(
        "squeezes a batch of one",
        "reward_shape",
        lambda rows: token_ratio(rows).sum(dim=1, keepdim=True).squeeze(),
    ),
    scaled("offset", "reward_zero_at_reference", lambda rows, size: ratio(rows) + size, 1e-3, 0.1, -1.0),
    reward("ratio in place of its log", "reward_zero_at_reference", lambda rows: ratio(rows).clamp(max=50).exp()),
    reward("no reference in it", "reward_zero_at_reference", lambda rows: rows.policy_logps.sum(dim=1)),
    reward(
        "bonus for desirable rows",
        "reward_zero_at_reference",
        lambda rows: ratio(rows) + 0.1 * rows.labels.desirable.float(),
        kind=INPUTS,
    ),
    reward("wrong sign", "reward_linear", lambda rows: -ratio(rows)),
    reward("squared", "reward_linear", lambda rows: ratio(rows).square()),
    reward("size", "reward_linear", lambda rows: ratio(rows).abs()),
    scaled("clamps the row", "reward_linear", lambda rows, size: ratio(rows).clamp(-size, size), 1.0, 5.0, 20.0),
    scaled(
        "clamps each token",
        "reward_linear",
        lambda rows, size: token_ratio(rows).clamp(-size, size).sum(dim=1),
        0.5,
        2.0,
        10.0,
    ),
    reward("a bounded transform", "reward_linear", lambda rows: torch.tanh(ratio(rows) / 10)),
    reward(
        "times the policy's probability",
        "reward_linear",
        lambda rows: ratio(rows) * (1 + rows.policy_logps.mean(dim=1).exp()),
    ),
    reward(
        "times the policy's probability, detached",
        "reward_linear",
        lambda rows: ratio(rows) * (1 + rows.policy_logps.mean(dim=1).exp().detach()),
    ),
    reward(
        "divides by the policy's surprise",
        "reward_linear",
        lambda rows: ratio(rows) / (1 + rows.policy_logps.detach().abs().sum(dim=1)),
    ),
    reward(
        "normalises over the batch",
        "reward_linear",
        lambda rows: ratio(rows) / (ratio(rows).detach().abs().mean() + 1e-6),
    ),
    reward(
        "negative factor for short completions",
        "reward_linear",
        lambda rows: ratio(rows) * (rows.mask.sum(1) - 2),
        kind=SIZES,
    ),
    reward("only the first two tokens", "reward_linear", lambda rows: token_ratio(rows)[:, :2].sum(dim=1)),
    reward("fully detached", "reward_linear", lambda rows: ratio(rows).detach()),
    reward("divides by the padded length", "reward_padding", lambda rows: token_ratio(rows).mean(dim=1)),
    reward(
        "counts non-zero log-ratios as tokens",
        ("reward_padding", "reward_zero_at_reference", "reward_linear"),
        by_nonzero_ratio,
    ),
    reward("counts non-zero log-probs as tokens", ("reward_linear", "reward_padding"), by_nonzero_logp),
    reward(
        "the last column is the last token",
        ("reward_padding", "reward_linear"),
        lambda rows: ratio(rows) + token_ratio(rows)[:, -1],
    ),
    reward(
        "longest completion of the batch as length",
        ("reward_padding", "reward_linear"),
        lambda rows: ratio(rows) / rows.mask.shape[1] ** 0.5,
    ),
]

# -- reference points ---------------------------------------------------------------------------------------


class EstimatedBy(ReferencePoint):
    """z0 = ``formula(rewards, rows)`` of the given scope and needs."""

    def __init__(
        self, formula: Callable[[Tensor, LogProbBatch], Tensor], *, scope: str = "step", needs: Needs | None = None
    ) -> None:
        super().__init__()
        self.formula = formula
        self.scope = scope  # type: ignore[assignment]
        self.needs = needs or Needs(step_rewards=True)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        return Estimate(self.formula(rewards, rows))


def over_ranks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count, in float64, without gradient."""
    return sum_over_ranks(values.detach().double().sum()), sum_over_ranks(values.new_tensor(float(len(values))))


def mean(values: Tensor) -> Tensor:
    """The right mean, which most mutants spoil."""
    total, count = over_ranks(values)
    return (total / count.clamp(min=1)).to(values)


def own(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    return rewards[rows.labels.train].detach()


def estimate(
    name: str,
    clauses: tuple[str, ...] | str,
    formula: Callable[[Tensor, LogProbBatch], Tensor],
    kind: str = "",
    **kwargs,
) -> Mutant:
    clauses = (clauses,) if isinstance(clauses, str) else clauses
    return Mutant(name, clauses, lambda rng: EstimatedBy(formula, **kwargs), kind)


def mean_of_rank_means(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    ranks = sum_over_ranks(rewards.new_ones(()))
    return sum_over_ranks(own(rewards, rows).mean()) / ranks


def with_gradient(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    with torch.enable_grad():
        return ratio(rows)[rows.labels.train].mean()


def exponential_mean(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    total, count = over_ranks(own(rewards, rows).exp())
    return (total / count.clamp(min=1)).log().to(rewards)


def standardised(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    values = own(rewards, rows)
    center = mean(values)
    spread = (sum_over_ranks((values - center).square().sum()) / (over_ranks(values)[1] - 1)).sqrt()
    # Nothing is done with the spread but what rounds to nothing: the mistake is the n - 1 of a single row.
    return center + 0 * spread


def others_of_the_prompt(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    other = (
        (rows.labels.group[:, None] == rows.labels.group[None, :])
        & rows.labels.train
        & ~torch.eye(len(rows), dtype=torch.bool)
    )
    return (other.to(rewards) @ rewards.detach()) / other.sum(dim=1)


def inverse_squares(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    values = own(rewards, rows)
    weights = (values - mean(values)).square().reciprocal()
    return (over_ranks(weights * values)[0] / over_ranks(weights)[0]).to(rewards)


def neighbours(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    return rewards.detach().roll(1)


def fading_weights(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    values = own(rewards, rows)
    weights = 0.9 ** torch.arange(len(values)).to(values)
    return (values * weights).sum() / weights.sum().clamp(min=1e-9)


class FromZero(ReferencePoint):
    """An exponential moving average that starts at 0."""

    needs = Needs(step_rewards=True)

    def __init__(self) -> None:
        super().__init__()
        self.mean = 0.0

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * float(mean(own(rewards, rows)))
        return Estimate(rewards.new_tensor(self.mean))


class Later(ReferencePoint):
    """The right mean on the first call, ``formula(rewards, rows)`` on later ones (or, with call 0, in evaluation)."""

    needs = Needs(step_rewards=True)

    def __init__(self, formula: Callable[[Tensor, LogProbBatch], Tensor], call: int) -> None:
        super().__init__()
        self.formula, self.call, self.calls = formula, call, 0

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        self.calls += 1
        late = self.calls >= self.call if self.call else not self.training
        return Estimate(self.formula(rewards, rows) if late else mean(own(rewards, rows)))


class LeakyAverage(ReferencePoint):
    """Detaches only the first estimate that it keeps."""

    needs = Needs(step_rewards=True)

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor | None = None

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        estimate_ = rewards[rows.labels.train].mean()
        self.mean = estimate_.detach() if self.mean is None else 0.9 * self.mean + 0.1 * estimate_
        return Estimate(self.mean)


def later(
    name: str, clauses: tuple[str, ...], formula: Callable[[Tensor, LogProbBatch], Tensor], call: int = 2
) -> Mutant:
    return Mutant(name, clauses, lambda rng: Later(formula, call), STATE)


def halves_in_place(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    return 2 * mean(own(rewards.mul_(0.5), rows))


def pair_doubled_in_place(rewards: Tensor, rows: LogProbBatch) -> Tensor:
    pair = torch.where(rows.labels.pair < 0, 0.0, rewards[rows.labels.pair]).clone()
    rewards.data.mul_(2)
    return pair


mismatched = Needs(mismatched=True)
IN_RANGE = ("reference_in_range", "reference_shift_equivariant")
REFERENCES = [
    later("drifts on later calls", IN_RANGE, lambda r, rows: mean(own(r, rows)) + 0.5),
    later("another number in evaluation", IN_RANGE, lambda r, rows: r.new_tensor(3.0), call=0),
    later("gradient on later calls", ("reference_detached",), lambda r, rows: r[rows.labels.train].mean()),
    Mutant("detaches only its first estimate", ("reference_detached",), lambda rng: LeakyAverage(), kind=STATE),
    later("nan on later calls", ("reference_finite", *IN_RANGE), lambda r, rows: mean(own(r, rows)) * torch.nan),
    later(
        "the first row in evaluation",
        ("reference_permutation_equivariant", "reference_split"),
        lambda r, rows: own(r, rows)[0],
        call=0,
    ),
    later("this rank's mean on later calls", ("reference_split",), lambda r, rows: own(r, rows).mean()),
    estimate(
        "offset in large steps", IN_RANGE, lambda r, rows: mean(own(r, rows)) + 100.0 * (len(rows) > 32), kind=SIZES
    ),
    estimate(
        "counts at most 64 rows",
        IN_RANGE,
        lambda r, rows: (over_ranks(own(r, rows))[0] / over_ranks(own(r, rows))[1].clamp(max=64)).to(r),
        kind=SIZES,
    ),
    estimate("clamps far estimates", IN_RANGE, lambda r, rows: mean(own(r, rows)).clamp(-5000, 5000)),
    estimate(
        "gradient in large steps",
        ("reference_detached",),
        lambda r, rows: mean(own(r, rows)) if len(rows) <= 20 else r[rows.labels.train].mean(),
        kind=SIZES,
    ),
    estimate("halves the rewards in place", IN_RANGE, halves_in_place),
    estimate(
        "doubles the rewards in place, row by row",
        IN_RANGE,
        pair_doubled_in_place,
        scope="row",
        needs=Needs(pairs=True),
    ),
    estimate(
        "sum in place of mean", "reference_in_range", lambda r, rows: sum_over_ranks(own(r, rows).double().sum()).to(r)
    ),
    estimate("offset", "reference_in_range", lambda r, rows: mean(own(r, rows)) + 0.5),
    estimate(
        "mean plus spread",
        "reference_in_range",
        lambda r, rows: mean(own(r, rows)) + 3 * mean((own(r, rows) - mean(own(r, rows))).square()).sqrt() + 1e-2,
    ),
    estimate(
        "divides by a fixed batch size",
        ("reference_in_range", "reference_shift_equivariant", "reference_split"),
        lambda r, rows: (over_ranks(own(r, rows))[0] / 32).to(r),
    ),
    estimate(
        "shrinks towards zero",
        ("reference_shift_equivariant", "reference_in_range"),
        lambda r, rows: 0.9 * mean(own(r, rows)),
    ),
    estimate(
        "mean of sizes",
        ("reference_shift_equivariant", "reference_in_range"),
        lambda r, rows: mean(own(r, rows).abs()),
    ),
    estimate(
        "clamps into a range",
        ("reference_shift_equivariant", "reference_in_range"),
        lambda r, rows: mean(own(r, rows)).clamp(-0.5, 0.5),
    ),
    Mutant(
        "running mean that starts at zero",
        ("reference_shift_equivariant", "reference_in_range"),
        lambda rng: FromZero(),
        kind=STATE,
    ),
    estimate(
        "count one too high",
        ("reference_shift_equivariant", "reference_in_range"),
        lambda r, rows: (over_ranks(own(r, rows))[0] / (over_ranks(own(r, rows))[1] + 1)).to(r),
    ),
    estimate(
        "the first row's reward",
        ("reference_permutation_equivariant", "reference_split"),
        lambda r, rows: own(r, rows)[0],
    ),
    estimate("the neighbour's reward", ("reference_permutation_equivariant", "reference_split"), neighbours),
    estimate("weights that fade with the place", "reference_permutation_equivariant", fading_weights),
    estimate(
        "the neighbour's reward, row by row",
        ("reference_permutation_equivariant", "reference_split"),
        lambda r, rows: r.roll(1),
        scope="row",
    ),
    estimate(
        "mean without detach",
        ("reference_detached", "reference_split"),
        lambda r, rows: r[rows.labels.train].mean(),
    ),
    estimate(
        "reads the policy with gradient",
        ("reference_detached",),
        with_gradient,
        needs=Needs(step_rewards=True, reference=True),
    ),
    estimate(
        "soft maximum with gradient",
        ("reference_detached", "reference_split"),
        lambda r, rows: (torch.softmax(r[rows.labels.train], 0) * r[rows.labels.train]).sum(),
    ),
    estimate("largest of this rank", "reference_split", lambda r, rows: own(r, rows).sort().values[-1:].sum()),
    estimate("mean of this rank", "reference_split", lambda r, rows: own(r, rows).mean()),
    estimate("mean of rank means", "reference_split", mean_of_rank_means),
    estimate("mean of each micro-batch", "reference_split", lambda r, rows: mean(own(r, rows)), scope="row"),
    estimate(
        "reads rows that it did not ask for", "reference_split", lambda r, rows: mean(own(r, rows)), needs=Needs()
    ),
    estimate(
        "mismatched rows and other rows alike", "reference_split", lambda r, rows: mean(r.detach()), needs=mismatched
    ),
    estimate("exponential mean that overflows", "reference_finite", exponential_mean),
    estimate("n - 1 of a single row", "reference_finite", standardised, kind=SIZES),
    estimate("each row's own reward", "reference_in_range", lambda r, rows: r.detach().clone()),
    estimate("weights by inverse squares, 0 / 0 where all are alike", "reference_finite", inverse_squares),
    estimate(
        "mean of the prompt's other rows, 0 / 0 of a row alone",
        "reference_finite",
        others_of_the_prompt,
        needs=Needs(step_rewards=True, groups=True),
        kind=SIZES,
    ),
]

# -- feedback -----------------------------------------------------------------------------------------------


class Judge(Feedback):
    """``spoil`` applied to plain thumbs up and down."""

    needs = Needs(reference=True, undesirable=True, step_rewards=True)

    def __init__(self, spoil: Callable[[Judgement, LogProbBatch], Judgement]) -> None:
        super().__init__()
        self.spoil = spoil

    def forward(self, rows: LogProbBatch) -> Judgement:
        like = torch.ones_like(rows.labels.desirable, dtype=torch.float32)
        right = Judgement(
            torch.where(rows.labels.desirable, -like, like), like * rows.labels.train, rows.labels.train.sum().float()
        )
        return self.spoil(right, rows)


class JudgesKL(Judge):
    needs = Needs(undesirable=True, exact_kl=True)


class Grouped(Judge):
    """The same, of whole prompts."""

    needs = Needs(undesirable=True, groups=True)


def of_its_prompt(rows: LogProbBatch) -> Tensor:
    """How many rows with a loss each row's prompt has."""
    return ((rows.labels.group[:, None] == rows.labels.group[None, :]) & rows.labels.train).sum(dim=1)


def feedback(
    name: str, clauses: tuple[str, ...] | str, spoil: Callable[[Judgement, LogProbBatch], Judgement], kind: str = ""
) -> Mutant:
    clauses = (clauses,) if isinstance(clauses, str) else clauses
    return Mutant(name, clauses, lambda rng: Judge(spoil), kind)


def negative_class(desirable: bool) -> Callable[[Random], Feedback]:
    def make(rng: Random) -> Feedback:
        factor = -rng.choice([1e-3, 0.1, 1.0])
        return Judge(
            lambda j, rows: j._replace(
                weight=torch.where(rows.labels.desirable == desirable, factor * j.weight, j.weight)
            )
        )

    return make


class LaterJudge(Feedback):
    """``spoil`` applied from the second call on, or in evaluation."""

    needs = Needs(undesirable=True)

    def __init__(self, spoil: Callable[[Judgement], Judgement], *, in_evaluation: bool = False) -> None:
        super().__init__()
        self.spoil, self.in_evaluation, self.calls = spoil, in_evaluation, 0
        self.right = Binary()

    def forward(self, rows: LogProbBatch) -> Judgement:
        self.calls += 1
        judgement: Judgement = self.right(rows)
        late = not self.training if self.in_evaluation else self.calls > 1
        return self.spoil(judgement) if late else judgement


class InPlace(Feedback):
    """``spoil`` the rows, then judge them."""

    needs = Needs(undesirable=True)

    def __init__(self, spoil: Callable[[LogProbBatch], object]) -> None:
        super().__init__()
        self.spoil, self.right = spoil, Binary()

    def forward(self, rows: LogProbBatch) -> Judgement:
        judgement: Judgement = self.right(rows)
        self.spoil(rows)
        return judgement


def flipped_where(rows: Callable[[LogProbBatch], Tensor | bool]) -> Callable[[Judgement, LogProbBatch], Judgement]:
    """A negative weight for some rows."""
    return lambda j, r: j._replace(weight=torch.where(torch.as_tensor(rows(r)), -j.weight, j.weight))


FEEDBACKS = [
    Mutant(
        "sign 0 on later calls",
        ("feedback_sign",),
        lambda rng: LaterJudge(lambda j: j._replace(sign=0 * j.sign)),
        kind=STATE,
    ),
    Mutant(
        "negative weight on later calls",
        ("feedback_weight",),
        lambda rng: LaterJudge(lambda j: j._replace(weight=-j.weight)),
        kind=STATE,
    ),
    Mutant(
        "negative weight in evaluation",
        ("feedback_weight",),
        lambda rng: LaterJudge(lambda j: j._replace(weight=-j.weight), in_evaluation=True),
        kind=STATE,
    ),
    feedback(
        "negative for long completions", "feedback_weight", flipped_where(lambda r: r.mask.sum(1) > 6), kind=SIZES
    ),
    feedback(
        "negative for later prompts", "feedback_weight", flipped_where(lambda r: r.labels.group >= 16), kind=SIZES
    ),
    feedback("negative in large steps", "feedback_weight", flipped_where(lambda r: len(r) > 32), kind=SIZES),
    Mutant(
        "no row weighs anything",
        ("feedback_weight",),
        lambda rng: Binary(lambda_desirable=0.0, lambda_undesirable=0.0),
    ),
    Mutant(
        "weight by the exact KL divergence",
        ("feedback_independent_of_theta",),
        lambda rng: JudgesKL(lambda j, rows: j._replace(weight=j.weight * torch.exp(-rows.kl.sum()).float())),  # type: ignore[union-attr]
    ),
    Mutant(
        "zeroes the log-probs in place",
        ("feedback_independent_of_theta",),
        lambda rng: InPlace(lambda rows: rows.policy_logps.data.zero_()),
    ),
    Mutant(
        "flips the labels in place",
        ("feedback_independent_of_theta", "feedback_sign"),
        lambda rng: InPlace(lambda rows: rows.labels.desirable.logical_not_()),
    ),
    feedback(
        "a denominator for small steps",
        "feedback_finite",
        lambda j, rows: j._replace(denominator=64 - j.denominator),
        kind=SIZES,
    ),
    feedback(
        "labels 0 and 1 as signs", "feedback_sign", lambda j, rows: j._replace(sign=1 - rows.labels.desirable.float())
    ),
    feedback(
        "sign 0 for mismatched rows", "feedback_sign", lambda j, rows: j._replace(sign=j.sign * rows.labels.train)
    ),
    feedback(
        "sign 2 for one class",
        "feedback_sign",
        lambda j, rows: j._replace(sign=torch.where(rows.labels.desirable, j.sign, 2 * j.sign)),
    ),
    feedback("centred signs", "feedback_sign", lambda j, rows: j._replace(sign=j.sign - j.sign.mean())),
    feedback("sign as a column", "feedback_sign", lambda j, rows: j._replace(sign=j.sign[:, None])),
    Mutant("negative weight for undesirable rows", ("feedback_weight",), negative_class(False)),
    Mutant("negative weight for desirable rows", ("feedback_weight",), negative_class(True)),
    feedback(
        "advantage with its sign as weight",
        "feedback_weight",
        lambda j, rows: j._replace(weight=(rows.labels.desirable.float() - 0.5) * rows.labels.train),
    ),
    feedback(
        "mismatched rows weigh as well", "feedback_weight", lambda j, rows: j._replace(weight=torch.ones_like(j.weight))
    ),
    feedback(
        "`weight or 1.0`",
        "feedback_weight",
        lambda j, rows: j._replace(weight=torch.tensor([w or 1.0 for w in j.weight.tolist()])),
    ),
    feedback("weight as a column", "feedback_weight", lambda j, rows: j._replace(weight=j.weight[:, None])),
    feedback(
        "weight by the policy's probability",
        "feedback_independent_of_theta",
        lambda j, rows: j._replace(weight=j.weight * rows.policy_logps.detach().mean(dim=1).exp()),
    ),
    feedback(
        "weight by the policy's probability, with gradient",
        "feedback_independent_of_theta",
        lambda j, rows: j._replace(weight=j.weight * rows.policy_logps.mean(dim=1).exp()),
    ),
    feedback(
        "focal weight of the log-ratio",
        "feedback_independent_of_theta",
        lambda j, rows: j._replace(weight=j.weight * torch.sigmoid(-0.1 * ratio(rows).detach().float())),
    ),
    feedback(
        "sign of the reward",
        "feedback_independent_of_theta",
        lambda j, rows: j._replace(sign=torch.where(ratio(rows) > 0, -1.0, 1.0)),
    ),
    feedback(
        "denominator counts non-zero log-probs",
        "feedback_independent_of_theta",
        lambda j, rows: j._replace(denominator=(rows.policy_logps != 0).sum().float()),
    ),
    feedback(
        "denominator of likelihoods",
        "feedback_independent_of_theta",
        lambda j, rows: j._replace(denominator=j.denominator * (1 + rows.policy_logps.detach().exp().mean().float())),
    ),
    feedback(
        "divides by the desirable rows only",
        "feedback_finite",
        lambda j, rows: j._replace(denominator=(rows.labels.desirable & rows.labels.train).sum().float()),
        kind=SIZES,
    ),
    feedback(
        "divides by the pairs where there are none",
        "feedback_finite",
        lambda j, rows: j._replace(denominator=((rows.labels.pair >= 0) & rows.labels.train).sum().float() / 2),
        kind=SIZES,
    ),
    feedback("n - 1", "feedback_finite", lambda j, rows: j._replace(denominator=j.denominator - 1), kind=SIZES),
    feedback("negative denominator", "feedback_finite", lambda j, rows: j._replace(denominator=-j.denominator)),
    feedback(
        "weights by the share of the class, 0 / 0",
        ("feedback_finite", "feedback_weight"),
        lambda j, rows: j._replace(weight=j.weight / (rows.labels.desirable & rows.labels.train).sum() * j.weight),
        kind=SIZES,
    ),
    Mutant(
        "n - 1 of a prompt with one row",
        ("feedback_finite", "feedback_weight"),
        lambda rng: Grouped(lambda j, rows: j._replace(weight=j.weight / (of_its_prompt(rows) - 1))),
        kind=SIZES,
    ),
    Mutant(
        "turns its signs round on every other call",
        ("feedback_deterministic",),
        lambda rng: LaterJudge(lambda j: j._replace(sign=-j.sign)),
    ),
    Mutant(
        "weighs otherwise in evaluation",
        ("feedback_deterministic",),
        lambda rng: LaterJudge(lambda j: j._replace(weight=2 * j.weight), in_evaluation=True),
    ),
    feedback(
        "signs by the place of a row",
        "feedback_split",
        lambda j, rows: j._replace(sign=torch.where(torch.arange(len(rows)) % 2 == 0, -1.0, 1.0)),
    ),
    feedback("scores as weights", "feedback_weight", lambda j, rows: j._replace(weight=j.weight * rows.labels.score)),
    feedback(
        "weights that sum to 1 on this rank",
        "feedback_split",
        lambda j, rows: Judgement(j.sign, j.weight / j.weight.sum(), torch.ones(())),
    ),
    feedback(
        "the whole step's denominator", "feedback_split", lambda j, rows: j._replace(denominator=torch.tensor(8.0))
    ),
    feedback(
        "weight by the share of padding",
        "feedback_split",
        lambda j, rows: j._replace(weight=j.weight * rows.mask.float().mean(dim=1)),
    ),
    feedback(
        "the first row counts twice",
        "feedback_split",
        lambda j, rows: j._replace(weight=j.weight * torch.where(torch.arange(len(rows)) == 0, 2.0, 1.0)),
    ),
    feedback(
        "weight by the scores of this rank",
        "feedback_split",
        lambda j, rows: j._replace(weight=j.weight * (rows.labels.score - rows.labels.score.mean()).abs()),
    ),
]

MUTANTS = REWARDS + REFERENCES + FEEDBACKS
