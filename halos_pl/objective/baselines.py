"""Losses that are not HALOs: baselines, and extra terms of composites."""

from __future__ import annotations

import math
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
    """A mean over the tokens of some rows; a subclass defines the loss of a token and the rows that count.

    A row's own weight (``Labels.weight``) multiplies its loss, not the number of rows or tokens that the sum is divided
    by.

    Args:
        weight: Factor of the term.
        per: ``token`` for a mean over the tokens of the rows that count, ``row`` for a mean over these rows.

    Raises:
        ValueError: for any other ``per``.
    """

    def __init__(self, *, weight: float = 1.0, per: Literal["token", "row"] = "token") -> None:
        super().__init__()
        if per not in ("token", "row"):
            raise ValueError(f"{type(self).__name__}: per is {per!r}; choose token or row")
        self.weight = float(weight)
        self.per = per

    @abstractmethod
    def counts(self, rows: LogProbBatch) -> Tensor:
        """BoolTensor [n]: the rows that count; mismatched rows are excluded anyway."""

    @abstractmethod
    def of_tokens(self, rows: LogProbBatch) -> Tensor:
        """The loss of each token, float [n, T]; values outside ``rows.mask`` are ignored."""

    def prepare(self, rows: LogProbBatch) -> TermContext:
        kept = (self.counts(rows) & rows.labels.train).float()
        counted = kept * rows.mask.sum(dim=1) if self.per == "token" else kept
        weight = kept * rows.labels.weight
        return TermContext(sign=-torch.ones_like(kept), weight=weight, denominator=sum_over_ranks(counted.sum()))

    def compute_loss(self, rows: LogProbBatch, context: TermContext) -> Result:
        of_rows = torch.where(rows.mask, self.of_tokens(rows), 0.0).sum(dim=1)
        return Result(self.weight * (context.weight * of_rows).sum() / divisor(context.denominator))


class NLL(TokenTerm):
    """Negative log-likelihood of completions.

    Alone, this is supervised fine-tuning; added to a HALO, it is the regulariser of CPO, SLiC or ORPO, and on gold
    answers that of TPO.

    Args:
        weight: Factor of the term.
        per: ``token`` for a mean over tokens, ``row`` for a mean over the log-likelihoods of whole completions.
        rows: ``desirable`` rows only, ``all`` (conditional fine-tuning on control tokens), or ``gold``: only the gold
            answers, which the other two leave out.

    Raises:
        ValueError: for any other ``per`` or ``rows``.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        per: Literal["token", "row"] = "token",
        rows: Literal["desirable", "all", "gold"] = "desirable",
    ) -> None:
        super().__init__(weight=weight, per=per)
        if rows not in ("desirable", "all", "gold"):
            raise ValueError(f"NLL: rows is {rows!r}; choose desirable, all or gold")
        self.rows = rows

    @property
    def needs(self) -> Needs:
        return Needs(undesirable=self.rows == "all", gold=self.rows == "gold")

    def counts(self, rows: LogProbBatch) -> Tensor:
        if self.rows == "gold":
            return rows.labels.gold
        return rows.labels.desirable if self.rows == "desirable" else torch.ones_like(rows.labels.desirable)

    def of_tokens(self, rows: LogProbBatch) -> Tensor:
        return -rows.policy_logps


class Unlikelihood(TokenTerm):
    """-log(1 - pi_theta(y_t)) at each token of undesirable completions.

    Welleck et al. 2019, eq. 4, at the sequence level. Probabilities are capped at 1 - 1e-6, which keeps the loss
    finite.

    Args:
        weight: Factor of the term.
        per: ``token`` for a mean over tokens, ``row`` for a mean over rows.
    """

    @property
    def needs(self) -> Needs:
        return Needs(undesirable=True)

    def counts(self, rows: LogProbBatch) -> Tensor:
        return ~rows.labels.desirable

    def of_tokens(self, rows: LogProbBatch) -> Tensor:
        # Padding has log-prob 0, where the logarithm would be infinite; it is clamped like a certain token.
        return -torch.log(-torch.expm1(rows.policy_logps.clamp(max=-1e-6)))


class KLPenalty(TokenTerm):
    """e^-d + d - 1 at each token, d = log pi_theta / pi_ref: at least 0, and 0 where policy and reference agree.

    The "k3" estimator of KL(pi_theta || pi_ref) of Schulman 2020, as in GRPO (Shao et al. 2024, eq. 4). It is unbiased
    on the policy's own samples; on other data it is a penalty. Below d = -40 nats it continues linearly.

    Args:
        weight: Factor of the term.
        per: ``token`` for a mean over tokens, ``row`` for a mean over rows.
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


class Centring(Objective):
    """weight * mean over pairs of (r + r')^2: pulls the mean reward of each pair towards 0.

    Preferences do not change if all rewards of a prompt shift by the same number; this term chooses that number
    (Eisenstein et al. 2023, "Helping or herding?"; ``center_rewards_coefficient`` in TRL). A row without a
    paired completion in its step counts as r^2, which also shrinks the reward itself.

    Args:
        weight: Factor of the term; 0.01 in the paper and in TRL's examples.

    Raises:
        ValueError: if ``weight`` is negative or not finite; when called: the rows have no scalars.
    """

    def __init__(self, *, weight: float = 0.01) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise ValueError(f"Centring: weight is {weight}; it must be 0 or a positive number")
        self.weight = float(weight)

    @property
    def needs(self) -> Needs:
        return Needs(scalar=True, undesirable=True)

    def prepare(self, rows: LogProbBatch) -> TermContext:
        # Each row of a pair carries half of the pair's term.
        half = torch.where(rows.labels.pair < 0, 1.0, 0.5) * rows.labels.train
        weight = half * rows.labels.weight
        return TermContext(sign=-torch.ones_like(weight), weight=weight, denominator=sum_over_ranks(half.sum()))

    def compute_loss(self, rows: LogProbBatch, context: TermContext) -> Result:
        if rows.scalar is None:
            raise ValueError("Centring needs a policy with a scalar head: use it with the reward ScalarHead")
        pair = rows.labels.pair
        both = rows.scalar + torch.where(pair < 0, 0.0, rows.scalar[pair])
        return Result(self.weight * (context.weight * both.square()).sum() / divisor(context.denominator))


@dataclass(frozen=True)
class RouterContext:
    """Context of :class:`RouterLoss`.

    Attributes:
        slope: float [E], the loss per unit of each expert's summed probability.
    """

    slope: Tensor

    def select(self, index: Tensor) -> RouterContext:
        """This context: it does not depend on the rows."""
        return self


class RouterLoss(Objective):
    """E * sum_e f_e * P_e for a mixture of E experts: the load-balancing loss of Fedus et al. 2022, eq. 4 to 6.

    P_e is the router's mean probability of expert e, f_e the mean number of times that e is chosen for a token (without
    gradient), both over all layers with experts and the tokens of all rows that carry a loss (see
    :class:`~halos_pl.batch.Routing`). The term is about the load, so the rows' weights do not matter. If k experts are
    chosen per token, a balanced load gives k. The term equals ``load_balancing_loss_func`` of transformers on the whole
    step; if the step is split, it takes a second forward pass.

    Args:
        weight: Factor of the term, such as the config's ``router_aux_loss_coef``; the paper uses 0.01.
    """

    def __init__(self, *, weight: float = 0.01) -> None:
        super().__init__()
        self.weight = float(weight)

    @property
    def needs(self) -> Needs:
        # All rows are scored before the first loss, because f is a mean over the whole step.
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
