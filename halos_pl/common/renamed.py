"""Renamed settings and classes: an error about an old name suggests the new one."""

from __future__ import annotations

from collections.abc import Iterable

#: New names of settings, plug-ins and Python imports, by old name.
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
#: New values of renamed settings, by old value.
VALUES = {
    "reflect_undesirable": {"reflect": "true", "same": "false"},
    "prefix_sharing": {"tree": "always", "padded": "never"},
}


def renamed(key: str, names: Iterable[str]) -> str:
    """The new name, among ``names``, of a dotted key from an earlier version; empty if there is none."""
    before, dot, last = key.rpartition(".")
    new = f"{before}{dot}{RENAMED.get(last, '')}"
    return new if last in RENAMED and new in set(names) else ""


def new_value(name: str, value: object) -> str:
    """The new value for an old value of a renamed setting; empty if there is none."""
    return VALUES.get(name.rpartition(".")[2], {}).get(str(value), "")


def lacks(cls: type) -> str:
    """The abstract methods that a class lacks, and the new names of old ones that it has."""
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    old = [f"{before} is now {after}" for before, after in RENAMED.items() if after in missing and before in vars(cls)]
    return "; ".join([", ".join(missing), *old])
