"""Reference points that match rows by rank, for a loss on first-order stochastic dominance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.common.transfer import moved
from halos_pl.distributed import gather_over_ranks, world_size
from halos_pl.labels import Labels
from halos_pl.objective.reference_points.base import Estimate, ReferencePoint


def _by_class(labels: Labels) -> tuple[Tensor, Tensor]:
    """Indices of the desirable and of the undesirable rows among the rows with loss of all processes."""
    if world_size() == 1:
        host = labels.host
        desirable = [good for good, extra in zip(host.desirable, host.mismatched, strict=True) if not extra]
        places = [[i for i, good in enumerate(desirable) if good == kind] for kind in (True, False)]
        columns = [torch.tensor(each, dtype=torch.long, device="cpu") for each in places]
        good, bad = moved(columns, labels.desirable.device)
        return good, bad
    everywhere = gather_over_ranks(labels.desirable[labels.train_index].float())[0] > 0.5
    return everywhere.nonzero().squeeze(1), (~everywhere).nonzero().squeeze(1)


class RankMatched(ReferencePoint):
    """z0 = reward of the row of the other class with the same rank, with gradient.

    Alignment via optimal transport, unpaired (Melnyk et al. 2024, eq. 8): the k-th best chosen row of the step
    is compared with the k-th best rejected row, over all processes. Rows of equal reward keep their order.

    Raises:
        ValueError: when called: the step has unequal numbers of desirable and undesirable rows.
    """

    scope = "row"
    needs = Needs(pairs=True, whole_step=True)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        train = rows.labels.train_index
        everyone, first = gather_over_ranks(rewards[train])
        classes = _by_class(rows.labels)
        if len(classes[0]) != len(classes[1]):
            raise ValueError(
                f"RankMatched: the step has {len(classes[0])} desirable and {len(classes[1])} undesirable rows;"
                " matching by rank needs equal numbers, so use data with chosen and rejected"
            )
        best, worst = (places[everyone[places].detach().argsort(stable=True)] for places in classes)
        match = torch.empty(len(everyone), dtype=torch.long, device=rewards.device)
        match[best], match[worst] = worst, best
        matched = everyone[match[first : first + len(train)]]
        return Estimate(torch.zeros_like(rewards).index_put((train,), matched), rows=1.0, mean=matched)


_MARGINS = "it is a margin of the reference model, not a mean of rewards"


class SortedMargins(ReferencePoint):
    """z0 = the reference model's margin of the same rank, no gradient.

    A margin is log pi_ref of a row minus that of its paired completion.

    Alignment via optimal transport, paired (Melnyk et al. 2024, eq. 9), together with the reward ``PairMargin``: the
    k-th largest margin of the policy is compared with the k-th largest margin of the reference model, over all
    processes. Rows of equal margin keep their order.

    Raises:
        ValueError: when called: a row has no paired completion, or there are no reference log-probs.
    """

    per_row = True
    needs = Needs(pairs=True, reference=True, step_rewards=True)
    violates: Mapping[str, str] = dict.fromkeys(("reference_in_range", "reference_shift_equivariant"), _MARGINS)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        train = rows.labels.train_index
        if rows.reference_logps is None or rows.labels.unpaired:
            raise ValueError("SortedMargins needs reference log-probs and rows that all have a paired completion")
        logps = rows.reference_logps.sum(dim=1)
        margins, first = gather_over_ranks((logps - logps[rows.labels.pair])[train])
        everyone, _ = gather_over_ranks(rewards[train])
        matched = torch.empty_like(margins)
        # A rejected row's margin is minus that of its paired completion, so the classes are sorted separately: sorted
        # together, the ranks of chosen and rejected rows could mix.
        for places in _by_class(rows.labels):
            matched[places[everyone[places].argsort(stable=True)]] = margins[places].sort(stable=True).values
        of_rows = torch.zeros_like(rewards).index_put((train,), matched[first : first + len(train)])
        return Estimate(of_rows, rows=1.0, mean=matched)
