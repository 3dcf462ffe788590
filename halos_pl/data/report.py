"""What became of the rows of a split: lines for the log, and the counts of a run's summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from halos_pl.batch import Needs
from halos_pl.data.order import StepSampler
from halos_pl.data.prompts import TextPrompts, convention, counted
from halos_pl.data.source import Source
from halos_pl.data.split import Split
from halos_pl.data.store import fault_list
from halos_pl.data.transforms import Transform
from halos_pl.data.weights import summary_of


def log_transforms(name: str, reports: Sequence[Mapping[str, Any]]) -> None:
    """Logs a line for each transform of the split ``name``."""
    for report in reports:
        counts = ", ".join(f"{key} {value}" for key, value in report.items() if key != "transform")
        rank_zero_info(f"{name} data, {report['transform']}: {counts}")


def log_split(
    name: str,
    split: Split,
    sources: Sequence[Source],
    text_prompts: TextPrompts,
    has_template: bool,
    needs: Needs,
    transforms: Sequence[Transform],
) -> None:
    """Logs for each source how many of its rows are used, skipped and cut, their weights, and how text is encoded.

    Args:
        name: name of the split.
        split: the rows in use.
        sources: the split's sources, in the order of its stores.
        text_prompts: how plain-text prompts are encoded.
        has_template: whether the tokenizer has a chat template.
        needs: needs of the objective.
        transforms: transforms of the rows.
    """
    scored = ~np.isnan(split.table.score)
    unread_scores = name == "train" and not (needs.scores or needs.groups or transforms)
    unread_votes = not any(transform.reads_votes for transform in transforms)
    for number, (source, store) in enumerate(zip(sources, split.table.stores, strict=True)):
        title, counts = f"{name} data {store.path}", split.counts[store.path]
        rank_zero_info(f"{title}: {counts}")
        prompts = convention(store.text_prompts, text_prompts, has_template)
        for note in [*([prompts] if prompts else []), *counted(store.notes)]:
            rank_zero_info(f"{title}: {note}")
        if store.unused:
            rank_zero_info(f"{title}: not used: {', '.join(store.unused)}")
        if unread_scores and bool(scored[split.table.source == number].any()):
            rank_zero_info(f"{title}: has scores or margins, which this objective does not ask for")
        if unread_votes and bool(store.rows["agree"].any() or store.rows["disagree"].any()):
            rank_zero_info(f"{title}: not used: votes, which the transform Agreement turns into weights")
        if weights := summary_of(store.weighted_by, split.table.weight[split.table.source == number]):
            rank_zero_info(f"{title}: {weights}")
        if store.fault_count:
            rank_zero_info(f"{name} data, skipped:\n{fault_list(store.causes, store.fault_count)}")
        if source.weight != 1:
            rows = round(source.weight * counts.rows)
            rank_zero_info(f"{title}: weight {source.weight:g}, about {rows} rows per epoch")


def log_merged(name: str, sampler: StepSampler) -> None:
    """Logs whether the steps of the split ``name`` differ from those of one device."""
    if sampler.merged:
        rank_zero_info(
            f"{name} data, left over at the end of an epoch: {sampler.merged} of {len(sampler.order)} examples, fewer"
            " than there are ranks; the step before takes them, while on one device they are a step of their own"
        )


def counts_of(split: Split, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The split's counts as :meth:`halos_pl.data.FeedbackDataModule.counts` returns them."""
    stores = split.table.stores
    by_source: dict[str, Any] = {}
    for number, store in enumerate(stores):
        weights = summary_of(store.weighted_by, split.table.weight[split.table.source == number])
        by_source[store.path] = asdict(split.counts[store.path]) | {"unused": store.unused, "weights": weights}
    return {**by_source, "transforms": reports}
