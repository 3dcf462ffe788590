"""A HALO whose rows have weights that depend on the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.halo import HALO, Objective, Result, TermContext, refuse_gold_needs
from halos_pl.objective.policy_weights import PolicyWeight
from halos_pl.objective.policy_weights.base import ActsOn


class PolicyWeighted(Objective):
    """sum_i w(theta)_i * w_i * t_i / denominator, where w(theta) depends on the policy but has no gradient.

    The one place for weights of the policy: WPO, beta-DPO, FIPO. The definition of a HALO does not allow them, so
    ``halos check`` calls the loss a *composite: policy-dependent weights* and checks the HALO without them. w(theta) is
    computed once per step, before the first loss, from all rows without gradient; with micro-batches, this takes one
    more forward pass.

    Args:
        halo: the HALO.
        policy_weight: w(theta), which multiplies the rows' weights or their outcomes.

    Raises:
        TypeError: ``halo`` is no HALO or ``policy_weight`` no policy weight.
        ValueError: the policy weight acts on something else, or the feedback is to set the ratio of the classes'
            slopes; the policy weight needs gold answers; when called: w(theta) is no tensor, negative, not finite or of
            the wrong shape.
    """

    def __init__(self, *, halo: HALO, policy_weight: PolicyWeight) -> None:
        super().__init__()
        for name, part, kind in (("halo", halo, HALO), ("policy_weight", policy_weight, PolicyWeight)):
            if not isinstance(part, kind):
                raise TypeError(f"PolicyWeighted: {name} is a {type(part).__name__}; it must be a {kind.__name__}")
        if policy_weight.acts_on not in (known := get_args(ActsOn)):
            name = type(policy_weight).__name__
            raise ValueError(f"{name}: acts_on is {policy_weight.acts_on!r}; choose {' or '.join(known)}")
        if halo.feedback.follows_slopes:
            raise ValueError(
                "PolicyWeighted: rho cannot be set together with a policy weight, which changes the slopes as well; set"
                " lambda_desirable to a number"
            )
        refuse_gold_needs(policy_weight)
        self.of, self.policy_weight = halo, policy_weight

    @property
    def needs(self) -> Needs:
        return self.of.needs | self.policy_weight.needs | Needs(step_rewards=True)

    @torch.no_grad()
    def prepare(self, rows: LogProbBatch) -> TermContext:
        context, rewards = self.of.prepare(rows), self.of.reward(rows)
        weight, name = self.policy_weight(rewards, rows), type(self.policy_weight).__name__
        if not isinstance(weight, Tensor):
            raise ValueError(f"{name} returns a {type(weight).__name__}; return a tensor with a number for each row")
        if weight.shape not in (rewards.shape, rewards.shape[:1]):
            raise ValueError(f"{name} returns shape {tuple(weight.shape)}, not {tuple(rewards.shape)}")
        counted = rows.labels.train if weight.dim() == 1 else rows.mask & rows.labels.train[:, None]
        weight = torch.where(counted, weight.detach(), 0.0)
        if not bool((weight.isfinite() & (weight >= 0)).all()):
            raise ValueError(f"{name} returns a weight that is negative or not finite")
        if self.policy_weight.acts_on == "outcome":
            return replace(context, scale=weight)
        return replace(context, weight=(context.weight if weight.dim() == 1 else context.weight[:, None]) * weight)

    def compute_loss(self, rows: LogProbBatch, context: TermContext) -> Result:
        return self.of.compute_loss(rows, context)

    def observe(self, results: Sequence[Result]) -> None:
        self.of.observe(results)
