"""Reads the published files of benchmarks from a local folder, as the splits of the hub's data sets.

The task files in ``halos_pl/tasks/yamls`` name these functions as ``custom_dataset``. lm-eval calls them with the
task's metadata: ``config_source`` is the task file that names the subset, ``eval_data`` the folder with the raw files
(default: the environment variable HALOS_EVAL_DATA).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from halos_pl.data.example import DataError
from halos_pl.tasks.ifeval import fault_of

#: Environment variable with the folder of raw benchmark files.
VARIABLE = "HALOS_EVAL_DATA"
Splits = dict[str, Any]
Row = TypeVar("Row")
#: The answers of MMLU.
LETTERS = ("A", "B", "C", "D")


def folder_of(eval_data: str | None) -> Path | None:
    """The folder of raw benchmark files: ``eval_data`` or that of ``HALOS_EVAL_DATA``; None for the hub's data."""
    folder = eval_data or os.environ.get(VARIABLE)
    return Path(folder) if folder else None


def gsm8k(eval_data: str | None = None, **_: Any) -> Splits:
    """GSM8K: ``gsm8k_test.jsonl``, and ``gsm8k_train*.jsonl`` as the pool of few-shot examples."""
    folder = _local(eval_data)
    train = sorted(folder.glob("gsm8k_train*.jsonl"))
    if not train:
        raise DataError(f"{folder} has no file gsm8k_train*.jsonl")
    return _splits(folder, test=_solved(folder / "gsm8k_test.jsonl"), train=_solved(train[0]))


def _solved(path: Path) -> list[dict[str, Any]]:
    rows = []
    for place, row in _lines(path, "question", "answer"):
        if not row["answer"].rpartition("####")[2].strip() or "####" not in row["answer"]:
            raise DataError(f"{place}: 'answer' has no final answer after ####")
        rows.append(row)
    return rows


def mmlu(config_source: str, eval_data: str | None = None, **_: Any) -> Splits:
    """A subject of MMLU from ``mmlu.zip``, whose CSV files have no header: question, four choices, letter."""
    path, subject = _local(eval_data) / "mmlu.zip", _subset(config_source)
    splits: dict[str, list[dict[str, Any]]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for split, name in (("test", "test"), ("validation", "val"), ("dev", "dev")):
                member = f"data/{name}/{subject}_{name}.csv"
                with archive.open(member) as file:
                    lines = csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
                    places = ((f"{path}: {member}:{lines.line_num}", line) for line in lines if line)
                    splits[split] = _some(path, (_choice(place, line, subject) for place, line in places), member)
    except DataError:
        raise
    except (OSError, zipfile.BadZipFile, csv.Error, KeyError, ValueError) as error:
        raise _unreadable(path, error) from error
    return _splits(path, **splits)


def _choice(place: str, line: list[str], subject: str) -> dict[str, Any]:
    if len(line) != 6:
        raise DataError(f"{place}: {len(line)} columns; it takes 6: the question, four choices and a letter")
    question, *choices, letter = line
    if letter not in LETTERS:
        raise DataError(f"{place}: the last column is {letter!r}; it takes {', '.join(LETTERS)}")
    if not question.strip() or not all(choice.strip() for choice in choices):
        raise DataError(f"{place}: the question or a choice is empty")
    return {"question": question, "subject": subject, "choices": choices, "answer": LETTERS.index(letter)}


def bbh(config_source: str, eval_data: str | None = None, **_: Any) -> Splits:
    """A task of BIG-Bench Hard from ``bbh/TASK.json``."""
    path = _local(eval_data) / "bbh" / f"{_subset(config_source)}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    examples = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(examples, list):
        raise DataError(f"{path}: no list of 'examples'")
    rows = ((f"{path}: example {i}", row) for i, row in enumerate(examples, 1))
    return _splits(path, test=_some(path, (_checked(place, row, "input", "target") for place, row in rows)))


def humaneval(eval_data: str | None = None, **_: Any) -> Splits:
    """HumanEval from ``HumanEval.jsonl.gz``, or from the hub."""
    if folder_of(eval_data) is None:
        return _hub("openai/openai_humaneval")
    path = _local(eval_data) / "HumanEval.jsonl.gz"
    return _splits(path, test=[row for _, row in _lines(path, "prompt", "test", "entry_point")])


def ifeval(eval_data: str | None = None, **_: Any) -> Splits:
    """IFEval from ``ifeval_input_data.jsonl``, or from the hub; its only split is called train."""
    if folder_of(eval_data) is None:
        return _hub("google/IFEval")
    path = _local(eval_data) / "ifeval_input_data.jsonl"
    rows = _lines(path, "prompt")
    for place, row in rows:
        if fault := fault_of(row):
            raise DataError(f"{place}: {fault}")
    return _splits(path, train=[row for _, row in rows])


def _local(eval_data: str | None) -> Path:
    folder = folder_of(eval_data)
    if folder is None:
        raise DataError(f"set --eval_data or {VARIABLE} to the folder with the raw benchmark files")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; set --eval_data or {VARIABLE} to that of the raw benchmark files")
    return folder


def _subset(config_source: str) -> str:
    """The ``dataset_name`` of a task file."""

    class Plain(yaml.SafeLoader):
        """Reads tags of the harness as text."""

    Plain.add_multi_constructor("!", lambda loader, suffix, node: None)
    content = yaml.load(Path(config_source).read_text(encoding="utf-8"), Loader=Plain)
    return str(content["dataset_name"])


def _lines(path: Path, *keys: str) -> list[tuple[str, dict[str, Any]]]:
    """The place and the row of each line, whose keys contain text."""
    rows = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"{path}:{number}"
                    rows.append((place, _checked(place, _parsed(place, line), *keys)))
    except DataError:
        raise
    except (OSError, EOFError, ValueError) as error:
        raise _unreadable(path, error) from error
    return _some(path, rows)


def _parsed(place: str, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}") from error


def _checked(place: str, row: Any, *keys: str) -> dict[str, Any]:
    """The row, if it is an object whose keys contain text."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: {row!r:.60} is not an object with {', '.join(keys)}")
    for key in keys:
        value = row.get(key)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{place}: '{key}' is {'missing' if key not in row else f'{value!r:.60}'}; it takes a text")
    return row


def _some(path: Path, rows: Iterable[Row], member: str = "") -> list[Row]:
    """The rows, of which there must be one."""
    if not (found := list(rows)):
        raise DataError(f"{path}{': ' * bool(member)}{member} has no questions")
    return found


def _unreadable(path: Path, error: Exception) -> DataError:
    why = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
    return DataError(f"{path} cannot be read as a benchmark: {why}")


def _splits(path: Path, **splits: Iterable[dict[str, Any]]) -> Splits:
    from datasets import Dataset

    try:
        return {name: Dataset.from_list(list(rows)) for name, rows in splits.items()}
    except (ValueError, TypeError) as error:  # a column of several types
        raise _unreadable(path, error) from error


def _hub(name: str) -> Splits:
    from datasets import load_dataset

    return dict(load_dataset(name))
