"""The log-ratio of policy and reference, per completion or per token."""

from __future__ import annotations

from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.rewards.base import Reward, log_ratios, per_row


class LogRatio(Reward):
    """Log-ratio of policy and reference: sum over completion tokens of log pi_theta / pi_ref.

    The reward implied by KL-constrained optimisation (Rafailov et al. 2023, eq. 5, without its prompt-only
    term; Ethayarajh et al., ICML 2024, eq. 5). The factor beta belongs to the value function here, so that rewards stay
    in nats and comparable between ablations.

    Args:
        length_normalised: whether to divide by the number of completion tokens, l(y) = 1 / \\|y\\|: nats per token.
    """

    needs = Needs(reference=True)

    def __init__(self, *, length_normalised: bool = False) -> None:
        super().__init__()
        self.length_normalised = length_normalised

    def forward(self, rows: LogProbBatch) -> Tensor:
        return per_row(log_ratios(self, rows), rows, self.length_normalised)


class TokenLogRatio(Reward):
    """Log-ratio of policy and reference at each token, [n, T]: every token is a separate outcome.

    The unit of PPO-style objectives (Schulman et al. 2017, eq. 7; offline in Ethayarajh et al., ICML 2024,
    section 3.3). The loss of a row is summed over its tokens.
    """

    needs = Needs(reference=True)

    def forward(self, rows: LogProbBatch) -> Tensor:
        return log_ratios(self, rows)
