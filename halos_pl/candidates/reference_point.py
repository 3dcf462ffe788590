"""The reference point of policies over candidates: the KL divergence itself.

This is *not* the KTO paper's estimate. The paper averages rewards of other prompts' completions (``MismatchedKL``);
a policy over candidates gives these probability 0, so that estimate does not exist here. What the paper estimates,
KL(pi_theta || pi_ref), is a short sum here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.reference_points import Estimate, ReferencePoint


@dataclass
class CandidateRows(LogProbBatch):
    """Rows of candidates: each completion is a single token, whose vocabulary is its prompt's candidates.

    Attributes:
        prompt_kl: float [n], KL(pi_theta || pi_ref) over the candidates of the row's prompt in nats, without gradient.
    """

    prompt_kl: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_kl is None or tuple(self.prompt_kl.shape) != (len(self),):
            shape = None if self.prompt_kl is None else tuple(self.prompt_kl.shape)
            raise ValueError(f"CandidateRows.prompt_kl has shape {shape}, not {(len(self),)}")


class CandidateKL(ReferencePoint):
    """z0 = KL(pi_theta || pi_ref) over the candidates of the row's prompt, exact, no gradient.

    For policies over candidates only; a language model has no such sum. It is E[r(x, y')] with y' from pi_theta(. | x),
    as in the definition, if the reward is ``LogRatio``. Each prompt has its own z0 where the paper shares one between
    the rows of a step.

    Raises:
        ValueError: when called: the rows are not those of a policy over candidates.
    """

    per_row = True
    needs = Needs(reference=True)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        if not isinstance(rows, CandidateRows) or rows.prompt_kl is None:
            raise ValueError(
                "CandidateKL is for policies over candidates (policy: candidates in a study); for a language model"
                " choose MismatchedKL, TokenKL or SampledKL"
            )
        return Estimate(rows.prompt_kl)
