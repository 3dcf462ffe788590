"""Targets of regressions on scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.reference_points.base import Estimate, ReferencePoint

_TARGET = "it is a target made of scores, not a mean of rewards"


class Calibrated(ReferencePoint):
    """z0 = (s - V(x)) / beta: the log-ratio that the KL-constrained optimum has at score s; no gradient.

    The optimum of E[s] - beta KL has log pi / pi_ref = (s - V) / beta with V = beta log E_ref[e^(s / beta)]. With
    ``Squared(beta)`` the loss is (beta * r - (s - V))^2. V is estimated from the scores of the prompt's rows:

    * ``mean``: their mean, the limit of a large temperature (DRO, Richemond et al. 2024, with V not learned);
    * ``soft``: temperature * log mean e^(s / temperature) (A*-PO, Brantley et al. 2025, eq. 3, where the rows are
      samples of the reference model).

    Args:
        beta: unit of the scores per nat, above 0.
        baseline: ``mean`` or ``soft``.
        temperature: of ``soft``, in the unit of the scores, above 0 (beta_1 of A*-PO); null with ``mean``.

    Raises:
        ValueError: an argument is none of these, or a temperature is missing or of no use.
    """

    per_row = True
    needs = Needs(groups=True, scores=True)
    violates: Mapping[str, str] = dict.fromkeys(("reference_in_range", "reference_shift_equivariant"), _TARGET)

    def __init__(
        self, *, beta: float = 0.1, baseline: Literal["mean", "soft"] = "mean", temperature: float | None = None
    ) -> None:
        super().__init__()
        if not 0 < beta < math.inf:
            raise ValueError(f"Calibrated: beta is {beta}; it must be above 0")
        if baseline not in ("mean", "soft"):
            raise ValueError(f"Calibrated: baseline is {baseline!r}; choose mean or soft")
        if (temperature is None) != (baseline == "mean"):
            raise ValueError(
                f"Calibrated: temperature is {temperature}, but baseline is {baseline}; only soft takes one"
            )
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(f"Calibrated: temperature is {temperature}; it must be above 0")
        self.beta, self.baseline, self.temperature = float(beta), baseline, temperature

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        same, count = _of_prompt(rows)
        score = rows.labels.score.to(rewards.dtype)
        if self.temperature is None:
            value = torch.where(same, score[None, :], 0.0).sum(dim=1) / count
        else:
            soft = torch.where(same, score[None, :] / self.temperature, -torch.inf).logsumexp(dim=1)
            value = self.temperature * (soft - count.log())
        return Estimate((score - value) / self.beta, rows=count.mean())


class QuantileCalibrated(ReferencePoint):
    """z0 = (F(s) - V) / beta: the log-ratio of the optimum if the reward is the score's quantile F; no gradient.

    QRPO (Matrenok et al. 2025, eq. 11): quantiles of the reference model's completions are uniform on [0, 1], so V is
    beta log(beta (e^(1 / beta) - 1)) for each prompt. F is estimated from the prompt's rows: the share of those with
    a lower score, plus half of those with the same one. With few rows it is coarse.

    Args:
        beta: quantile per nat, above 0.

    Raises:
        ValueError: beta is not above 0.
    """

    per_row = True
    needs = Needs(groups=True, scores=True)
    violates: Mapping[str, str] = dict.fromkeys(("reference_in_range", "reference_shift_equivariant"), _TARGET)

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        if not 0 < beta < math.inf:
            raise ValueError(f"QuantileCalibrated: beta is {beta}; it must be above 0")
        self.beta = float(beta)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        same, count = _of_prompt(rows)
        score = rows.labels.score
        below = (same & (score[None, :] < score[:, None])).sum(dim=1)
        equal = (same & (score[None, :] == score[:, None])).sum(dim=1)
        quantile = (below + equal / 2).to(rewards.dtype) / count
        # log(beta (e^(1/beta) - 1)), without overflow for small beta
        value = self.beta * (math.log(self.beta) + 1 / self.beta + math.log(-math.expm1(-1 / self.beta)))
        return Estimate((quantile - value) / self.beta, rows=count.mean())


def _of_prompt(rows: LogProbBatch) -> tuple[Tensor, Tensor]:
    """BoolTensor [n, n]: rows with a loss that answer the same prompt; float [n]: how many these are."""
    same = rows.labels.same_prompt
    same |= torch.eye(len(rows), dtype=torch.bool, device=same.device)
    return same, same.sum(dim=1).to(rows.policy_logps.dtype)
