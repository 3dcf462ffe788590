"""The steps of a split: which examples come together in which order, and the batches they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from halos_pl.data.order import Order
from halos_pl.data.source import Source
from halos_pl.data.split import Split


def training_order(
    split: Split,
    sources: Sequence[Source],
    *,
    seed: int,
    shuffle: bool,
    balance_classes: bool,
    group_by_length: bool,
    batch_size: int,
) -> Order:
    """The order of a training split, whose ``sources`` may have weights.

    Raises:
        ValueError: rows that come together are of sources with different weights.
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
    lengths: Any = split.of_examples(split.prompt_length + split.completion_length) if group_by_length else None
    return Order(
        len(split.examples),
        seed=seed,
        shuffle=shuffle,
        source=table.source[first],
        weights=weights,
        classes=split.of_examples((table.label == 1).astype(int)) if balance_classes else None,
        lengths=lengths,
        batch_size=batch_size,
    )
