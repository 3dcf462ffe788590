"""From examples to the rows of an optimizer step, the mismatched ones included.

A batch is one optimizer step over all ranks. What it holds is a function of (seed, epoch, step) and of
nothing else: not of the number of workers, not of the number of ranks (each takes its share of the same
step), not of what was drawn before. So a resumed run meets the rows that the uninterrupted one would have.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from multiprocessing.reduction import ForkingPickler
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from halos_pl.batch import Labels, TokenBatch

# Examples of about equal length are looked for among those of so many steps.
LENGTH_WINDOW = 50


class Step(NamedTuple):
    """One optimizer step over all ranks: its place, and its examples by their index in the data set."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants of a step
    examples: tuple[int, ...]


def seeded(purpose: str, *numbers: int) -> Random:
    """A generator that is a function of its arguments, on every rank, worker, platform and Python."""
    return Random(":".join([purpose, *map(str, numbers)]))


def _copies(examples: Sequence[int]) -> Iterator[int]:
    """Of each of ``examples``, how often it has come before."""
    seen: Counter[int] = Counter()
    for example in examples:
        yield seen[example]
        seen[example] += 1


class Order:
    """Which examples an epoch has, in which order: a function of the seed and the epoch.

    Args:
        size: number of examples.
        seed: with the epoch, what is drawn depends on.
        shuffle: False keeps the order of the data.
        source: the source of each example, int [size], and ``weights`` how often an epoch has each example of a source:
            0.5 for a half of them, drawn anew each epoch, 2.0 for each of them twice.
        classes: the class of each example, int [size]: they are spread evenly, so that each step has them in the
            proportion of the whole, within one example.
        lengths: tokens of each example, int [size]: steps are made of examples of about equal length, and come
            in random order.
        batch_size: examples of a step; needed with ``lengths``.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        source: NDArray[Any] | None = None,
        weights: Sequence[float] = (1.0,),
        classes: NDArray[Any] | None = None,
        lengths: NDArray[Any] | None = None,
        batch_size: int = 1,
    ) -> None:
        self.seed, self.shuffle = seed, shuffle
        self.classes, self.lengths, self.batch_size = classes, lengths, batch_size
        source = np.zeros(size, int) if source is None else source
        own = [(source == number).nonzero()[0] for number in range(len(weights))]
        # (examples of a source, how many an epoch has)
        self._parts = [(members, round(weight * len(members))) for members, weight in zip(own, weights, strict=True)]
        for (members, number), weight in zip(self._parts, weights, strict=True):
            if len(members) and not number:
                raise ValueError(f"weight {weight:g} leaves none of the {len(members)} examples of a source; raise it")

    def __len__(self) -> int:
        """Examples of an epoch."""
        return sum(number for _, number in self._parts)

    def __call__(self, epoch: int) -> list[int]:
        order: list[int] = []
        for part, (members, number) in enumerate(self._parts):
            if not number:
                continue
            whole, rest = divmod(number, len(members))
            draw = seeded("weight", self.seed, epoch, part)
            order += members.tolist() * whole
            order += members[sorted(draw.sample(range(len(members)), rest))].tolist()
        if self.shuffle:
            seeded("order", self.seed, epoch).shuffle(order)
        if self.classes is not None:
            order = self._spread(order)
        if self.lengths is None:
            return order
        steps: list[list[int]] = []
        window = LENGTH_WINDOW * self.batch_size
        for start in range(0, len(order), window):
            near = order[start : start + window]
            # A second copy of an example, as a weight makes it, does not come beside the first.
            lengths = [(copy, int(self.lengths[example])) for copy, example in zip(_copies(near), near, strict=True)]
            near = [near[i] for i in sorted(range(len(near)), key=lengths.__getitem__)]
            near = near if self.classes is None else self._spread(near)
            steps += [near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size)]
        last = [steps.pop()] if steps and len(steps[-1]) < self.batch_size else []  # the small one stays last
        if self.shuffle:
            seeded("steps", self.seed, epoch).shuffle(steps)
        return [example for step in steps + last for example in step]

    def _spread(self, order: list[int]) -> list[int]:
        """The classes evenly among each other, each in the order that it has."""
        assert self.classes is not None
        by_class: dict[int, list[int]] = {}
        for example in order:
            by_class.setdefault(int(self.classes[example]), []).append(example)
        places = [
            ((k + 0.5) / len(members), number, example)
            for number, members in by_class.items()
            for k, example in enumerate(members)
        ]
        return [example for *_, example in sorted(places)]


class StepSampler(DistributedSampler):
    """Yields every example once an epoch, as ``Step`` s of ``batch_size`` examples over all ranks together.

    It yields the same steps on every rank; ``StepDataset`` takes the rank's share. It is a
    ``DistributedSampler`` only so that Lightning leaves it alone instead of splitting the steps over ranks.

    The last step of an epoch may be smaller. Where it would have fewer examples than there are ranks, it is
    merged into the step before, because a rank without a row could not take part in the step.

    Attributes:
        start: the first step to yield; once an iterator yields from there, it is back at 0.

    Args:
        order: which examples an epoch has, in which order.
        batch_size: examples per step over all ranks, at least ``world_size``.
        world_size: number of ranks.
        drop_last: leave out a smaller last step.
        same_every_epoch: ignore ``set_epoch``, so that evaluations of different epochs see the same
            mismatched rows and can be compared.

    Raises:
        ValueError: a batch size below ``world_size``, or no step at all.
    """

    def __init__(
        self,
        order: Order,
        *,
        batch_size: int,
        world_size: int = 1,
        drop_last: bool = False,
        same_every_epoch: bool = False,
    ) -> None:
        size = len(order)
        everything: Any = range(size)  # a stand-in: only its length is asked for
        super().__init__(everything, num_replicas=1, rank=0, shuffle=order.shuffle, seed=order.seed)
        if batch_size < world_size:
            raise ValueError(
                f"batch_size is {batch_size}, the examples of one step over all {world_size} ranks, so "
                f"some rank would have none; set it to {world_size} or more."
            )
        if size < world_size:
            raise ValueError(f"{size} examples are too few for {world_size} ranks; use more data or fewer devices.")
        if drop_last and size < batch_size:
            raise ValueError(
                f"With drop_last, {size} examples do not fill one step of batch_size {batch_size}; lower batch_size."
            )
        self.order, self.same_every_epoch, self.start = order, same_every_epoch, 0
        self._bounds = [*range(0, size, batch_size), size]
        tail = size - self._bounds[-2]
        if tail < batch_size and drop_last:
            self._bounds.pop()
        elif tail < world_size:
            del self._bounds[-2]

    def __len__(self) -> int:
        """Steps in a whole epoch, whatever ``start`` is."""
        return len(self._bounds) - 1

    def set_epoch(self, epoch: int) -> None:
        if not self.same_every_epoch:
            super().set_epoch(epoch)

    def __iter__(self) -> Iterator[Step]:
        # Read now and not at the first ``next``: workers fetch ahead of the epoch's hooks.
        return self._steps(self.epoch, self.start)

    def _steps(self, epoch: int, start: int) -> Iterator[Step]:
        # Not when the iterator is made: a loader with workers makes two and uses the second.
        self.start = 0
        order = self.order(epoch)
        for index in range(start, len(self)):
            yield Step(epoch, index, tuple(order[self._bounds[index] : self._bounds[index + 1]]))


def mismatches(prompts: Sequence[int], draw: Random) -> list[int | None]:
    """For each row i the place j of a row with another prompt; no j is used twice.

    A permutation whenever there is one, that is, unless one prompt has more than half of the rows. Then the
    other rows all find a place among that prompt's rows and the reverse, and the rest is None.

    Args:
        prompts: the prompt of each row; equal numbers are equal prompts.
        draw: the source of randomness.
    """
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    order = list(groups.values())
    draw.shuffle(order)
    for group in order:
        draw.shuffle(group)
    n, largest = len(prompts), max(map(len, order), default=0)
    partner: list[int | None] = [None] * n
    if 2 * largest <= n:
        # With equal prompts side by side, a turn by at least the largest group, and by at most the rest,
        # takes every row out of its own group.
        rows = [row for group in order for row in group]
        turn = draw.randint(largest, n - largest) if n else 0
        for place, row in enumerate(rows):
            partner[row] = rows[(place + turn) % n]
    else:
        most = max(order, key=len)
        others = [row for group in order if group is not most for row in group]
        for row, other in zip(most, others, strict=False):
            partner[row] = other
        draw.shuffle(most)
        for row, other in zip(most, others, strict=False):
            partner[other] = row
    return partner


@dataclass(frozen=True)
class TokenizedRow:
    """One tokenised row.

    Attributes:
        prompt: the prompt's number; equal prompts, by their uncut tokens, have equal numbers.
        prompt_length: tokens of the prompt that are kept, counted from its end, at least 1.
        completion: token ids, at least one; a sequence or an int array [t].
        desirable: the row's label.
        row_id: its name in messages and files.
        pair: the place among the rows of the pair's other completion; -1 where they go their own ways.
        control: token ids between prompt and completion that say what follows; no part of either.
        score: higher is better, in the source's unit; NaN where there is none.
        loss: bool [t], which tokens of the completion carry the loss; None where all of them do.
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


class StepDataset(Dataset[TokenBatch]):
    """Makes this rank's share of a ``Step`` into a ``TokenBatch``.

    Args:
        prompts: the distinct prompts, uncut, as token ids.
        rows: the rows.
        prompt_of: the prompt's number of each row, int [n]; left out, asked of ``rows``.
        examples: the rows of each example, which stay together: one, the two of a pair, or all of a prompt.
        max_length: tokens of prompt, control tokens and completion together.
        mismatched: add, for each of the rank's rows (x_i, y_i), one mismatched row (x_i, y_j).
        seed: with epoch and step, what the mismatches depend on.
        rank, world_size: the share: every ``world_size``-th example of the step, from ``rank`` on.
        prefix: ids (BOS) that a prompt keeps where it begins with them and its start is cut off.

    The mismatches are drawn over the step's rows of all ranks: y_j never answers a prompt equal to x_i, and
    the y_j of a step are its y, each once, wherever that is possible. Where a prompt has more than half of
    the step's rows (a batch of one, say) the missing y_j come from the rest of the data set. A mismatched row is
    marked undesirable, though nobody judged it: it is feedback on nothing.

    Raises:
        ValueError: mismatched rows where all rows have the same prompt.
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
    ) -> None:
        self.prompts, self.rows, self.examples = prompts, rows, examples
        self.prefix = list(prefix)
        self.max_length, self.mismatched, self.seed = max_length, mismatched, seed
        self.rank, self.world_size = rank, world_size
        self._prompt_of = np.array([row.prompt for row in rows], int) if prompt_of is None else prompt_of
        # Rows by prompt, so that one with another prompt is drawn without searching for it.
        self._by_prompt = np.argsort(self._prompt_of, kind="stable")
        self._numbers, self._first, self._count = np.unique(
            self._prompt_of[self._by_prompt], return_index=True, return_counts=True
        )
        if mismatched and len(self._count) < 2:
            raise ValueError(
                "The objective's reference point needs mismatched rows (one row's prompt, another's "
                f"completion), but all {len(rows)} rows have the same prompt. Use data with at least two "
                "distinct prompts, or a reference point that needs no mismatched rows."
            )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, step: Step) -> TokenBatch:
        batch = _Builder(self.prompts, self.prefix)
        rows = [row for example in step.examples for row in self.examples[example]]
        mine: list[int] = []  # places in ``rows``
        place = 0
        for i, (example, copy) in enumerate(zip(step.examples, _copies(step.examples), strict=True)):
            size = len(self.examples[example])
            if i % self.world_size == self.rank:
                # Where the example's rows are in this batch; an example may come twice in a step.
                here = {rows[place + k]: len(mine) + k for k in range(size)}
                mine.extend(range(place, place + size))
                for x in (self.rows[rows[place + k]] for k in range(size)):
                    pair = here.get(x.pair, -1)
                    # A second copy's rows are compared among each other, not each with itself.
                    group = x.prompt + copy * len(self.prompts)
                    batch.add(x, x.prompt_length, x, x.desirable, pair, False, x.row_id, x.score, group)
            place += size
        if self.mismatched:
            partners = self._partners(step, rows)
            for i in mine:
                x, y = self.rows[rows[i]], self.rows[partners[i]]
                length = min(x.prompt_length, self.max_length - len(x.control) - len(y.completion))
                name = f"{x.row_id} with {y.row_id}"
                batch.add(x, length, y, False, -1, True, name, math.nan, x.prompt)
        return batch.build()

    def _partners(self, step: Step, rows: list[int]) -> list[int]:
        """For each row of the step, the row whose completion its mismatched row takes."""
        draw = seeded("mismatch", self.seed, step.epoch, step.index)
        places = mismatches(self._prompt_of[rows].tolist(), draw)
        missing = [i for i, place in enumerate(places) if place is None]
        extra: Iterator[int] = iter(())
        if missing:  # all of one prompt, the step's most frequent
            prompt = int(self._prompt_of[rows[missing[0]]])
            extra = iter(self._others(prompt, len(missing), set(rows), draw))
        return [next(extra) if place is None else rows[place] for place in places]

    def _others(self, prompt: int, number: int, in_step: set[int], draw: Random) -> list[int]:
        """``number`` rows with another prompt: from outside the step and distinct as far as there are any."""
        group = int(np.searchsorted(self._numbers, prompt))
        first, count = int(self._first[group]), int(self._count[group])
        available = len(self.rows) - count
        drawn = draw.sample(range(available), min(available, number + len(in_step)))
        candidates = [int(self._by_prompt[place if place < first else place + count]) for place in drawn]
        candidates.sort(key=in_step.__contains__)  # stable: those outside the step first
        return [candidates[k % len(candidates)] for k in range(number)]


class _Builder:
    """Puts rows together; a prompt that several rows share is kept once."""

    def __init__(self, prompts: Sequence[Any], prefix: list[int]) -> None:
        self._source, self._prefix = prompts, prefix
        self._known: dict[tuple[int, int, tuple[int, ...]], int] = {}
        self.prompts: list[Tensor] = []
        self.columns: tuple[list[Any], ...] = ([], [], [], [], [], [], [], [], [])

    def add(
        self,
        x: TokenizedRow,
        length: int,
        y: TokenizedRow,
        desirable: bool,
        pair: int,
        mismatched: bool,
        name: str,
        score: float,
        group: int,
    ) -> None:
        key = (x.prompt, length, x.control)
        if key not in self._known:
            self._known[key] = len(self.prompts)
            self.prompts.append(torch.tensor([*self._cut(x.prompt, length), *x.control], dtype=torch.long))
        ids = torch.tensor(np.asarray(y.completion), dtype=torch.long)
        loss = None if y.loss is None else torch.tensor(y.loss)
        row = (ids, self._known[key], desirable, pair, mismatched, name, group, score, loss)
        for column, value in zip(self.columns, row, strict=True):
            column.append(value)

    def _cut(self, prompt: int, length: int) -> list[int]:
        """The prompt's last ``length`` tokens, BOS instead of the first of them: many models are lost without."""
        ids, count = np.asarray(self._source[prompt]), len(self._prefix)
        keeps = count < length < len(ids) and ids[:count].tolist() == self._prefix
        start = self._prefix if keeps else []
        return [*start, *ids[len(start) - length :].tolist()]

    def build(self) -> TokenBatch:
        completions, prompt, desirable, pair, mismatched, row_ids, group, score, loss = self.columns
        return TokenBatch(
            prompts=self.prompts,
            completions=completions,
            prompt=torch.tensor(prompt, dtype=torch.long),
            labels=Labels(
                desirable=torch.tensor(desirable, dtype=torch.bool),
                pair=torch.tensor(pair, dtype=torch.long),
                mismatched=torch.tensor(mismatched, dtype=torch.bool),
                group=torch.tensor(group, dtype=torch.long),
                score=torch.tensor(score, dtype=torch.float32),
            ),
            row_ids=row_ids,
            loss=loss if any(carried is not None for carried in loss) else None,
        )


def _as_arrays(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_arrays(v) for v in value]
    if isinstance(value, Labels):
        return {name: column.numpy() for name, column in vars(value).items()}
    return value.numpy() if isinstance(value, Tensor) else value


def _as_tensors(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_tensors(v) for v in value]
    if isinstance(value, dict):
        return Labels(**{name: torch.from_numpy(column) for name, column in value.items()})
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _rebuild(columns: list[Any]) -> TokenBatch:
    return TokenBatch(*map(_as_tensors, columns))


# A worker would otherwise send each of a batch's many small tensors through a file descriptor of its own,
# and a large step would run into the limit of open files. Sent as arrays, they travel by value.
ForkingPickler.register(
    TokenBatch, lambda batch: (_rebuild, ([_as_arrays(getattr(batch, f.name)) for f in fields(batch)],))
)
