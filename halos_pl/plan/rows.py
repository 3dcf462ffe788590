"""The rows that a plan assumes, or takes from the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halos_pl.batch import Needs, TokenBatch
from halos_pl.labels import Labels


@dataclass(frozen=True)
class Rows:
    """The rows of a step.

    Attributes:
        source: where they come from, in words.
        batches: whole optimizer steps.
        steps: number of steps of an epoch; None if unknown.
        make: makes a batch with a number of rows with gradient (pairs, if the objective compares pairs): the longest.
        alike: whether all rows have the same lengths.
    """

    source: str
    batches: Sequence[TokenBatch]
    steps: int | None
    make: Callable[[int], TokenBatch]
    alike: bool


def rows_of_unit(needs: Needs) -> int:
    """Rows with gradient of a row or, if the objective compares pairs, of a pair: itself and its gold answer."""
    return (2 if needs.pairs else 1) + needs.gold


def assumed(rows: int, length: int, needs: Needs) -> TokenBatch:
    """A batch in which all rows have different prompts and the same length: half prompt, half completion.

    If the objective needs gold answers, there is one for each row or pair.

    Args:
        rows: rows with gradient; pairs, if the objective compares pairs.
        length: tokens of prompt and completion together.
        needs: needs of the objective.
    """
    prompts = [torch.zeros(max(1, length // 2), dtype=torch.long) for _ in range(rows)]
    completion = max(1, length - length // 2)
    each = 2 if needs.pairs else 1
    prompt = torch.arange(rows).repeat_interleave(each)
    pair = torch.full((rows,), -1)
    if needs.pairs:
        pair = torch.arange(2 * rows).view(-1, 2).flip(1).flatten()
    judged = len(prompt)
    if needs.gold:
        prompt = torch.cat([prompt, torch.arange(rows)])
        pair = torch.cat([pair, torch.full((rows,), -1)])
    gold = torch.arange(len(prompt)) >= judged
    lengths = [completion] * len(prompt)
    mismatched = [False] * len(prompt)
    if needs.mismatched or needs.samples or needs.exact_kl:
        prompt = torch.cat([prompt, torch.arange(rows)])
        pair = torch.cat([pair, torch.full((rows,), -1)])
        gold = torch.cat([gold, torch.zeros(rows, dtype=torch.bool)])
        lengths += [needs.samples or completion] * rows
        mismatched += [True] * rows
    n = len(lengths)
    labels = Labels(torch.arange(n) % 2 == 0, pair=pair, mismatched=torch.tensor(mismatched), gold=gold)
    return TokenBatch(prompts, [torch.zeros(length, dtype=torch.long) for length in lengths], prompt, labels)


def longest(batch: TokenBatch, units: int, needs: Needs) -> TokenBatch:
    """The longest rows of a batch, with mismatched rows and gold answers: an upper bound of a rank's share of the step.

    Args:
        batch: rows of a whole step.
        units: number of rows with gradient; of pairs, if the objective compares pairs.
        needs: needs of the objective.
    """
    size = [len(batch.prompts[p]) + len(c) for p, c in zip(batch.prompt.tolist(), batch.completions, strict=True)]
    pair, mismatched, gold = (getattr(batch.labels, name).tolist() for name in ("pair", "mismatched", "gold"))
    train = [i for i in range(len(batch)) if not (mismatched[i] or gold[i])]
    groups = [[pair[i], i] for i in train if 0 <= pair[i] < i] if needs.pairs else [[i] for i in train]
    groups.sort(key=lambda rows: -sum(size[i] for i in rows))
    chosen = [i for rows in groups[:units] for i in rows]
    for spare in (mismatched, gold):
        chosen += sorted((i for i in range(len(batch)) if spare[i]), key=lambda i: -size[i])[:units]
    return batch.select(torch.tensor(sorted(chosen)))


def from_data(data: Any, steps: int) -> tuple[list[TokenBatch], int]:
    """The first optimizer steps of a DataModule that has been set up, and the number of steps of an epoch.

    Args:
        data: the DataModule.
        steps: maximum number of steps to read.
    """
    loader = data.train_dataloader()
    batches = [batch for _, batch in zip(range(steps), loader, strict=False)]
    return batches, len(loader)


def largest(batches: Sequence[TokenBatch]) -> TokenBatch:
    """The batch with the most tokens."""
    return max(batches, key=lambda b: sum(map(len, b.prompts)) + sum(map(len, b.completions)))
