"""Pairs of answers that people have compared, from any file of rows."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos_pl.data.example import DataError, Fault, listed, short
from halos_pl.data.formats import rows
from halos_pl.data.source import Source
from halos_pl.judge.base import Pair, answer_of, text_of

#: The winner by what a person wrote: the number of the answer, or 0 for a tie.
WINNERS = {0: 0, 1: 1, 2: -1}
#: Name of the labels of files that list the preferred answer first.
ORDER = "the file's order"


@dataclass(frozen=True)
class HumanLabels:
    """Pairs and the labels that people gave them.

    Attributes:
        pairs: the pairs.
        labels: by annotator, the winner of each pair by its name: 1 for the first answer, -1 for the second, 0 for a
            tie.
        rows: number of rows in the file.
    """

    pairs: list[Pair]
    labels: dict[str, dict[str, int]]
    rows: int


def read_labels(
    path: str,
    prompt: Sequence[str],
    answers: Sequence[str],
    annotators: Sequence[str],
    limit: int | None = None,
    seed: int = 0,
) -> HumanLabels:
    """The pairs and labels in a file.

    Args:
        path: the file, in any format of training data.
        prompt: columns that make up the prompt, joined by empty lines; empty ones are skipped.
        answers: the columns of the two answers.
        annotators: columns with labels: 1 or 2 for the better answer, 0 for a tie, as numbers or as text. None: the
            first answer is the better one.
        limit: number of pairs to draw; None for all.
        seed: seed of the draw.

    Raises:
        DataError: naming file, row and column.
    """
    if len(answers) != 2 or not prompt:
        raise DataError(f"--answers {','.join(answers)}: name two columns, and at least one in --prompt")
    for option, given in (("prompt", prompt), ("answers", answers), ("annotators", annotators)):
        if "" in given or len({*given}) < len(given):
            raise DataError(f"--{option} {','.join(given)}: name different columns, separated by single commas")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be at least 1")
    pairs: list[Pair] = []
    labels: dict[str, dict[str, int]] = {name: {} for name in annotators or (ORDER,)}
    example: dict[str, str] = {}  # the first row with a prompt
    for line, row in rows(Source(path)):
        if isinstance(row, Fault):
            raise DataError(str(row))
        if lacking := [column for column in (*prompt, *answers, *annotators) if column not in row]:
            raise DataError(f"{path}:{line}: there is no column '{lacking[0]}'; the columns are {listed(row)}")
        place, name = f"{path}:{line}", f"{Path(path).name}:{line}"
        question = "\n\n".join(filter(None, (_text(row.get(column), row, column, place) for column in prompt)))
        first, second = (_text(answer_of(row.get(column)), row, column, place) for column in answers)
        used = {*prompt, *answers, *annotators}
        columns = {key: value for key, value in row.items() if key not in used}
        pairs.append(Pair(name, question, first, second, columns, example.setdefault(question, name)))
        for annotator in annotators:
            labels[annotator][name] = _winner(row, annotator, place)
        if not annotators:
            labels[ORDER][name] = 1
    number = len(pairs)
    if limit is not None and limit < number:
        drawn = sorted(random.Random(seed).sample(range(number), limit))
        pairs = [pairs[i] for i in drawn]
        names = {pair.name for pair in pairs}
        labels = {by: {name: label for name, label in each.items() if name in names} for by, each in labels.items()}
    return HumanLabels(pairs, labels, number)


def _winner(row: dict[str, Any], column: str, place: str) -> int:
    """The winner that a column names, as a number or, as in CSV files, as text.

    Raises:
        DataError: naming the row and the column.
    """
    value = row.get(column)
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if number not in WINNERS:
        raise DataError(f"{place}: column '{column}' is {short(value)}; it must be 1, 2, or 0 for a tie")
    return WINNERS[int(number)]


def _text(value: Any, row: dict[str, Any], column: str, place: str) -> str:
    """A column's value as text: numbers and truth values, too, as in files whose answers were parsed; of messages, all.

    Raises:
        DataError: naming the row and the column.
    """
    if isinstance(value, list) and all(isinstance(each, dict) and "role" in each for each in value):
        return text_of(value)
    if not isinstance(value, str | int | float):
        raise DataError(f"{place}: column '{column}' contains {short(value)}, no text or messages")
    return str(value)
