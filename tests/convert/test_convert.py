"""What holds for every library: nothing is dropped, defaults are theirs, and bad input is one line."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_configs import HALOS_LOSSES, KTO, LLAMAFACTORY, TRL, WORDS, converted, write, write_halos, write_recipe
from run_halos import one_error, run_here

from halos_pl.cli.convert import peers
from halos_pl.convert.run import ConvertError
from halos_pl.convert.table import table

BARE = {"model_name_or_path": "owner/model", "dataset_name": "owner/data"}
#: A run of each trainer of each library: word, trainer, overrides, and how to write its file.
RUNS: dict[str, tuple[str, str, str, Any]] = {
    **{f"trl {t}": ("trl", t, "", lambda d: write(d, BARE)) for t in ("kto", "dpo", "cpo", "orpo", "reward")},
    **{
        f"llamafactory {s}": ("llamafactory", s, "", lambda d, s=s: write_recipe(d, LLAMAFACTORY[n]))
        for s, n in (("kto", "kto"), ("dpo", "dpo"), ("rm", "reward"))
        for n in [n]
    },
}


def of(run: str, folder: Path, overrides: str = "") -> tuple[dict[str, Any], list[str]]:
    word, trainer, words, make = RUNS[run]
    asked = trainer if word == "trl" else None
    return converted(word, make(folder), trainer=asked, overrides=f"{words} {overrides}")


def others(value: Any) -> list[Any]:
    """Values that differ from a default, one of which has the right type."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2 + 1, value / 2, 0.5]
    return [True, False, 3, 0.5, "other", ["other"], {"other": 1}]
