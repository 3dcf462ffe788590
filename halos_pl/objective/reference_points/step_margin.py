"""The other completion of the pair, plus a margin that depends on the other pairs of the step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import gather_over_ranks
from halos_pl.objective.reference_points.base import Estimate
from halos_pl.objective.reference_points.paired_completion import PairedCompletion
from halos_pl.objective.rewards.base import per_row

_MARGIN = {
    "reference_in_range": "a margin is added to the reward of the other completion",
    "reference_detached": "the margin depends on the policy, without gradient",
}


class _StepMargin(PairedCompletion):
    """z0 = reward of the pair's other completion plus a margin without gradient; minus it for rejected rows."""

    @abstractmethod
    def gap(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        """What the margins depend on, of each row; compared between chosen and rejected. Float [n]."""

    @abstractmethod
    def margins(self, gaps: Tensor) -> Tensor:
        """The margin of each pair in nats, from the gaps of all pairs of the step over all ranks, float [pairs]."""

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        other: Estimate = super().forward(rewards, rows)
        labels = rows.labels
        with torch.no_grad():
            values = self.gap(rewards.detach(), rows)
            chosen = (labels.desirable & labels.train).nonzero().squeeze(1)
            everywhere, first = gather_over_ranks(values[chosen] - values[labels.pair[chosen]])
            margin = self.margins(everywhere)[first : first + len(chosen)].to(rewards.dtype)
            of_rows = torch.zeros_like(rewards).index_put((chosen,), margin)
            of_rows = of_rows.index_put((labels.pair[chosen],), -margin)
        return Estimate(other.value + of_rows, rows=1.0, further={"margin": margin.mean() if len(margin) else 0.0})


class NormalisedGapMargin(_StepMargin):
    """The margin is gamma + alpha * Z: Z is the pair's gap of log-ratios per token, normalised over the step.

    Alpha-DPO (Wu et al. 2025, "AlphaDPO", eq. 12), with ``LogProb`` per token as reward: Z = (gap - mean) / std over
    the pairs of the step and all ranks; std is the sample standard deviation. With one pair, or equal gaps, Z is 0. The
    authors' code normalises by moving averages over steps.

    Args:
        alpha: nats per standard deviation.
        gamma: margin of an average pair, nats.

    Raises:
        ValueError: when called: a row has no paired completion, or there are no reference log-probs.
    """

    needs = Needs(pairs=True, whole_step=True, reference=True)
    violates: Mapping[str, str] = _MARGIN

    def __init__(self, *, alpha: float = 0.05, gamma: float = 0.3) -> None:
        super().__init__()
        self.alpha, self.gamma = float(alpha), float(gamma)

    def gap(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        if rows.reference_logps is None:
            raise ValueError("NormalisedGapMargin needs reference log-probs: choose a reference_model")
        return per_row(rows.policy_logps.detach() - rows.reference_logps, rows, length_normalised=True)

    def margins(self, gaps: Tensor) -> Tensor:
        off = gaps - gaps.mean() if len(gaps) else gaps
        std = (off.square().sum() / max(len(gaps) - 1, 1)).sqrt()
        # Equal gaps differ by rounding; their normalised differences would be noise.
        alike = std <= 1e-6 * gaps.abs().max() if len(gaps) else std == 0
        return self.gamma + self.alpha * torch.where(alike, 0.0, off / torch.where(alike, 1.0, std))


class AllottedMargin(_StepMargin):
    """Margins with a given mean, allotted over the step's pairs: more to pairs that are already won.

    Gamma-PO (Sun et al. 2025, "Robust preference optimization via dynamic target margins", eq. 8): the shares p of n
    pairs minimise mean_i -log sigmoid(beta * gap_i - beta * gamma * n * p_i) + tau * KL(p, uniform); a pair's margin is
    gamma * n * p_i. Solved by exponentiated gradient steps from equal shares, over the pairs of the step and all ranks.
    The authors' code adds pairs of earlier steps.

    Args:
        gamma: mean margin, nats.
        beta: 1 / nats, that of the value function.
        tau: weight of the KL divergence, above 0; towards infinity, all margins are gamma.
        iterations: number of gradient steps.

    Raises:
        ValueError: an argument is outside its range; when called: a row has no paired completion.
    """

    needs = Needs(pairs=True, whole_step=True)
    violates: Mapping[str, str] = _MARGIN

    def __init__(self, *, gamma: float = 0.5, beta: float = 2.0, tau: float = 1.0, iterations: int = 20) -> None:
        super().__init__()
        if not (0 < tau < math.inf and beta > 0 and iterations >= 1):
            raise ValueError(
                f"AllottedMargin: beta is {beta}, tau {tau} and iterations {iterations}; beta and tau must be"
                " above 0, and iterations at least 1"
            )
        self.gamma, self.beta, self.tau, self.iterations = float(gamma), float(beta), float(tau), iterations

    def gap(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        return rewards

    def margins(self, gaps: Tensor) -> Tensor:
        n = len(gaps)
        shares = torch.full_like(gaps, 1 / max(n, 1))
        for _ in range(self.iterations):
            lost = torch.sigmoid(self.beta * (self.gamma * n * shares - gaps))
            slope = self.tau * (1 + torch.log(n * shares)) + self.beta * self.gamma * lost
            shares = torch.softmax(torch.log(shares) - min(0.5 / self.tau, 1.0) * slope, dim=0)
        return self.gamma * n * shares
