"""Rows of a step, drawn for the clauses of the suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from halos_pl.batch import Labels, LogProbBatch, Needs, Routing

Classes = Literal["mixed", "desirable", "undesirable"]


@dataclass(frozen=True)
class Step:
    """How the rows of a step are drawn; small numbers give small steps.

    Attributes:
        seed: seed of all random draws.
        units: pairs, or (without ``paired``) rows.
        mismatched: number of mismatched rows.
        tokens: width of the batch; a row has between 1 and this many.
        scale: nats; log-probs lie between -3 * scale and 0, as multiples of a tenth of it.
        paired: whether rows come as pairs of a desirable and an undesirable one.
        classes: labels of rows that are not paired.
        grouped: whether every prompt has two rows or more.
        alone: whether to drop one row of the last prompt, if grouped and not paired; this often leaves a single one.
    """

    seed: int = 0
    units: int = 1
    mismatched: int = 0
    tokens: int = 1
    scale: float = 1.0
    paired: bool = False
    classes: Classes = "mixed"
    grouped: bool = False
    alone: bool = False

    @property
    def large(self) -> bool:
        """Whether the step is larger than the drawn ones, so that checking row by row would take long."""
        return self.units > 6 or self.tokens > 5

    def later(self, call: int) -> Step:
        """Another step of the same kind and size, for the ``call``-th call after this step."""
        return replace(self, seed=(self.seed + 7919 * call) % 2**31)

    def rows(self, dtype: torch.dtype = torch.float64) -> LogProbBatch:
        """The rows of the step in random order, mismatched rows among them."""
        drawn = self._rows(dtype)
        rows: LogProbBatch = _copy(drawn)
        rows.labels, rows.routing = _copy(drawn.labels), _copy(drawn.routing)
        return rows

    @lru_cache(maxsize=4096)  # noqa: B019  (a step is a few numbers)
    def _rows(self, dtype: torch.dtype) -> LogProbBatch:
        draw = torch.Generator().manual_seed(self.seed)
        train = self.units * (2 if self.paired or self.grouped else 1)
        train -= self.alone and self.grouped and not self.paired
        n, width = train + self.mismatched, self.tokens
        place = torch.randperm(n, generator=draw)
        mask = torch.arange(width) < torch.randint(1, width + 1, (n, 1), generator=draw)
        desirable = torch.rand(n, generator=draw) < 0.5
        pair = torch.full((n,), -1)
        trained = place[:train]
        if self.paired:
            pair[trained[0::2]], pair[trained[1::2]] = trained[1::2], trained[0::2]
            desirable[trained[0::2]], desirable[trained[1::2]] = True, False
        elif self.classes != "mixed":
            desirable[trained] = self.classes == "desirable"
        mismatched = torch.ones(n, dtype=torch.bool)
        mismatched[trained] = False
        # One or two pairs (or rows) per prompt; with groups, a single row only if `alone`.
        prompt = torch.empty(n, dtype=torch.long)
        each = torch.arange(train) // 2 if self.paired or self.grouped else torch.arange(train)
        prompt[trained] = each // (1 + self.seed % 2)
        prompt[place[train:]] = prompt[trained[torch.arange(self.mismatched) % train]]

        def log_probs() -> torch.Tensor:
            tenths = torch.randint(0, 31, (n, width), generator=draw)
            certain = torch.rand(n, width, generator=draw) < 0.1  # a log-prob of 0 is not padding
            return -(tenths * ~certain).to(dtype) / 10 * self.scale * mask

        policy, reference = log_probs(), log_probs()
        alike = torch.rand(n, width, generator=draw) < 0.1
        return LogProbBatch(
            policy_logps=torch.where(alike, reference, policy),
            reference_logps=reference,
            mask=mask,
            labels=Labels(
                desirable=desirable, pair=pair, mismatched=mismatched, group=prompt, score=self._scores(desirable)
            ),
            kl=log_probs().abs() / 10,
            routing=self._routing(mask & ~mismatched[:, None], dtype),
            scalar=self._scalars(n, dtype),
        )

    def _scalars(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        """The scalars of ``n`` rows, as far from 0 as a token's log-prob, of either sign; from a separate generator."""
        draw = torch.Generator().manual_seed(self.seed + 3)
        return torch.randint(-30, 31, (n,), generator=draw).to(dtype) / 10 * self.scale

    def _routing(self, tokens: torch.Tensor, dtype: torch.dtype) -> Routing:
        """The routing of ``tokens`` (BoolTensor [n, T]) to three experts, two per token; from a separate generator."""
        draw = torch.Generator().manual_seed(self.seed + 2)
        logits = torch.randn(*tokens.shape, 3, generator=draw, dtype=torch.float64)
        chosen = torch.zeros_like(logits).scatter_(2, logits.topk(2, dim=2).indices, 1.0)
        probability = (logits.softmax(dim=2) * tokens[..., None]).sum(dim=1)
        return Routing(probability.to(dtype), (chosen * tokens[..., None]).sum(dim=1).float())

    def _scores(self, desirable: torch.Tensor) -> torch.Tensor:
        """Scores of the rows, of either sign regardless of the label; missing for some rows, and in every third step.

        Drawn from a separate generator, so that no other draw depends on them.
        """
        draw = torch.Generator().manual_seed(self.seed + 1)
        score = torch.randint(-20, 21, desirable.shape, generator=draw).float() / 10
        missing = torch.rand(desirable.shape, generator=draw) < (0.1 if self.seed % 3 else 1.1)
        return torch.where(missing, desirable.float(), score)


def with_leaf(rows: LogProbBatch, needs: Needs) -> tuple[torch.Tensor, LogProbBatch]:
    """A leaf with copies of the policy's outputs that an objective reads, and the rows with these.

    Args:
        rows: n rows.
        needs: needs of the objective.

    Returns:
        The log-probs [n, T], or, if the objective needs scalars, [n, T + 1] with the scalars in the last column.
    """
    if not needs.scalar:
        leaf = rows.policy_logps.detach().clone().requires_grad_()
        return leaf, replace(rows, policy_logps=leaf)
    assert rows.scalar is not None
    leaf = torch.cat([rows.policy_logps, rows.scalar[:, None]], dim=1).detach().requires_grad_()
    return leaf, replace(rows, policy_logps=leaf[:, :-1], scalar=leaf[:, -1])


def _copy(batch: Any) -> Any:
    """A dataclass with copies of its tensors, without checking their shapes again."""
    copy = object.__new__(type(batch))
    copy.__dict__.update(
        {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.__dict__.items()}
    )
    return copy


# Simplest values first: Hypothesis shrinks towards them.
CHOICES: dict[str, Sequence[Any]] = {
    "units": range(1, 7),
    "mismatched": range(5),
    "tokens": range(1, 6),
    "scale": (1.0, 0.1, 10.0, 100.0),
    "paired": (False, True),
    "classes": ("mixed", "desirable", "undesirable"),
    "grouped": (False, True),
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
    )


def large_steps(needs: Needs | None = None, *, mismatched: bool | None = None) -> tuple[Step, ...]:
    """A few steps with many rows, many prompts, long completions or far log-ratios; see ``steps`` for the arguments."""
    needs = needs or Needs()
    wanted = needs.mismatched or needs.samples > 0 or needs.exact_kl
    allowed = (not needs.pairs) if mismatched is None else mismatched
    sizes = [(300, 1, 1.0), (70, 20, 1.0), (40, 2, 10.0), (6, 130, 100.0), (4, 1100, 1.0)]
    return tuple(
        Step(
            seed=number,
            units=rows // 2 if needs.pairs or needs.groups else rows,
            mismatched=(1 + rows // 4) * (wanted or allowed),
            tokens=tokens,
            scale=scale,
            paired=needs.pairs,
            grouped=needs.groups,
        )
        for number, (rows, tokens, scale) in enumerate(sizes)
    )


def kept_together(rows: LogProbBatch, needs: Needs) -> list[list[int]]:
    """Indices of rows that no split of a step separates: pairs, and whole prompts if needed."""
    units: dict[tuple[str, int], list[int]] = {}
    for i, (pair, group) in enumerate(zip(rows.labels.pair.tolist(), rows.labels.group.tolist(), strict=True)):
        if needs.groups and not rows.labels.mismatched[i]:
            units.setdefault(("group", group), []).append(i)
        else:
            units.setdefault(("row", min(i, pair) if pair >= 0 else i), []).append(i)
    return list(units.values())


def two_ranks(rows: LogProbBatch, needs: Needs, seed: int) -> list[torch.Tensor]:
    """Indices of the step's rows on each of two ranks; empty if one rank would have no row with a loss."""
    units = kept_together(rows, needs)
    if len(units) < 2:
        return []
    cut = 1 + seed % (len(units) - 1)
    parts = [torch.tensor([i for unit in half for i in unit]) for half in (units[:cut], units[cut:])]
    return parts if all(bool(rows.labels.train[index].any()) for index in parts) else []
