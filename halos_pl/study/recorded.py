"""The data of a report: the numbers in ``values.csv.gz``, and a record of the runs in ``record.json``.

``values.csv.gz`` has one line per number: ``run, arm, seed, metric, example, value``. Values are read back exactly, and
equal values give equal bytes. Besides the metrics of ``halos evaluate``, it contains, for the figures,

- ``trained``: the ``rows``, ``tokens`` and optimizer ``steps`` that a run was trained on, and the share of its steps
  whose gradient was ``clipped``;
- ``training/...``: a training figure, whose example is the optimizer step;
- ``outcome/desirable`` and ``outcome/undesirable``: outcomes u = r - z0 of the last rows, in nats;
- ``value_function``: v at u, whose example is u in nats.

Tuning runs have lines of their own, ``tune/METRIC``: the mean on the validation split, whose example is the value of
the tuned option; NaN if the run diverged. Lines without a seed belong to baselines that are not arms, such as the model
before training.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from halos_pl.common.files import write
from halos_pl.common.messages import counted
from halos_pl.study.choice import Trials
from halos_pl.study.record_shape import misshapen
from halos_pl.study.spec import Study, StudyError
from halos_pl.study.tune import text_of

VALUES = "values.csv.gz"
RECORD = "record.json"
DIGEST = "values_sha256"  #: key of the record: the digest of the text in ``values.csv.gz``
COLUMNS = ("run", "arm", "seed", "metric", "example", "value")

#: What a run was trained on, by example of ``trained``.
AMOUNTS = {"rows": "rows", "tokens": "tokens", "steps": "optimizer steps"}
#: Example of ``trained``: the share of the logged steps whose gradient was clipped by its norm.
CLIPPED = "clipped"

#: Values by metric and example.
Figures = Mapping[str, Mapping[str, float]]
#: An arm's name and a seed; no seed for a baseline that is not an arm.
Key = tuple[str, int | None]


@dataclass(frozen=True)
class Recorded:
    """The numbers of a study's runs, and how they were made.

    Attributes:
        values: numbers by run, metric and example, of runs that can be compared.
        record: the study's file, verdicts of ``halos check``, revisions, digests and missing runs; empty without
            ``record.json``.
        trials: what the tuning runs have shown, apart from ``values``.
    """

    values: Mapping[Key, Figures]
    record: Mapping[str, Any] = field(default_factory=dict)
    trials: Trials = field(default_factory=dict)


def write_recorded(recorded: Recorded, study: Study, out: Path) -> None:
    """Writes both files into the study's folder; equal numbers give equal bytes.

    Earlier files with runs that are missing now are kept under another name.
    """
    folders = {(run.arm.name, run.seed): run.folder.as_posix() for run in study.runs(Path())}
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for (name, seed), figures in recorded.values.items():
        if seed is None:
            run, shown = re.sub(r"\W+", "_", name), ""
        else:
            run, shown = folders[name, seed], str(seed)
        for metric, values in figures.items():
            lines.writerows((run, name, shown, metric, example, repr(value)) for example, value in values.items())
    for trial in study.trials(Path()):
        value = text_of(trial.arm.options[study.tune.option]) if study.tune else ""
        mean = recorded.trials.get((trial.arm.name, trial.seed), {}).get(value)
        if study.tune and mean is not None:
            of = (trial.folder.as_posix(), trial.arm.name, str(trial.seed))
            lines.writerow((*of, study.tune.column, value, repr(mean)))
    content = text.getvalue().encode()
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0, compresslevel=9) as file:
        file.write(content)
    _keep_lost(content, out)
    beside = out / f"{VALUES}.part"
    beside.write_bytes(packed.getvalue())
    os.replace(beside, out / VALUES)
    record = {**recorded.record, DIGEST: hashlib.sha256(content).hexdigest()}
    write(out / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _runs_in(file: IO[str]) -> set[tuple[str, str]]:
    """The runs that have values, by folder and seed."""
    return {(line["run"], line["seed"]) for line in csv.DictReader(file) if line["seed"]}


def _keep_lost(content: bytes, out: Path) -> None:
    """Renames both files if they contain runs that ``content`` lacks, as after a folder or a value was removed."""
    path = out / VALUES
    new = _runs_in(io.StringIO(content.decode(), newline=""))
    try:
        with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
            old = _runs_in(file)
    except (OSError, EOFError, KeyError, ValueError, csv.Error):  # absent or unreadable
        return
    if lost := old - new:
        number = next(i for i in itertools.count(1) if not (out / _aside(VALUES, i)).exists())
        for name in (VALUES, RECORD):
            if (out / name).is_file():
                os.replace(out / name, out / _aside(name, number))
        print(
            f"halos: {path} contains {counted(len(lost), 'run')} no longer in the study's folder; it is kept as"
            f" {_aside(VALUES, number)}"
        )


def _aside(name: str, number: int) -> str:
    """``values.1.csv.gz``."""
    stem, _, ends = name.partition(".")
    return f"{stem}.{number}.{ends}"


def read_recorded(study: Study, out: Path) -> Recorded:
    """The data that :func:`write_recorded` wrote; empty without ``values.csv.gz``.

    Raises:
        StudyError: for a file that cannot be read, or with lines that do not belong to the study.
    """
    path = out / VALUES
    if not path.is_file():
        return Recorded({})
    runs: dict[Key, dict[str, dict[str, float]]] = {}
    planned = {(arm.name, seed) for arm in study.arms for seed in study.seeds}
    tried: dict[tuple[str, int], list[str]] = {}
    column = None
    if study.tune is not None:
        column = study.tune.column
        texts = {name: [*map(text_of, values)] for name, values in study.tune.values.items()}
        tried = {(arm.name, seed): texts[arm.name] for arm in study.arms for seed in study.tune.seeds}
    with readable(path):
        content = unpacked(path)
        for place, line in lines_of(path, content):
            key = (line["arm"], int(line["seed"]) if line["seed"] else None)
            if key in tried and (line["metric"] != column or line["example"] not in tried[key]):
                what = f"{line['metric']} at {line['example']!r}"
                raise StudyError(f"{place}: the study does not tune arm {key[0]!r} by {what}")
            if key[1] is not None and key not in planned | tried.keys():
                raise StudyError(f"{place}: the study has no arm {key[0]!r} with seed {key[1]}")
            add_value(runs.setdefault(key, {}), line, study, place)
    trials = {key: means for key in tried for means in runs.pop(key, {}).values()}
    check_examples(runs, study, path)
    ordered: dict[Key, Figures] = {}
    for arm in study.arms:
        ordered |= {(arm.name, seed): runs[arm.name, seed] for seed in study.seeds if (arm.name, seed) in runs}
    ordered |= {key: figures for key, figures in runs.items() if key[1] is None}
    return Recorded(ordered, read_record(out, content), trials)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """In this context, whatever is wrong with ``path`` is a StudyError that names it."""
    try:
        yield
    except (OSError, EOFError, ValueError, TypeError, csv.Error) as error:
        if isinstance(error, StudyError):
            raise
        raise StudyError(f"{path} cannot be read: {error}") from error


def unpacked(path: Path) -> bytes:
    """The text in ``values.csv.gz``."""
    with gzip.open(path, "rb") as packed:
        return packed.read()


def lines_of(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of ``values.csv.gz`` by column, each with its place for errors."""
    with io.StringIO(content.decode(), newline="") as file:
        lines = csv.DictReader(file)
        if lines.fieldnames is None or set(COLUMNS) - set(lines.fieldnames):
            raise StudyError(f"{path}: the columns are {lines.fieldnames}; expected {', '.join(COLUMNS)}")
        for line in lines:
            yield f"{path}:{lines.line_num}", line


def add_value(figures: dict[str, dict[str, float]], line: Mapping[str, str], study: Study, place: str) -> None:
    """Adds the value in a line to those of its run."""
    values = figures.setdefault(line["metric"], {})
    value = float(line["value"])
    if line["metric"] in study.metrics and not math.isfinite(value):
        raise StudyError(f"{place}: value {line['value']!r} is not finite")
    if line["example"] in values:
        raise StudyError(f"{place}: a second value of {line['metric']} for {line['example']!r}")
    values[line["example"]] = value


def read_record(folder: Path, content: bytes) -> dict[str, Any]:
    """The record beside ``values.csv.gz``, whose text is ``content``; empty if there is none.

    Raises:
        StudyError: if it cannot be read, or was written with other values.
    """
    note = folder / RECORD
    try:
        record = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    except ValueError as error:
        raise StudyError(f"{note} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise StudyError(f"{note} is not the record of a study: it is not a JSON object")
    if fault := misshapen(record):
        raise StudyError(f"{note} is damaged: {fault}; restore it, or train the runs again")
    if record.get(DIGEST, digest := hashlib.sha256(content).hexdigest()) != digest:
        raise StudyError(
            f"{folder / VALUES} is not the file that {note} was written with: its SHA-256 differs. Restore both; or, if"
            f" the values were changed on purpose, remove {note}, and the report states that their origin is not"
            " recorded"
        )
    return record


def check_examples(runs: Mapping[Key, Figures], study: Study, path: Path) -> None:
    """Refuses runs with different examples, which cannot be paired."""
    for metric in study.metrics:
        first: tuple[Key, frozenset[str]] | None = None
        for key, figures in runs.items():
            examples = frozenset(figures.get(metric, {}))
            if key[1] is None:
                continue
            first = first or (key, examples)
            if lost := sorted(examples ^ first[1]):
                both = " and ".join(f"{arm!r} with seed {seed}" for arm, seed in (first[0], key))
                raise StudyError(f"{path}: {metric} of {both} has different examples, such as {lost[0]!r}")
