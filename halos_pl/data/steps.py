"""The steps of a split: which examples come together in which order, and the batches they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from halos_pl.batch import TokenBatch
from halos_pl.common.stopping import ignore_signals
from halos_pl.data.batches import StepDataset
from halos_pl.data.order import Order, StepSampler
from halos_pl.data.source import Source
from halos_pl.data.split import Split


@dataclass(frozen=True)
class Batching:
    """How training examples make steps; for the settings see ``FeedbackDataModule``."""

    batch_size: int
    shuffle: bool
    drop_last: bool
    balance_classes: bool
    group_by_length: bool


def training_sampler(
    split: Split, sources: Sequence[Source], batching: Batching, *, seed: int, world_size: int
) -> StepSampler:
    """The steps of a training split, whose ``sources`` may have weights.

    Raises:
        ValueError: rows of one example are from sources with different weights, or the data do not fill a step.
    """
    table, first = split.table, np.array([example[0] for example in split.examples])
    weights = [source.weight for source in sources]
    weight = np.array(weights)[table.source]
    if len(set(weight.tolist())) > 1:
        for example in split.examples:
            if len(set(weight[list(example)].tolist())) > 1:
                one, other = (table.name(max(example, key=lambda i: s * weight[i])) for s in (1, -1))
                raise ValueError(
                    f"{one} and {other} come together, but their sources have different weights; give both the same"
                )
    order = Order(
        len(split.examples),
        seed=seed,
        shuffle=batching.shuffle,
        source=table.source[first],
        weights=weights,
        classes=split.of_examples((table.label == 1).astype(int)) if batching.balance_classes else None,
        lengths=split.of_examples(split.row_tokens) if batching.group_by_length else None,
        batch_size=batching.batch_size,
    )
    return StepSampler(order, batch_size=batching.batch_size, world_size=world_size, drop_last=batching.drop_last)


def loader_of(dataset: StepDataset, sampler: StepSampler, *, num_workers: int, seed: int) -> DataLoader[TokenBatch]:
    """A loader of the sampler's steps, one ``TokenBatch`` per step."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_signals,
        # Each iterator draws a seed for the workers. Drawn from the global state, it would change a resumed run, which
        # makes fewer iterators.
        generator=torch.Generator().manual_seed(seed),
        collate_fn=_unchanged,
    )


def _unchanged(batch: Any) -> Any:
    return batch
