"""How the loss of a step changes with the rewards of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

#: Nats; if no outcome is farther from 0, the policy is still its reference, up to rounding. There a value function may
#: have a kink, and the rows' slopes depend on the side on which rounding puts them.
AT_START = 1e-3


class ClassSums(NamedTuple):
    """Sums over the rows of one class, float scalars.

    Attributes:
        rows: number of rows.
        slope: sum of |dloss/dr|, 1 / nats.
        weight: sum of the weights w.
        row_weight: sum of the rows' own weights.
    """

    rows: Tensor
    slope: Tensor
    weight: Tensor
    row_weight: Tensor


@dataclass(frozen=True)
class Slopes:
    """dloss/dr of the m rows of a micro-batch, or of a rank's share of a step, that carry a loss; without gradient.

    Attributes:
        desirable: BoolTensor [m], whether a row is desirable (of a pair: chosen).
        weight: w of each row, float [m].
        reward: r in nats, float [m], or [m, T] for a reward per token.
        slope: derivative of the step's loss with respect to ``reward``, also through a reference point with gradient;
            1 / nats, of the same shape, 0 outside the rows' tokens.
        outcome: u in nats, of the same shape, 0 outside the rows' tokens.
        denominator: what the step's loss is divided by, float scalar.
        row_weight: the factor of w that comes with the row (``Labels.weight``), float [m].
    """

    desirable: Tensor
    weight: Tensor
    reward: Tensor
    slope: Tensor
    outcome: Tensor
    denominator: Tensor
    row_weight: Tensor

    def select(self, index: Tensor) -> Slopes:
        """The rows ``index`` (LongTensor [k])."""
        return _with_rows([column[index] for column in self._of_rows], self.denominator)

    @property
    def _of_rows(self) -> tuple[Tensor, ...]:
        return self.desirable, self.weight, self.reward, self.slope, self.outcome, self.row_weight

    @property
    def size(self) -> Tensor:
        """|dloss/dr| of each row, summed over its tokens for a reward per token; 1 / nats, float [m]."""
        return self.slope.abs().flatten(start_dim=1).sum(dim=1) if self.slope.dim() > 1 else self.slope.abs()

    def of_class(self, desirable: bool) -> ClassSums:
        """Sums over the desirable or the undesirable rows."""
        member = (self.desirable == desirable).float()
        counted = (torch.ones_like(member), self.size, self.weight, self.row_weight)
        return ClassSums(*((member * each).sum() for each in counted))

    @property
    def moved(self) -> Tensor:
        """Number of outcomes that are not 0 up to rounding, float scalar."""
        return (self.outcome.abs() > AT_START).sum().float()


def joined(parts: Sequence[Slopes]) -> Slopes:
    """The rows of several micro-batches of a step."""
    columns = zip(*(part._of_rows for part in parts), strict=True)
    return _with_rows([torch.cat(column) for column in columns], parts[0].denominator)


def _with_rows(columns: Sequence[Tensor], denominator: Tensor) -> Slopes:
    desirable, weight, reward, slope, outcome, row_weight = columns
    return Slopes(desirable, weight, reward, slope, outcome, denominator, row_weight)


def of_sum(terms: Sequence[Slopes]) -> Slopes:
    """The slopes of a sum of HALOs in the reward of the first: those of a term count where it has the same reward."""
    first, *others = terms
    alike = [other for other in others if other.reward.shape == first.reward.shape]
    further = [torch.where(other.reward == first.reward, other.slope, 0.0) for other in alike]
    return replace(first, slope=torch.stack([first.slope, *further]).sum(dim=0)) if further else first
