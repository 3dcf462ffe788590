"""Composites: the sum of several terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.halo import Context, Objective, Result, with_logps


@dataclass(frozen=True)
class SumContext:
    """Contexts of the terms of a sum."""

    parts: tuple[Context, ...]

    def select(self, index: Tensor) -> SumContext:
        return SumContext(tuple(part.select(index) for part in self.parts))


@dataclass(frozen=True)
class WithoutGold:
    """Context of a term that does not see the gold answers among the n rows of a step.

    Attributes:
        context: the term's own context, of the other rows only.
        place: LongTensor [n], number of each row among these others, -1 for a gold answer.
    """

    context: Context
    place: Tensor

    def select(self, index: Tensor) -> WithoutGold:
        kept = self.place[index]
        return WithoutGold(self.context.select(kept[kept >= 0]), _numbered(kept >= 0))


def _numbered(chosen: Tensor) -> Tensor:
    """The number of each chosen row among those chosen, -1 for the others; LongTensor [n]."""
    return torch.where(chosen, chosen.cumsum(0) - 1, -1)


class Sum(Objective):
    """A composite: the sum of terms, each with its own weights and denominator.

    A term that does not need gold answers is computed as if the step had none: it never sees such a row.

    Args:
        terms: One or more terms. The outcomes of the first HALO among them are reported.

    Raises:
        ValueError: without terms, and if their reference points need different mismatched rows.
    """

    def __init__(self, terms: Sequence[Objective]) -> None:
        super().__init__()
        if not terms:
            raise ValueError("Sum: no terms")
        if any(term.needs.samples for term in terms) and any(term.needs.mismatched for term in terms):
            raise ValueError(
                "one term's reference point needs mismatched rows and another's needs samples of the policy, but a step"
                " has only one of the two: give all terms the same kind of reference point"
            )
        self.terms = nn.ModuleList(terms)

    def _objectives(self) -> list[Objective]:
        return list(self.terms)  # type: ignore[arg-type]

    @property
    def needs(self) -> Needs:
        each = [term.needs for term in self._objectives()]
        return with_logps(reduce(or_, each), *each)

    def seen_by_terms(self, rows: LogProbBatch) -> list[LogProbBatch]:
        """The rows that each term sees."""
        terms = self._objectives()
        if not any(term.needs.gold for term in terms):
            return [rows] * len(terms)
        others = rows.without_gold()
        return [rows if term.needs.gold else others for term in terms]

    def prepare(self, rows: LogProbBatch) -> SumContext:
        parts: list[Context] = []
        for term, seen in zip(self._objectives(), self.seen_by_terms(rows), strict=True):
            part = term.prepare(seen)
            parts.append(part if seen is rows else WithoutGold(part, _numbered(~rows.labels.gold)))
        return SumContext(tuple(parts))

    def compute_loss(self, rows: LogProbBatch, context: SumContext) -> Result:
        terms = self._objectives()
        parts = [part.context if isinstance(part, WithoutGold) else part for part in context.parts]
        seen = zip(terms, self.seen_by_terms(rows), parts, strict=True)
        results = [term.compute_loss(of_term, part) for term, of_term, part in seen]
        of_halo = next((r for r in results if r.outcomes is not None), None)
        return Result(
            loss=torch.stack([r.loss for r in results]).sum(),
            outcomes=of_halo.outcomes if of_halo else None,
            estimate=of_halo.estimate if of_halo else None,
            terms={
                f"{i}_{type(t).__name__}": r.loss.detach() for i, (t, r) in enumerate(zip(terms, results, strict=True))
            },
            slopes=tuple(pair for r in results for pair in r.slopes),
        )
