"""Rows of a step, drawn for the clauses of the suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from random import Random
from typing import Any, Literal

import torch
import torch.nn.functional as F

from halos_pl.batch import LogProbBatch, Needs, Routing
from halos_pl.conformance.gold_rows import joined
from halos_pl.labels import Labels

Classes = Literal["mixed", "desirable", "undesirable"]
Rewards = Literal["varied", "skewed", "equal", "start"]
Scores = Literal["near", "far", "tied", "extreme"]


@dataclass(frozen=True)
class Step:
    """How the rows of a step are drawn; small numbers give small steps.

    Attributes:
        seed: seed of all random draws.
        units: pairs, or (without ``paired``) rows.
        mismatched: number of mismatched rows.
        tokens: width of the batch; a row has between 1 and this many. In a large step, some rows of each kind have
            all of them.
        scale: nats; log-probs lie between -3 * scale and 0, as multiples of a tenth of it.
        paired: whether rows come as pairs of a desirable and an undesirable one.
        classes: labels of rows that are not paired.
        grouped: whether every prompt has two rows or more.
        of_prompt: pairs (or, if grouped, twos of rows; else rows) that answer the same prompt.
        alone: whether the last row is the only one of its prompt, unless rows are paired.
        rewards: log-ratios that vary, that are 0 in all rows but a far one, that are the same in all rows, or that are
            0 in each token, as in the first step of a run, where the policy is the reference.
        scores: within 2 of 0, up to 1,000 away, 0 in most rows, or all near -1,000 or all near 1,000. Some are missing,
            in every third step all.
        holes: whether rows have tokens without loss before or between those with loss, as turns of a conversation.
        gold: number of gold answers, from separate generators.
    """

    seed: int = 0
    units: int = 1
    mismatched: int = 0
    tokens: int = 1
    scale: float = 1.0
    paired: bool = False
    classes: Classes = "mixed"
    grouped: bool = False
    of_prompt: int = 1
    alone: bool = False
    rewards: Rewards = "varied"
    scores: Scores = "near"
    holes: bool = False
    gold: int = 0

    @property
    def large(self) -> bool:
        """Whether the step is larger than the drawn ones, so that checking row by row would take long."""
        return self.units > 6 or self.tokens > 5

    @property
    def huge(self) -> bool:
        """Whether every call takes long, so that a clause should make only a few."""
        return self.units > 500

    @property
    def cotangent(self) -> float:
        """What a loss is multiplied by before its backward pass: loss scaling and accumulation make it far from 1."""
        return (1e-8, 1e4, 1.0, 1e-4, 1e2)[self.seed % 5]

    def later(self, call: int) -> Step:
        """Another step of the same kind and size, for the ``call``-th call after this step."""
        return replace(self, seed=(self.seed + 7919 * call) % 2**31)

    def rows(self, dtype: torch.dtype = torch.float64) -> LogProbBatch:
        """The rows of the step in random order, mismatched rows and gold answers among them."""
        drawn = self._rows(dtype)
        rows: LogProbBatch = _copy(drawn)
        rows.labels, rows.routing = _copy(drawn.labels), _copy(drawn.routing)
        return rows

    @lru_cache(maxsize=4096)  # noqa: B019  (a step is a few numbers)
    def _rows(self, dtype: torch.dtype) -> LogProbBatch:
        if self.gold:
            alone = replace(self, units=self.gold, mismatched=0, paired=False, grouped=False, classes="desirable")
            gold = replace(alone, gold=0, seed=self.seed + 6)._rows(dtype)
            return joined(replace(self, gold=0)._rows(dtype), gold, self.seed + 6)
        draw = torch.Generator().manual_seed(self.seed)
        train = self.units * (2 if self.paired or self.grouped else 1)
        n, width = train + self.mismatched, self.tokens
        place = torch.randperm(n, generator=draw)
        length = torch.randint(1, width + 1, (n, 1), generator=draw)
        desirable = torch.rand(n, generator=draw) < 0.5
        pair = torch.full((n,), -1)
        trained = place[:train]
        if self.large:
            length[place[[0, train - 1, -1]]] = width
            desirable[trained[0]], desirable[trained[-1]] = True, False
        mask = torch.arange(width) < length
        if self.holes:
            mask &= self._kept(length, width)
        if self.paired:
            pair[trained[0::2]], pair[trained[1::2]] = trained[1::2], trained[0::2]
            desirable[trained[0::2]], desirable[trained[1::2]] = True, False
        elif self.classes != "mixed":
            desirable[trained] = self.classes == "desirable"
        mismatched = torch.ones(n, dtype=torch.bool)
        mismatched[trained] = False
        prompt = torch.empty(n, dtype=torch.long)
        each = torch.arange(train) // 2 if self.paired or self.grouped else torch.arange(train)
        prompt[trained] = each // self.of_prompt
        if self.alone and not self.paired:
            prompt[trained[-1]] = train
        prompt[place[train:]] = prompt[trained[torch.arange(self.mismatched) % train]]

        def log_probs() -> torch.Tensor:
            tenths = torch.randint(0, 31, (n, width), generator=draw)
            certain = torch.rand(n, width, generator=draw) < 0.1  # a log-prob of 0 is not padding
            return -(tenths * ~certain).to(dtype) / 10 * self.scale * mask

        policy, reference = log_probs(), log_probs()
        alike = torch.rand(n, width, generator=draw) < 0.1
        policy = torch.where(alike, reference, policy)
        if self.rewards == "skewed":
            far = (torch.arange(n) == place[self.seed % n])[:, None]
            low, other = (policy, reference) if self.seed % 4 < 2 else (reference, policy)
            low, other = torch.where(far, 10 * low, other), other
            policy, reference = (low, other) if self.seed % 4 < 2 else (other, low)
        elif self.rewards == "equal":  # all of it in one token, so that the length does not matter
            policy, reference = torch.zeros_like(policy), torch.zeros_like(policy)
            first = torch.arange(n), mask.int().argmax(dim=1)
            policy[first], reference[first] = -self.scale * (self.seed % 5), -2 * self.scale
        elif self.rewards == "start":
            policy = reference.clone()
        return LogProbBatch(
            policy_logps=policy,
            reference_logps=reference,
            mask=mask,
            labels=Labels(
                desirable=desirable,
                pair=pair,
                mismatched=mismatched,
                group=prompt,
                score=self._scores(desirable),
                weight=self._weights(pair),
            ),
            kl=log_probs().abs() / 10 * mismatched[:, None],
            routing=routing_of(mask & ~mismatched[:, None], dtype, self.seed + 2),
            scalar=self._scalars(n, dtype),
        )

    def _kept(self, length: torch.Tensor, width: int) -> torch.Tensor:
        """Which tokens are no hole, BoolTensor [n, T]: any share of a row, with its last one; a separate generator."""
        draw = torch.Generator().manual_seed(self.seed + 4)
        kept = torch.rand(len(length), width, generator=draw) < torch.rand(len(length), 1, generator=draw)
        return kept | (torch.arange(width) == length - 1)

    def _scalars(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        """The scalars of ``n`` rows, as far from 0 as a token's log-prob, of either sign; from a separate generator."""
        draw = torch.Generator().manual_seed(self.seed + 3)
        scalars = torch.randint(-30, 31, (n,), generator=draw).to(dtype) / 10 * self.scale
        if self.rewards == "skewed":
            scalars[1:] = 0.0
        return scalars if self.rewards != "equal" else torch.full_like(scalars, self.scale)

    def _weights(self, pair: torch.Tensor) -> torch.Tensor:
        """The rows' own weights: 1 in every third step, else 0 to 3, equal in a pair; from a separate generator."""
        draw = torch.Generator().manual_seed(self.seed + 5)
        weight = torch.randint(0, 7, pair.shape, generator=draw).float() / 2
        if not self.seed % 3:
            return torch.ones_like(weight)
        return torch.where(pair < 0, weight, torch.maximum(weight, weight[pair]))

    def _scores(self, desirable: torch.Tensor) -> torch.Tensor:
        """Scores of the rows, of either sign regardless of the label; missing for some rows, and in every third step.

        Drawn from a separate generator, so that no other draw depends on them.
        """
        draw = torch.Generator().manual_seed(self.seed + 1)
        score = torch.randint(-20, 21, desirable.shape, generator=draw).float() / 10
        if self.scores == "far":
            score *= 500
        elif self.scores == "tied":
            score = torch.where(score.abs() < 1.5, 0.0, score)
        elif self.scores == "extreme":
            score += 998 if self.seed // 2 % 2 else -998
        missing = torch.rand(desirable.shape, generator=draw) < (0.1 if self.seed % 3 else 1.1)
        return torch.where(missing, desirable.float(), score)


def routing_of(tokens: torch.Tensor, dtype: torch.dtype, seed: int) -> Routing:
    """A routing of ``tokens`` (BoolTensor [n, T]) to three experts, two per token, from a separate generator."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(*tokens.shape, 3, generator=draw, dtype=torch.float64)
    chosen = torch.zeros_like(logits).scatter_(2, logits.topk(2, dim=2).indices, 1.0)
    probability = (logits.softmax(dim=2) * tokens[..., None]).sum(dim=1)
    return Routing(probability.to(dtype), (chosen * tokens[..., None]).sum(dim=1).float())


def rerouted(rows: LogProbBatch, seed: int) -> Routing | None:
    """How another policy might route the tokens of the rows; None if they have no routing."""
    tokens = rows.mask & ~rows.labels.mismatched[:, None]
    return rows.routing and routing_of(tokens, rows.routing.probability.dtype, seed)


def with_leaf(rows: LogProbBatch, needs: Needs) -> tuple[torch.Tensor, LogProbBatch]:
    """A leaf with copies of the policy's outputs that an objective reads, and the rows with these.

    Args:
        rows: n rows.
        needs: needs of the objective.

    Returns:
        The log-probs [n, T], or, if the objective needs scalars, [n, T + 1] with the scalars in the last column.
    """
    outputs = rows.policy_logps.detach().clone()
    if needs.scalar:
        assert rows.scalar is not None
        outputs = torch.cat([outputs, rows.scalar.detach()[:, None]], dim=1)
    leaf = outputs.requires_grad_()
    return leaf, with_outputs(rows, leaf)


def with_outputs(rows: LogProbBatch, outputs: torch.Tensor) -> LogProbBatch:
    """The rows with other outputs of the policy, laid out as the leaf of :func:`with_leaf`."""
    if outputs.shape == rows.policy_logps.shape:
        return replace(rows, policy_logps=outputs)
    return replace(rows, policy_logps=outputs[:, :-1], scalar=outputs[:, -1])


def gradient_of(loss: torch.Tensor, leaf: torch.Tensor, cotangent: float = 1.0) -> torch.Tensor:
    """The gradient of a scalar with respect to ``leaf``, from that of ``cotangent`` * loss; zeros if there is none."""
    if not loss.requires_grad:
        return torch.zeros_like(leaf)
    # Of the product, since torch imports sympy (half a second) if it is passed an upstream gradient.
    (gradient,) = torch.autograd.grad(loss * cotangent, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient / cotangent


def _copy(batch: Any) -> Any:
    """A dataclass with copies of its tensors, without checking their shapes again."""
    copy = object.__new__(type(batch))
    copy.__dict__.update(
        {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.__dict__.items()}
    )
    return copy


def asked(rows: LogProbBatch, needs: Needs) -> LogProbBatch:
    """The rows as training provides them: what ``needs`` does not name is None, and log-probs are NaN."""
    return replace(
        rows,
        policy_logps=rows.policy_logps if needs.policy_logps else torch.full_like(rows.policy_logps, torch.nan),
        has_logps=needs.policy_logps,
        reference_logps=rows.reference_logps if needs.reference else None,
        kl=rows.kl if needs.exact_kl else None,
        routing=rows.routing if needs.routing else None,
        scalar=rows.scalar if needs.scalar else None,
    )


def unscored(rows: LogProbBatch) -> LogProbBatch:
    """The rows as they are before those with a loss have been scored: log-probs and scalars are 0 in these."""
    mismatched = rows.labels.mismatched
    return replace(
        rows,
        policy_logps=torch.where(mismatched[:, None], rows.policy_logps, 0.0),
        reference_logps=None
        if rows.reference_logps is None
        else torch.where(mismatched[:, None], rows.reference_logps, 0.0),
        scalar=None if rows.scalar is None else torch.where(mismatched, rows.scalar, 0.0),
    )


def padded(rows: LogProbBatch, columns: int) -> LogProbBatch:
    """The same rows in a wider batch: every [n, T] field gets columns of zeros (False in the mask)."""
    wide: dict[str, Any] = {
        f.name: F.pad(value, (0, columns))
        for f in fields(rows)
        if isinstance(value := getattr(rows, f.name), torch.Tensor) and value.dim() == 2
    }
    return replace(rows, **wide)


def paddings(step: Step) -> tuple[int, ...]:
    """By how many columns the rows of a step are padded: one, a drawn number and, for few and short rows, up to 8,192.

    No step has more than 2**20 tokens.
    """
    small = not step.large and step.units <= 3
    most = (WIDEST if small else min(WIDEST, 2**18 // step.units)) - step.tokens
    drawn = int(64 * (most / 64) ** Random(step.seed).random()) if most > 64 else most
    return (1, 4, max(1, drawn)) if not small else (1, drawn, most)


# Prompts are numbered throughout the data, and the copies of one far apart. Neighbours differ by what float32, int16,
# an int32 times the number of rows, an int32 and a table by remainder lose.
_NUMBERS = torch.tensor([2**24, 1, 2**16, 2**20, 2**32, 10**6 * 2**20]).cumsum(0)


def renumbered(rows: LogProbBatch, step: Step) -> LogProbBatch:
    """The same rows with other numbers for their prompts, up to 2**41, in about the opposite order."""
    place = step.seed % len(_NUMBERS) + rows.labels.group.max() - rows.labels.group if len(rows) else rows.labels.group
    group = _NUMBERS[place % len(_NUMBERS)] + 7 * (place // len(_NUMBERS))
    return replace(rows, labels=replace(rows.labels, group=group))


# Simplest values first: Hypothesis shrinks towards them.
CHOICES: dict[str, Sequence[Any]] = {
    "units": range(1, 7),
    "mismatched": range(5),
    "tokens": range(1, 6),
    "scale": (1.0, 0.1, 10.0, 100.0),
    "paired": (False, True),
    "classes": ("mixed", "desirable", "undesirable"),
    "grouped": (False, True),
    "of_prompt": (1, 2, 6),
    "alone": (False, True),
    "rewards": ("varied", "varied", "skewed", "equal", "start"),
    "scores": ("near", "far", "tied", "extreme"),
    "holes": (False, True),
    "seed": range(2**31),
}


def fitted_to(step: Step, needs: Needs, mismatched: bool | None) -> Step:
    """The step adapted to ``needs``, without mismatched rows if none are allowed."""
    wanted = needs.mismatched or needs.samples > 0 or needs.exact_kl
    allowed = wanted or ((not needs.pairs) if mismatched is None else mismatched)
    return replace(
        step,
        mismatched=max(step.mismatched, int(wanted)) if allowed else 0,
        paired=step.paired or needs.pairs,
        grouped=step.grouped or needs.groups,
        gold=(1 + step.seed % step.units) * needs.gold,
    )


WIDEST = 8192  # tokens of a batch
# Each is large in one way: many rows, prompts with many rows, far log-ratios, long completions. Odd numbers of rows
# show what only works in even ones, and widths of 2**n + 1 what loses a last block of one column. No step has more than
# 2**20 tokens.
LARGE = (
    Step(units=300, tokens=1),
    Step(units=65, tokens=20, of_prompt=64, scores="far", holes=True),
    Step(units=40, tokens=2, scale=10.0, classes="undesirable", scores="extreme"),
    Step(units=33, tokens=3, of_prompt=32, alone=True, classes="desirable"),
    Step(units=6, tokens=513, scale=100.0, scores="extreme", holes=True),
    Step(units=4, tokens=1025),
    Step(units=3, tokens=WIDEST),
    Step(units=9, tokens=7, rewards="start"),
    Step(units=129, tokens=2, rewards="skewed", of_prompt=6),
    Step(units=4096, tokens=1, rewards="skewed"),
)


def large_steps(needs: Needs | None = None, *, mismatched: bool | None = None) -> tuple[Step, ...]:
    """A few steps with many rows, many prompts, long completions or far log-ratios; see ``steps`` for the arguments."""
    needs = needs or Needs()
    wanted = needs.mismatched or needs.samples > 0 or needs.exact_kl
    allowed = (not needs.pairs) if mismatched is None else mismatched
    together = needs.pairs or needs.groups
    most = 512 if needs.groups else 4096  # rows of a prompt are compared pairwise, which takes memory
    return tuple(
        replace(
            step,
            seed=number,
            units=min(most, max(1, step.units // 2) if together else step.units),
            mismatched=(1 + min(step.units, 300) // 4) * (wanted or allowed),
            paired=needs.pairs,
            grouped=needs.groups,
            gold=(1 + min(step.units, 300) // 4) * needs.gold,
        )
        for number, step in enumerate(LARGE)
    )
