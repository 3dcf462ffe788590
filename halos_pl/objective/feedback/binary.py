"""Thumbs up or down."""

from __future__ import annotations

from typing import get_args

import torch

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.feedback.base import Denominator, Feedback, Judgement, denominator_of, require_pairs


class Binary(Feedback):
    """Thumbs up or down for each row separately.

    Ethayarajh et al., ICML 2024, eq. 8. The paper advises lambda_D * n_D / (lambda_U * n_U) in [1, 4/3]
    (arXiv v1), [1, 3/2] (v4, v5).

    Args:
        lambda_desirable: weight of desirable rows (lambda_D), at least 0.
        lambda_undesirable: weight of undesirable rows (lambda_U), at least 0.
        denominator: unit that the loss is averaged over: ``rows``; ``pairs``, which needs data with chosen and
            rejected; or ``tokens`` of all rows.

    Raises:
        ValueError: a weight is negative, or the denominator is unknown; when called, over pairs: a row has no paired
            completion.
    """

    def __init__(
        self, *, lambda_desirable: float = 1.0, lambda_undesirable: float = 1.0, denominator: Denominator = "rows"
    ) -> None:
        super().__init__()
        for name, value in (("lambda_desirable", lambda_desirable), ("lambda_undesirable", lambda_undesirable)):
            if not value >= 0:
                raise ValueError(f"Binary: {name} is {value}; a weight must be at least 0")
        if denominator not in get_args(Denominator):
            raise ValueError(f"Binary: denominator is {denominator!r}; choose one of {get_args(Denominator)}")
        self.lambda_desirable = float(lambda_desirable)
        self.lambda_undesirable = float(lambda_undesirable)
        self.denominator = denominator
        self.needs = Needs(pairs=denominator == "pairs", undesirable=True)

    def forward(self, rows: LogProbBatch) -> Judgement:
        if self.needs.pairs:
            require_pairs(self, rows)
        like = torch.ones_like(rows.labels.desirable, dtype=torch.float32)
        return Judgement(
            sign=torch.where(rows.labels.desirable, -like, like),
            weight=torch.where(rows.labels.desirable, self.lambda_desirable * like, self.lambda_undesirable * like)
            * rows.labels.train,
            denominator=denominator_of(rows, self.denominator),
        )
