"""The rows of a split, cut to a length and grouped into examples, and what became of every row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import Needs
from halos_pl.data.batches import StepDataset, TokenizedRow
from halos_pl.data.counts import FileCounts
from halos_pl.data.cut import count, cut
from halos_pl.data.example import DataError
from halos_pl.data.table import Table
from halos_pl.data.transforms import groups

Together = Literal["pairs", "prompts"]

#: The largest weight of a row: the norm of its gradient, a sum of squares, still fits float32.
MOST_WEIGHT = 1e15


@dataclass(frozen=True)
class ControlTokens:
    """Texts between prompt and completion that tell the model which label follows, for conditional fine-tuning.

    They are tokenised like any text of the prompt and carry no loss. To sample from the trained model, end the prompt
    with the desirable one.

    Attributes:
        desirable, undesirable: the text for rows of either label.
    """

    desirable: str = "<|good|>"
    undesirable: str = "<|bad|>"

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> dict[bool, tuple[int, ...]]:
        """The token ids for desirable (True) and undesirable rows."""
        texts = {True: self.desirable, False: self.undesirable}
        return {k: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for k, text in texts.items()}


class Split:
    """The rows of a split, cut to ``max_length``, as ``StepDataset`` takes them.

    Attributes:
        table: the rows in use.
        counts: counts by source.
        examples: the indices of the rows of each example.
        cut: the tokens of each row that are kept.
        score: score of each row, less the mean of its prompt; float64 [n], NaN if missing.
        longest: upper bound of a batch row's tokens: prompt, control tokens and completion.

    Args:
        table: all rows, each with a label.
        needs: needs of the objective.
        max_length, truncate_completions, keep_together: see ``FeedbackDataModule``.
        control: control tokens for desirable (True) and undesirable rows.

    Raises:
        DataError: control tokens fill ``max_length``; the objective needs pairs, scores or gold answers and a row has
            none; a score or weight does not fit float32; or all weights of a source's rows in use are 0.
    """

    def __init__(
        self,
        table: Table,
        needs: Needs,
        *,
        max_length: int,
        truncate_completions: bool = True,
        control: Mapping[bool, tuple[int, ...]] | None = None,
        keep_together: Together | None = None,
    ) -> None:
        _check_weights(table)
        self.max_length = max_length
        self.control = control or {True: (), False: ()}
        self.counts = {
            store.path: FileCounts(store.examples, store.fault_count, store.faults[:10], dict(store.skipped))
            for store in table.stores
        }
        longest_control = max(map(len, self.control.values()))
        room = max_length - 1 - longest_control  # keeps at least one token of the prompt
        if room < 1:
            raise DataError(f"data.max_length is {max_length}, and data.control_tokens alone fill it; raise it")
        self.cut = cut(table, needs, self.counts, room=room, truncate_completions=truncate_completions)
        table = self.cut.table
        whole = needs.groups or keep_together == "prompts"
        together: Together | None = "prompts" if whole else "pairs" if needs.pairs else keep_together
        if needs.pairs and needs.scores:
            count(self.counts, table, (table.label == 1) & (table.score < table.score[table.pair]), "negative_margins")
        if needs.groups:
            count(self.counts, table, np.bincount(table.prompt, minlength=1)[table.prompt] == 1, "alone")
        count(self.counts, table, table.label == 1, "desirable")
        count(self.counts, table, table.label == 0, "undesirable")
        count(self.counts, table, table.label >= 0, "rows")
        self.pairs = needs.pairs or keep_together == "pairs"  # whole prompts include their pairs
        if self.pairs:
            count(self.counts, table, table.pair > np.arange(len(table)), "pairs")
        prompt_length, longer = self.cut.prompt_length, self.cut.longer
        self.longest = int((prompt_length + longer).max(initial=0))
        if needs.mismatched:  # one row's prompt with another row's completion
            self.longest = int(prompt_length.max(initial=0) + longer.max(initial=0))
        self.longest = min(max_length, self.longest + longest_control)
        _check_some_weight(table)
        self.table = table
        self.score = self._scores()
        if needs.groups:
            count(self.counts, table, self._alike(), "alike")
        self.examples = self._examples(together)

    def check_groups(self) -> None:
        """Refuses rows of which the objective has none to compare.

        Raises:
            DataError: the objective compares the rows of a prompt, and each prompt has only one.
        """
        if sum(counts.alone for counts in self.counts.values()) == len(self.table):
            raise DataError(
                f"{self.table.name(0)}: the objective compares the completions of a prompt, but each prompt of the"
                " training data has only one; use data with several completions per prompt, or an objective for single"
                " rows such as KTO"
            )

    def _scores(self) -> NDArray[np.float64]:
        """Each row's score less the mean of its prompt, so that float32 keeps small differences of large scores.

        NaN if any row of the prompt has no score.

        Raises:
            DataError: a score does not fit float32.
        """
        table, scored = self.table, ~np.isnan(self.table.score)
        # If a row of the prompt has no score, labels are compared: never a label with a score.
        lacks = np.zeros(len(table.prompt_places), bool)
        lacks[table.prompt[~scored]] = True
        scored &= ~lacks[table.prompt]
        total, number = (np.zeros(len(table.prompt_places)) for _ in range(2))
        np.add.at(total, table.prompt[scored], table.score[scored])
        np.add.at(number, table.prompt[scored], 1)
        score = np.where(scored, table.score - (total / np.maximum(number, 1))[table.prompt], np.nan)
        beyond = (~np.isfinite(score[scored]) | (np.abs(score[scored]) > 1e30)).nonzero()[0]
        if len(beyond):
            prompt = table.prompt[scored.nonzero()[0][beyond[0]]]
            rows = (table.prompt == prompt).nonzero()[0]  # one large score shifts the mean of the others
            place = int(rows[np.abs(table.score[rows]).argmax()])
            raise DataError(
                f"{table.name(place)}: the score {table.score[place]:g} does not fit float32; rescale the scores"
            )
        return score

    def _alike(self) -> NDArray[np.bool_]:
        """The rows whose prompt has other rows, all as good as they are; bool [n]."""
        prompt, value = self.table.prompt, np.where(np.isnan(self.score), self.table.label == 1, self.score)
        size = int(prompt.max(initial=-1)) + 1
        low, high = np.full(size, np.inf), np.full(size, -np.inf)
        np.minimum.at(low, prompt, value)
        np.maximum.at(high, prompt, value)
        alike: NDArray[np.bool_] = ((low == high) & (np.bincount(prompt, minlength=size) > 1))[prompt]
        return alike

    def _examples(self, together: Together | None) -> Sequence[Sequence[int]]:
        if together == "prompts":
            return groups(self.table.prompt)
        if together == "pairs":
            pair = self.table.pair
            return [(i, int(pair[i])) if pair[i] >= 0 else (i,) for i in self.table.units.tolist()]
        return _Singles(len(self.table))

    @property
    def rows(self) -> Sequence[TokenizedRow]:
        """The rows with their tokens, read on access."""
        return _Rows(self)

    @property
    def prompts(self) -> Sequence[NDArray[np.int32]]:
        """Token ids of the distinct prompts, uncut, read on access."""
        return _Prompts(self.table)

    def dataset(self, prefix: Sequence[int], *, mismatched: bool, seed: int, rank: int, world_size: int) -> StepDataset:
        """The data set that makes the split's batches; for the arguments see :class:`StepDataset`.

        Raises:
            ValueError: mismatched rows are needed, but all rows have the same prompt.
        """
        return StepDataset(
            self.prompts,
            self.rows,
            self.examples,
            prompt_of=self.table.prompt,
            max_length=self.max_length,
            mismatched=mismatched,
            seed=seed,
            rank=rank,
            world_size=world_size,
            prefix=prefix,
            lengths=(self.cut.prompt_length, self.cut.completion_length, self.cut.gold_length),
        )

    @property
    def row_tokens(self) -> NDArray[np.int64]:
        """Tokens of each row, prompt and completion together, and of its gold answer; int64 [n]."""
        of_gold = (self.cut.gold >= 0) * (self.cut.prompt_length + self.cut.gold_length)
        tokens: NDArray[np.int64] = self.cut.prompt_length + self.cut.completion_length + of_gold
        return tokens

    def tokens(self) -> Iterator[tuple[str, NDArray[np.int32]]]:
        """Name and token ids (prompt, control tokens, completion) of each row and each gold answer."""
        for row in self.rows:
            prompt = self.prompts[row.prompt][-row.prompt_length :]
            for each in (row, *([row.gold] if row.gold else [])):
                yield each.row_id, np.concatenate([prompt, np.array(each.control, np.int32), each.completion])

    def of_examples(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sums ``values`` [n] over the rows of each example."""
        if isinstance(self.examples, _Singles):
            return values
        return np.array([values[list(example)].sum() for example in self.examples])

    @cached_property
    def digest(self) -> str:
        """A hash of what the model sees, in order, independent of file names."""
        digest = hashlib.sha256(json.dumps([store.digest for store in self.table.stores]).encode())
        table, cut = self.table, self.cut
        columns = [table.source, table.row, table.label, table.score, table.weight, table.pair]
        columns += [cut.gold, cut.gold_length] if bool((cut.gold >= 0).any()) else []
        for column in (*columns, cut.prompt_length, cut.completion_length):
            digest.update(np.ascontiguousarray(column).tobytes())
        digest.update(repr(self.control).encode())
        if not isinstance(self.examples, _Singles):
            digest.update(repr([tuple(example) for example in self.examples]).encode())
        return digest.hexdigest()


def _check_some_weight(table: Table) -> None:
    rows, counted = (
        np.bincount(table.source[chosen], minlength=len(table.stores))
        for chosen in (np.ones(len(table), bool), table.weight > 0)
    )
    for store, number, some in zip(table.stores, rows.tolist(), counted.tolist(), strict=True):
        if number and not some:
            by = "the weight made by transforms" if store.weighted_by is None else f"column '{store.weighted_by}'"
            raise DataError(
                f"{store.path}: {by} is 0 in every row in use, so none would count; correct the weights, or leave the"
                " source out"
            )


def _check_weights(table: Table) -> None:
    weight = table.weight
    with np.errstate(over="ignore", under="ignore"):
        vanishes = (weight.astype(np.float32) > 0) != (weight > 0)
    wrong = ~((weight >= 0) & (weight <= MOST_WEIGHT)) | vanishes
    if wrong.any():
        place = int(wrong.nonzero()[0][0])
        raise DataError(
            f"{table.name(place)}: the weight {weight[place]:g} is not a number from 0 to {MOST_WEIGHT:g} that fits"
            " float32; rescale the weights"
        )


class _Singles(Sequence[tuple[int]]):
    """Every row is an example."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self.size:
            raise IndexError(place)
        return (place,)


class _Prompts(Sequence[NDArray[np.int32]]):
    def __init__(self, table: Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table.prompt_places)

    def __getitem__(self, number: Any) -> Any:
        return self.table.prompt_ids(number)


class _Rows(Sequence[TokenizedRow]):
    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.table)

    def __getitem__(self, place: Any) -> Any:
        split, table, cut = self.split, self.split.table, self.split.cut
        desirable = bool(table.label[place] == 1)
        row = TokenizedRow(
            prompt=int(table.prompt[place]),
            prompt_length=int(cut.prompt_length[place]),
            **_completion(table, place, int(cut.completion_length[place])),
            desirable=desirable,
            pair=int(table.pair[place]) if split.pairs else -1,
            control=split.control[desirable],
            score=float(split.score[place]),
            weight=float(table.weight[place]),
        )
        if cut.gold[place] < 0:
            return row
        of_gold = _completion(cut.gold_answers, place, int(cut.gold_length[place]))
        gold = replace(row, **of_gold, desirable=True, pair=-1, control=split.control[True], score=np.nan)
        return replace(row, gold=gold)


def _completion(table: Table, place: int, length: int) -> dict[str, Any]:
    """Name, kept tokens and loss of a completion, as arguments of ``TokenizedRow``."""
    loss = table.loss(place)
    return {
        "row_id": table.name(place),
        "completion": table.completion_ids(place)[:length],
        "loss": None if loss is None else loss[:length],
    }
