"""The parts of a step: which rows each has, and what it gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, TokenBatch
from halos_pl.common.transfer import moved
from halos_pl.objective.halo import Result


@dataclass(frozen=True)
class Part:
    """A finished micro-batch of a step.

    Attributes:
        index: LongTensor [m], positions of its rows in ``batch``.
        numbers: The same positions on the host.
        batch: The step's batch, including the policy's samples.
        rows: Log-probs of its rows, without gradient; like ``index``, without gold answers, which have no outcome.
        result: Loss and outcomes, without gradient. The losses of the parts of all ranks sum to the step's loss.
    """

    index: Tensor
    numbers: list[int]
    batch: TokenBatch
    rows: LogProbBatch
    result: Result

    @property
    def row_ids(self) -> list[str]:
        """The names of its rows."""
        return [self.batch.row_ids[i] for i in self.numbers] if self.batch.row_ids else []


@dataclass(frozen=True)
class Rows:
    """Positions of m rows in a batch, so that neither the host nor the device waits for the other.

    Attributes:
        numbers: The positions on the host.
        index: LongTensor [m], the same on the device.
    """

    numbers: list[int]
    index: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.numbers[part], self.index[part])


def on_device(groups: Sequence[list[int]], device: torch.device) -> list[Rows]:
    """Positions on the host and, after one copy, on the device."""
    columns = [torch.tensor(numbers, dtype=torch.long, device="cpu") for numbers in groups]
    return [Rows(numbers, index) for numbers, index in zip(groups, moved(columns, device), strict=True)]


def without_gold(rows: Rows, batch: TokenBatch) -> tuple[Rows, Rows]:
    """Those of some rows of a batch that are no gold answers, and their places among these rows."""
    gold = batch.labels.host.gold
    places = [k for k, i in enumerate(rows.numbers) if not gold[i]]
    (kept,) = on_device([places], rows.index.device)
    return Rows([rows.numbers[k] for k in places], rows.index[kept.index]), kept


def split(rows: Rows, batch: TokenBatch, most: int | None) -> list[Rows]:
    """Splits rows of a batch into parts of at most ``most`` rows, keeping pairs and, if possible, prompts together."""
    if most is None or len(rows) <= most:
        return [rows]
    units: dict[int, list[int]] = {}
    pair, prompt = batch.labels.host.pair, batch.host.prompt
    for i in rows.numbers:
        units.setdefault(min(i, pair[i]) if pair[i] >= 0 else i, []).append(i)
    parts: list[list[int]] = [[]]
    for unit in sorted(units.values(), key=lambda unit: prompt[unit[0]]):
        if parts[-1] and len(parts[-1]) + len(unit) > most:
            parts.append([])
        parts[-1].extend(unit)
    return on_device(parts, rows.index.device)
