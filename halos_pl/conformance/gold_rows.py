"""Steps with gold answers, drawn for the clauses of the suite."""

from __future__ import annotations

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Routing
from halos_pl.labels import Labels


def joined(rows: LogProbBatch, gold: LogProbBatch, seed: int) -> LogProbBatch:
    """Rows of a step together with gold answers to some of their prompts, in random order.

    Args:
        rows: n rows, some with a loss.
        gold: m desirable rows of the same width, without pairs.
        seed: seed of the order, and of the prompts that are answered.
    """
    draw = torch.Generator().manual_seed(seed)
    n, m = len(rows), len(gold)
    train = rows.labels.train_index
    answered = train[torch.randint(len(train), (m,), generator=draw)]

    def both(a: Tensor | None, b: Tensor | None) -> Tensor:
        assert a is not None
        assert b is not None
        return torch.cat([a, b])

    assert rows.routing is not None
    assert gold.routing is not None
    of, other = rows.labels, gold.labels
    together = LogProbBatch(
        policy_logps=both(rows.policy_logps, gold.policy_logps),
        reference_logps=both(rows.reference_logps, gold.reference_logps),
        mask=both(rows.mask, gold.mask),
        labels=Labels(
            desirable=both(of.desirable, other.desirable),
            pair=both(of.pair, other.pair),
            mismatched=both(of.mismatched, other.mismatched),
            group=both(of.group, of.group[answered]),
            score=both(of.score, other.score),
            weight=both(of.weight, other.weight),
            gold=torch.arange(n + m) >= n,
        ),
        kl=both(rows.kl, gold.kl),
        routing=Routing(
            both(rows.routing.probability, gold.routing.probability), both(rows.routing.chosen, gold.routing.chosen)
        ),
        scalar=both(rows.scalar, gold.scalar),
    )
    return together.select(torch.randperm(n + m, generator=draw))
