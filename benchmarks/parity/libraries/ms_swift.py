"""ms-swift: formulas written out from ``swift/rlhf_trainers``, where they are not those of TRL 1.16."""

from __future__ import annotations

from torch import Tensor

from parity.batch import Batch
from parity.formulas import running_bco, smoothed
from parity.library import Library

LIBRARY = Library("ms-swift", "modelscope/ms-swift", "3602360a562313afbf2ef6065fdf61f271a2c5b9")


def dpo(batch: Batch, *, beta: float = 0.1, label_smoothing: float = 0.0, rpo_alpha: float = 0.0) -> Tensor:
    """``loss_type: sigmoid``; the likelihood is a mean over the chosen rows' tokens."""
    likelihood = batch.policy[batch.good][batch.mask[batch.good]].mean()
    return smoothed(beta * batch.margin(batch.r), label_smoothing).mean() - rpo_alpha * likelihood


def ipo(batch: Batch, *, beta: float = 0.1) -> Tensor:
    """``loss_type: ipo``: log-probs are divided by the number of tokens, under both models."""
    return (batch.margin(batch.r / batch.length) - 1 / (2 * beta)).pow(2).mean()


def bco_pair(batch: Batch, *, beta: float = 0.1, after: Batch | None = None) -> Tensor:
    """``loss_type: bco_pair``."""
    return running_bco(batch, beta, after)
