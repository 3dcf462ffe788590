"""The objective: loss = sum_i w_i * (loss_offset + t_i) / denominator, over plain tensors.

w_i is the weight that the feedback gives a row, times the weight that the data give it (``Labels.weight``). The
denominator counts rows, pairs or tokens whatever their weight, so a row's share of the loss does not depend on the
weights of the other rows.

t_i = -v(u_i) for a desirable row (a = -1). There are two readings of an undesirable row (a = +1), and
``reflect_undesirable`` chooses between them:

* False: +v(u_i), the a = +1 of the definition (Ethayarajh et al., ICML 2024, Def. 3.4);
* True: -v(-u_i), as in the paper's KTO loss (eq. 8): the person values z0 - r.

They agree up to a constant if and only if v is point-symmetric (logistic, identity).

An objective is an ``nn.Module`` over :class:`~halos_pl.batch.LogProbBatch`; nothing in this file depends on a model:

>>> halo = HALO(reward=LogRatio(), reference_point=Zero(), value_function=Logistic(),
...             feedback=Binary(), reflect_undesirable=True, loss_offset=1.0)      # doctest: +SKIP
>>> halo(rows).loss.backward()                                             # doctest: +SKIP
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.distributed import sum_over_ranks
from halos_pl.labels import Labels
from halos_pl.objective.feedback import Feedback, Slopes
from halos_pl.objective.feedback.slopes import joined
from halos_pl.objective.reference_points import Estimate, ReferencePoint
from halos_pl.objective.rewards import Reward
from value_functions import ValueFunction


class Context(Protocol):
    """Values that an objective fixes once per optimizer step, before the first row's loss."""

    def select(self, index: Tensor) -> Context:
        """The context for the rows ``index`` (LongTensor [m]) of the step."""


@dataclass(frozen=True)
class TermContext:
    """Context of a single term.

    Attributes:
        sign: float [n], a of each row of the step.
        weight: float [n], w of each row, with its own weight; 0 for mismatched rows; [n, T] if it differs by token.
        denominator: float scalar, summed over all ranks.
        reference_point: z0, without gradient; None if it is computed with each micro-batch.
        scale: float [n] or [n, T], factor of each outcome before v; None for 1.
    """

    sign: Tensor
    weight: Tensor
    denominator: Tensor
    reference_point: Estimate | None = None
    scale: Tensor | None = None

    def select(self, index: Tensor) -> TermContext:
        z0, scale = self.reference_point, self.scale
        return replace(
            self,
            sign=self.sign[index],
            weight=self.weight[index],
            reference_point=z0 and z0.select(index),
            scale=None if scale is None else scale[index],
        )


def refuse_gold(needs: Needs, labels: Labels) -> None:
    """Refuses gold answers that an objective with these needs does not use.

    Raises:
        ValueError: if a row is one.
    """
    if not needs.gold and labels.has_gold:
        raise ValueError(
            f"row {labels.host.gold.index(True)} is a gold answer (Labels.gold), which the objective does not use;"
            " leave such rows out, or add a term that uses them, such as NLL(rows='gold')"
        )


def of_tokens(values: Tensor, width: int) -> Tensor:
    """Numbers of rows [n], or of tokens [n, T] in a batch at least as wide, for tokens; float [n, 1] or [n, width]."""
    return values[:, None] if values.dim() == 1 else values[:, :width]


def mean_of_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` [n] unchanged, or the mean of ``values`` [n, T] over the tokens in ``mask``; float [n]."""
    return values if values.dim() == 1 else torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1)


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of the m rows that carry a loss, without gradient.

    For a token-level reward, all values are means over a row's tokens, in nats per token.

    Attributes:
        reward, reference_point, outcome: r, z0 and u = r - z0 in nats, float [m].
        perceived: Argument of v in nats, float [m]: u, or -u for a reflected row.
        value: v(perceived), utility, float [m].
        sign, weight: a and w, float [m].
    """

    reward: Tensor
    reference_point: Tensor
    outcome: Tensor
    perceived: Tensor
    value: Tensor
    sign: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Result:
    """The loss of some rows, and values to log.

    Attributes:
        loss: float32 scalar with gradient. The losses of all micro-batches and ranks *sum* to the loss of the step,
            because each is divided by the whole step's denominator.
        outcomes: Outcomes of the rows; None if no term is a HALO.
        estimate: z0 of the outcomes and its precision; None if no term is a HALO.
        terms: Weighted summands of ``loss`` by name, detached; None if there is only one.
        slopes: How the loss depends on the rewards of each HALO among the terms; empty if it has no gradient.
    """

    loss: Tensor
    outcomes: Outcomes | None = None
    estimate: Estimate | None = None
    terms: dict[str, Tensor] | None = None
    slopes: tuple[tuple[HALO, Slopes], ...] = ()


class Objective(nn.Module, ABC):
    """A loss over rows: ``prepare`` is called once per step, then ``compute_loss`` once per micro-batch.

    Each row's share of the loss is multiplied by ``rows.labels.weight``, also in a subclass that computes it otherwise.
    After the last micro-batch, ``observe`` tells feedback whose weights follow earlier steps. ``objective(rows)`` does
    all three for a step without micro-batches.
    """

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What data and models must provide."""

    @property
    def halo(self) -> HALO | None:
        """The HALO whose outcomes are reported; None if no term is a HALO."""
        return next((module for module in self.modules() if isinstance(module, HALO)), None)

    @abstractmethod
    def prepare(self, rows: LogProbBatch) -> Context:
        """Computes the values that the whole step shares.

        Args:
            rows: All rows of this rank's share of the step, including mismatched rows, without gradient. Log-probs may
                be zeros in rows that ``needs`` does not require to be scored first.
        """

    @abstractmethod
    def compute_loss(self, rows: LogProbBatch, context: Any) -> Result:
        """The loss of one micro-batch without mismatched rows; ``context`` belongs to the same rows."""

    def observe(self, results: Sequence[Result]) -> None:
        """Ends a training step: tells each HALO's feedback the step's slopes. Every rank must call it once a step.

        Args:
            results: results of all micro-batches of this rank, whose losses have a gradient.

        Raises:
            ValueError: if weights follow slopes that the results lack.
        """
        told = []
        for of_halo in zip(*(result.slopes for result in results), strict=True):
            told.append(of_halo[0][0])
            told[-1].feedback.observe(joined([slopes for _, slopes in of_halo]))
        for halo in self.modules():
            if isinstance(halo, HALO) and halo.feedback.follows_slopes and halo not in told:
                raise ValueError(
                    f"{type(halo.feedback).__name__}: rho cannot be set, because the loss does not tell how it depends"
                    f" on the rewards; return Result.slopes from compute_loss of {type(self).__name__}, as HALO does"
                )

    def forward(self, rows: LogProbBatch) -> Result:
        """The loss of a whole step; ``rows`` include mismatched rows.

        Raises:
            ValueError: if a row is a gold answer and the objective does not use it.
        """
        refuse_gold(self.needs, rows.labels)
        context = self.prepare(rows.detach())
        train = rows.labels.train_index
        result = self.compute_loss(rows.select(train), context.select(train))
        if self.training and result.loss.requires_grad:
            self.observe([result])
        return result


def with_logps(needs: Needs, *of_parts: Needs) -> Needs:
    """The needs together with log-probs, if one part reads the scalar and another reads log-probs."""
    return replace(needs, logps=needs.logps or (needs.scalar and any(part.policy_logps for part in of_parts)))


def divisor(denominator: Tensor) -> Tensor:
    """The denominator, or 1 if it is 0: a step in which no row counts has a loss of 0, not 0 / 0."""
    return torch.where(denominator == 0, torch.ones_like(denominator), denominator)


def refuse_gold_needs(*parts: Any) -> None:
    """Refuses parts of a HALO that need gold answers, which are no outcomes: nobody judged them.

    Raises:
        ValueError: if a part does.
    """
    for part in parts:
        if part.needs.gold:
            raise ValueError(
                f"{type(part).__name__} needs gold answers, which nobody judged, so a HALO has no outcome for them; use"
                " them in one of the extra_terms"
            )


class HALO(Objective):
    """A human-aware loss, composed of four independent parts.

    Args:
        reward: r(x, y).
        reference_point: z0.
        value_function: v.
        feedback: a, w and the denominator.
        reflect_undesirable: Reading of rows with a = +1 (see the module's docstring). There is no default.
        loss_offset: Constant added to each row's loss, in utility; it shifts the loss but not its gradient. KTO uses
            1, which keeps its loss between 0 and 1.

    Raises:
        TypeError: if ``reflect_undesirable`` is not a bool.
        ValueError: if a learned reward is compared with log-probs, which have another scale, or the feedback is to set
            the ratio of the classes' slopes, but the reference point has a gradient; or if a part needs gold answers.
    """

    def __init__(
        self,
        *,
        reward: Reward,
        reference_point: ReferencePoint,
        value_function: ValueFunction,
        feedback: Feedback,
        reflect_undesirable: bool,
        loss_offset: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(reflect_undesirable, bool):
            raise TypeError(f"reflect_undesirable is {reflect_undesirable!r}; it must be True or False")
        compared = reference_point.needs
        if reward.needs.scalar and (compared.reference or compared.samples):
            raise ValueError(
                f"the reference point {type(reference_point).__name__} is about the policy's log-probs or samples, but"
                f" the reward {type(reward).__name__} is learned: choose PairedCompletion, or a mean of rewards such as"
                " BatchMean"
            )
        if feedback.follows_slopes and reference_point.scope == "row":
            raise ValueError(
                f"feedback: rho cannot be set with the reference point {type(reference_point).__name__}, whose gradient"
                " gives each row's slope to the row that it is compared with, too: weights do not change the ratio. Set"
                " lambda_desirable to a number, or choose a reference point without gradient, such as MismatchedKL"
            )
        refuse_gold_needs(reward, reference_point, feedback)
        self.reward = reward
        self.reference_point = reference_point
        self.value_function = value_function
        self.feedback = feedback
        self.reflect_undesirable = reflect_undesirable
        self.loss_offset = loss_offset

    @property
    def needs(self) -> Needs:
        needs = self.reward.needs | self.reference_point.needs | self.feedback.needs
        return with_logps(needs, self.reward.needs)

    def estimate(self, reward: Tensor, rows: LogProbBatch) -> Estimate:
        """z0 for ``reward``, nats, float [n] or [n, T].

        Raises:
            TypeError: if the reference point does not return an :class:`Estimate`.
        """
        z0 = self.reference_point(mean_of_tokens(reward, rows.mask), rows)
        if not isinstance(z0, Estimate):
            name = type(self.reference_point).__name__
            raise TypeError(f"{name} returns a {type(z0).__name__}; return Estimate(value=z0) from its forward")
        return z0

    @torch.no_grad()
    def prepare(self, rows: LogProbBatch) -> TermContext:
        sign, weight, denominator = self.feedback(rows)
        weight = weight * rows.labels.weight
        z0 = None
        if self.reference_point.scope == "step":
            z0 = self.estimate(self.reward(rows), rows)
        return TermContext(sign, weight, sum_over_ranks(denominator), z0)

    def compute_loss(self, rows: LogProbBatch, context: TermContext) -> Result:
        # A view, so that slopes in the reward run no hook of the model: where it is the model's own output, one of FSDP
        # would gather weights in the middle of the step.
        reward = self.reward(rows)
        reward = reward.view_as(reward)
        estimate = context.reference_point or self.estimate(reward, rows)
        z0, sign, weight = estimate.value, context.sign, context.weight
        if reward.dim() == 2:  # each token is an outcome with its row's sign and weight
            weight = of_tokens(weight, reward.shape[1]) * rows.mask
            sign = sign[:, None].expand_as(reward)
            z0 = z0[:, None] if z0.dim() else z0
        outcome = reward - z0
        if (scale := context.scale) is not None:
            outcome = outcome * (scale if reward.dim() == 1 else of_tokens(scale, reward.shape[1]))
        desirable = sign < 0
        reflected = ~desirable if self.reflect_undesirable else torch.zeros_like(desirable)
        perceived = torch.where(reflected, -outcome, outcome)
        value = self.value_function(perceived)
        signed = torch.where(desirable | reflected, -value, value)
        loss = (weight * (self.loss_offset + signed)).sum() / divisor(context.denominator)
        of_rows_weight = context.weight if context.weight.dim() == 1 else mean_of_tokens(weight, rows.mask)
        slopes: tuple[tuple[HALO, Slopes], ...] = ()
        if loss.requires_grad and reward.requires_grad:
            # From the loss back to the rewards only: a few operations on numbers of rows, none of them the model's.
            (slope,) = torch.autograd.grad(loss, reward, retain_graph=True, materialize_grads=True)
            u = torch.where(rows.mask, outcome, 0.0) if reward.dim() == 2 else outcome
            of_labels = rows.labels.desirable, of_rows_weight
            figures = reward.detach(), slope, u.detach(), context.denominator
            slopes = ((self, Slopes(*of_labels, *figures, rows.labels.weight)),)
        of_rows = {"reward": reward, "reference_point": z0.expand_as(reward), "outcome": outcome}
        of_rows |= {"perceived": perceived, "value": value}
        return Result(
            loss,
            Outcomes(
                **{name: mean_of_tokens(values.detach(), rows.mask) for name, values in of_rows.items()},
                sign=context.sign,
                weight=of_rows_weight,
            ),
            estimate,
            slopes=slopes,
        )
