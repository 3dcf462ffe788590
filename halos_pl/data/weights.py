"""The weights of rows, from a column ``weight`` or ``confidence``, and the votes on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halos_pl.data.example import short
from halos_pl.data.source import Source
from halos_pl.data.values import BadRow, label_of

#: The columns with a weight, and the largest value that each takes.
WEIGHTS = {"weight": math.inf, "confidence": 1.0}
_RANGES = {"weight": "a finite number of at least 0", "confidence": "a number from 0 to 1"}
_EVERY = "give every row one (1 for a row that counts as usual)"
#: The columns with votes, as a regular expression.
VOTES = "votes(_for|_against)?"
_COUNTS = ("votes_for", "votes_against")
#: The columns about a judgement, which do not go with another judgement of the same prompt.
OF_JUDGEMENTS = ("confidence", "votes", *_COUNTS)


class Weights:
    """The weights of one source's rows. Either all of its rows have one, in the same column, or none has.

    Args:
        source: source of the rows.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._column: str | None = None
        self._first: str | None = None  # the first row that was read
        self._cells_are_text = ".csv" in Path(source.path).suffixes

    @property
    def column(self) -> str | None:
        """The source's name of the column; None if no row has a weight."""
        return self._column and self._name(self._column)

    def _name(self, column: str) -> str:
        return self._source.columns.get(column, column)

    def of(self, row: dict[str, Any], place: str) -> float:
        """The weight of a row; 1 if the source has none.

        Args:
            row: values by column; a null counts as missing.
            place: place of the row.

        Raises:
            BadRow: the weight is not a number in its range, is missing while another row has one, or there are two.
        """
        filled = [name for name in WEIGHTS if row.get(name) is not None]
        if len(filled) > 1:
            first, second = map(self._name, filled)
            raise BadRow(f"is a weight, and '{first}' of the row is another; keep one of them", filled[1], "", second)
        name = filled[0] if filled else None
        if self._first is None:
            self._first, self._column = place, name
        if name is None and self._column is not None:
            raise BadRow(f"is missing or null, but {self._first} has a weight there; {_EVERY}", self._column)
        if name is None:
            return 1.0
        if name != self._column:
            where = f"the one of {self._first} is in '{self.column}'; use one column"
            where = where if self._column else f"{self._first} has none; {_EVERY}"
            raise BadRow(f"is the weight of the row, but {where}", name, "", name)
        weight = self._number(row[name])
        if weight is None or not 0 <= weight <= WEIGHTS[name] or weight == math.inf:
            raise BadRow(f"is {short(row[name])}; a {name} must be {_RANGES[name]}", name, "", name)
        return weight

    def _number(self, value: Any) -> float | None:
        """The value as a number; text is one only in a file where every cell is text."""
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return None
        if isinstance(value, str) and not self._cells_are_text:
            return None
        try:
            return float(value)
        except (ValueError, OverflowError):
            return None

    def votes(self, row: dict[str, Any]) -> tuple[float, float] | None:
        """The numbers of votes for and against a completion, or a pair's chosen one; None if the row has no votes.

        Args:
            row: values by column: a list ``votes``, a label of each judge (null: none), or the numbers ``votes_for``
                and ``votes_against``.

        Raises:
            BadRow: a vote is not a label, or a number is missing or no number of at least 0.
        """
        counts = [name for name in _COUNTS if row.get(name) is not None]
        if isinstance(votes := row.get("votes"), list):
            if counts:
                raise BadRow(f"and '{self._name(counts[0])}' are both votes on the row; keep one of them", "votes")
            labels = [label_of({"votes": vote}, "votes") for vote in votes if vote is not None]
            return (float(sum(labels)), float(len(labels) - sum(labels))) if labels else None
        if not counts:
            return None
        numbers = {name: self._number(row.get(name)) for name in _COUNTS}
        for name, number in numbers.items():
            if number is None or not 0 <= number < math.inf:
                raise BadRow(f"is {short(row.get(name))}; it must be a number of votes of at least 0", name, "", name)
        given = tuple(number or 0.0 for number in numbers.values())
        return (given[0], given[1]) if any(given) else None


def summary_of(column: str | None, weight: NDArray[np.float64]) -> str | None:
    """The column that the weights of a source come from, their range and mean; None if all are 1 without a column.

    Args:
        column: the source's column with the weights; None without one.
        weight: weights of its rows in use, [n].
    """
    if not len(weight) or (column is None and bool((weight == 1).all())):
        return None
    by = "made by transforms" if column is None else f"from column '{column}'"
    return f"weights of the rows {by}: {weight.min():.4g} to {weight.max():.4g}, mean {weight.mean():.4g}"
