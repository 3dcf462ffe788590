"""The sources that an argument of the DataModule names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from halos_pl.data.formats import files_of
from halos_pl.data.memory import MemorySource, in_memory
from halos_pl.data.source import Source, source_of

# A mapping of settings, not a ``Source``: jsonargparse would read a path given for a dataclass as a settings file.
Given = str | dict[str, Any]
if TYPE_CHECKING:
    Item: TypeAlias = "Given | os.PathLike[str] | Source | Any"  # a Dataset, a DataFrame or a Table
    Sources: TypeAlias = "Item | Sequence[Item]"
else:  # what a command line or a YAML file can hold
    Sources = Given | list[Given]

_SETTINGS = {field.name for field in fields(Source)}


def sources_of(split: str, data: Sources | None) -> list[Source]:
    """The sources of a split. A folder, or a pattern of files, becomes one source per file.

    Args:
        split: name of the argument, for messages.
        data: the argument. A list of mappings is a list of rows, unless the first is a mapping of settings.

    Raises:
        ValueError: ``data`` is not a source, lists one twice, or weights data that are not trained on.
    """
    if data is None:
        items: list[Any] = []
    elif isinstance(data, list | tuple) and not (data and _is_row(data[0])):
        items = list(data)
    else:
        items = [data]
    names = [split if len(items) == 1 else f"{split}[{i}]" for i in range(len(items))]
    sources = [
        file for item, name in zip(items, names, strict=True) for file in files_of(_source(f"data.{split}", item, name))
    ]
    if split != "train" and any(source.weight != 1 for source in sources):
        raise ValueError(f"data.{split} has a source with a weight; only training data are weighted")
    labels = [source.label for source in sources]
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise ValueError(f"data.{split} lists {', '.join(twice)} more than once; list each once, with a weight")
    return sources


def _is_row(item: Any) -> bool:
    """Whether a mapping is feedback, not the settings of a source."""
    return isinstance(item, Mapping) and "path" not in item and not set(item) <= _SETTINGS


def _source(argument: str, item: Any, name: str) -> Source:
    """One source; ``name`` is the name of rows in memory."""
    if isinstance(item, Source):
        return item
    if isinstance(item, str | os.PathLike):
        return Source(os.fspath(item))
    if isinstance(item, dict) and "path" in item:
        if isinstance(item["path"], str | os.PathLike):
            return source_of(item, argument)
        settings = source_of({**item, "path": name}, argument)
        if wrong := [key for key in ("split", "name", "data_dir", "revision", "streaming") if getattr(settings, key)]:
            raise ValueError(f"{argument} sets {', '.join(wrong)}, which rows in memory do not have; remove it")
        memory = _source(f"{argument}.path", item["path"], name)
        options = {field.name: getattr(settings, field.name) for field in fields(Source)}
        return replace(memory, **options)
    try:
        rows = list(item) if isinstance(item, list | tuple) else in_memory(item)
    except ValueError as error:
        raise ValueError(f"{argument} {error}") from error
    if rows is None:
        raise ValueError(f"{argument} {_no_source(item)}")
    return MemorySource(name, data=rows)


def _no_source(item: Any) -> str:
    """Why an argument is not a source, without quoting its rows."""
    takes = (
        "it takes a path, a name on the hub, a mapping {path: ..., ...} of a source's settings, a list of these, or in"
        " Python a datasets.Dataset, a pandas DataFrame or a list of rows"
    )
    if isinstance(item, Mapping):
        keys = ", ".join(map(str, list(item)[:8]))
        if not _is_row(item):
            return f"is a mapping without path, with the keys {keys}; {takes}"
        if any(isinstance(value, list) for value in item.values()) and "messages" not in item:
            return f"is a mapping of columns ({keys}); pass datasets.Dataset.from_dict(...) of it"
        return (
            f"is a mapping with the keys {keys} and without path: pass a list of rows if it is a row, and add path if"
            " it is a source's settings"
        )
    shown = repr(item) if item is None or isinstance(item, bool | int | float) else f"a {type(item).__name__}"
    return f"is {shown}; {takes}"
