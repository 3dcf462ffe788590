"""The rows of a split as columns of numbers; the tokens stay on disk. Transforms make tables from tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halos_pl.data.store import Store


@dataclass(frozen=True)
class Table:
    """Columns of length n, one entry per row; gold answers are no rows of a table.

    Attributes:
        stores: token stores of the sources.
        prompt_places: int64 [p, 2], the store of each distinct prompt, and its number there.
        source: int32 [n], the store of each row.
        row: int64 [n], its index there.
        prompt: int64 [n], equal for prompts with equal uncut tokens, in any store.
        label: int8 [n], 1 desirable, 0 undesirable, -1 if there is only a score.
        score: float64 [n], higher is better, NaN if missing.
        weight: float64 [n], factor of the row's loss, at least 0, equal in both rows of a pair; 1 if not given.
        agree, disagree: float64 [n], how many people judge the row, or its pair, as its label says, and how many the
            opposite; both 0 if there is no record of them.
        pair: int64 [n], index of the pair's other row, -1 for a single row.
        added: bool [n], rows that a transform made from others.
    """

    stores: tuple[Store, ...]
    prompt_places: NDArray[np.int64]
    source: NDArray[np.int32]
    row: NDArray[np.int64]
    prompt: NDArray[np.int64]
    label: NDArray[np.int8]
    score: NDArray[np.float64]
    weight: NDArray[np.float64]
    agree: NDArray[np.float64]
    disagree: NDArray[np.float64]
    pair: NDArray[np.int64]
    added: NDArray[np.bool_]

    @classmethod
    def of(cls, stores: Sequence[Store]) -> Table:
        """All rows of ``stores`` but the gold answers, in order."""
        keys = np.concatenate([np.empty(0, "S16"), *(store.prompts["key"] for store in stores)])
        owners = np.concatenate(
            [np.empty((0, 2), np.int64), *(_places(i, len(store.prompts)) for i, store in enumerate(stores))]
        )
        _, first, number = np.unique(keys, return_index=True, return_inverse=True)
        # Numbered by first occurrence.
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        number = rank[number]
        columns: dict[str, list[NDArray[Any]]] = {name: [] for name in COLUMNS}
        prompts = rows = 0
        for i, store in enumerate(stores):
            judged = (store.rows["gold"] != np.arange(len(store.rows))).nonzero()[0]
            n = len(judged)
            place = np.full(len(store.rows) + 1, -1)
            place[judged] = np.arange(rows, rows + n)
            columns["source"].append(np.full(n, i, np.int32))
            columns["row"].append(judged)
            columns["prompt"].append(number[prompts + store.rows["prompt"][judged].astype(np.int64)])
            for name in ("label", "score", "weight", "agree", "disagree"):
                columns[name].append(np.array(store.rows[name][judged]))
            columns["pair"].append(place[store.rows["pair"][judged]])  # -1 reads the last entry, which is -1
            columns["added"].append(np.zeros(n, bool))
            prompts, rows = prompts + len(store.prompts), rows + n
        joined: dict[str, Any] = {name: np.concatenate(parts) for name, parts in columns.items()}
        return cls(stores=tuple(stores), prompt_places=owners[first[order]], **joined)

    def __len__(self) -> int:
        return len(self.row)

    def select(self, index: NDArray[Any]) -> Table:
        """The rows at ``index`` (int64 [m], or bool [n]); a pair that loses its other row becomes -1.

        A row may be selected several times only if its pair's other row is not selected.
        """
        if index.dtype == bool:
            index = index.nonzero()[0]
        place = np.full(len(self) + 1, -1)
        place[index] = np.arange(len(index))
        chosen: dict[str, Any] = {name: getattr(self, name)[index] for name in COLUMNS}
        return replace(self, **(chosen | {"pair": place[self.pair[index]]}))  # -1 reads the last entry, which is -1

    def join(self, other: Table) -> Table:
        """The rows of this table, then those of ``other``, which must have the same stores."""
        both: dict[str, Any] = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in COLUMNS}
        moved = np.where(other.pair >= 0, other.pair + len(self), -1)
        return replace(self, **(both | {"pair": np.concatenate([self.pair, moved])}))

    def of_rows(self, column: str) -> NDArray[Any]:
        """A column of the stores' ``rows``, for each row of the table."""
        values = np.empty(len(self), self.stores[0].rows.dtype[column] if self.stores else np.int64)
        for i, store in enumerate(self.stores):
            here = self.source == i
            values[here] = store.rows[column][self.row[here]]
        return values

    @property
    def gold_answers(self) -> Table:
        """The table with the gold answer of each desirable row of a file in the row's place, if it has one."""
        return self.with_rows(self.of_rows("gold"))

    def with_rows(self, rows: NDArray[np.int64]) -> Table:
        """The table with other rows of the same stores in the places of its rows; -1 leaves a row as it is."""
        return replace(self, row=np.where(rows >= 0, rows, self.row))

    @property
    def prompt_length(self) -> NDArray[np.int64]:
        """int64 [n], tokens of each row's prompt, uncut."""
        length = np.empty(len(self.prompt_places), np.int64)
        for i, store in enumerate(self.stores):
            here = self.prompt_places[:, 0] == i
            length[here] = store.prompts["length"][self.prompt_places[here, 1]]
        return length[self.prompt]

    @property
    def units(self) -> NDArray[np.int64]:
        """int64 [u], single rows and the first row of each pair."""
        return ((self.pair < 0) | (self.pair > np.arange(len(self)))).nonzero()[0]

    def with_pairs(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """``index`` and the other rows of its pairs, ascending."""
        pairs = self.pair[index]
        return np.unique(np.concatenate([index, pairs[pairs >= 0]]))

    def prompt_ids(self, number: int) -> NDArray[np.int32]:
        """Token ids of a distinct prompt, uncut."""
        store, there = self.prompt_places[number].tolist()
        return self.stores[int(store)].prompt(int(there))

    def completion_ids(self, place: int) -> NDArray[np.int32]:
        """Token ids of a row's completion, uncut."""
        return self.stores[int(self.source[place])].completion(int(self.row[place]))

    def loss(self, place: int) -> NDArray[np.bool_] | None:
        """Which tokens of a row's uncut completion carry the loss, bool [t]; None if all do."""
        return self.stores[int(self.source[place])].loss(int(self.row[place]))

    @property
    def first_loss(self) -> NDArray[np.int64]:
        """The first token of each row's completion that carries the loss, int64 [n]."""
        first = np.zeros(len(self), np.int64)
        for i, store in enumerate(self.stores):
            here = self.source == i
            first[here] = store.first_loss()[self.row[here]]
        return first

    def name(self, place: int) -> str:
        """The row's name: ``SOURCE:LINE``, and which of the line's rows it is."""
        name = self.stores[int(self.source[place])].name(int(self.row[place]))
        return f"{name}#contradicted" if self.added[place] else name


COLUMNS = [field.name for field in fields(Table) if field.name not in ("stores", "prompt_places")]


def _places(store: int, count: int) -> NDArray[np.int64]:
    return np.stack([np.full(count, store), np.arange(count)], axis=1)
