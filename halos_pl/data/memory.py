"""Feedback in memory as a source: a ``datasets.Dataset``, a pandas DataFrame, an Arrow table, or a list of rows."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from halos_pl.data.arrow import BATCH, batches, classes_of, named, validated
from halos_pl.data.broken import Broken, Read, split_of, twice
from halos_pl.data.example import short
from halos_pl.data.source import Source


@dataclass(frozen=True)
class MemorySource(Source):
    """Rows in memory. ``path`` is only a name for messages; rows count from 1, as they do in files.

    Attributes:
        data: a ``datasets.Dataset``, an Arrow table, or a list of rows.
    """

    data: Any = field(default=None, repr=False, compare=False)

    before_line = ": row "

    @property
    def fills_columns(self) -> bool:
        return not isinstance(self.data, list)

    def read(self) -> Read:
        """The rows, numbered from 1."""
        if isinstance(self.data, list):
            for number, row in enumerate(self.data, start=1):
                yield number, _plain_row(row)
        elif isinstance(self.data, pa.Table):
            yield from batches(validated(self.data.to_batches(BATCH)), self.data.column_names, {}, self.max_row)
        else:
            yield from dataset_rows(self.data, self)

    def digest(self) -> str:
        """A hash of the rows: equal rows in an equal container have an equal one."""
        sha = hashlib.sha256(type(self.data).__name__.encode())
        if isinstance(self.data, list):
            for row in self.data:
                plain = _plain_row(row)
                sha.update((json.dumps(plain) if isinstance(plain, dict) else repr(plain)).encode() + b"\n")
        else:
            sha.update(repr(getattr(self.data, "features", None)).encode())
            for table in _tables(self.data):
                with pa.ipc.new_stream(_Sink(sha), table.schema) as stream:
                    stream.write_table(table)
        return sha.hexdigest()


class _Sink(io.RawIOBase):
    """A file that only hashes what is written to it."""

    def __init__(self, sha: Any) -> None:
        self.sha = sha

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha.update(data)
        return len(data)


def _tables(data: Any) -> Iterator[pa.Table]:
    """The rows in tables of ``BATCH``, however the data are cut into chunks."""
    if isinstance(data, pa.Table):
        tables: Any = (data.slice(start, BATCH) for start in range(0, data.num_rows, BATCH))
    else:
        tables = data.with_format("arrow").iter(BATCH)
    for table in tables:
        yield table.combine_chunks().replace_schema_metadata(None)


def _plain_row(row: Any) -> Any:
    """The row as plain JSON values, or a Broken; anything but a mapping is returned unchanged."""
    if not isinstance(row, Mapping):
        return row
    columns = {}
    for name, value in row.items():
        try:
            columns[name] = _plain(value)
        except (TypeError, RecursionError) as error:
            reason = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
            return Broken(f"column {short(name)} {reason}; give text, numbers, lists and dicts", str(name))
        if not isinstance(name, str):
            return Broken(f"the column name {short(name)} is not text; rename the column")
    return columns


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        if wrong := next((key for key in value if not isinstance(key, str)), None):
            raise TypeError(f"has the key {short(wrong)}, which is not text")
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist"):  # an array, or a number of NumPy's
        return _plain(value.tolist())
    raise TypeError(f"contains a {type(value).__name__}")


def dataset_rows(dataset: Any, source: Source) -> Read:
    """Rows of a ``datasets`` object, numbered from 1; of one split if there are several."""
    import datasets  # takes a second, which files do not need

    if isinstance(dataset, dict):
        split = split_of(list(dataset), source.split, "data set")
        if isinstance(split, Broken):
            yield 0, split
            return
        dataset = dataset[split]
    features = getattr(dataset, "features", None)
    classes = classes_of(features.to_dict()) if isinstance(features, datasets.Features) else {}
    if isinstance(dataset, datasets.Dataset):
        # As stored: a column of images, say, is not decoded.
        tables = validated(dataset.with_format("arrow").iter(BATCH))
        yield from batches(tables, dataset.column_names, classes, source.max_row)
    else:
        for number, row in enumerate(dataset, start=1):
            yield number, named(dict(row), classes)


def in_memory(data: Any) -> Any:
    """The rows of an object, as ``MemorySource`` takes them; None for an object of another type.

    Raises:
        ValueError: the rows have a form that cannot be read; the message names an alternative.
    """
    datasets, pandas = (sys.modules.get(name) for name in ("datasets", "pandas"))  # the caller has imported it
    if isinstance(data, pa.Table):
        return data
    if pandas is not None and isinstance(data, pandas.DataFrame):
        return _of_frame(data)
    if datasets is None:
        return None
    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(f"is a {type(data).__name__}; pass one of its splits, such as data[{short(next(iter(data)))}]")
    if isinstance(data, datasets.IterableDataset):
        raise ValueError("is an IterableDataset; pass a Dataset, or name the data set with streaming: true")
    return _as_shown(data) if isinstance(data, datasets.Dataset) else None


def _as_shown(dataset: Any) -> Any:
    """The data set without the columns that its format hides."""
    if dataset.format["type"] == "custom":
        raise ValueError(
            "has a transform that changes rows when they are read (set_transform or with_transform); apply it first,"
            " with map"
        )
    shown = dataset.format["columns"]
    return dataset if shown == dataset.column_names else dataset.select_columns(shown)


def _of_frame(frame: Any) -> pa.Table:
    """A DataFrame as an Arrow table, without its index; NaN becomes null, as in ``to_parquet``."""
    if (double := twice([str(name) for name in frame.columns])) is not None:
        raise ValueError(f"has the column {short(double)} twice; rename one of the two")
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:
        reason = "; ".join(map(str, error.args))
        raise ValueError(f"has a column that cannot be converted ({reason}); give each column one type") from error
