"""The numbers of a sweep on disk, from which it resumes and is reported.

``values.csv.gz`` has a line per cell and seed; ``prompts.csv.gz`` a line per cell and round, with the primary metric of
each prompt, averaged over the round's seeds; ``rates.csv.gz`` a line per cell and learning rate; ``record.json`` the
settings, the prompts and the machine. Each piece of work is appended as one gzip member in a single write, so that an
interrupted sweep loses at most one piece.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos_pl.candidates.measure import METRICS
from halos_pl.candidates.read import Preferences
from halos_pl.candidates.spec import Cell, Sweep, settings_of
from halos_pl.common.files import write
from halos_pl.objective.halo import Objective
from halos_pl.study.spec import StudyError

VALUES, PROMPTS, RATES, RECORD, STUDY = (
    *("values.csv.gz", "prompts.csv.gz", "rates.csv.gz", "record.json", "study.yaml"),
)


class Table:
    """A gzipped CSV file that grows by whole pieces of lines.

    Args:
        path: the file; it need not exist.
        columns: names of its columns.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)

    def lines(self) -> Iterator[dict[str, str]]:
        """The lines of all whole pieces; cuts off a piece that is not whole.

        Raises:
            StudyError: the columns are others.
        """
        if not self.path.is_file():
            return
        packed = self.path.read_bytes()
        text, rest = io.StringIO(), packed
        while rest:
            member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            try:
                piece = member.decompress(rest)
            except zlib.error as error:
                raise StudyError(f"{self.path} is damaged ({error}); restore it, or name another --out") from error
            if not member.eof:
                os.truncate(self.path, len(packed) - len(rest))
                break
            text.write(piece.decode())
            rest = member.unused_data
        reader = csv.DictReader(io.StringIO(text.getvalue()))
        if reader.fieldnames is not None and list(reader.fieldnames) != self.columns:
            raise StudyError(f"{self.path} has the columns {', '.join(reader.fieldnames)}; name another --out")
        yield from reader

    def append(self, lines: Sequence[Sequence[Any]]) -> None:
        """Adds a piece."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self.path.is_file() or not self.path.stat().st_size:
            writer.writerow(self.columns)
        writer.writerows([f"{value:.5g}" if isinstance(value, float) else value for value in line] for line in lines)
        with self.path.open("ab", buffering=0) as file:
            file.write(gzip.compress(text.getvalue().encode(), mtime=0))
            os.fsync(file.fileno())


@dataclass
class Values:
    """The tables of a sweep in a folder."""

    sweep: Sweep
    folder: Path

    def __post_init__(self) -> None:
        point = ["arm", *self.sweep.axes, "noise", "desirable"]
        self._cells = {tuple(map(str, _flat(cell))): cell for cell in self.sweep.cells}
        self.values = Table(self.folder / VALUES, [*point, "seed", *METRICS, "loss"])
        self.rates = Table(self.folder / RATES, [*point, "rate", "figure"])
        self.prompts = Table(self.folder / PROMPTS, [*point, "first_seed", "seeds", "seconds", "metric", "means"])
        self._width = len(point)

    def _of(self, line: Mapping[str, str]) -> Cell | None:
        """The cell of a line; None for one that the study no longer has."""
        return self._cells.get(tuple(line.values())[: self._width])

    def seeds(self) -> dict[Cell, dict[int, dict[str, float]]]:
        """Metrics and the training loss by cell and seed."""
        found: dict[Cell, dict[int, dict[str, float]]] = {cell: {} for cell in self.sweep.cells}
        for line in self.values.lines():
            if (cell := self._of(line)) is not None:
                found[cell][int(line["seed"])] = {name: float(line[name]) for name in (*METRICS, "loss")}
        return found

    def curves(self) -> dict[Cell, dict[float, float]]:
        """The figure of each learning rate, by cell."""
        found: dict[Cell, dict[float, float]] = {}
        for line in self.rates.lines():
            if (cell := self._of(line)) is not None:
                found.setdefault(cell, {})[float(line["rate"])] = float(line["figure"])
        return found

    def of_prompts(self) -> dict[Cell, dict[int, tuple[int, float, list[float]]]]:
        """By cell and first seed of a round: number of seeds, seconds, and the primary metric of each prompt."""
        found: dict[Cell, dict[int, tuple[int, float, list[float]]]] = {cell: {} for cell in self.sweep.cells}
        for line in self.prompts.lines():
            if (cell := self._of(line)) is not None and line["metric"] == self.sweep.primary:
                means = [float(mean) for mean in line["means"].split()]
                found[cell][int(line["first_seed"])] = int(line["seeds"]), float(line["seconds"]), means
        return found

    def add_rates(self, cell: Cell, figures: Sequence[float]) -> None:
        """Adds what chose a cell's learning rate."""
        rates = zip(self.sweep.rates, figures, strict=True)
        self.rates.append([[*_flat(cell), f"{rate:g}", figure] for rate, figure in rates])

    def add_seeds(
        self, cell: Cell, seeds: range, lines: Sequence[Sequence[float]], means: Sequence[float], seconds: float
    ) -> None:
        """Adds a cell's round: ``METRICS`` and the loss of each seed, and the primary metric of each prompt."""
        packed = " ".join(f"{mean:.4g}" for mean in means)
        self.prompts.append([[*_flat(cell), seeds[0], len(seeds), seconds, self.sweep.primary, packed]])
        self.values.append([[*_flat(cell), seed, *line] for seed, line in zip(seeds, lines, strict=True)])


def _flat(cell: Cell) -> list[Any]:
    """The first columns of a line; numbers as the file of the study has them."""
    return [cell.arm, *map(str, cell.axes), str(cell.noise), str(cell.desirable)]


def best_rate(curve: Mapping[float, float]) -> float:
    """The rate with the highest figure; the lowest of equal ones, and none whose figure is not finite."""
    return max(sorted(curve), key=lambda rate: curve[rate] if math.isfinite(curve[rate]) else -math.inf)


def digest(read: Preferences) -> str:
    """A hash of the preferences and of the texts that they are about."""
    content = [read.texts, read.prompt, read.pairs, [Path(name).name for name in read.names]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """The content of ``record.json``.

    Raises:
        StudyError: there is none.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StudyError(f"{folder} has no {RECORD}; it is not the folder of a sweep") from error
    return record


def _refuse_others(folder: Path, before: Mapping[str, Any], settings: Mapping[str, Any], data: str) -> None:
    """Refuses to add to values that were computed with other settings or data."""
    for key, value in settings.items():
        if (old := before["settings"].get(key)) == value:
            continue
        if key == "objectives":
            changed = [arm for arm, content in value.items() if (old or {}).get(arm) != content]
            raise StudyError(
                f"{folder} has values for another content of the objectives of {', '.join(changed)} (their YAML or"
                " Python files have changed); name another folder with --out, or restore the files"
            )
        raise StudyError(
            f"{folder} has values for {key} {old!r}, not {value!r}; name another folder with --out, or restore the"
            " setting"
        )
    if before["data"] != data:
        raise StudyError(f"{folder} has values for other data; name another folder with --out")


def claim(sweep: Sweep, built: Mapping[Cell, Objective], source: Path, folder: Path, record: Mapping[str, Any]) -> None:
    """Makes a folder that of a sweep, before anything is fitted.

    Args:
        sweep, built: the sweep and its objectives.
        source: the sweep's file, which is copied.
        folder: the folder.
        record: what to write beside the settings, once; its ``data`` is compared too.

    Raises:
        StudyError: the folder has values that were computed with other settings or data, or other files.
    """
    settings = json.loads(json.dumps(settings_of(sweep, built)))
    has_values = any((folder / name).is_file() for name in (VALUES, PROMPTS, RATES))
    if (folder / RECORD).is_file() and has_values:
        _refuse_others(folder, read_record(folder), settings, record["data"])
    elif folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise StudyError(f"{folder} is not empty and is not the folder of a sweep; name another folder with --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / RECORD, json.dumps({"settings": settings, **record}, indent=1) + "\n")
    if source.resolve() != (folder / STUDY).resolve():
        write(folder / STUDY, source.read_text(encoding="utf-8"))
