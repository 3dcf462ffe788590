"""Losses that are no HALOs, as terms of their own: baselines and the extra terms of composites."""

from __future__ import annotations

from torch import Tensor

from halos_pl.distributed import sum_over_ranks
from halos_pl.objective import Objective, Result, TermContext
from halos_pl.outcomes import Needs, Rows


class NLL(Objective):
    """Negative log-likelihood of desirable completions, a mean over their tokens.

    Alone it is supervised fine-tuning; beside a HALO, the regulariser of CPO, SLiC or ORPO.

    Args:
        weight: factor of the term.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @property
    def needs(self) -> Needs:
        return Needs()

    def prepare(self, rows: Rows) -> TermContext:
        kept = (rows.desirable & rows.train).float()
        tokens: Tensor = (kept * rows.mask.sum(dim=1)).sum()
        return TermContext(sign=-kept.new_ones(len(rows)), weight=kept, denominator=sum_over_ranks(tokens))

    def judge(self, rows: Rows, context: TermContext) -> Result:
        # A step whose rows are all undesirable has nothing to imitate: a loss of 0, not 0 / 0.
        total = -(context.weight * rows.policy_logps.sum(dim=1)).sum()
        return Result(self.weight * total / context.denominator.clamp(min=1))
