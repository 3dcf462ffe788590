"""Thumbs up or down."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.feedback.auto_weight import AutoWeight
from halos_pl.objective.feedback.base import Denominator, Feedback, Judgement, denominator_of, require_pairs
from halos_pl.objective.feedback.slopes import Slopes


class Binary(Feedback):
    """Thumbs up or down for each row separately.

    Ethayarajh et al., ICML 2024, eq. 8. The paper advises lambda_D * n_D / (lambda_U * n_U) in [1, 4/3]
    (arXiv v1), [1, 3/2] (v4, v5).

    With ``lambda_desirable: auto``, lambda_D is chosen anew in each step, so that the sum of |dloss/dr| over desirable
    rows is about rho times that over undesirable rows:
    lambda_D = rho * lambda_U * (n_U * m_U) / (n_D * m_D), where n is the sum of the rows' own weights of a class in the
    step (their number, if all are 1) and m the mean |dv/du| of such rows in earlier steps, of which the last one weighs
    half, the one before a quarter, and so on. A step that lacks a class takes n_U / n_D of all earlier steps. Steps do
    not count while the policy is its reference; until rows of both classes have been seen, the ratios of earlier steps
    are 1. (n_U * m_U) / (n_D * m_D) is kept between 1/1000 and 1000.

    Args:
        lambda_desirable: weight of desirable rows (lambda_D), at least 0; or ``auto``, which needs ``rho``.
        lambda_undesirable: weight of undesirable rows (lambda_U), at least 0; with ``auto``, above 0.
        denominator: unit that the loss is averaged over: ``rows``; ``pairs``, which needs data with chosen and
            rejected; or ``tokens`` of all rows.
        rho: with ``auto``, the ratio to reach, from 1e-6 to 1e6.

    Raises:
        ValueError: a weight or rho is outside its range, only one of ``auto`` and rho is given, or the denominator is
            unknown; when called, over pairs: a row has no paired completion.
    """

    def __init__(
        self,
        *,
        lambda_desirable: float | Literal["auto"] = 1.0,
        lambda_undesirable: float = 1.0,
        denominator: Denominator = "rows",
        rho: float | None = None,
    ) -> None:
        super().__init__()
        auto = lambda_desirable == "auto"
        for name, value in (("lambda_desirable", lambda_desirable), ("lambda_undesirable", lambda_undesirable)):
            if isinstance(value, str):
                if value != "auto" or name != "lambda_desirable":
                    or_auto = ", or auto" if name == "lambda_desirable" else ""
                    raise ValueError(f"Binary: {name} is {value!r}; it must be a number of at least 0{or_auto}")
            elif not 0 <= value < math.inf:
                raise ValueError(f"Binary: {name} is {value}; a weight must be at least 0 and finite")
        if auto and rho is None:
            raise ValueError("Binary: lambda_desirable is auto, but there is no rho to reach; set it, such as rho: 1.0")
        if rho is not None and not auto:
            raise ValueError(
                f"Binary: rho is {rho}, but lambda_desirable is {lambda_desirable}; set lambda_desirable to auto, or"
                " leave rho out"
            )
        if denominator not in get_args(Denominator):
            raise ValueError(f"Binary: denominator is {denominator!r}; choose one of {get_args(Denominator)}")
        self.lambda_desirable: float | Literal["auto"] = "auto" if auto else float(lambda_desirable)
        self.lambda_undesirable = float(lambda_undesirable)
        self.denominator = denominator
        self.rho = rho
        self.auto = None if rho is None else AutoWeight(rho=rho, lambda_undesirable=self.lambda_undesirable)
        self.follows_slopes = auto
        self.needs = Needs(pairs=denominator == "pairs", undesirable=True)

    def observe(self, slopes: Slopes) -> None:
        if self.auto is not None:
            self.auto.observe(slopes)

    def forward(self, rows: LogProbBatch) -> Judgement:
        if self.needs.pairs:
            require_pairs(self, rows)
        like = torch.ones_like(rows.labels.desirable, dtype=torch.float32)
        of_desirable: Any = self.lambda_desirable if self.auto is None else self.auto(rows.labels)
        return Judgement(
            sign=torch.where(rows.labels.desirable, -like, like),
            weight=torch.where(rows.labels.desirable, of_desirable * like, self.lambda_undesirable * like)
            * rows.labels.train,
            denominator=denominator_of(rows, self.denominator),
        )
