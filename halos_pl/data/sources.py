"""The sources that an argument of the DataModule names."""

from __future__ import annotations

import os
from typing import Any

from halos_pl.data.formats import files_of
from halos_pl.data.source import Source, source_of

# A mapping of settings, not a ``Source``: jsonargparse would read a path given for a dataclass as a settings file.
Given = str | dict[str, Any]
Sources = Given | list[Given]


def sources_of(split: str, data: Sources | None) -> list[Source]:
    """The sources of a split. A folder, or a pattern of files, becomes one source per file.

    Args:
        split: the name of the argument, for messages.
        data: the argument.

    Raises:
        ValueError: ``data`` is no source, lists one twice, or weights data that are not trained on.
    """
    items = [] if data is None else list(data) if isinstance(data, list | tuple) else [data]
    sources = [file for item in items for file in files_of(_source(split, item))]
    if split != "train" and any(source.weight != 1 for source in sources):
        raise ValueError(f"data.{split} has a source with a weight; only training data are weighted")
    labels = [source.label for source in sources]
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise ValueError(f"data.{split} lists {', '.join(twice)} more than once; list each once, with a weight")
    return sources


def _source(split: str, item: Any) -> Source:
    if isinstance(item, Source):
        return item
    if isinstance(item, str | os.PathLike):
        return Source(os.fspath(item))
    if isinstance(item, dict) and "path" in item:
        return source_of(item, f"data.{split}")
    raise ValueError(f"data.{split} {_no_source(item)}")


def _no_source(item: Any) -> str:
    """What is wrong with an argument that is no source, without quoting its rows."""
    takes = "it takes a path, a name on the hub, a mapping {path: ..., ...} of a source's settings, or a list of these"
    if isinstance(item, dict):
        keys = ", ".join(map(str, list(item)[:8]))
        if {"prompt", "completion", "chosen", "messages"} & set(item):
            return f"holds a row, with the columns {keys}; {takes}. Write the rows to a .jsonl file and name that"
        return f"is a mapping without path, with the keys {keys}; {takes}"
    save = ""
    if hasattr(item, "save_to_disk"):
        save = '. Save it with save_to_disk("folder"), and name that folder'
    elif hasattr(item, "to_parquet"):
        save = '. Save it with to_parquet("file.parquet"), and name that file'
    return f"is a {type(item).__name__}; {takes}{save}"
