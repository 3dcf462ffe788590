"""How a step may be split: the rows that stay together, and the shares of ranks."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import torch

from halos_pl.batch import LogProbBatch, Needs


def kept_together(rows: LogProbBatch, needs: Needs) -> list[list[int]]:
    """Indices of rows that no split of a step separates: pairs, and whole prompts if needed."""
    units: dict[tuple[str, int], list[int]] = {}
    columns = (rows.labels.pair.tolist(), rows.labels.group.tolist(), rows.labels.mismatched.tolist())
    for i, (pair, group, mismatched) in enumerate(zip(*columns, strict=True)):
        if needs.groups and not mismatched:
            units.setdefault(("group", group), []).append(i)
        else:
            units.setdefault(("row", min(i, pair) if pair >= 0 else i), []).append(i)
    return list(units.values())


def shares(rows: LogProbBatch, needs: Needs, seed: int, ranks: int) -> list[torch.Tensor]:
    """Indices of the step's rows on each of ``ranks``, unequal numbers of them; in some steps, a rank has no rows.

    Mismatched rows are on ranks that have rows with a loss.
    """
    units = kept_together(rows, needs)
    draw = Random(seed)
    some = len(units) >= ranks and seed % 3
    between = draw.sample(range(1, len(units)), ranks - 1) if some else draw.choices(range(len(units) + 1), k=ranks - 1)
    cuts = [0, *sorted(between), len(units)]
    parts = [[i for unit in units[a:b] for i in unit] for a, b in pairwise(cuts)]
    with_loss = [part for part in parts if bool(rows.labels.train[part].any())]
    for part in parts:
        if part not in with_loss:
            with_loss[0] += part
            part.clear()
    return [torch.tensor(part, dtype=torch.long) for part in parts]
