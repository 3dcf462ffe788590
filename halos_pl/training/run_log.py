"""``metrics.csv`` in a run's folder: one line per logged step, whenever and by whomever its figures are logged."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from halos_pl.common.files import whole

METRICS = "metrics.csv"
#: Columns from left to right, by name or beginning of the name; "" stands for all others.
ORDER = (
    *("step", "epoch", "loss", "grad_norm", "rewards", "kl", "outcome", "logps", "lengths", "", "val"),
    *("rows/s", "tokens/s", "TFLOP/s", "of_matmul", "DeviceStatsMonitor"),
)


def column_order(name: str) -> tuple[int, int, str]:
    """Sort key for the columns of ``metrics.csv``: the most important figures come first."""

    def place(name: str) -> int:
        begins = (i for i, first in enumerate(ORDER) if first and re.match(rf"{re.escape(first)}(?:[/.]|$)", name))
        return next(begins, ORDER.index(""))

    return place(name), place(name.removeprefix("val/")), name


def _text(names: list[str], rows: list[dict[str, Any]], *, header: bool = False) -> bytes:
    with io.StringIO(newline="") as file:
        writer = csv.DictWriter(file, names)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return file.getvalue().encode()


def _parse(path: Path, text: str) -> tuple[list[str], list[dict[str, str]]]:
    """Names and rows of a ``metrics.csv``. Drops rows that a kill or a disk has damaged, with a warning."""
    rows: list[dict[str, str]] = []
    damaged: list[int] = []
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or [])
        for row in reader:
            good = None not in row and None not in row.values() and row.get("step", "").isdigit()
            if good and not any("\0" in value or "\ufffd" in value for value in row.values()):
                rows.append(row)
            else:
                damaged.append(reader.line_num)
    if rows and not damaged and not text.endswith("\n"):  # a truncated number still parses
        damaged.append(reader.line_num)
        rows.pop()
    if "step" not in names:
        names, rows, damaged = [], [], [1] if text.strip() else []
    if damaged:
        lines = ", ".join(map(str, damaged[:3])) + (", ..." if damaged[3:] else "")
        rank_zero_warn(f"halos: {path} is damaged at line {lines}; {len(damaged)} of its lines are dropped")
    return names, rows


class StepWriter(ExperimentWriter):
    """Writes one line per step, and continues an existing ``metrics.csv``.

    The last lines stay open: figures of a step that are logged later, such as those of its validation, are added to
    its line, which is then rewritten in place.
    """

    #: Number of steps whose lines may still grow: two, as some callbacks log under the next step's number.
    OPEN = 2

    def __init__(self, log_dir: str) -> None:
        self._open: dict[int, dict[str, Any]] = {}
        self._end = 0  # size of the final lines, in bytes
        self._changed = False
        self._read = False
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Keeps the file, which Lightning would delete: an earlier run's folder is renamed later."""

    def _resume(self) -> None:
        """Reads the names of the columns, and reopens the last line."""
        self._read = True
        path = Path(self.metrics_file_path)
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        if not lines:
            return
        header, last = (next(csv.reader([line.decode(errors="replace")]), []) for line in (lines[0], lines[-1]))
        self.metrics_keys, self._end = header, sum(map(len, lines))
        row = {name: value for name, value in zip(header, last, strict=False) if value}
        if len(lines) > 1 and row.get("step", "").isdigit():
            self._open[int(row["step"])] = row
            self._end -= len(lines[-1])

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Adds figures to the line of ``step``, by default the newest one."""
        if not self._read:
            self._resume()
        step = max(self._open, default=0) if step is None else step
        row = self._open.setdefault(step, {})
        row |= {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics_dict.items()} | {"step": step}
        self._changed = True

    def save(self) -> None:
        """Writes new figures. A kill at any moment leaves all lines but the open ones unchanged."""
        if not self._changed:
            return
        path, there = Path(self.metrics_file_path), Path(self.metrics_file_path).is_file()
        names = sorted({*self.metrics_keys, *(name for row in self._open.values() for name in row)}, key=column_order)
        steps = sorted(self._open)
        if not there or names != self.metrics_keys:
            closed: list[dict[str, str]] = []
            if there:
                closed = _parse(path, path.read_bytes()[: self._end].decode(errors="replace"))[1]
            before = _text(names, closed, header=True)
            with whole(path) as file:
                file.write((before + _text(names, [self._open[step] for step in steps])).decode())
            self.metrics_keys, self._end = names, len(before)
        else:
            with path.open("r+b") as raw:
                raw.seek(self._end)
                raw.write(_text(names, [self._open[step] for step in steps]))
                raw.truncate()
        for step in steps[: -self.OPEN]:
            self._end += len(_text(names, [self._open.pop(step)]))
        self._changed = False


class RunCSVLogger(CSVLogger):
    """``metrics.csv`` in the run's folder, one line per logged step, continued when the run is resumed.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: str) -> None:
        super().__init__(run_dir, name="", version="")

    @property
    def log_dir(self) -> str:
        return self.save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> StepWriter:
        if self._experiment is None:
            self._experiment = StepWriter(log_dir=self.log_dir)
        return cast(StepWriter, self._experiment)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Collects figures of a step; :meth:`save` writes them when the step is complete."""
        self.experiment.log_metrics(metrics, step)

    def log_hyperparams(self, params: Any = None) -> None:
        """Does nothing: ``config.yaml`` is beside ``metrics.csv``."""

    def drop_from(self, step: int) -> int:
        """Drops the lines of optimizer step ``step`` and later, which a resumed run writes again.

        Returns:
            The step of the last remaining line; -1 if there is none.
        """
        path = Path(self.log_dir) / METRICS
        if not path.is_file():
            return -1
        names, rows = _parse(path, path.read_text(encoding="utf-8", errors="replace"))
        kept = [row for row in rows if int(row["step"]) < step]
        if names:
            with whole(path) as file:
                file.write(_text(sorted(names, key=column_order), _one_a_step(kept), header=True).decode())
        else:
            path.unlink()
        self._experiment = None  # it has the old columns
        return max((int(row["step"]) for row in kept), default=-1)


def _one_a_step(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Joins the lines of each step, which earlier versions wrote separately."""
    joined: dict[str, dict[str, str]] = {}
    for row in rows:
        joined.setdefault(row["step"], {}).update({name: value for name, value in row.items() if value})
    return list(joined.values())
