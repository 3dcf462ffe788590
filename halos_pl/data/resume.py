"""The data's part of a checkpoint, and the refusal to resume with other data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from halos_pl.data.memory import MemorySource
from halos_pl.data.source import Source

Settings = dict[str, Any]
#: Settings of the DataModule that, with the sources, decide which rows are trained on.
DECIDE_ROWS = (
    "max_length",
    "truncate_completions",
    "on_bad_rows",
    "special_tokens_in_text",
    "text_prompts",
    "chat_template",
    "loss_on",
    "transforms",
    "keep_together",
    "control_tokens",
)


def plain(value: Any) -> Any:
    """``value`` after a round trip through JSON; an object becomes ``{class: attributes}``."""
    return json.loads(json.dumps(value, default=lambda o: {type(o).__name__: getattr(o, "__dict__", None)}))


def described(sources: Sequence[Source], digests: Mapping[str, str]) -> list[str]:
    """The label of each source, and for rows in memory the start of their digest (``digests`` is by label)."""
    return [
        f"{source.label} (in memory, {digests[source.label][:12]})"
        if isinstance(source, MemorySource)
        else source.label
        for source in sources
    ]


def refuse_other_data(saved: Mapping[str, Any], now: Mapping[str, Any], was: Settings, settings: Settings) -> None:
    """Refuses to resume with data or batches that differ from the checkpoint's: it would be another run.

    Args:
        saved, now: values that must be equal, by name; names missing from an older checkpoint are not compared.
        was, settings: settings of the DataModule at the checkpoint and now, to explain why rows differ.

    Raises:
        ValueError: names what differs.
    """
    differing = [key for key in now if key in saved and _compared(key, saved[key]) != _compared(key, now[key])]
    if differing:
        named = "; ".join(_difference(key, saved[key], now[key], was, settings) for key in differing)
        raise ValueError(
            f"the checkpoint is from a run with other data or batches: {named}. Restore these settings to resume, or"
            " start a new run."
        )


def _compared(key: str, value: Any) -> Any:
    """What must be equal: of the objective's needs those that exist, since an older version does not know all names."""
    return {k: v for k, v in json.loads(value).items() if v} if key == "objective's needs" else value


def _difference(key: str, saved: Any, now: Any, was: Settings, settings: Settings) -> str:
    if key == "training data":  # a hash, which explains nothing
        changed = [f"data.{name}: {was[name]} -> {v}" for name, v in settings.items() if was.get(name, v) != v]
        return f"{key} ({', '.join(['other rows', *changed])})"
    if key == "objective's needs":
        before, after = json.loads(saved), json.loads(now)
        return f"{key} ({', '.join(f'{k}: {before.get(k)} -> {v}' for k, v in after.items() if before.get(k) != v)})"
    return f"{key} (saved {saved}, now {now})"
