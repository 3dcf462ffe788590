"""From examples to the batch of an optimizer step, with its mismatched rows.

A step over all ranks depends only on (seed, epoch, step): not on the number of workers or ranks, each of which takes
its share of the same step, nor on earlier draws. So a resumed run sees the same rows as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from multiprocessing.reduction import ForkingPickler
from random import Random
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from halos_pl.batch import TokenBatch
from halos_pl.data.mismatches import mismatches
from halos_pl.data.order import Step, copies, seeded
from halos_pl.data.shares import shares
from halos_pl.labels import Labels


@dataclass(frozen=True)
class TokenizedRow:
    """One tokenised row.

    Attributes:
        prompt: number of the prompt; prompts with equal uncut tokens have equal numbers.
        prompt_length: number of tokens kept at the prompt's end, at least 1.
        completion: token ids, at least one; a sequence or an int array [t].
        desirable: the label.
        row_id: name in messages and files.
        pair: index of the row with the pair's other completion; -1 for a single row.
        control: token ids between prompt and completion that name the label.
        score: higher is better, in the source's unit; NaN if missing.
        loss: which tokens of the completion carry the loss, bool [t]; None for all.
        weight: factor of the row's loss, at least 0.
        gold: its gold answer, which has the same prompt; None without one.
    """

    prompt: int
    prompt_length: int
    completion: Sequence[int] | NDArray[np.int32]
    desirable: bool
    row_id: str
    pair: int = -1
    control: tuple[int, ...] = ()
    score: float = math.nan
    loss: NDArray[np.bool_] | None = None
    weight: float = 1.0
    gold: TokenizedRow | None = None


class StepDataset(Dataset[TokenBatch]):
    """Turns this rank's share of a ``Step`` into a ``TokenBatch``.

    Mismatches are drawn over the step's rows of all ranks: y_j never answers a prompt equal to x_i, and each y of the
    step is used once if possible. If one prompt has more than half of the step's rows (as in a batch of one), the
    missing y_j come from the rest of the data set. A mismatched row is marked undesirable, but is not feedback.

    The gold answers of an example's rows follow them in the batch. They take part in no mismatch.

    Args:
        prompts: the distinct prompts, uncut, as token ids.
        rows: all rows.
        examples: the indices of the rows of each example: one row, the two of a pair, or all of a prompt.
        max_length: tokens of prompt, control tokens and completion together.
        prompt_of: the prompt number of each row, int [n]; default: read from ``rows``.
        mismatched: whether to add one mismatched row (x_i, y_j) for each of the rank's rows (x_i, y_i).
        seed: seed of the mismatches, together with epoch and step.
        rank, world_size: this rank and the number of ranks, which share a step by tokens (see
            :func:`halos_pl.data.shares.shares`).
        lengths: tokens of each row's prompt, of its completion and of its gold answer (0 without one), three int [n];
            default: read from ``rows``.
        prefix: ids (BOS) that a prompt beginning with them keeps when its start is cut.

    Raises:
        ValueError: mismatched rows are needed, but all rows have the same prompt.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        rows: Sequence[TokenizedRow],
        examples: Sequence[Sequence[int]],
        *,
        max_length: int,
        prompt_of: NDArray[Any] | None = None,
        mismatched: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefix: Sequence[int] = (),
        lengths: tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None = None,
    ) -> None:
        self.prompts, self.rows, self.examples = prompts, rows, examples
        self.prefix = list(prefix)
        self.max_length, self.mismatched, self.seed = max_length, mismatched, seed
        self.rank, self.world_size = rank, world_size
        self._prompt_of = np.array([row.prompt for row in rows], int) if prompt_of is None else prompt_of
        if lengths is None and world_size > 1:
            each = [
                (row.prompt_length + len(row.control), len(row.completion), len(row.gold.completion) if row.gold else 0)
                for row in rows
            ]
            prompt, completion, gold = np.array(each, int).reshape(-1, 3).T
            lengths = prompt, completion, gold
        self._lengths = lengths
        # Rows sorted by prompt, to draw one with another prompt without a search.
        self._by_prompt = np.argsort(self._prompt_of, kind="stable")
        self._numbers, self._first, self._count = np.unique(
            self._prompt_of[self._by_prompt], return_index=True, return_counts=True
        )
        if mismatched and len(self._count) < 2:
            raise ValueError(
                "the objective's reference point needs mismatched rows (one row's prompt with another row's"
                f" completion), but all {len(rows)} rows have the same prompt; use data with at least two distinct"
                " prompts, or a reference point without mismatched rows"
            )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, step: Step) -> TokenBatch:
        batch = _Builder(self.prompts, self.prefix)
        rows = [row for example in step.examples for row in self.examples[example]]
        partners = self._partners(step, rows) if self.mismatched else []
        counts = [len(self.examples[example]) for example in step.examples]
        starts = [0, *accumulate(counts)]
        copy = list(copies(step.examples))
        mine: list[int] = []  # this rank's rows, as indices into ``rows``
        for i in self._share(rows, partners, starts):
            places = range(starts[i], starts[i + 1])
            # The rows' indices in this batch; an example may come twice in a step.
            here = {rows[place]: len(batch) + k for k, place in enumerate(places)}
            mine.extend(places)
            of_example = [self.rows[rows[place]] for place in places]
            gold_answers = [x.gold for x in of_example if x.gold]
            for k, x in enumerate([*of_example, *gold_answers]):
                pair = here.get(x.pair, -1)
                # Rows of a second copy are compared with each other, not with the first copy.
                group = x.prompt + copy[i] * len(self.prompts)
                gold = k >= len(of_example)
                labels = RowLabels(x.desirable, pair, False, group, x.score, x.weight, gold)
                batch.add(x.row_id, labels, x, x.prompt_length, x)
        for i in mine if self.mismatched else ():
            x, y = self.rows[rows[i]], self.rows[partners[i]]
            length = min(x.prompt_length, self.max_length - len(x.control) - len(y.completion))
            labels = RowLabels(False, -1, True, x.prompt, math.nan, x.weight, False)
            batch.add(f"{x.row_id} with {y.row_id}", labels, x, length, y)
        return batch.build()

    def _share(self, rows: list[int], partners: list[int], starts: list[int]) -> Sequence[int]:
        """This rank's examples of the step, by index; the rows of example i are ``starts[i]`` to ``starts[i + 1]``."""
        if self.world_size == 1:
            return range(len(starts) - 1)
        assert self._lengths is not None
        prompt, completion, gold = self._lengths
        prompts, tokens = [prompt[rows]], completion[rows] + gold[rows]
        if partners:  # a prompt is cut to fit its completion
            prompts.append(np.minimum(prompts[0], self.max_length - completion[partners]))
            tokens = tokens + completion[partners]
        spans = list(pairwise(starts))
        return shares(
            [int(self._prompt_of[rows[start]]) for start, _ in spans],
            [{length for lengths in prompts for length in lengths[start:end].tolist()} for start, end in spans],
            [int(tokens[start:end].sum()) for start, end in spans],
            self.world_size,
        )[self.rank]

    def _partners(self, step: Step, rows: list[int]) -> list[int]:
        """For each row of the step, the row whose completion its mismatched row takes."""
        draw = seeded("mismatch", self.seed, step.epoch, step.index)
        places = mismatches(self._prompt_of[rows].tolist(), draw)
        missing = [i for i, place in enumerate(places) if place is None]
        extra: Iterator[int] = iter(())
        if missing:  # all with the step's most frequent prompt
            prompt = int(self._prompt_of[rows[missing[0]]])
            extra = iter(self._others(prompt, len(missing), set(rows), draw))
        return [next(extra) if place is None else rows[place] for place in places]

    def _others(self, prompt: int, number: int, in_step: set[int], draw: Random) -> list[int]:
        """``number`` rows with another prompt: from outside the step and distinct as far as possible."""
        group = int(np.searchsorted(self._numbers, prompt))
        first, count = int(self._first[group]), int(self._count[group])
        available = len(self.rows) - count
        drawn = draw.sample(range(available), min(available, number + len(in_step)))
        candidates = [int(self._by_prompt[place if place < first else place + count]) for place in drawn]
        candidates.sort(key=in_step.__contains__)  # stable: rows outside the step come first
        return [candidates[k % len(candidates)] for k in range(number)]


class RowLabels(NamedTuple):
    """A row's entries of ``Labels``."""

    desirable: bool
    pair: int
    mismatched: bool
    group: int
    score: float
    weight: float
    gold: bool


#: The tensor type of each of these labels.
_DTYPES = {
    name: {bool: torch.bool, int: torch.long, float: torch.float32}[kind]
    for name, kind in get_type_hints(RowLabels).items()
}


class _Builder:
    """Collects rows; a prompt that several rows share is kept once."""

    def __init__(self, prompts: Sequence[Any], prefix: list[int]) -> None:
        self._source, self._prefix = prompts, prefix
        self._prompt_index: dict[tuple[int, int, tuple[int, ...]], int] = {}
        self.prompts: list[Tensor] = []
        self.completions: list[Tensor] = []
        self.loss: list[Tensor | None] = []
        self.prompt: list[int] = []
        self.row_ids: list[str] = []
        self.labels: list[RowLabels] = []

    def __len__(self) -> int:
        return len(self.row_ids)

    def add(self, name: str, labels: RowLabels, x: TokenizedRow, length: int, y: TokenizedRow) -> None:
        """Adds a row: the last ``length`` tokens of x's prompt, x's control tokens and y's completion."""
        key = (x.prompt, length, x.control)
        if key not in self._prompt_index:
            self._prompt_index[key] = len(self.prompts)
            self.prompts.append(torch.tensor([*self._cut(x.prompt, length), *x.control], dtype=torch.long))
        self.prompt.append(self._prompt_index[key])
        self.completions.append(torch.tensor(np.asarray(y.completion), dtype=torch.long))
        self.loss.append(None if y.loss is None else torch.tensor(y.loss))
        self.row_ids.append(name)
        self.labels.append(labels)

    def _cut(self, prompt: int, length: int) -> list[int]:
        """The prompt's last ``length`` tokens, with BOS in place of the first: many models fail without it."""
        ids, count = np.asarray(self._source[prompt]), len(self._prefix)
        keeps = count < length < len(ids) and ids[:count].tolist() == self._prefix
        start = self._prefix if keeps else []
        return [*start, *ids[len(start) - length :].tolist()]

    def build(self) -> TokenBatch:
        columns = {
            name: torch.tensor([getattr(labels, name) for labels in self.labels], dtype=dtype)
            for name, dtype in _DTYPES.items()
        }
        return TokenBatch(
            prompts=self.prompts,
            completions=self.completions,
            prompt=torch.tensor(self.prompt, dtype=torch.long),
            labels=Labels(**columns),
            row_ids=self.row_ids,
            loss=self.loss if any(carried is not None for carried in self.loss) else None,
        )


def _as_arrays(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_arrays(v) for v in value]
    if isinstance(value, Labels):
        return {f.name: getattr(value, f.name).numpy() for f in fields(value)}
    return value.numpy() if isinstance(value, Tensor) else value


def _as_tensors(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_tensors(v) for v in value]
    if isinstance(value, dict):
        return Labels(**{name: torch.from_numpy(column) for name, column in value.items()})
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _rebuild(columns: list[Any]) -> TokenBatch:
    return TokenBatch(*map(_as_tensors, columns))


# A worker would otherwise send each small tensor of a batch through its own file descriptor, and a large step would hit
# the limit of open files. Arrays are sent by value.
ForkingPickler.register(
    TokenBatch, lambda batch: (_rebuild, ([_as_arrays(getattr(batch, f.name)) for f in fields(batch)],))
)
