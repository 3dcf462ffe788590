"""The token weights of FIPO."""

from __future__ import annotations

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.objective.policy_weights.base import PolicyWeight


class FutureKL(PolicyWeight):
    """A weight for each token: the ratio of policy and reference from this token on, discounted and clamped.

    w_t = clamp(exp(sum_{k >= t} gamma^(k - t) * log-ratio_k), low, high) with gamma = 2^(-1 / half_life) (FIPO, arXiv
    2603.19835; ``fipo_decay_rate`` and ``fipo_clip_range`` of ms-swift). Needs a reward per token.

    Args:
        half_life: number of tokens after which a log-ratio counts half, above 0.
        low, high: bounds of the weight, 0 <= low <= 1 <= high.

    Raises:
        ValueError: an argument is outside its range; when called: the reward is one number per row.
    """

    def __init__(self, *, half_life: float = 32.0, low: float = 1.0, high: float = 1.2) -> None:
        super().__init__()
        if not half_life > 0:
            raise ValueError(f"FutureKL: half_life is {half_life}; it must be above 0")
        if not 0 <= low <= 1 <= high:
            raise ValueError(f"FutureKL: the bounds are {low} and {high}; they must satisfy 0 <= low <= 1 <= high")
        self.half_life, self.low, self.high = float(half_life), float(low), float(high)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        if rewards.dim() == 1:
            raise ValueError("FutureKL weights tokens, so it needs a reward per token, such as TokenLogRatio")
        ahead = torch.where(rows.mask, rewards, 0.0)
        step = 1
        while step < ahead.shape[1]:  # sums over 1, 2, 4, ... tokens
            shifted = torch.nn.functional.pad(ahead[:, step:], (0, step))
            ahead, step = ahead + 2 ** (-step / self.half_life) * shifted, 2 * step
        bounds = (torch.tensor(bound, dtype=ahead.dtype).log().item() for bound in (self.low, self.high))
        return ahead.clamp(*bounds).exp()
