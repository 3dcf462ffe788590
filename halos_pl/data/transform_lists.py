"""Lists of transforms: their order, and the table after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halos_pl.data.order import seeded
from halos_pl.data.table import Table
from halos_pl.data.transforms import OnePerPrompt, ThresholdScores, Transform


def in_order(transforms: Sequence[Transform], one_per_prompt: bool) -> list[Transform]:
    """The transforms; with ``one_per_prompt``, ``OnePerPrompt`` comes before the first that needs labels.

    Raises:
        ValueError: ``ThresholdScores`` would make labels only after a transform has used them.
    """
    place = _first_on_labels(transforms)
    if any(isinstance(t, ThresholdScores) and not t.relabel for t in transforms[place:]):
        name = type(transforms[place]).__name__
        raise ValueError(f"data.transforms: ThresholdScores comes after {name}, which needs labels; put it before")
    return [*transforms[:place], *([OnePerPrompt()] if one_per_prompt else []), *transforms[place:]]


def plan(transforms: Sequence[Transform], *, train: bool, drop_ties: bool) -> list[Transform]:
    """The transforms of a split, including the one that turns scores into labels.

    Args:
        transforms: transforms in order.
        train: whether the split is trained on; else only transforms with ``held_out`` apply.
        drop_ties: ``drop_ties`` of the ``ThresholdScores`` that is added if the list has none.
    """
    chosen = [t for t in transforms if train or t.held_out]
    if any(isinstance(t, ThresholdScores) for t in chosen):
        return chosen
    place = _first_on_labels(chosen)
    return [*chosen[:place], ThresholdScores(drop_ties=drop_ties), *chosen[place:]]


def apply(
    table: Table, transforms: Sequence[Transform], *, train: bool, drop_ties: bool, seed: int
) -> tuple[Table, list[dict[str, Any]]]:
    """The table after the transforms of :func:`plan`, and the name and counts of each.

    Raises:
        ValueError: a transform does not return a table and its counts.
    """
    reports: list[dict[str, Any]] = []
    for transform in plan(transforms, train=train, drop_ties=drop_ties):
        listed = transform in transforms
        if not listed and not bool((table.label < 0).any()):
            continue  # every row has a label
        name = type(transform).__name__
        # The place in the user's list, so that a draw does not depend on what the plan inserts.
        place = transforms.index(transform) if listed else len(transforms)
        result: Any = transform(table, seeded("transform", seed, place))
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Table)):
            raise ValueError(f"data.transforms: {name} returned {type(result).__name__}, not (Table, counts)")
        table, counts = result
        reports.append({"transform": name, **counts})
    return table, reports


def _first_on_labels(transforms: Sequence[Transform]) -> int:
    return next((i for i, t in enumerate(transforms) if not t.before_labels), len(transforms))
