"""Reference points that match rows by rank: first-order stochastic dominance as a loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import gather_over_ranks
from halos_pl.objective.reference_points.base import Estimate, ReferencePoint


def _by_class(desirable: Tensor) -> tuple[Tensor, Tensor]:
    """Places, among the rows of all ranks, of desirable and of undesirable ones."""
    everywhere = gather_over_ranks(desirable.float())[0] > 0.5
    return everywhere.nonzero().squeeze(1), (~everywhere).nonzero().squeeze(1)


class RankMatched(ReferencePoint):
    """z0 = reward of the row of the other class that has the same rank, with gradient.

    Alignment via optimal transport, unpaired (Melnyk et al. 2024, eq. 8): the k-th best chosen row of the step
    is compared with the k-th best rejected one, over all ranks. Rows of equal reward keep their order.

    Raises:
        ValueError: when called for a step with unequal numbers of desirable and undesirable rows.
    """

    scope = "row"
    needs = Needs(pairs=True, whole_step=True)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        own = rows.labels.train.nonzero().squeeze(1)
        everyone, first = gather_over_ranks(rewards[own])
        classes = _by_class(rows.labels.desirable[own])
        if len(classes[0]) != len(classes[1]):
            raise ValueError(
                f"RankMatched: the step has {len(classes[0])} desirable and {len(classes[1])} undesirable rows; rows"
                " are matched by rank, so there must be as many of either: use data with chosen and rejected"
            )
        best, worst = (places[everyone[places].detach().argsort(stable=True)] for places in classes)
        match = torch.empty(len(everyone), dtype=torch.long, device=rewards.device)
        match[best], match[worst] = worst, best
        matched = everyone[match[first : first + len(own)]]
        return Estimate(torch.zeros_like(rewards).index_put((own,), matched), rows=1.0, mean=matched)


_MARGINS = "it is a margin of the reference model, not a mean of rewards"


class SortedMargins(ReferencePoint):
    """z0 = the reference's margin of the same rank, no gradient.

    A margin is log pi_ref of a row less that of its paired completion.

    Alignment via optimal transport, paired (Melnyk et al. 2024, eq. 9), together with the reward ``PairMargin``: the
    k-th largest margin of the policy is compared with the k-th largest margin of the reference, over
    all ranks. Rows of equal margin keep their order.

    Raises:
        ValueError: when called with a row that has no paired completion.
    """

    per_row = True
    needs = Needs(pairs=True, reference=True, step_rewards=True)
    violates: Mapping[str, str] = dict.fromkeys(("reference_in_range", "reference_shift_equivariant"), _MARGINS)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        own = rows.labels.train.nonzero().squeeze(1)
        if rows.reference_logps is None or bool((rows.labels.pair[own] < 0).any()):
            raise ValueError("SortedMargins needs reference log-probs and rows that all have a paired completion")
        logps = rows.reference_logps.sum(dim=1)
        margins, first = gather_over_ranks((logps - logps[rows.labels.pair])[own])
        everyone, _ = gather_over_ranks(rewards[own])
        matched = torch.empty_like(margins)
        # A rejected row's margin is its paired completion's with the other sign, so the two classes are sorted apart:
        # together, the ranks of a chosen and of a rejected row could mix.
        for places in _by_class(rows.labels.desirable[own]):
            matched[places[everyone[places].argsort(stable=True)]] = margins[places].sort(stable=True).values
        of_rows = torch.zeros_like(rewards).index_put((own,), matched[first : first + len(own)])
        return Estimate(of_rows, rows=1.0, mean=matched)
