"""The reward of LD-DPO."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.rewards.base import Reward, log_ratios


class SharedLengthLogRatio(Reward):
    """Log-ratio in which tokens beyond the length of the paired completion count less.

    LD-DPO (Liu et al. 2024, "Length desensitization in direct preference optimization", eq. 9): the first min(T, T')
    tokens of a completion of T tokens have weight 1, the others alpha, in policy and reference alike, as in TRL 1.16
    (``ld_alpha``). LLaMA-Factory weights the policy alone. Rows without a paired completion keep all their tokens.

    Args:
        alpha: weight of the tokens beyond the shared length, in [0, 1]; 1 is ``LogRatio``.

    Raises:
        ValueError: alpha is outside [0, 1]; when called: a row that is not mismatched has no paired completion.
    """

    needs = Needs(reference=True, pairs=True)
    violates: Mapping[str, str] = {
        "reward_linear": "tokens beyond the paired completion's length weigh less than the others",
        "reward_of_its_row": "it depends on the length of the paired completion",
    }

    def __init__(self, *, alpha: float = 0.5) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"SharedLengthLogRatio: alpha is {alpha}; it must be in [0, 1]")
        self.alpha = float(alpha)

    def forward(self, rows: LogProbBatch) -> Tensor:
        if rows.labels.unpaired:
            raise ValueError(
                "SharedLengthLogRatio: a row has no paired completion; this reward needs data with chosen and rejected"
            )
        length, pair = rows.mask.sum(dim=1), rows.labels.pair
        shared = torch.where(pair < 0, length, torch.minimum(length, length[pair]))
        beyond = rows.mask.cumsum(dim=1) > shared[:, None]
        ratios = log_ratios(self, rows)
        return torch.where(beyond, self.alpha * ratios, ratios).sum(dim=1)
