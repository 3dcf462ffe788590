"""The labels of a batch's rows, on a device and on the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halos_pl.common.transfer import moved


class HostLabels(NamedTuple):
    """Labels as Python lists: reading them never waits for a device.

    Attributes:
        desirable, mismatched: [n], as in :class:`Labels`.
        pair: [n], as in :class:`Labels`.
        gold: [n], as in :class:`Labels`.
    """

    desirable: list[bool]
    mismatched: list[bool]
    pair: list[int]
    gold: list[bool]

    def select(self, numbers: Sequence[int]) -> HostLabels:
        """The rows ``numbers``, with pairs renumbered."""
        place = {row: k for k, row in enumerate(numbers)} | {-1: -1}
        return HostLabels(
            [self.desirable[i] for i in numbers],
            [self.mismatched[i] for i in numbers],
            [place.get(self.pair[i], -1) for i in numbers],
            [self.gold[i] for i in numbers],
        )


@dataclass
class Labels:
    """The labels of n rows. To add a column to all batches, add it here.

    Labels that have been moved to a device (:meth:`to`) keep a copy on the host until a column changes.

    Attributes:
        desirable: BoolTensor [n].
        pair: LongTensor [n], row of the pair's other completion, -1 for none (default).
        mismatched: BoolTensor [n], rows that only feed z0 and get no gradient: (x_i, y_j), or a sample of the policy.
            Default: False.
        group: LongTensor [n], equal for rows that answer the same prompt, however it was truncated; a second copy of
            them in the same step has a different number. Default: each row is its own group.
        score: float32 [n], quality of a row, higher is better, in the unit of the data minus the mean of its prompt's
            rows. NaN, and the default, stand for 1 in desirable and 0 in undesirable rows.
        weight: float32 [n], factor of the row's loss, at least 0; the two rows of a pair have the same. Every term
            multiplies the row's share of its sum by it, and no denominator depends on it. Default: 1.
        gold: BoolTensor [n], rows whose completion is a gold answer: nobody compared it with others, and only terms
            that need it (``Needs.gold``) see it. It is not mismatched and has no pair. Default: False.

    Raises:
        ValueError: for a column that is not of shape [n]; on the CPU, also for a weight that is negative or not finite,
            and for a gold answer that is mismatched or has a pair.
    """

    desirable: Tensor
    pair: Tensor = None  # type: ignore[assignment]  # __post_init__ sets the defaults
    mismatched: Tensor = None  # type: ignore[assignment]
    group: Tensor = None  # type: ignore[assignment]
    score: Tensor = None  # type: ignore[assignment]
    weight: Tensor = None  # type: ignore[assignment]
    gold: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        n, device = len(self.desirable), self.desirable.device
        if self.pair is None:
            self.pair = torch.full((n,), -1, device=device)
        if self.mismatched is None:
            self.mismatched = torch.zeros(n, dtype=torch.bool, device=device)
        if self.group is None:
            self.group = torch.arange(n, device=device)
        weighted = self.weight is not None
        if not weighted:
            self.weight = torch.ones(n, device=device)
        given = self.gold is not None
        if not given:
            self.gold = torch.zeros(n, dtype=torch.bool, device=device)
            self.__dict__["_without_gold"] = versions_of([self.gold])
        by_label = self.desirable.float()
        self.score = by_label if self.score is None else torch.where(self.score.isnan(), by_label, self.score)
        for column in fields(self):
            shape = tuple(getattr(self, column.name).shape)
            if shape != (n,):
                raise ValueError(f"Labels.{column.name} has shape {shape}, not {(n,)}")
        # Reading another device would wait for it, and a tensor without data has no values.
        readable = type(self.desirable) is Tensor and device.type == "cpu"
        if weighted and readable:
            wrong = (~(self.weight.isfinite() & (self.weight >= 0))).nonzero()
            if len(wrong):
                raise ValueError(
                    f"Labels.weight is {float(self.weight[wrong[0]]):g} in row {int(wrong[0])}; it must be a finite"
                    " number of at least 0"
                )
        if given and readable:
            wrong = (self.gold & (self.mismatched | (self.pair >= 0))).nonzero()
            if len(wrong):
                raise ValueError(
                    f"Labels.gold is True in row {int(wrong[0])}, which is mismatched or has a pair; a gold answer is a"
                    " row of its own"
                )

    def __len__(self) -> int:
        return len(self.desirable)

    @property
    def train(self) -> Tensor:
        """BoolTensor [n]: the rows that carry a loss."""
        return ~self.mismatched

    @property
    def same_prompt(self) -> Tensor:
        """BoolTensor [n, n]: the second row answers the prompt of the first, and carries a loss."""
        return (self.group[:, None] == self.group[None, :]) & self.train

    @property
    def host(self) -> HostLabels:
        """The labels on the host. Labels that were created on a device wait for it."""
        columns = self.desirable, self.mismatched, self.pair, self.gold
        return self._kept or HostLabels(*(column.tolist() for column in columns))

    @property
    def _kept(self) -> HostLabels | None:
        """The copy on the host, unless a column has changed since."""
        versions, view = self.__dict__.get("_host", (None, None))  # not a field: replace() drops it
        return view if versions == versions_of(getattr(self, f.name) for f in fields(self)) else None

    def _keep(self, view: HostLabels, **indices: Any) -> None:
        self.__dict__.update(_host=(versions_of(getattr(self, f.name) for f in fields(self)), view), **indices)

    @property
    def train_index(self) -> Tensor:
        """LongTensor [m]: the rows that carry a loss. Unlike a mask, an index does not wait for the device."""
        return self._index(False)

    @property
    def mismatched_index(self) -> Tensor:
        """LongTensor [m]: the mismatched rows."""
        return self._index(True)

    @property
    def unpaired(self) -> bool:
        """Whether a row that carries a loss has no pair."""
        host = self.host
        return any(pair < 0 and not extra for pair, extra in zip(host.pair, host.mismatched, strict=True))

    @property
    def has_gold(self) -> bool:
        """Whether a row is a gold answer. Labels that were created without any do not wait for their device."""
        return self.__dict__.get("_without_gold") != versions_of([self.gold]) and any(self.host.gold)

    def _index(self, mismatched: bool) -> Tensor:
        if self._kept is None:
            return (self.mismatched == mismatched).nonzero().squeeze(1)
        indices: dict[bool, Tensor] = self.__dict__.setdefault("_indices", {})
        if mismatched not in indices:
            (indices[mismatched],) = moved([self._rows(mismatched)], self.mismatched.device)
        return indices[mismatched]

    def _rows(self, mismatched: bool) -> Tensor:
        """LongTensor [m] on the CPU: the mismatched rows, or the others."""
        rows = [i for i, kind in enumerate(self.host.mismatched) if kind == mismatched]
        return torch.tensor(rows, dtype=torch.long, device="cpu")

    def to(self, device: torch.device | str) -> Labels:
        """The same labels on ``device``."""
        return self._on(moved(self._columns(), torch.device(device)))

    def _columns(self) -> list[Tensor]:
        """All that moves to a device."""
        return [*(getattr(self, f.name) for f in fields(self)), self._rows(False), self._rows(True)]

    def _on(self, columns: list[Tensor]) -> Labels:
        """The same labels from moved columns."""
        *labels, train, mismatched = columns
        other = replace(self, **{f.name: column for f, column in zip(fields(self), labels, strict=True)})
        other._keep(self.host, _indices={False: train, True: mismatched})
        return other

    def select(self, index: Tensor, numbers: Sequence[int] | None = None) -> Labels:
        """The rows ``index`` (LongTensor [m]), with pairs renumbered; -1 if a pair's other row is not among them.

        Args:
            index: Positions of the rows, on their device.
            numbers: The same positions on the host; without them, the new labels have no copy on the host.
        """
        place = torch.full((len(self) + 1,), -1, dtype=torch.long, device=self.pair.device)
        place[index] = torch.arange(len(index), device=self.pair.device)
        chosen = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        labels = Labels(**{**chosen, "pair": place[chosen["pair"]]})  # a pair of -1 reads the last entry, which is -1
        if numbers is not None:
            labels._keep(self.host.select(numbers))
        return labels


def versions_of(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Changes whenever a tensor is replaced or changed in place; does not wait for a device."""
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
