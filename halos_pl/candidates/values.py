"""The numbers of a sweep on disk, from which it resumes and is reported.

``values.csv.gz`` has a line per cell and seed; ``prompts.csv.gz`` a line per cell and round, with the primary metric of
each prompt, averaged over the round's seeds; ``rates.csv.gz`` a line per cell and learning rate; ``record.json`` the
settings, the prompts and the machine. Each piece of work is appended as one gzip member in a single write, so that an
interrupted sweep loses at most one piece. Only what adds to a table cuts off the rest of a lost one.
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
from halos_pl.study.record_shape import ANY, NUMBER, TEXT, fault_in
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
        self.path, self.columns, self._cut = path, list(columns), False

    def _whole(self) -> tuple[str, int]:
        """The text of all whole pieces, and the number of their bytes.

        Raises:
            StudyError: a piece is damaged.
        """
        packed = self.path.read_bytes() if self.path.is_file() else b""
        text, rest = [], packed
        while rest:
            member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            try:
                piece = member.decompress(rest).decode()
            except (zlib.error, UnicodeDecodeError) as error:
                raise StudyError(f"{self.path} is damaged ({error}); restore it, or name another --out") from error
            if not member.eof:
                break
            text.append(piece)
            rest = member.unused_data
        return "".join(text), len(packed) - len(rest)

    def lines(self) -> Iterator[dict[str, str]]:
        """The lines of all whole pieces.

        Raises:
            StudyError: the columns are others, or a piece is damaged.
        """
        reader = csv.DictReader(io.StringIO(self._whole()[0]))
        if reader.fieldnames is not None and list(reader.fieldnames) != self.columns:
            raise StudyError(f"{self.path} has the columns {', '.join(reader.fieldnames)}; name another --out")
        yield from reader

    def numbers(self, line: Mapping[str, str], *columns: str, finite: bool = True) -> list[float]:
        """The numbers in some columns of a line; a cell may have several.

        Raises:
            StudyError: one is no number or, if they must be ``finite``, not finite.
        """
        texts = [text for column in columns for text in str(line[column]).split()]
        try:
            found = [float(text) for text in texts]
        except ValueError:
            found = []
        if len(found) < len(columns) or (finite and not all(map(math.isfinite, found))):
            cells = ", ".join(map(str, line.values()))
            raise StudyError(f"{self.path} is damaged in the line {cells:.90}; restore it, or name another --out")
        return found

    def append(self, lines: Sequence[Sequence[Any]]) -> None:
        """Adds a piece."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self._cut:
            _, whole = self._whole()
            if self.path.is_file():
                os.truncate(self.path, whole)
            self._cut = True
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
        """``METRICS`` by cell and seed."""
        found: dict[Cell, dict[int, dict[str, float]]] = {cell: {} for cell in self.sweep.cells}
        for line in self.values.lines():
            if (cell := self._of(line)) is not None:
                seed, *figures = self.values.numbers(line, "seed", *METRICS)
                found[cell][int(seed)] = dict(zip(METRICS, figures, strict=True))
        return found

    def curves(self) -> dict[Cell, dict[float, float]]:
        """The figure of each learning rate, by cell."""
        found: dict[Cell, dict[float, float]] = {}
        for line in self.rates.lines():
            if (cell := self._of(line)) is not None:
                rate, figure = self.rates.numbers(line, "rate", "figure", finite=False)
                found.setdefault(cell, {})[rate] = figure
        return found

    def of_prompts(self) -> dict[Cell, dict[int, tuple[int, float, list[float]]]]:
        """By cell and first seed of a round: number of seeds, seconds, and the primary metric of each prompt."""
        found: dict[Cell, dict[int, tuple[int, float, list[float]]]] = {cell: {} for cell in self.sweep.cells}
        for line in self.prompts.lines():
            if (cell := self._of(line)) is not None and line["metric"] == self.sweep.primary:
                first, seeds, seconds, *means = self.prompts.numbers(line, "first_seed", "seeds", "seconds", "means")
                found[cell][int(first)] = int(seeds), seconds, means
        return found

    def rounds(self) -> dict[Cell, list[range]]:
        """The rounds of seeds that each cell has in both tables."""
        by_seed, by_prompt = self.seeds(), self.of_prompts()
        return {
            cell: [
                seeds
                for seeds in self.sweep.rounds
                if {*seeds} <= done.keys() and by_prompt[cell].get(seeds[0], (0,))[0] >= len(seeds)
            ]
            for cell, done in by_seed.items()
        }

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


#: What is read of ``record.json``.
_SHAPE: dict[str, Any] = {
    "settings": {"*": ANY},
    "data": TEXT,
    "training": dict.fromkeys(("preferences", "prompts", "completions", "parameters"), NUMBER),
    "tuning_prompts": NUMBER,
    "prompts": [TEXT],
    "tokens": NUMBER,
    "date": TEXT,
    "threads": NUMBER,
    "machine": TEXT,
    "versions": {"torch": TEXT},
    "halos_pl": TEXT,
}


def read_record(folder: Path) -> dict[str, Any]:
    """The content of ``record.json``.

    Raises:
        StudyError: there is none, or it is damaged.
    """
    path = folder / RECORD
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StudyError(f"{folder} has no {RECORD}; it is not the folder of a sweep") from error
    except ValueError as error:
        raise StudyError(f"{path} is damaged ({error}); restore it, or name another --out") from error
    if fault := fault_in(record, _SHAPE, whole=True):
        raise StudyError(f"{path} is damaged: {fault}; restore it, or name another --out")
    return dict(record)


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
        most = max((1 + seed for seeds in Values(sweep, folder).seeds().values() for seed in seeds), default=0)
        if most > sweep.seeds:
            raise StudyError(f"{folder} has values for {most} seeds, not {sweep.seeds}; name another folder with --out")
    elif folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise StudyError(f"{folder} is not empty and is not the folder of a sweep; name another folder with --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / RECORD, json.dumps({"settings": settings, **record}, indent=1) + "\n")
    if source.resolve() != (folder / STUDY).resolve():
        write(folder / STUDY, source.read_text(encoding="utf-8"))
