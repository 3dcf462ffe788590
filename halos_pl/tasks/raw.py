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
from typing import Any

import yaml

from halos_pl.data.example import DataError

#: Environment variable with the folder of raw benchmark files.
VARIABLE = "HALOS_EVAL_DATA"
Splits = dict[str, Any]


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
    return _splits(test=_lines(folder / "gsm8k_test.jsonl"), train=_lines(train[0]))


def mmlu(config_source: str, eval_data: str | None = None, **_: Any) -> Splits:
    """A subject of MMLU from ``mmlu.zip``, whose CSV files have no header: question, four choices, letter."""
    path, subject = _local(eval_data) / "mmlu.zip", _subset(config_source)
    splits = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for split, name in (("test", "test"), ("validation", "val"), ("dev", "dev")):
                with archive.open(f"data/{name}/{subject}_{name}.csv") as file:
                    lines = csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
                    splits[split] = [_choice(line, subject) for line in lines]
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise _unreadable(path, error) from error
    return _splits(**splits)


def _choice(line: list[str], subject: str) -> dict[str, Any]:
    question, *choices, letter = line
    if len(choices) != 4:
        raise ValueError(f"a line of {subject} has {len(line)} columns, not 6")
    return {"question": question, "subject": subject, "choices": choices, "answer": "ABCD".index(letter)}


def bbh(config_source: str, eval_data: str | None = None, **_: Any) -> Splits:
    """A task of BIG-Bench Hard from ``bbh/TASK.json``."""
    path = _local(eval_data) / "bbh" / f"{_subset(config_source)}.json"
    try:
        return _splits(test=json.loads(path.read_text(encoding="utf-8"))["examples"])
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error


def humaneval(eval_data: str | None = None, **_: Any) -> Splits:
    """HumanEval from ``HumanEval.jsonl.gz``, or from the hub."""
    if folder_of(eval_data) is None:
        return _hub("openai/openai_humaneval")
    return _splits(test=_lines(_local(eval_data) / "HumanEval.jsonl.gz"))


def ifeval(eval_data: str | None = None, **_: Any) -> Splits:
    """IFEval from ``ifeval_input_data.jsonl``, or from the hub; its only split is called train."""
    if folder_of(eval_data) is None:
        return _hub("google/IFEval")
    return _splits(train=_lines(_local(eval_data) / "ifeval_input_data.jsonl"))


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


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    why = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
    return DataError(f"{path} cannot be read as a benchmark: {why}")


def _splits(**splits: Iterable[dict[str, Any]]) -> Splits:
    from datasets import Dataset

    return {name: Dataset.from_list(list(rows)) for name, rows in splits.items()}


def _hub(name: str) -> Splits:
    from datasets import load_dataset

    return dict(load_dataset(name))
