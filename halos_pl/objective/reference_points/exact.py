"""Costlier and more accurate reference points: over the whole vocabulary, or from samples of the policy."""

from __future__ import annotations

from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.reference_points.base import Estimate, MeanOverRanks, ReferencePoint


class TokenKL(ReferencePoint):
    """z0 = mean over mismatched rows of sum_t KL(pi_theta || pi_ref) at each token, over the whole vocabulary.

    Exact given each prefix, and never negative. Its variance is lower than that of ``MismatchedKL``, where one sampled
    token stands for the whole vocabulary. The prefixes come from mismatched completions, not from samples of the
    policy, so it estimates a KL divergence other than the definition's, but of the same order. It is an expected reward
    only for ``LogRatio`` summed over tokens; compared with a reward per token, it is too large by the number of tokens.
    No gradient. Costs one more forward pass of each model over the mismatched rows.

    Raises:
        ValueError: when called: the step has no mismatched row.
    """

    needs = Needs(reference=True, mismatched=True, exact_kl=True)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        if rows.kl is None:
            raise ValueError("TokenKL: the rows have no exact KL divergence (LogProbBatch.kl)")
        sample = MeanOverRanks(rows.kl.sum(dim=1)[rows.labels.mismatched_index])
        if sample.empty:
            raise ValueError("TokenKL: the step has no mismatched rows (x_i, y_j) to estimate z0 from")
        return sample.estimate()


class SampledKL(ReferencePoint):
    """z0 = mean reward of completions sampled from the current policy, no gradient.

    The definition: E[r(x, y')] with y' from pi_theta(. | x) at temperature 1, which for a log-ratio is
    KL(pi_theta || pi_ref) (Ethayarajh et al., ICML 2024, section 4.1). Unbiased for completions up to
    ``max_new_tokens``. Slow, because the policy generates in every step: a benchmark for cheaper estimators. Draws one
    sample for each row of the step. Each rank draws separately, so the figures depend on the number of ranks.

    Args:
        max_new_tokens: maximum number of tokens per sample; longer ones are cut off.

    Raises:
        ValueError: ``max_new_tokens`` is below 1; when called: the step has no samples.
    """

    def __init__(self, *, max_new_tokens: int = 64) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise ValueError(f"SampledKL: max_new_tokens is {max_new_tokens}; it must be at least 1")
        self.needs = Needs(samples=max_new_tokens)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        sample = MeanOverRanks(rewards[rows.labels.mismatched_index])
        if sample.empty:
            raise ValueError("SampledKL: the step has no samples of the policy to estimate z0 from")
        return sample.estimate()
