"""KTO's estimate of the KL divergence."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.reference_points.base import Estimate, MeanOverRanks, ReferencePoint


class MismatchedKL(ReferencePoint):
    """z0 = max(0, mean reward of mismatched rows (x_i, y_j)), no gradient.

    The estimator of KTO (Ethayarajh et al., ICML 2024, section 4.1): rewards of completions of *other* prompts
    stand in for E_{y' ~ pi_theta}[r(x, y')] = KL(pi_theta || pi_ref). It is biased, but needs no sampling.
    The mean is over all ranks of the step. The clamp keeps z0 a mean of rewards: policy and reference both sum to 1, so
    some completion has a log-ratio of at least 0 and some one of at most 0.

    Off-policy completions often have a negative mean log-ratio; the clamp then sets z0 to 0, sometimes for
    whole runs. ``outcome/z0_clamped`` shows how often.

    Args:
        clamp: whether to replace a negative mean by 0, as in the paper, since a KL divergence cannot be negative. Set
            it to false for rewards that are not log-ratios, such as ``LogProb``, whose mean is always negative.

    Raises:
        ValueError: when called: the step has no mismatched row.
    """

    needs = Needs(mismatched=True)

    def __init__(self, *, clamp: bool = True) -> None:
        super().__init__()
        self.clamp = clamp

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        sample = MeanOverRanks(rewards[rows.labels.mismatched_index])
        if sample.empty:
            raise ValueError("MismatchedKL: the step has no mismatched rows (x_i, y_j) to estimate z0 from")
        if not self.clamp:
            return sample.estimate()
        return replace(
            sample.estimate(), value=sample.mean.clamp(min=0), mean=sample.mean, clamped=(sample.mean < 0).float()
        )
