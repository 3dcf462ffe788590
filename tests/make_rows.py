"""Rows of random log-probs, for tests that need no model."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from halos_pl.batch import Labels, LogProbBatch


def random_rows(
    seed: int,
    pairs: int,
    mismatched: int = 3,
    *,
    tokens: int = 5,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
) -> LogProbBatch:
    """``pairs`` chosen and rejected rows, shuffled, then ``mismatched`` mismatched ones; lengths 1 to ``tokens``.

    Two pairs answer the same prompt.
    """
    g = torch.Generator().manual_seed(seed)
    n = 2 * pairs + mismatched
    lengths = torch.randint(1, tokens + 1, (n,), generator=g)
    mask = torch.arange(tokens) < lengths[:, None]
    order = torch.randperm(2 * pairs, generator=g)
    place = torch.empty_like(order)
    place[order] = torch.arange(2 * pairs)
    pair = torch.full((n,), -1)
    pair[place[0::2]], pair[place[1::2]] = place[1::2], place[0::2]
    desirable = torch.zeros(n, dtype=torch.bool)
    desirable[place[0::2]] = True
    mismatched = torch.arange(n) >= 2 * pairs
    policy = -scale * torch.rand(n, tokens, generator=g, dtype=dtype) * mask
    reference = -scale * torch.rand(n, tokens, generator=g, dtype=dtype) * mask
    group = torch.randint(0, (pairs + 1) // 2, (n,), generator=g)
    group[place] = torch.arange(2 * pairs) // 4
    return LogProbBatch(policy.requires_grad_(), reference, mask, Labels(desirable, pair, mismatched, group))


seeds = st.integers(0, 2**31 - 1)
