"""From token ids to an objective's input: log-probs of the rows under policy and reference."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from halos_pl.batch import LogProbBatch, TokenBatch
from halos_pl.policy.kl import Scoring, completion_kl
from halos_pl.policy.logprobs import completion_mask
from halos_pl.policy.scorer import Scorer


class Reference(Scoring, Protocol):
    """Log-probs under the reference model, and the model itself for KL divergences."""

    def logps(self, batch: TokenBatch) -> Tensor:
        """Log-probs of the completion tokens, float32 [n, T], without gradient."""


def scored_rows(
    policy: Scorer,
    reference: Reference | None,
    batch: TokenBatch,
    *,
    gradient: bool = False,
    kl: bool = False,
    routing: bool = False,
    reference_logps: Tensor | None = None,
) -> LogProbBatch:
    """Scores the rows of a batch.

    Args:
        policy: Model that is trained.
        reference: Source of log pi_ref; None to score under the policy only.
        batch: n rows.
        gradient: Whether the policy's log-probs get a gradient.
        kl: Whether to compute the KL divergence over the whole vocabulary at the tokens of mismatched rows.
        routing: Whether to return how the policy's router spreads the tokens over the experts.
        reference_logps: Log-probs under the reference, [n, T], if they have been computed already.
    """
    # The reference first, before the policy's activations take up memory.
    if reference is not None and reference_logps is None:
        reference_logps = reference.logps(batch)
    with torch.set_grad_enabled(gradient):
        policy_logps, of_experts = policy(batch, wanted="routing") if routing else (policy(batch), None)
    divergence = None
    numbers = [row for row, extra in enumerate(batch.host.mismatched) if extra]
    if kl and reference is not None and numbers:
        mismatched = batch.labels.mismatched_index
        of_mismatched = completion_kl(policy, reference, batch.select(mismatched, numbers))
        divergence = torch.zeros_like(policy_logps, requires_grad=False)
        divergence[mismatched, : of_mismatched.shape[1]] = of_mismatched
    return LogProbBatch(policy_logps, reference_logps, completion_mask(batch), batch.labels, divergence, of_experts)


def widened(rows: LogProbBatch, width: int) -> LogProbBatch:
    """The same rows, padded to ``width`` tokens."""
    pad = (0, width - rows.mask.shape[1])
    return LogProbBatch(
        policy_logps=F.pad(rows.policy_logps, pad),
        reference_logps=None if rows.reference_logps is None else F.pad(rows.reference_logps, pad),
        mask=F.pad(rows.mask, pad),
        labels=rows.labels,
        kl=None if rows.kl is None else F.pad(rows.kl, pad),
        routing=rows.routing,
    )


def differentiable(rows: LogProbBatch) -> list[Tensor]:
    """The policy's outputs for the rows that get a gradient: log-probs and, if any, the router's probabilities."""
    return [rows.policy_logps] if rows.routing is None else [rows.policy_logps, rows.routing.probability]
