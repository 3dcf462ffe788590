"""Liger-Kernel: its chunked losses are called, with logits over a vocabulary of two tokens in place of hidden states.

They take hidden states and the weight of a model's head; here the head is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parity.batch import PROMPT, Batch
from parity.formulas import standardised, thumbs
from parity.library import Library

LIBRARY = Library("Liger-Kernel", "linkedin/Liger-Kernel", "v0.8.5", package="liger-kernel", version="0.8.5")


def _logits(tokens: Tensor) -> Tensor:
    """[n, L, 2], under which token 1 has the log-probs ``tokens``."""
    return torch.stack([torch.log(-torch.expm1(tokens)), tokens], dim=2)


def _hidden(batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of the completions of chosen, then of rejected rows, and their labels."""
    rows = batch.train
    return _logits(batch.tokens[rows, PROMPT:]), torch.where(batch.mask[rows], 1, -100)


def _reference(batch: Batch) -> Tensor:
    """Logits under the reference; beyond a row's end, where they do not count, of any log-prob."""
    rows = batch.train
    return _logits(torch.where(batch.mask[rows], batch.reference[rows], -1.0))


def _first(result: Any) -> Tensor:
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    return loss


def dpo(batch: Batch, *, loss_type: str, **constants: Any) -> Tensor:
    """``LigerFusedLinearDPOLoss``."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, labels = _hidden(batch)
    head = torch.eye(2)
    loss = LigerFusedLinearDPOLoss(loss_type=loss_type, compiled=False, **constants)
    return _first(loss(head, hidden, labels, ref_input=_reference(batch), ref_weight=head))


def kto(batch: Batch, *, beta: float = 0.1, use_ref_model: bool = True) -> Tensor:
    """``LigerFusedLinearKTOLoss``, which is given z0; here the mean over the mismatched rows, at least 0."""
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    hidden, labels = _hidden(batch)
    head, desirable = torch.eye(2), batch.labels.desirable[batch.train]
    z0 = batch.r[batch.mismatched].mean().clamp(min=0).detach()
    loss = LigerFusedLinearKTOLoss(beta=beta, use_ref_model=use_ref_model, compiled=False)
    others = {"preference_labels": desirable, "ref_input": _reference(batch), "ref_weight": head, "kl": z0}
    return _first(loss(hidden, head, labels, **others))


def cpo(batch: Batch, **constants: Any) -> Tensor:
    """``LigerFusedLinearCPOLoss``."""
    from liger_kernel.chunked_loss import LigerFusedLinearCPOLoss

    hidden, labels = _hidden(batch)
    return _first(LigerFusedLinearCPOLoss(compiled=False, **constants)(torch.eye(2), hidden, labels))


def simpo(batch: Batch, **constants: Any) -> Tensor:
    """``LigerFusedLinearSimPOLoss``."""
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    hidden, labels = _hidden(batch)
    return _first(LigerFusedLinearSimPOLoss(compiled=False, **constants)(torch.eye(2), hidden, labels))


def orpo(batch: Batch, *, beta: float = 0.1) -> Tensor:
    """``LigerFusedLinearORPOLoss`` without ``nll_target``."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    hidden, labels = _hidden(batch)
    return _first(LigerFusedLinearORPOLoss(beta=beta, compiled=False)(torch.eye(2), hidden, labels))


def grpo(batch: Batch, *, advantage: str = "ours", **constants: Any) -> Tensor:
    """``LigerFusedLinearGRPOLoss``, which is given advantages: ours, or +1 and -1; the reference is the old policy."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rows, mask, head = batch.train, batch.mask[batch.train].long(), torch.eye(2)
    of_rows = {"ours": standardised(batch, correction=0, eps=1e-2), "thumbs": thumbs(batch)}[advantage]
    before = {"ref_per_token_logps": batch.reference[rows], "old_per_token_logps": batch.reference[rows]}
    loss = LigerFusedLinearGRPOLoss(compiled=False, **constants)
    return _first(loss(_hidden(batch)[0], head, torch.ones_like(mask), mask, of_rows, **before))
