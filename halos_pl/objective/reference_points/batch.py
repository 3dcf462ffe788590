"""Reference points estimated from the rewards of the step's rows."""

from __future__ import annotations

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import gather_over_ranks
from halos_pl.objective.reference_points.base import Estimate, MeanOverRanks, ReferencePoint


class BatchMean(ReferencePoint):
    """z0 = mean reward of the step's rows, desirable and undesirable alike, no gradient.

    Q is the data distribution of (x, y) instead of that of mismatched pairs. Each row is part of its own reference
    point, which shrinks outcomes by a fraction 1/n.
    """

    needs = Needs(step_rewards=True)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        sample = MeanOverRanks(rewards[rows.labels.train_index])
        return sample.estimate()


class BatchQuantile(ReferencePoint):
    """z0 = a quantile of the rewards of the step's rows over all ranks, no gradient.

    A reference point that is robust to extreme rewards. Interpolates linearly between rows.

    Args:
        quantile: q in [0, 1]; 0.5 is the median.

    Raises:
        ValueError: q is outside [0, 1].
    """

    needs = Needs(step_rewards=True)

    def __init__(self, *, quantile: float = 0.5) -> None:
        super().__init__()
        if not 0 <= quantile <= 1:
            raise ValueError(f"BatchQuantile: quantile is {quantile}; it must be in [0, 1]")
        self.quantile = float(quantile)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        sample, _ = gather_over_ranks(rewards[rows.labels.train_index].detach().float())
        n, q = len(sample), self.quantile
        if n == 0:
            return Estimate(rewards.new_zeros(()), rows=0.0)
        estimate = torch.quantile(sample, q)
        # Without distributional assumptions: half the distance between the quantiles one standard deviation of the
        # binomial rank below and above.
        spread = (q * (1 - q) / n) ** 0.5
        low, high = (torch.quantile(sample, bound) for bound in (max(q - spread, 0.0), min(q + spread, 1.0)))
        return Estimate(estimate, standard_error=(high - low) / 2, rows=float(n))


class LeaveOneOut(ReferencePoint):
    """z0 = mean reward of the *other* rows of the same prompt, no gradient.

    The baseline of RLOO (Kool et al. 2019; Ahmadian et al. 2024, section 3.3), with completions from the data in
    place of samples: Q(Y' | x) is uniform over the prompt's other completions. A row whose prompt has no other row is
    compared with the mean reward of the step, as by ``BatchMean``; ``alone`` is the share of such rows.
    """

    per_row = True
    within_prompt = True  # except for a row whose prompt has no other
    needs = Needs(step_rewards=True, groups=True)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        other = rows.labels.same_prompt & ~torch.eye(len(rows), dtype=torch.bool, device=rewards.device)
        rewards = rewards.detach()
        weight = other.to(rewards)
        count = weight.sum(dim=1)
        train = rows.labels.train_index
        alone = count == 0
        mean = torch.where(alone, MeanOverRanks(rewards[train]).mean, weight @ rewards / count.clamp(min=1))
        variance = (weight * (rewards[None, :] - mean[:, None]).square()).sum(dim=1) / (count - 1).clamp(min=1)
        return Estimate(
            mean,
            mean=MeanOverRanks(mean[train]).mean,
            standard_error=MeanOverRanks((variance / count.clamp(min=1)).sqrt()[train]).mean,
            rows=MeanOverRanks(count[train]).mean,
            further={"alone": MeanOverRanks(alone[train]).mean},
        )
