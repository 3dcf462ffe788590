"""Feedback: which way each row pulls (a), how hard (w), and what the loss is divided by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from halos_pl.outcomes import Needs, Rows


class Judgement(NamedTuple):
    """What people said of each row.

    Attributes:
        sign: float [n], a in {-1, +1}; -1: raising the value lowers the loss (desirable).
        weight: float [n], w >= 0; 0 for probes.
        denominator: float scalar, what this rank adds to the divisor of the step's loss.
    """

    sign: Tensor
    weight: Tensor
    denominator: Tensor


class Feedback(nn.Module, ABC):
    """Judges rows by their labels alone: never by ``policy_logps``, since a and w do not depend on theta."""

    needs: Needs = Needs(undesirable=True)

    @abstractmethod
    def forward(self, rows: Rows) -> Judgement:
        """Sign, weight and denominator for ``rows``; the log-probs in them may not have been computed yet."""


class Binary(Feedback):
    """Thumbs up or down for each row by itself; the loss is a mean over rows.

    Ethayarajh et al., ICML 2024, eq. 8. The paper advises lambda_D * n_D / (lambda_U * n_U) in [1, 4/3]
    (arXiv v1), [1, 3/2] (v4, v5).

    Args:
        lambda_desirable: weight of desirable rows (lambda_D), at least 0.
        lambda_undesirable: weight of undesirable rows (lambda_U), at least 0.

    Raises:
        ValueError: for a negative weight.
    """

    def __init__(self, *, lambda_desirable: float = 1.0, lambda_undesirable: float = 1.0) -> None:
        super().__init__()
        for name, value in (("lambda_desirable", lambda_desirable), ("lambda_undesirable", lambda_undesirable)):
            if not value >= 0:
                raise ValueError(f"Binary: {name} is {value}; a weight must be at least 0")
        self.lambda_desirable = float(lambda_desirable)
        self.lambda_undesirable = float(lambda_undesirable)

    def forward(self, rows: Rows) -> Judgement:
        like = torch.ones_like(rows.desirable, dtype=torch.float32)
        return Judgement(
            sign=torch.where(rows.desirable, -like, like),
            weight=torch.where(rows.desirable, self.lambda_desirable * like, self.lambda_undesirable * like)
            * rows.train,
            denominator=rows.train.sum().float(),
        )


class Pairwise(Feedback):
    """One completion preferred to its rival; the loss is a mean over pairs.

    With label smoothing the rejected row is taken as the preferred one with weight epsilon, which is
    conservative DPO (Mitchell 2023). Without it rejected rows have weight 0: they act as reference only.

    Args:
        label_smoothing: probability epsilon in [0, 0.5) that a preference was recorded the wrong way round.

    Raises:
        ValueError: for an epsilon outside its range; when called, for a row without a rival.
    """

    needs = Needs(rivals=True, undesirable=True)

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"Pairwise: label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
        self.label_smoothing = float(label_smoothing)

    def forward(self, rows: Rows) -> Judgement:
        if bool(((rows.rival < 0) & rows.train).any()):
            raise ValueError("Pairwise: a row has no rival; this feedback needs data with chosen and rejected")
        like = torch.ones_like(rows.desirable, dtype=torch.float32)
        weight = torch.where(rows.desirable, (1 - self.label_smoothing) * like, self.label_smoothing * like)
        return Judgement(
            sign=-like,
            weight=weight * rows.train,
            denominator=(rows.desirable & rows.train).sum().float(),
        )
