"""A source of feedback: a file, a folder, or a data set on the hub, and how to read it."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from jsonargparse import ArgumentError, ArgumentParser

#: The largest number of rows to read or to skip.
MOST_ROWS = 2**62


@dataclass(frozen=True)
class Source:
    """One source of feedback. In YAML, a string is a source with that path.

    Attributes:
        path: a file (``.jsonl``, ``.json``, ``.csv``, ``.parquet``, ``.arrow``; text files also with ``.gz`` or
            ``.zst``), a folder written by ``datasets.save_to_disk``, or the name of a data set on the hub
            (``owner/name``). A path that exists takes precedence over a hub name. ``~`` and environment variables
            (``$NAME``) are expanded.
        split: split of a hub data set or a saved ``DatasetDict``; required if there are several.
        name: configuration of a hub data set.
        data_dir: sub-folder of a hub data set, such as ``harmless-base`` of ``Anthropic/hh-rlhf``.
        revision: revision of a hub data set.
        schema: name of the row schema; null: detected from the columns of the first row.
        columns: your column names: ``{prompt: question}`` reads the column ``question`` as ``prompt``.
        ignore: columns, message keys and placeholders such as ``<image>`` that may be dropped although they carry
            meaning.
        max_row_mb: size limit of a row in megabytes; a larger row is a fault.
        skip: number of rows to skip at the start, such as those of a validation split.
        rows: number of rows to read after that; null: all. With ``streaming`` no more are downloaded.
        streaming: whether to read a hub data set row by row, without downloading it first.
        weight: how often a training epoch sees each row: 0.5 for half of the rows, drawn anew each epoch, 2.0 for each
            row twice.

    Raises:
        ValueError: the path is empty or cannot be looked up, ``weight`` or ``max_row_mb`` is not a positive number,
            ``rows`` is below 1, or ``skip`` below 0.
    """

    path: str
    split: str | None = None
    name: str | None = None
    data_dir: str | None = None
    revision: str | None = None
    schema: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    max_row_mb: float = 16.0
    skip: int = 0
    rows: int | None = None
    streaming: bool = False
    weight: float = 1.0

    @property
    def label(self) -> str:
        """The name in messages and counts: the path, configuration, sub-folder and split."""
        return "/".join(filter(None, (self.path, self.name, self.data_dir))) + (f"[{self.split}]" if self.split else "")

    @property
    def key(self) -> str:
        """Equal for sources that are read the same way, regardless of their weight."""
        return repr(replace(self, weight=1.0))

    before_line: ClassVar[str] = ":"

    def place(self, line: int | str) -> str:
        """The name of a line (a row, in formats without lines), in messages and row names."""
        return f"{self.path}{self.before_line}{line}"

    @property
    def fills_columns(self) -> bool:
        """Whether every row has every column, so that a null may stand for a missing value; not so in text formats."""
        return True

    @property
    def max_row(self) -> int:
        """``max_row_mb`` in bytes."""
        return int(self.max_row_mb * 1e6)

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a source has an empty path; name a file, a folder, or a data set on the hub")
        object.__setattr__(self, "path", os.path.expanduser(os.path.expandvars(self.path)))
        try:
            os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            pass  # it may be a hub name, or a pattern
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.EACCES):
                raise ValueError(f"{self.path}: cannot be looked up ({error.strerror}); check the path") from error
        for name in ("weight", "max_row_mb"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{self.path}: {name} is {getattr(self, name)}; it must be a number above 0")
        for name, least, or_null in (("skip", 0, ""), ("rows", 1, ", or null for all")):
            value = getattr(self, name)
            if value is None and or_null:
                continue
            if not isinstance(value, int) or not least <= value <= MOST_ROWS:
                why = f"it must be a whole number from {least} to {MOST_ROWS}{or_null}"
                raise ValueError(f"{self.path}: {name} is {value!r}; {why}")


OnBadRows = Literal["error", "skip"]


def source_of(settings: Mapping[str, Any], where: str) -> Source:
    """A source from plain settings, as in YAML.

    Args:
        settings: attributes of ``Source`` by name.
        where: name of the settings in errors.

    Raises:
        ValueError: a name is unknown, the path is missing, or a value has the wrong type or range.
    """
    names = [f.name for f in fields(Source)]
    unknown = [str(name) for name in settings if name not in names]
    if unknown:
        raise ValueError(f"{where} has no setting {', '.join(unknown)}; a source takes {', '.join(names)}")
    for name, value in settings.items():
        for key in value if isinstance(value, Mapping) else ():
            if not isinstance(key, str):
                raise ValueError(f"{where}: YAML does not read the key {key!r} of {name} as a string; put it in quotes")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Source, "source")
    try:
        source: Source = parser.instantiate(parser.parse_object({"source": dict(settings)})).source
    except ArgumentError as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    return source
