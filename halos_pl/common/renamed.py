"""Settings and classes that earlier versions named otherwise; an error about one suggests the name it has now."""

from __future__ import annotations

from collections.abc import Iterable

#: The new name by the old one: of settings, of plug-ins, and of what Python code imports.
RENAMED = {
    "undesirable": "reflect_undesirable",
    "constant": "loss_offset",
    "packing": "prefix_sharing",
    "Rival": "PairedCompletion",
    "SortedRival": "RankMatched",
    "probes": "mismatched",
    "rivals": "pairs",
    "judge": "compute_loss",
    "FlatBatch": "TokenBatch",
    "Rows": "LogProbBatch",
}
#: The new value of a renamed setting by the old one.
VALUES = {
    "reflect_undesirable": {"reflect": "true", "same": "false"},
    "prefix_sharing": {"tree": "always", "padded": "never"},
}


def renamed(key: str, names: Iterable[str]) -> str:
    """Which of ``names`` a dotted key of an earlier version stands for; empty where it is none of them."""
    before, dot, last = key.rpartition(".")
    new = f"{before}{dot}{RENAMED.get(last, '')}"
    return new if last in RENAMED and new in set(names) else ""


def new_value(name: str, value: object) -> str:
    """The value of a renamed setting that an old value stands for; empty where none does."""
    return VALUES.get(name.rpartition(".")[2], {}).get(str(value), "")
