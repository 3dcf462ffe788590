"""The table: which losses of which libraries are compared with which objectives of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from halos_pl.common.yaml_files import read_yaml
from halos_pl.objective.build import load_objective
from parity.batch import Batch
from parity.library import Library

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Ours:
    """An objective of ours.

    Attributes:
        objective: name of the file in ``experiments/objectives``.
        changes: settings that replace those of the file, by dotted key.
    """

    objective: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def loss(self, after: Batch | None) -> Callable[[Batch], Tensor]:
        """The objective on a batch, in training, after the step ``after``."""

        def of(batch: Batch) -> Tensor:
            objective = load_objective(self.objective, deepcopy(self.changes)).train()  # the parser changes them
            if after is not None:
                objective(after.rows(objective.needs))
            loss: Tensor = objective(batch.rows(objective.needs)).loss
            return loss

        return of


@dataclass(frozen=True)
class Row:
    """One loss of one library.

    Attributes:
        loss: the heading that it belongs to.
        library: name of the library's file.
        name: what its users write.
        function, arguments: what computes it.
        formula: what it computes.
        mean: what the loss is a mean over.
        lengths: whether log-probs are divided by a completion's length.
        ours: objectives of ours that it is compared with; the first is the one that has its name.
        place: file and lines in the repository; of a row without one, the paper and the equation.
        repository: ``OWNER/NAME@REVISION`` of the code, if it is not the library's.
        note: what the numbers do not say; empty for nothing.
        later: whether an earlier step has been taken, on half of the rows.
    """

    loss: str
    library: str
    name: str
    function: str
    formula: str
    mean: str
    lengths: bool | str
    ours: tuple[Ours, ...]
    place: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    repository: str = ""
    note: str = ""
    later: bool = False

    @property
    def key(self) -> str:
        """Name of the row, which no other has."""
        return f"{self.loss} | {self.library} | {self.name}"

    @property
    def code(self) -> str:
        """``OWNER/NAME@REVISION`` that ``place`` is in; empty if the code was not read."""
        library = libraries()[self.library]
        return self.repository or (f"{library.repository}@{library.revision}" if library.repository else "")

    def theirs(self, after: Batch | None) -> Callable[[Batch], Tensor]:
        """The library's loss on a batch."""
        function = getattr(import_module(f"parity.libraries.{self.library}"), self.function)
        given = dict(self.arguments) | ({} if after is None else {"after": after})
        return lambda batch: function(batch, **given)


@cache
def libraries() -> dict[str, Library]:
    """Every library, by the name of its file."""
    names = sorted(path.stem for path in (FOLDER / "libraries").glob("*.py") if path.stem != "__init__")
    return {name: import_module(f"parity.libraries.{name}").LIBRARY for name in names}


def headings() -> dict[str, str]:
    """The text under each loss's heading, in the order of the table."""
    return {loss: content["text"] for loss, content in _read().items()}


def table() -> list[Row]:
    """Every row of ``table.yaml``.

    Raises:
        ValueError: a row is unlike the others; names it.
    """
    rows = []
    for loss, content in _read().items():
        for entry in content["rows"]:
            name = f"table.yaml: {loss}: {entry.get('name')}"
            given = {"ours": [], **entry}
            given["ours"] = tuple(
                Ours(o) if isinstance(o, str) else Ours(*next(iter(o.items()))) for o in given["ours"]
            )
            try:
                row = Row(loss=loss, **given)
            except TypeError as error:
                raise ValueError(f"{name}: {error}") from error
            if row.library not in libraries():
                raise ValueError(f"{name}: there is no file libraries/{row.library}.py")
            if not row.ours:
                raise ValueError(f"{name}: ours names no objective; a loss that is compared with none is no row")
            rows.append(row)
    keys = [row.key for row in rows]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"table.yaml has two rows of the same name: {', '.join(sorted(twice))}")
    return rows


def _read() -> dict[str, Any]:
    content: dict[str, Any] = read_yaml(FOLDER / "table.yaml")[0]
    return content
