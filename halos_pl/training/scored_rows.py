"""From token ids to an objective's input: log-probs of the rows under policy and reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs, TokenBatch
from halos_pl.policy.kl import Scoring, completion_kl
from halos_pl.policy.logprobs import Scores, completion_mask
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
    needs: Needs | None = None,
    reference_logps: Tensor | None = None,
) -> LogProbBatch:
    """Scores the rows of a batch.

    Args:
        policy: Model that is trained.
        reference: Source of log pi_ref; None to score under the policy only.
        batch: n rows.
        gradient: Whether the policy's log-probs get a gradient.
        needs: Needs of the objective beside log-probs: scalars, the routing of a mixture of experts, and the exact KL
            divergence at the tokens of mismatched rows.
        reference_logps: Log-probs under the reference, [n, T], if they have been computed already.
    """
    needs = needs or Needs()
    # The reference first, before the policy's activations take up memory.
    if reference is not None and reference_logps is None:
        reference_logps = reference.logps(batch)
    with torch.set_grad_enabled(gradient):
        scores: Scores = policy(batch, wanted="scores", needs=needs)
    mask = completion_mask(batch)
    logps = scores.logps
    if logps is None:
        logps = torch.full(mask.shape, torch.nan, dtype=torch.float32, device=mask.device)
    divergence = None
    numbers = [row for row, extra in enumerate(batch.host.mismatched) if extra]
    if needs.exact_kl and reference is not None and numbers:
        mismatched = batch.labels.mismatched_index
        of_mismatched = completion_kl(policy, reference, batch.select(mismatched, numbers))
        divergence = torch.zeros_like(logps, requires_grad=False)
        divergence[mismatched, : of_mismatched.shape[1]] = of_mismatched
    return LogProbBatch(
        logps,
        reference_logps,
        mask,
        batch.labels,
        divergence,
        scores.routing,
        scalar=scores.scalar,
        has_logps=scores.logps is not None,
    )


def widened(rows: LogProbBatch, width: int) -> LogProbBatch:
    """The same rows, padded to ``width`` tokens."""
    pad = (0, width - rows.mask.shape[1])
    return LogProbBatch(
        policy_logps=F.pad(rows.policy_logps, pad, value=0.0 if rows.has_logps else torch.nan),
        reference_logps=None if rows.reference_logps is None else F.pad(rows.reference_logps, pad),
        mask=F.pad(rows.mask, pad),
        labels=rows.labels,
        kl=None if rows.kl is None else F.pad(rows.kl, pad),
        routing=rows.routing,
        scalar=rows.scalar,
        has_logps=rows.has_logps,
    )


def differentiable(rows: LogProbBatch) -> list[Tensor]:
    """The policy's outputs for the rows that get a gradient: log-probs, the router's probabilities and scalars."""
    outputs = [rows.policy_logps] if rows.has_logps else []
    outputs += [] if rows.routing is None else [rows.routing.probability]
    return outputs if rows.scalar is None else [*outputs, rows.scalar]


def as_leaves(rows: LogProbBatch, *, gradient: bool) -> LogProbBatch:
    """The same rows, with copies of the policy's outputs that a loss can be differentiated by."""

    def leaf(values: Tensor) -> Tensor:
        return values.detach().clone().requires_grad_(gradient)

    routing = rows.routing and replace(rows.routing, probability=leaf(rows.routing.probability))
    scalar = None if rows.scalar is None else leaf(rows.scalar)
    return replace(rows, policy_logps=leaf(rows.policy_logps), routing=routing, scalar=scalar)
