"""Which rows of a table a split uses, and how many of their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from halos_pl.batch import Needs
from halos_pl.data.counts import FileCounts
from halos_pl.data.example import DataError
from halos_pl.data.table import Table


@dataclass(frozen=True)
class Cut:
    """The rows in use, and how many tokens of each are kept.

    Attributes:
        table: the rows in use.
        gold: row of each row's gold answer in its store, -1 without one; int64 [n].
        prompt_length, completion_length: tokens of each row that are kept, int64 [n].
        gold_length: the same of its gold answer, which follows the same prompt; 0 without one.
    """

    table: Table
    gold: NDArray[np.int64]
    prompt_length: NDArray[np.int64]
    completion_length: NDArray[np.int64]
    gold_length: NDArray[np.int64]

    @cached_property
    def gold_answers(self) -> Table:
        """The table with each row's gold answer in its place; rows without one are unchanged."""
        return self.table.with_rows(self.gold)

    @property
    def longer(self) -> NDArray[np.int64]:
        """Tokens of each row's completion or gold answer, whichever is longer; int64 [n]."""
        return np.maximum(self.completion_length, self.gold_length)


def cut(table: Table, needs: Needs, counts: Mapping[str, FileCounts], *, room: int, truncate_completions: bool) -> Cut:
    """Drops the rows that the objective cannot use, and cuts the others to ``room + 1`` tokens.

    Completions lose their end, and keep at least one token of their prompts, which lose their beginning.

    Args:
        table: all rows, each with a label.
        needs: needs of the objective.
        counts: counts by source, which are updated.
        room: the most tokens of a completion.
        truncate_completions: whether longer ones are cut; otherwise, their rows are dropped.

    Raises:
        DataError: the objective needs pairs, scores or gold answers and a row has none.
    """
    _check_needs(table, needs)
    if not (needs.pairs or needs.undesirable):
        count(counts, table, table.label == 0, "dropped_undesirable")
        table = table.select(table.label != 0)
    gold = gold_rows(table) if needs.gold else np.full(len(table), -1)
    if not needs.gold:
        count(counts, table, table.of_rows("gold") >= 0, "dropped_gold")
    has_gold, gold_answers = gold >= 0, table.with_rows(gold)
    length = table.of_rows("length").astype(np.int64)
    gold_length = np.where(has_gold, gold_answers.of_rows("length"), 0).astype(np.int64)
    too_long = (np.maximum(length, gold_length) > room) & (not truncate_completions)
    if needs.pairs:  # a pair is dropped as a whole
        too_long |= too_long[table.pair]
    lost = table.first_loss >= np.minimum(length, room)
    lost |= has_gold & (gold_answers.first_loss >= np.minimum(gold_length, room))
    if needs.pairs:
        lost |= lost[table.pair]
    count(counts, table, too_long, "dropped_too_long")
    count(counts, table, lost & ~too_long, "dropped_without_loss")
    kept = ~(too_long | lost)
    table, gold, length, gold_length = table.select(kept), gold[kept], length[kept], gold_length[kept]
    completion_length, gold_kept = np.minimum(length, room), np.minimum(gold_length, room)
    # All completions of a pair get the same prompt, so the longest one decides how much of it is kept.
    paired, longest = table.pair >= 0, np.maximum(completion_length, gold_kept)
    longest[paired] = np.maximum(longest[paired], longest[table.pair[paired]])
    prompt_length = np.minimum(table.prompt_length, room + 1 - longest)
    count(counts, table, prompt_length < table.prompt_length, "prompts_cut")
    count(counts, table, length > room, "completions_cut")
    count(counts, table, gold_length > room, "completions_cut")
    count(counts, table, gold >= 0, "gold")
    return Cut(table, gold, prompt_length, completion_length, gold_kept)


def gold_rows(table: Table) -> NDArray[np.int64]:
    """The row of each row's gold answer in its store, -1 without one: each gold answer is at one row of its example.

    Transforms may have exchanged the labels of the example's rows, dropped or copied one of them, or paired it with
    another: a gold answer stays at the first desirable row, or else at the first.

    Raises:
        DataError: a row comes from an example without a gold answer.
    """
    of_example = np.full(len(table), -1, np.int64)
    for i, store in enumerate(table.stores):
        gold, pair = store.rows["gold"], store.rows["pair"]
        either = np.where((gold < 0) & (pair >= 0), gold[pair], gold)
        of_example[table.source == i] = either[table.row[table.source == i]]
    if (lacking := of_example < 0).any():
        raise DataError(
            f"{table.name(int(lacking.argmax()))}: the objective uses gold answers, but this row has none; use data"
            " with the columns prompt, chosen, rejected and reference (the gold answer), all of them filled"
        )
    order = np.lexsort((table.label != 1, of_example, table.source))
    first = np.ones(len(table), bool)
    first[1:] = (np.diff(table.source[order]) != 0) | (np.diff(of_example[order]) != 0)
    rows = np.full(len(table), -1, np.int64)
    rows[order[first]] = of_example[order[first]]
    return rows


def count(counts: Mapping[str, FileCounts], table: Table, chosen: NDArray[np.bool_], name: str) -> None:
    """Adds the chosen rows (bool [n]) of each source to its count ``name``."""
    number = np.bincount(table.source[chosen], minlength=len(table.stores))
    for store, more in zip(table.stores, number.tolist(), strict=True):
        setattr(counts[store.path], name, getattr(counts[store.path], name) + more)


def _check_needs(table: Table, needs: Needs) -> None:
    if needs.pairs and bool((table.pair < 0).any()):
        raise DataError(
            f"{table.name(int((table.pair < 0).argmax()))}: the objective compares the two completions of a pair, but"
            " this row has no pair; use data with chosen and rejected, the transform Pair (data.transforms), or an"
            " objective for binary feedback such as KTO"
        )
    if needs.scores and bool((lacking := np.isnan(table.score)).any()):
        raise DataError(
            f"{table.name(int(lacking.argmax()))}: the objective compares scores, but this row has none; use data with "
            + ("chosen_score and rejected_score, or with a margin" if needs.pairs else "a score of each completion")
        )
