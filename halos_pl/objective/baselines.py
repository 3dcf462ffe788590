"""Losses that are not HALOs: baselines, and extra terms of composites."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs, Routing
from halos_pl.distributed import sum_over_ranks
from halos_pl.objective.halo import Objective, Result, TermContext, divisor
from value_functions.bounded import bounded_exp


class TokenTerm(Objective):
    """A sum over the tokens of some rows, divided by their number; a subclass gives the loss of a token, and the rows.

    Args:
        weight: factor of the term.
        per: ``token`` for a mean over the tokens of the rows that count, ``row`` for a mean over these rows.

    Raises:
        ValueError: if ``per`` is anything else.
    """

    def __init__(self, *, weight: float = 1.0, per: Literal["token", "row"] = "token") -> None:
        super().__init__()
        if per not in ("token", "row"):
            raise ValueError(f"{type(self).__name__}: per is {per!r}; choose token or row")
        self.weight = float(weight)
        self.per = per

    @abstractmethod
    def counts(self, rows: LogProbBatch) -> Tensor:
        """BoolTensor [n]: the rows that count; mismatched rows never do."""

    @abstractmethod
    def of_tokens(self, rows: LogProbBatch) -> Tensor:
        """The loss of each token, float [n, T]; places outside ``rows.mask`` are not read."""

    def prepare(self, rows: LogProbBatch) -> TermContext:
        kept = (self.counts(rows) & rows.labels.train).float()
        counted = kept * rows.mask.sum(dim=1) if self.per == "token" else kept
        return TermContext(sign=-torch.ones_like(kept), weight=kept, denominator=sum_over_ranks(counted.sum()))

    def compute_loss(self, rows: LogProbBatch, context: TermContext) -> Result:
        of_rows = torch.where(rows.mask, self.of_tokens(rows), 0.0).sum(dim=1)
        return Result(self.weight * (context.weight * of_rows).sum() / divisor(context.denominator))


class NLL(TokenTerm):
    """Negative log-likelihood of completions.

    Alone it is supervised fine-tuning; beside a HALO, the regulariser of CPO, SLiC or ORPO.

    Args:
        weight: factor of the term.
        per: a mean over ``token``, or over ``row`` (of the log-likelihoods of whole completions).
        rows: ``desirable`` ones only, or ``all`` (conditional fine-tuning on control tokens).

    Raises:
        ValueError: for another ``per`` or ``rows``.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        per: Literal["token", "row"] = "token",
        rows: Literal["desirable", "all"] = "desirable",
    ) -> None:
        super().__init__(weight=weight, per=per)
        if rows not in ("desirable", "all"):
            raise ValueError(f"NLL: rows is {rows!r}; choose desirable or all")
        self.rows = rows

    @property
    def needs(self) -> Needs:
        return Needs(undesirable=self.rows == "all")

    def counts(self, rows: LogProbBatch) -> Tensor:
        return rows.labels.desirable if self.rows == "desirable" else torch.ones_like(rows.labels.desirable)

    def of_tokens(self, rows: LogProbBatch) -> Tensor:
        return -rows.policy_logps


class Unlikelihood(TokenTerm):
    """-log(1 - pi_theta(y_t)) at each token of undesirable completions.

    Welleck et al. 2019, eq. 4, at the level of sequences. A token closer to certainty than 1e-6 counts as 1 - 1e-6,
    so that the loss stays finite.

    Args:
        weight: factor of the term.
        per: what it is a mean over, ``token`` or ``row``.
    """

    @property
    def needs(self) -> Needs:
        return Needs(undesirable=True)

    def counts(self, rows: LogProbBatch) -> Tensor:
        return ~rows.labels.desirable

    def of_tokens(self, rows: LogProbBatch) -> Tensor:
        # 0 stands in padded places, where the logarithm would be infinite: clamped like a certain token.
        return -torch.log(-torch.expm1(rows.policy_logps.clamp(max=-1e-6)))


class KLPenalty(TokenTerm):
    """e^-d + d - 1 at each token, d = log pi_theta / pi_ref: at least 0, and 0 where they agree.

    The "k3" estimator of KL(pi_theta || pi_ref) of Schulman 2020 that GRPO uses (Shao et al. 2024, eq. 4); unbiased
    on the policy's own samples, on data a penalty. Past d = -40 nats it continues linearly.

    Args:
        weight: factor of the term.
        per: what it is a mean over, ``token`` or ``row``.
    """

    @property
    def needs(self) -> Needs:
        return Needs(reference=True, undesirable=True)

    def counts(self, rows: LogProbBatch) -> Tensor:
        return torch.ones_like(rows.labels.desirable)

    def of_tokens(self, rows: LogProbBatch) -> Tensor:
        if rows.reference_logps is None:
            raise ValueError("KLPenalty needs reference log-probs: choose a reference_model")
        d = rows.policy_logps - rows.reference_logps
        return bounded_exp(-d) + d - 1


@dataclass(frozen=True)
class RouterContext:
    """What :class:`RouterLoss` fixes once per step.

    Attributes:
        slope: float [E], the loss per unit of each expert's summed probability.
    """

    slope: Tensor

    def select(self, index: Tensor) -> RouterContext:
        """The same: it does not depend on the rows."""
        return self


class RouterLoss(Objective):
    """E * sum_e f_e * P_e of a mixture of E experts, the load-balancing loss of Fedus et al. 2022, eq. 4 to 6.

    P_e is the mean of the router's probabilities of expert e over the tokens of all rows that carry a loss and all
    layers with experts; f_e is how often e is chosen per token, without gradient. With k experts per token it is k
    where the load is balanced. It equals ``load_balancing_loss_func`` of transformers on the whole step, however the
    step is split; the price is a second forward pass where it is split. See :class:`~halos_pl.batch.Routing` for the
    tokens that count.

    Args:
        weight: Factor of the term, such as the config's ``router_aux_loss_coef``; the paper takes 0.01.
    """

    def __init__(self, *, weight: float = 0.01) -> None:
        super().__init__()
        self.weight = float(weight)

    @property
    def needs(self) -> Needs:
        # Rows are scored before the first row's loss: f is that of the whole step.
        return Needs(step_rewards=True, routing=True)

    def prepare(self, rows: LogProbBatch) -> RouterContext:
        routing = _of_experts(rows)
        train = rows.labels.train[:, None]
        chosen = sum_over_ranks((routing.chosen * train).sum(dim=0))
        tokens = sum_over_ranks((routing.probability * train).sum())
        return RouterContext(chosen.numel() * chosen / divisor(tokens) ** 2)

    def compute_loss(self, rows: LogProbBatch, context: RouterContext) -> Result:
        return Result(self.weight * (context.slope * _of_experts(rows).probability.sum(dim=0)).sum())


def _of_experts(rows: LogProbBatch) -> Routing:
    if rows.routing is None:
        raise ValueError("RouterLoss needs the routing of a mixture of experts: set LogProbBatch.routing")
    return rows.routing
