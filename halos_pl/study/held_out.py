"""Checks, before the first run, that a study's metrics can be computed from its held-out data."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from halos_pl.data.example import DataError
from halos_pl.data.prompts import TEXT_SETTINGS
from halos_pl.data.sources import sources_of
from halos_pl.data.store import fault_list, open_store
from halos_pl.data.table import Table
from halos_pl.data.transforms import ThresholdScores
from halos_pl.evaluation.metrics import metric_of
from halos_pl.study.spec import Study, StudyError

# Rows that a metric needs, by label.
_GOOD, _BAD = {1: "desirable"}, {0: "undesirable"}
NEEDED = {"nll_desirable": _GOOD, "nll_undesirable": _BAD, "displacement": _GOOD, "reward_auroc": _GOOD | _BAD}


def check_held_out(study: Study, arguments: Mapping[str, Any], tokenizer: Any, data: Any) -> int:
    """Refuses held-out data with faults, and metrics that the data cannot give.

    Args:
        study: the study.
        arguments: arguments of ``halos evaluate``.
        tokenizer: the policy's tokenizer.
        data: a DataModule used in training, for its text settings.

    Returns:
        the number of prompts that the primary metric is measured on.

    Raises:
        StudyError: naming the line of the study file.
    """
    sources = arguments["held_out"]
    if not sources:
        return 0
    place = f"{study.places['evaluate']}: held_out"
    text = {name: getattr(data, name) for name in TEXT_SETTINGS}
    text["text_prompts"] = arguments["text_prompts"] or data.text_prompts
    try:
        stores = [open_store(source, tokenizer, **text) for source in sources_of("predict", sources)]
    except (DataError, OSError, ValueError) as error:
        raise StudyError(f"{place}: {error}") from error
    for store in stores:
        if store.fault_count:
            raise StudyError(f"{place}: {fault_list(store.causes, store.fault_count)}")
    table = Table.of(stores)
    if bool((table.label < 0).any()):  # scores become labels by comparison with other rows of the prompt
        table, counts = ThresholdScores()(table, random.Random(0))
        if not len(table):
            raise StudyError(
                f"{study.places['held_out']}: held_out: no row is left with a label, as none scores above or below"
                f" others of its prompt ({counts['dropped_at_threshold']} were dropped)"
            )
    paired = table.pair >= 0
    if paired.any() and not paired.all():
        raise StudyError(f"{place}: it mixes pairs and single rows; a study measures one or the other")
    labels = set(table.label.tolist())
    for metric in study.metrics:
        if metric_of(metric).unit == "pairs" and not paired.any():
            raise StudyError(f"{study.places['metrics']}: {metric} needs pairs; the held-out data have none")
        for label, kind in NEEDED.get(metric, {}).items():
            if label not in labels:
                raise StudyError(f"{study.places['metrics']}: {metric} needs {kind} rows; the held-out data have none")
    counted = list(NEEDED.get(study.primary, {0: "", 1: ""}))
    return len(set(table.prompt[np.isin(table.label, counted)].tolist()))
