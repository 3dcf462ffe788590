"""Rewards: what a completion is worth to the policy, in nats."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from value_functions.bounded import bounded_exp


class Reward(nn.Module, ABC):
    """r(x, y) of each row.

    A HALO in the sense of Ethayarajh et al. (ICML 2024, Def. 3.4) takes
    r = l(y) * log[pi_theta(y|x) / pi_ref(y|x)] with l > 0.
    """

    needs: Needs = Needs()

    @abstractmethod
    def forward(self, rows: LogProbBatch) -> Tensor:
        """Rewards in nats with the gradient of ``rows.policy_logps``: float [n], or one of each token, [n, T].

        Of a reward of tokens, places outside ``rows.mask`` are not read.
        """


def _per_row(token_values: Tensor, rows: LogProbBatch, length_normalised: bool) -> Tensor:
    total = token_values.sum(dim=1)
    return total / rows.mask.sum(dim=1) if length_normalised else total


def _log_ratios(reward: Reward, rows: LogProbBatch) -> Tensor:
    """log pi_theta / pi_ref of each token, [n, T]."""
    if rows.reference_logps is None:
        raise ValueError(
            f"{type(reward).__name__} needs reference log-probs: choose a reference_model, or reward: LogProb"
        )
    return rows.policy_logps - rows.reference_logps


class LogRatio(Reward):
    """Log-ratio of policy and reference: sum over completion tokens of log pi_theta / pi_ref.

    The reward implied by KL-constrained optimisation (Rafailov et al. 2023, eq. 5, without its prompt-only
    term; Ethayarajh et al., ICML 2024, eq. 5; the factor beta belongs to the value function here, so that rewards stay
    in nats and comparable between ablations).

    Args:
        length_normalised: divide by the number of completion tokens, l(y) = 1 / \\|y\\|: nats per token.
    """

    needs = Needs(reference=True)

    def __init__(self, *, length_normalised: bool = False) -> None:
        super().__init__()
        self.length_normalised = length_normalised

    def forward(self, rows: LogProbBatch) -> Tensor:
        return _per_row(_log_ratios(self, rows), rows, self.length_normalised)


class TokenLogRatio(Reward):
    """Log-ratio of policy and reference at each token, [n, T]: every token is an outcome of its own.

    The unit of PPO-style objectives (Schulman et al. 2017, eq. 7; offline in Ethayarajh et al., ICML 2024,
    section 3.3). The loss of a row is the sum over its tokens.
    """

    needs = Needs(reference=True)

    def forward(self, rows: LogProbBatch) -> Tensor:
        return _log_ratios(self, rows)


class HumanlineLogRatio(Reward):
    """Log-ratio with each token's share clamped: sum_t clamp(log pi_theta / pi_ref, low, high).

    Humanline (Liu et al. 2025, "Humanline: online alignment as perceptual loss"): people perceive token
    probabilities with distortion, which is imitated by clipping. A token outside the range has no gradient, so r
    is not linear in the log-ratio. Made for a reference that is re-synced with the policy (``SyncedCopy``).

    Args:
        low, high: nats, log epsilon_P and log epsilon_R.

    Raises:
        ValueError: unless low < 0 < high.
    """

    needs = Needs(reference=True)

    def __init__(self, *, low: float = -1.0, high: float = 1.5) -> None:
        super().__init__()
        if not low < 0 < high:
            raise ValueError(f"HumanlineLogRatio: the range is {low} to {high}; it must include 0")
        self.low, self.high = float(low), float(high)

    def forward(self, rows: LogProbBatch) -> Tensor:
        return _log_ratios(self, rows).clamp(self.low, self.high).sum(dim=1)


class ForwardKL(Reward):
    """r = 1 - exp(-log-ratio): DPO under a forward-KL constraint instead of the reverse one.

    The score of Wang et al. 2023 ("Beyond reverse KL", table 1), shifted so that r = 0 where policy equals
    reference. Not linear in the log-ratio. Below -40 nats it goes on linearly, where exp would overflow.
    """

    needs = Needs(reference=True)

    def forward(self, rows: LogProbBatch) -> Tensor:
        return 1 - bounded_exp(-_log_ratios(self, rows).sum(dim=1))


class JensenShannon(Reward):
    """r = log 2 + log sigmoid(log-ratio): DPO under a Jensen-Shannon constraint.

    The score of Wang et al. 2023 ("Beyond reverse KL", table 1), shifted so that r = 0 where policy equals
    reference. Not linear in the log-ratio.
    """

    needs = Needs(reference=True)

    def forward(self, rows: LogProbBatch) -> Tensor:
        return math.log(2) + F.logsigmoid(_log_ratios(self, rows).sum(dim=1))


class AlphaDivergence(Reward):
    """r = (exp((alpha - 1) * log-ratio) - 1) / (alpha - 1): DPO under an alpha-divergence constraint.

    The score of Wang et al. 2023 ("Beyond reverse KL", table 1), up to its constant factor as in TRL, and
    shifted so that r = 0 where policy equals reference. Not linear in the log-ratio. Where the exponent
    is above 40 it goes on linearly.

    Args:
        alpha: in (0, 1); towards 1 r becomes the log-ratio, at 0 it is the forward KL divergence's.

    Raises:
        ValueError: for an alpha outside (0, 1).
    """

    needs = Needs(reference=True)

    def __init__(self, *, alpha: float = 0.5) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(f"AlphaDivergence: alpha is {alpha}; it must be in (0, 1)")
        self.alpha = float(alpha)

    def forward(self, rows: LogProbBatch) -> Tensor:
        slope = self.alpha - 1
        return (bounded_exp(slope * _log_ratios(self, rows).sum(dim=1)) - 1) / slope


class LogProb(Reward):
    """Plain log-probability: sum over completion tokens of log pi_theta. Needs no reference model.

    Equals ``LogRatio`` up to a constant where pi_ref is uniform over completions (Ethayarajh et al., ICML
    2024, section 4.3, the variant without a reference model); otherwise it is no HALO reward.

    Args:
        length_normalised: divide by the number of completion tokens: nats per token.
    """

    def __init__(self, *, length_normalised: bool = False) -> None:
        super().__init__()
        self.length_normalised = length_normalised

    def forward(self, rows: LogProbBatch) -> Tensor:
        return _per_row(rows.policy_logps, rows, self.length_normalised)


class LogOdds(Reward):
    """log[p / (1 - p)] of p = exp(mean log pi_theta per token), the geometric mean of the tokens' probabilities.

    ORPO (Hong et al. 2024, eq. 4). Needs no reference model; not linear in any log-ratio. A mean log-prob
    closer to 0 than 1e-6 counts as -1e-6, where the odds are a million to one.
    """

    def forward(self, rows: LogProbBatch) -> Tensor:
        mean = _per_row(rows.policy_logps, rows, length_normalised=True).clamp(max=-1e-6)
        return mean - torch.log(-torch.expm1(mean))


class PairMargin(Reward):
    """log pi_theta of the row less that of its paired completion, with gradient through both; no reference in it.

    What AOT compares, quantile by quantile, with the reference's margins (Melnyk et al. 2024, "Distributional
    preference alignment via optimal transport", paired variant); see ``SortedMargins``.

    Mismatched rows, which have none, are worth 0.

    Raises:
        ValueError: when called with another row that has no paired completion.
    """

    needs = Needs(pairs=True)

    def forward(self, rows: LogProbBatch) -> Tensor:
        logps, alone = rows.policy_logps.sum(dim=1), rows.labels.pair < 0
        if bool((alone & rows.labels.train).any()):
            raise ValueError(
                "PairMargin: a row has no paired completion; this reward needs data with chosen and rejected"
            )
        return torch.where(alone, 0.0, logps - logps[rows.labels.pair])
