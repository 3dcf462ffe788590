"""Reference points that cost more and say more: the whole vocabulary, or samples of the policy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.reference_points.base import Estimate, MeanOverRanks, ReferencePoint

_EXACT = "the KL divergence is summed over the vocabulary and does not read the rewards whose mean it is"


class TokenKL(ReferencePoint):
    """z0 = mean over mismatched rows of sum_t KL(pi_theta || pi_ref) at each token, over the whole vocabulary.

    Exact given each prefix, and never negative, so of lower variance than ``MismatchedKL``, whose one sampled
    token stands for the whole vocabulary. The prefixes are those of the mismatched completions, not of the
    policy's own samples, so it is an estimate of another KL divergence than the definition's, and of its order.
    No gradient. Costs one more forward pass of either model over the mismatched rows.

    Raises:
        ValueError: when called for a step without a mismatched row.
    """

    needs = Needs(reference=True, mismatched=True, exact_kl=True)
    excused: Mapping[str, str] = dict.fromkeys(("reference_in_range", "reference_shift_equivariant"), _EXACT)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        if rows.kl is None:
            raise ValueError("TokenKL: the rows carry no exact KL divergence (LogProbBatch.kl)")
        sample = MeanOverRanks(rows.kl.sum(dim=1)[rows.labels.mismatched])
        if sample.count == 0:
            raise ValueError("TokenKL: the step has no mismatched rows (x_i, y_j) to estimate z0 from")
        return sample.estimate()


class SampledKL(ReferencePoint):
    """z0 = mean reward of completions that the policy itself has just sampled, no gradient.

    The definition: E[r(x, y')] with y' from pi_theta(. | x) at temperature 1, which for a log-ratio is
    KL(pi_theta || pi_ref) (Ethayarajh et al., ICML 2024, section 4.1). Unbiased for completions up to
    ``max_new_tokens``; slow, because the policy generates at every step: the oracle that cheaper estimators
    are measured against. One sample for each of the step's rows. Each rank draws its own samples, so two
    ranks do not give the figures of one.

    Args:
        max_new_tokens: where a sample that has not ended is cut off.

    Raises:
        ValueError: for fewer than one token; when called for a step without samples.
    """

    def __init__(self, *, max_new_tokens: int = 64) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise ValueError(f"SampledKL: max_new_tokens is {max_new_tokens}; it must be at least 1")
        self.needs = Needs(samples=max_new_tokens)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        sample = MeanOverRanks(rewards[rows.labels.mismatched])
        if sample.count == 0:
            raise ValueError("SampledKL: the step has no samples of the policy to estimate z0 from")
        return sample.estimate()
