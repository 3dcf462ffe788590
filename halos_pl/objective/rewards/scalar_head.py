"""The scalar of a reward model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.rewards.base import Reward


class ScalarHead(Reward):
    """The number that a linear head gives the row, from the policy's hidden state after the row's last token.

    This trains a reward model (Ouyang et al. 2022, eq. 1) instead of a policy: no log-prob is computed and no
    reference model loaded. With ``PairedCompletion``, ``LogSigmoid(beta=1)`` and ``Pairwise`` the loss is that of
    Bradley and Terry (1952), -log sigmoid(r_chosen - r_rejected); then r is a log-odds, in nats. Preferences determine
    r only up to a function of the prompt; see ``Centring``.

    Raises:
        ValueError: when called: the rows have no scalars.
    """

    needs = Needs(scalar=True)
    violates: Mapping[str, str] = {
        "reward_zero_at_reference": "it has no reference model",
        "reward_linear": "a learned head computes it, not log-probs",
    }

    def forward(self, rows: LogProbBatch) -> Tensor:
        if rows.scalar is None:
            raise ValueError("ScalarHead needs a policy with a scalar head: Scorer(model, scalar_head=True)")
        return rows.scalar
