"""Rows of Arrow's formats: Parquet, Arrow files and streams, folders of ``datasets.save_to_disk``.

An Arrow file is mapped into memory, where a wrong offset would read outside of it and crash the process. So every
batch is validated first. Integers of a ``ClassLabel`` become their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from halos_pl.data.broken import CHUNK, Broken, Read, split_of, too_large, twice
from halos_pl.data.example import short

BATCH = 1024  # rows decoded at a time
SHARED = 16  # size limit of values shared by rows, once decoded, in multiples of a row's limit
_VIEWS = {pa.string_view().id, pa.binary_view().id, pa.list_view(pa.null()).id, pa.large_list_view(pa.null()).id}
_VIEWS |= {pa.run_end_encoded(pa.int32(), pa.null()).id}
ROW_FAULTS = (UnicodeDecodeError, ValueError, OverflowError, SystemError)  # that decoding a value may raise
Classes = dict[str, Any]  # by column, as ``_class`` returns them

_YES_NO = {"yes": True, "no": False}


def meanings(names: Sequence[str]) -> list[Any]:
    """The names of a ClassLabel; yes and no become true and false."""
    plain = [str(name).strip().lower() for name in names]
    return [_YES_NO[name] for name in plain] if set(plain) == set(_YES_NO) else list(names)


def _class(feature: Any) -> Any:
    """The ClassLabels in a feature as ``datasets`` writes it: a tuple of names, or a list or dict that holds one."""
    if isinstance(feature, list) and len(feature) == 1:  # as early versions write a list
        return [inner] if (inner := _class(feature[0])) else None
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if kind == "ClassLabel":
        return tuple(meanings(feature["names"]))
    if kind in ("Sequence", "List", "LargeList"):
        inner = _class(feature["feature"])
        if kind == "Sequence" and isinstance(inner, dict):  # of objects: stored as an object of lists
            return {name: [part] for name, part in inner.items()}
        return [inner] if inner else None
    return {name: inner for name, part in feature.items() if (inner := _class(part))} or None


def classes_of(features: Any) -> Classes:
    """The ClassLabels among features as ``datasets`` writes them."""
    return _class(features) or {} if isinstance(features, dict) else {}


def _classes_of(schema: pa.Schema) -> Classes:
    """The ClassLabels of a file written by ``datasets``.

    Raises:
        ValueError: the metadata are damaged, so the meaning of integers is unknown.
    """
    written = (schema.metadata or {}).get(b"huggingface")
    try:
        return classes_of(json.loads(written)["info"]["features"]) if written else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its metadata of datasets are damaged: {type(error).__name__}: {error}") from error


def _named(value: Any, names: Any) -> Any:
    """The value with names in place of integers.

    Raises:
        ValueError: an integer has no name.
    """
    if isinstance(names, tuple):
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if value >= len(names):
            raise ValueError(f"is {value}, but its ClassLabel has {len(names)} names")
        return names[value] if value >= 0 else None  # -1 means no label
    if isinstance(names, list) and isinstance(value, list):
        return [_named(item, names[0]) for item in value]
    if isinstance(names, dict) and isinstance(value, dict):
        return {key: _named(item, names.get(key)) for key, item in value.items()}
    return value


def named(row: Any, classes: Classes) -> Any:
    """The row with the names of its ClassLabels in place of integers; a Broken row is returned as it is."""
    for column, names in classes.items() if isinstance(row, dict) else ():
        try:
            row |= {column: _named(row[column], names)} if column in row else {}
        except ValueError as error:
            return Broken(f"column {short(column)} {error}", column)
    return row


def batches(tables: Iterable[Any], names: Sequence[str], classes: Classes, most: int) -> Read:
    """Rows of record batches or tables, numbered from 1, in bounded memory.

    Args:
        tables: valid except for the text in them.
        names: names of the columns.
        classes: the names of integers, by column.
        most: size limit of a row, in bytes.
    """
    if (double := twice(names)) is not None:
        reason = f"the column {short(double)} appears twice in the file; rename one of the two"
        yield 0, Broken(reason, double, ends=True)
        return
    number = 0
    for large in tables:
        for start in range(0, large.num_rows, BATCH):
            batch = large.slice(start, BATCH)
            rows: Any = None
            if batch.nbytes <= most and _shared(batch) <= SHARED * most:  # no row is larger
                with suppress(*ROW_FAULTS):  # of one row, found below
                    rows = batch.to_pylist()
            for row in rows or (_row(batch.slice(i, 1), most) for i in range(batch.num_rows)):
                number += 1
                yield number, named(row, classes) if classes else row


def _shared(batch: Any) -> int:
    """Decoded size of values that rows share: they are stored once, but decoded for each row."""
    size = 0
    for column in batch.columns:
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
            if pa.types.is_dictionary(chunk.type):
                values = chunk.dictionary
                text = any(is_one(values.type) for is_one in (pa.types.is_string, pa.types.is_large_string))
                largest = (pc.max(pc.binary_length(values)).as_py() or 0) if text else values.nbytes
                size += len(chunk) * largest
            elif chunk.type.id in _VIEWS:
                size += len(chunk) * chunk.get_total_buffer_size()
    return size


def _row(batch: Any, most: int) -> Any:
    """The one row of a batch."""
    try:
        # A slice keeps the whole dictionary.
        columns = [c.combine_chunks() if isinstance(c, pa.ChunkedArray) else c for c in batch.columns]
        columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in columns]
        if (size := sum(column.nbytes for column in columns)) > most:
            return too_large(most, size)
        batch.validate(full=True)
        return batch.to_pylist()[0]
    except (*ROW_FAULTS, pa.ArrowException) as error:
        return Broken(f"the row cannot be decoded ({error}); write the file again, its text as UTF-8")


def _of_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with binary in place of text."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_of_bytes(field.type)) for field in kind])
    for is_one, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_one(kind):
            return make(kind.value_field.with_type(_of_bytes(kind.value_type)))
    return {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(kind, kind)


def validated(tables: Iterable[Any]) -> Iterable[Any]:
    """The batches or tables, after a check that offsets and lengths stay within their memory.

    Raises:
        pa.ArrowException: they do not.
    """
    for batch in tables:
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
            # Validation stops at its first error; the rest may have other errors than wrong text.
            batch.validate()
            fields = [field.with_type(_of_bytes(field.type)) for field in batch.schema]
            batch.cast(pa.schema(fields)).validate(full=True)
            # Only text is wrong; the row is found by decoding rows one by one.
            for i in range(batch.num_rows):
                yield batch.slice(i, 1)
            continue
        yield batch


def _parquet(path: str, most: int) -> Read:
    # Without these two, whole row groups are read, and a file may be a single row group.
    with pq.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        at = BATCH
        for group in groups:
            mean = group.total_byte_size // max(1, group.num_rows)
            if mean > most:  # some row is larger, and reading it would take that much memory
                yield 0, too_large(most, mean, ends=True)
                return
            at = min(at, max(1, 4 * most // max(1, mean)))
        yield from batches(file.iter_batches(at), file.schema_arrow.names, _classes_of(file.schema_arrow), most)


def _arrow(path: str, most: int) -> Read:
    """Arrow's formats: random-access files, and streams, which ``datasets`` writes."""
    yield from _arrow_rows(path, most, None)


def _arrow_rows(path: str, most: int, classes: Classes | None) -> Read:
    with pa.memory_map(path) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            record_batches: Any = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            source.seek(0)
            file = record_batches = pa.ipc.open_stream(source)
        classes = _classes_of(file.schema) | (classes or {})
        yield from batches(validated(iter(record_batches)), file.schema.names, classes, most)


BINARY = {".parquet": _parquet, ".arrow": _arrow}

# Folders of save_to_disk ---------------------------------------------------------------------------------

SAVED = ("dataset_info.json", "dataset_dict.json")


def _regular(path: Path) -> Path:
    """The path, unless it is a pipe or a device, which may never end.

    Raises:
        ValueError: it is.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path.name} is not a file")
    return path


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it contains something else.
    """
    content = json.loads(_regular(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is {short(content)}, not an object")
    return content


def saved(path: str, split: str | None, most: int) -> Read:
    """Rows of a folder of ``datasets.save_to_disk``, of one split if there are several.

    Raises:
        OSError, ValueError, TypeError, KeyError, pa.ArrowException: the folder is damaged.
    """
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        chosen = split_of(list(_object(folder / "dataset_dict.json")["splits"]), split, "folder")
        if isinstance(chosen, Broken):
            yield 0, chosen
            return
        folder /= str(chosen)
    state = _object(folder / "state.json")
    if folder == Path(path) and split and str(state.get("_split")) != split:
        which = f"the split {state['_split']}" if state.get("_split") else "a data set without splits"
        yield 0, Broken(f"the folder contains {which}; remove 'split: {split}', or name another split", ends=True)
        return
    if state.get("_indices_data_files"):
        raise ValueError("it holds a selection of rows, as early versions of datasets wrote it")
    classes = classes_of(_object(folder / "dataset_info.json").get("features"))
    number = 0
    for file in state["_data_files"]:
        # Only the name counts: the files are in the folder.
        for _, row in _arrow_rows(str(_regular(folder / Path(file["filename"]).name)), most, classes):
            number += 1
            yield number, row
