"""Where feedback comes from: a file, a folder, or a data set of the hub, and how it is to be read."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from jsonargparse import ArgumentError, ArgumentParser


@dataclass(frozen=True)
class Source:
    """One source of feedback. In YAML a bare string stands for a source with this path.

    Attributes:
        path: a file (``.jsonl``, ``.json``, ``.csv``, ``.parquet``, ``.arrow``; the text ones also with ``.gz`` or
            ``.zst``), a folder written by ``datasets.save_to_disk``, or the name of a data set of the hub
            (``owner/name``). A path that exists is never taken for a name of the hub. ``~`` and ``$VARIABLE`` of the
            environment are replaced by what they stand for.
        split: of a hub data set or a saved ``DatasetDict``; needed where there are several.
        name: configuration of a hub data set.
        data_dir: sub-folder of a hub data set, such as ``harmless-base`` of ``Anthropic/hh-rlhf``.
        revision: of a hub data set.
        schema: name of the row schema; null finds it by the columns of the first row.
        columns: other names of columns: ``{prompt: question}`` reads the column ``question`` as ``prompt``.
        ignore: what may be dropped though it carries meaning: names of columns, of keys of messages, and placeholders
            such as ``<image>`` that are text here.
        max_row_mb: megabytes that a row may take; a larger one is a fault, found before it is tokenised.
        rows: read only so many rows from the start; null for all. With ``streaming`` no more is downloaded.
        streaming: read a hub data set row by row, without downloading all of it first.
        weight: how many times an epoch of training sees each row of the source: 0.5 for a half drawn anew each epoch,
            2.0 for each row twice.

    Raises:
        ValueError: for an empty path or one that cannot be looked up, a ``weight`` or ``max_row_mb``
            that is not a number above 0, or ``rows`` below 1.
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
    rows: int | None = None
    streaming: bool = False
    weight: float = 1.0

    @property
    def label(self) -> str:
        """Its name in messages, counts and row names: the path, and what tells it from others with the same path."""
        return "/".join(filter(None, (self.path, self.name, self.data_dir))) + (f"[{self.split}]" if self.split else "")

    @property
    def key(self) -> str:
        """The same for sources that are read the same way, however often their rows are seen."""
        return repr(replace(self, weight=1.0))

    before_line: ClassVar[str] = ":"

    def place(self, line: int | str) -> str:
        """The name of a line (a row, in formats without lines), in messages and row names."""
        return f"{self.path}{self.before_line}{line}"

    @property
    def fills_columns(self) -> bool:
        """Whether every row has every column, so that an empty value may mean that it has none; text formats aside."""
        return True

    @property
    def max_row(self) -> int:
        """``max_row_mb`` in bytes."""
        return int(self.max_row_mb * 1e6)

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a source has an empty path; name a file, a folder, or a data set of the hub")
        object.__setattr__(self, "path", os.path.expanduser(os.path.expandvars(self.path)))
        try:
            os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            pass  # it may be a name of the hub, or a pattern
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.EACCES):
                raise ValueError(f"{self.path}: cannot be looked up ({error.strerror}); check the path") from error
        for name in ("weight", "max_row_mb"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{self.path}: {name} is {getattr(self, name)}; it must be a number above 0")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"{self.path}: rows is {self.rows}; it must be at least 1, or null for all")


OnBadRows = Literal["error", "skip"]


def source_of(settings: Mapping[str, Any], where: str) -> Source:
    """A source from plain settings, as they stand in YAML.

    Args:
        settings: by the names of ``Source``'s attributes.
        where: what to call them in an error.

    Raises:
        ValueError: for an unknown name, a missing path, or a value of another type or out of its range.
    """
    known = [f.name for f in fields(Source)]
    unknown = [str(name) for name in settings if name not in known]
    if unknown:
        raise ValueError(f"{where} has no setting {', '.join(unknown)}; a source takes {', '.join(known)}")
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
