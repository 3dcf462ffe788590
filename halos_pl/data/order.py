"""Which examples make up each optimizer step: a function of the seed, the epoch and the step, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

# Examples of similar length are grouped within this many steps.
LENGTH_WINDOW = 50


class Step(NamedTuple):
    """One optimizer step over all ranks: epoch, index in the epoch, and the indices of its examples."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    examples: tuple[int, ...]


def seeded(purpose: str, *numbers: int) -> Random:
    """A generator that depends only on its arguments, not on rank, worker, platform or Python version."""
    return Random(":".join([purpose, *map(str, numbers)]))


def copies(examples: Sequence[int]) -> Iterator[int]:
    """For each of ``examples``, how often it has occurred before."""
    seen: Counter[int] = Counter()
    for example in examples:
        yield seen[example]
        seen[example] += 1


class Order:
    """The examples of an epoch in order, as a function of the seed and the epoch.

    Args:
        size: number of examples.
        seed: of the draws, together with the epoch.
        shuffle: False keeps the order of the data.
        source: the source of each example, int [size].
        weights: for each source, how often an epoch has its examples: 0.5 for half of them, drawn anew each epoch, 2.0
            for each of them twice.
        classes: the class of each example, int [size]; classes are spread evenly, so that each step has them in the
            proportion of the whole, within one example.
        lengths: tokens of each example, int [size]; a step has examples of similar length, and the steps come in
            random order.
        batch_size: examples per step; needed with ``lengths``.

    Raises:
        ValueError: a weight leaves no example of its source.
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
        by_source = [(source == number).nonzero()[0] for number in range(len(weights))]
        # For each source its examples, and how many of them an epoch has.
        self._parts = [(part, round(weight * len(part))) for part, weight in zip(by_source, weights, strict=True)]
        for (members, number), weight in zip(self._parts, weights, strict=True):
            if len(members) and not number:
                raise ValueError(f"weight {weight:g} leaves none of the {len(members)} examples of a source; raise it")

    def __len__(self) -> int:
        """Examples per epoch."""
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
            # The second copy of an example, due to a weight, does not come beside the first.
            lengths = [(copy, int(self.lengths[example])) for copy, example in zip(copies(near), near, strict=True)]
            near = [near[i] for i in sorted(range(len(near)), key=lengths.__getitem__)]
            near = near if self.classes is None else self._spread(near)
            steps += [near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size)]
        last = [steps.pop()] if steps and len(steps[-1]) < self.batch_size else []  # a smaller one stays last
        if self.shuffle:
            seeded("steps", self.seed, epoch).shuffle(steps)
        return [example for step in steps + last for example in step]

    def _spread(self, order: list[int]) -> list[int]:
        """Spreads the classes evenly, each in its order."""
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


class StepSampler(DistributedSampler[Any]):
    """Yields the examples of an epoch as ``Step`` s of ``batch_size`` examples over all ranks.

    Every rank gets the same steps, and ``StepDataset`` takes the rank's share. It is a ``DistributedSampler`` only to
    keep Lightning from splitting the steps over ranks.

    The last step of an epoch may be smaller. If it has fewer examples than there are ranks, it is merged into the step
    before, as every rank needs a row to train on.

    Attributes:
        start: the first step to yield; the next iterator starts at 0 again.
        merged: number of examples by which the last step is larger than ``batch_size``, so that every rank has one.

    Args:
        order: order of the examples.
        batch_size: examples per step over all ranks, at least ``world_size``.
        world_size: number of ranks that each need an example of every step; 1 if a rank may have none.
        drop_last: whether to leave out a smaller last step.
        same_every_epoch: whether to ignore ``set_epoch``, so that evaluations in all epochs see the same mismatched
            rows.

    Raises:
        ValueError: ``batch_size`` is below ``world_size``, or there is no step.
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
        everything: Any = range(size)  # only its length is used
        super().__init__(everything, num_replicas=1, rank=0, shuffle=order.shuffle, seed=order.seed)
        if batch_size < world_size:
            raise ValueError(
                f"batch_size is {batch_size}, but {world_size} ranks share a step; set it to {world_size} or more."
            )
        if size < world_size:
            raise ValueError(f"{size} examples are too few for {world_size} ranks; use more data or fewer devices.")
        if drop_last and size < batch_size:
            raise ValueError(
                f"with drop_last, {size} examples do not fill one step of batch_size {batch_size}; lower batch_size."
            )
        self.order, self.same_every_epoch, self.start = order, same_every_epoch, 0
        self.merged = 0
        self._bounds = [*range(0, size, batch_size), size]
        tail = size - self._bounds[-2]
        if tail < batch_size and drop_last:
            self._bounds.pop()
        elif tail < world_size:
            self.merged = tail
            del self._bounds[-2]

    def __len__(self) -> int:
        """Steps in a whole epoch, regardless of ``start``."""
        return len(self._bounds) - 1

    def set_epoch(self, epoch: int) -> None:
        if not self.same_every_epoch:
            super().set_epoch(epoch)

    def __iter__(self) -> Iterator[Step]:
        # The epoch is read now, not at the first ``next``, as workers fetch ahead of the epoch's hooks.
        return self._steps(self.epoch, self.start)

    def _steps(self, epoch: int, start: int) -> Iterator[Step]:
        # Reset here: a loader with workers makes two iterators and uses the second.
        self.start = 0
        order = self.order(epoch)
        for index in range(start, len(self)):
            yield Step(epoch, index, tuple(order[self._bounds[index] : self._bounds[index + 1]]))
