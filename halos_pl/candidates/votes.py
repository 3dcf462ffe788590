"""Votes on candidates, and how a seed draws those that a fit sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halos_pl.labels import Labels


@dataclass(frozen=True)
class Votes:
    """The judged rows of many fits. Labels are the same in all fits; which completion has them is not.

    Attributes:
        rows: LongTensor [fits, n], place of each row's completion (see :class:`~halos_pl.candidates.Candidates`).
        desirable: BoolTensor [n].
        pair: LongTensor [n], number of the row's paired row, -1 for none.

    Raises:
        ValueError: shapes do not agree.
    """

    rows: Tensor
    desirable: Tensor
    pair: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(each.shape) for each in (self.rows, self.desirable, self.pair)]
        if len(shapes[0]) != 2 or shapes[0][1:] != shapes[1] or shapes[1] != shapes[2]:
            raise ValueError(f"Votes: rows, desirable and pair have shapes {shapes}, not (fits, n), (n,) and (n,)")

    def labels(self, group: Tensor) -> Labels:
        """Labels of the rows of one fit; ``group`` is LongTensor [n], number of each row's prompt."""
        return Labels(desirable=self.desirable, pair=self.pair, group=group)

    @classmethod
    def of_pairs(cls, pairs: Tensor, alone: Tensor) -> Votes:
        """Preferences, and undesirable rows whose chosen completion was left out.

        Args:
            pairs: LongTensor [fits, m, 2], places of chosen and rejected.
            alone: LongTensor [fits, k], places.
        """
        (m, k), rows = (pairs.shape[1], alone.shape[1]), torch.cat([pairs.flatten(1), alone], dim=1)
        desirable = torch.cat([torch.tensor([True, False]).repeat(m), torch.zeros(k, dtype=torch.bool)])
        return cls(rows, desirable, torch.cat([torch.arange(2 * m) ^ 1, torch.full((k,), -1)]))


def draw(
    pairs: Tensor, seeds: Sequence[int], *, count: int, noise: float = 0.0, desirable: float = 1.0, paired: bool
) -> Votes:
    """What each seed sees of some preferences.

    A seed draws ``count`` preferences without replacement, flips round(noise * count) of them, and keeps the
    chosen completion of round(desirable * count), but at least 1. Which of them does not depend on ``paired``, and
    with other settings it changes as little as possible.

    Args:
        pairs: LongTensor [m, 2], places of chosen and rejected.
        seeds: a fit each.
        count: number of preferences, at most m.
        noise: share of the preferences that are flipped, in [0, 1].
        desirable: share of the chosen completions that are kept, in (0, 1].
        paired: for losses that compare pairs: leaves out rejected completions whose chosen one is left out.

    Raises:
        ValueError: a number is outside its range.
    """
    if not 1 <= count <= len(pairs):
        raise ValueError(f"votes is {count}; it must be at least 1 and at most the number of preferences, {len(pairs)}")
    if not 0 <= noise <= 1 or not 0 < desirable <= 1:
        raise ValueError(f"noise is {noise} and desirable {desirable}; they must be in [0, 1] and in (0, 1]")
    turned, kept = round(noise * count), max(1, round(desirable * count))
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        mine = pairs[torch.randperm(len(pairs), generator=generator)[:count]]
        wrong = torch.randperm(count, generator=generator)[:turned]
        mine[wrong] = mine[wrong].flip(1)
        drawn.append(mine)  # in random order: the first are a random subset
    every = torch.stack(drawn)
    alone = every[:, kept:, 1]
    return Votes.of_pairs(every[:, :kept], alone[:, :0] if paired else alone)
