"""Reference points that match rows by rank: first-order stochastic dominance as a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from halos_pl.distributed import gather_over_ranks
from halos_pl.outcomes import Needs, Rows
from halos_pl.reference_points.base import ReferencePoint


class SortedRival(ReferencePoint):
    """z0 = reward of the row of the other class that has the same rank, with gradient.

    Alignment via optimal transport, unpaired (Melnyk et al. 2024, eq. 8): the k-th best chosen row of the step
    is compared with the k-th best rejected one, over all ranks. Rows of equal reward keep their order.

    Raises:
        ValueError: when called for a step with unequal numbers of desirable and undesirable rows.
    """

    scope = "row"
    needs = Needs(rivals=True, whole_step=True)

    def forward(self, rewards: Tensor, rows: Rows) -> Tensor:
        everyone, first = gather_over_ranks(rewards)
        desirable = gather_over_ranks(rows.desirable.to(rewards))[0] > 0.5
        groups = [place.nonzero().squeeze(1) for place in (desirable, ~desirable)]
        if len(groups[0]) != len(groups[1]):
            raise ValueError(
                f"SortedRival: the step has {len(groups[0])} desirable and {len(groups[1])} undesirable rows; rows"
                " are matched by rank, so there must be as many of either: use data with chosen and rejected"
            )
        match = torch.empty_like(desirable, dtype=torch.long)
        by_rank = [group[everyone[group].detach().argsort(stable=True)] for group in groups]
        match[by_rank[0]], match[by_rank[1]] = by_rank[1], by_rank[0]
        matched = everyone[match[first : first + len(rewards)]]
        self.report(matched, rows=1.0)
        return matched


class SortedMargins(ReferencePoint):
    """z0 = the reference's margin of the same rank: log pi_ref of a row less that of its rival, sorted; no gradient.

    Alignment via optimal transport, paired (Melnyk et al. 2024, eq. 9), together with the reward ``PairMargin``: the
    k-th largest margin of the policy is compared with the k-th largest margin of the reference, over
    all ranks. Rows of equal margin keep their order.

    Raises:
        ValueError: when called with a row that has no rival.
    """

    needs = Needs(rivals=True, reference=True, step_rewards=True)

    def forward(self, rewards: Tensor, rows: Rows) -> Tensor:
        if rows.reference_logps is None or bool((rows.rival < 0)[rows.train].any()):
            raise ValueError("SortedMargins needs reference log-probs and rows that all have a rival")
        logps = rows.reference_logps.sum(dim=1)
        margins, first = gather_over_ranks(logps - logps[rows.rival])
        everyone, _ = gather_over_ranks(rewards)
        matched = torch.empty_like(margins)
        # A rejected row's margin is its rival's with the other sign, so the two classes are sorted apart:
        # together, the ranks of a chosen and of a rejected row could mix.
        desirable = gather_over_ranks(rows.desirable.to(rewards))[0] > 0.5
        for place in (desirable.nonzero().squeeze(1), (~desirable).nonzero().squeeze(1)):
            matched[place[everyone[place].argsort(stable=True)]] = margins[place].sort(stable=True).values
        own = matched[first : first + len(rewards)]
        self.report(matched, rows=1.0)
        return own
