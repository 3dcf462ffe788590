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
from halos_pl.data.example import DataError
from halos_pl.data.table import Table
from halos_pl.data.transforms import groups

Together = Literal["pairs", "prompts"]


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
        prompt_length, completion_length: tokens of each row that are kept, int64 [n].
        gold_length: the same of its gold answer, which follows the same prompt; 0 without one.
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
        if needs.pairs and bool((table.pair < 0).any()):
            place = int((table.pair < 0).nonzero()[0][0])
            raise DataError(
                f"{table.name(place)}: the objective compares the two completions of a pair, but this row has no pair;"
                " use data with chosen and rejected, the transform Pair (data.transforms), or an objective for binary"
                " feedback such as KTO"
            )
        if needs.scores and bool((lacking := np.isnan(table.score)).any()):
            raise DataError(
                f"{table.name(int(lacking.nonzero()[0][0]))}: the objective compares scores, but this row has none; use"
                " data with "
                + ("chosen_score and rejected_score, or with a margin" if needs.pairs else "a score of each completion")
            )
        if not (needs.pairs or needs.undesirable):
            self._count(table, table.label == 0, "dropped_undesirable")
            table = table.select(table.label != 0)
        table = self._with_gold(table, needs)
        length = table.of_rows("length").astype(np.int64)
        gold, gold_length = table.gold_answers, _length_of_gold(table)
        too_long = (np.maximum(length, gold_length) > room) & (not truncate_completions)
        if needs.pairs:  # a pair is dropped as a whole
            too_long |= too_long[table.pair]
        self._count(table, too_long, "dropped_too_long")
        lost = table.first_loss >= np.minimum(length, room)
        lost |= (table.gold >= 0) & (gold.first_loss >= np.minimum(gold_length, room))
        if needs.pairs:
            lost |= lost[table.pair]
        lost &= ~too_long
        self._count(table, lost, "dropped_without_loss")
        kept = ~(too_long | lost)
        table, length, gold_length = table.select(kept), length[kept], gold_length[kept]
        self.gold, self.gold_length = table.gold_answers, np.minimum(gold_length, room)
        self.completion_length = np.minimum(length, room)
        # All completions of a pair get the same prompt, so the longest one decides how much of it is kept.
        paired = table.pair >= 0
        longest = np.maximum(self.completion_length, self.gold_length)
        longest[paired] = np.maximum(longest[paired], longest[table.pair[paired]])
        self.prompt_length = np.minimum(table.prompt_length, room + 1 - longest)
        whole = needs.groups or keep_together == "prompts"
        together: Together | None = "prompts" if whole else "pairs" if needs.pairs else keep_together
        if needs.pairs and needs.scores:
            self._count(table, (table.label == 1) & (table.score < table.score[table.pair]), "negative_margins")
        if needs.groups:
            self._count(table, np.bincount(table.prompt, minlength=1)[table.prompt] == 1, "alone")
        self._count(table, table.label == 1, "desirable")
        self._count(table, table.label == 0, "undesirable")
        self._count(table, table.label >= 0, "rows")
        self._count(table, self.prompt_length < table.prompt_length, "prompts_cut")
        self._count(table, length > room, "completions_cut")
        self._count(table, gold_length > room, "completions_cut")
        self._count(table, gold_length > 0, "gold")
        self.pairs = needs.pairs or keep_together == "pairs"  # whole prompts include their pairs
        if self.pairs:
            self._count(table, table.pair > np.arange(len(table)), "pairs")
        longer = np.maximum(self.completion_length, self.gold_length)
        self.longest = int((self.prompt_length + longer).max(initial=0))
        if needs.mismatched:  # one row's prompt with another row's completion
            self.longest = int(self.prompt_length.max(initial=0) + longer.max(initial=0))
        self.longest = min(max_length, self.longest + longest_control)
        _check_some_weight(table)
        self.table = table
        self.score = self._scores()
        if needs.groups:
            self._count(table, self._alike(), "alike")
        self.examples = self._examples(together)

    def _with_gold(self, table: Table, needs: Needs) -> Table:
        """The table with each gold answer at one row of its example; without gold answers if none are needed.

        Transforms may have exchanged the labels of the example's rows, dropped or copied one of them, or paired it with
        another: a gold answer stays at the first desirable row, or else at the first.

        Raises:
            DataError: the objective needs gold answers, and a row comes from an example without one.
        """
        if not needs.gold:
            self._count(table, table.gold >= 0, "dropped_gold")
            return replace(table, gold=np.full(len(table), -1))
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
        gold = np.full(len(table), -1, np.int64)
        gold[order[first]] = of_example[order[first]]
        return replace(table, gold=gold)

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

    def _count(self, table: Table, chosen: NDArray[np.bool_], name: str) -> None:
        number = np.bincount(table.source[chosen], minlength=len(table.stores))
        for store, count in zip(table.stores, number.tolist(), strict=True):
            counts = self.counts[store.path]
            setattr(counts, name, getattr(counts, name) + count)

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
        total, count = (np.zeros(len(table.prompt_places)) for _ in range(2))
        np.add.at(total, table.prompt[scored], table.score[scored])
        np.add.at(count, table.prompt[scored], 1)
        score = np.where(scored, table.score - (total / np.maximum(count, 1))[table.prompt], np.nan)
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
            lengths=(self.prompt_length, self.completion_length, self.gold_length),
        )

    @property
    def row_tokens(self) -> NDArray[np.int64]:
        """Tokens of each row, prompt and completion together, and of its gold answer; int64 [n]."""
        of_gold = (self.gold_length > 0) * (self.prompt_length + self.gold_length)
        tokens: NDArray[np.int64] = self.prompt_length + self.completion_length + of_gold
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
        table = self.table
        columns = [table.source, table.row, table.label, table.score, table.weight, table.pair]
        columns += [table.gold, self.gold_length] if bool(self.gold_length.any()) else []
        for column in (*columns, self.prompt_length, self.completion_length):
            digest.update(np.ascontiguousarray(column).tobytes())
        digest.update(repr(self.control).encode())
        if not isinstance(self.examples, _Singles):
            digest.update(repr([tuple(example) for example in self.examples]).encode())
        return digest.hexdigest()


def _length_of_gold(table: Table) -> NDArray[np.int64]:
    """Tokens of each row's gold answer, uncut, 0 without one; int64 [n]."""
    return np.where(table.gold >= 0, table.gold_answers.of_rows("length"), 0).astype(np.int64)


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
        single = weight.astype(np.float32)
    wrong = ~((weight >= 0) & np.isfinite(single) & ((single > 0) == (weight > 0)))
    if wrong.any():
        place = int(wrong.nonzero()[0][0])
        raise DataError(
            f"{table.name(place)}: the weight {weight[place]:g} is not a number of at least 0 that fits float32;"
            " rescale the weights"
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
        split, table = self.split, self.split.table
        desirable = bool(table.label[place] == 1)
        row = TokenizedRow(
            prompt=int(table.prompt[place]),
            prompt_length=int(split.prompt_length[place]),
            **_completion(table, place, int(split.completion_length[place])),
            desirable=desirable,
            pair=int(table.pair[place]) if split.pairs else -1,
            control=split.control[desirable],
            score=float(split.score[place]),
            weight=float(table.weight[place]),
        )
        if not split.gold_length[place]:
            return row
        of_gold = _completion(split.gold, place, int(split.gold_length[place]))
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
