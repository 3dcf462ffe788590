"""One completion preferred to another."""

from __future__ import annotations

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.feedback.base import Feedback, Judgement, denominator_of, require_pairs


def _epsilon(feedback: Feedback, label_smoothing: float) -> float:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{type(feedback).__name__}: label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
    return float(label_smoothing)


def _smoothed(rows: LogProbBatch, epsilon: float) -> Tensor:
    """float32 [n]: 1 - epsilon for chosen rows, epsilon for rejected ones."""
    like = torch.ones_like(rows.labels.desirable, dtype=torch.float32)
    return torch.where(rows.labels.desirable, (1 - epsilon) * like, epsilon * like)


class Pairwise(Feedback):
    """One completion preferred to its paired completion; the loss is a mean over pairs.

    With label smoothing, the rejected row also counts as the preferred one, with weight epsilon, as in conservative DPO
    (Mitchell 2023). Without, rejected rows have weight 0 and only serve as reference points.

    Args:
        label_smoothing: probability epsilon in [0, 0.5) that a preference label is flipped.

    Raises:
        ValueError: epsilon is outside its range; when called: a row has no paired completion.
    """

    needs = Needs(pairs=True, undesirable=True)

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = _epsilon(self, label_smoothing)

    def forward(self, rows: LogProbBatch) -> Judgement:
        require_pairs(self, rows)
        weight = _smoothed(rows, self.label_smoothing)
        return Judgement(
            sign=-torch.ones_like(weight), weight=weight * rows.labels.train, denominator=denominator_of(rows, "pairs")
        )


class RobustPairwise(Feedback):
    """One completion preferred to its paired completion, unbiased under label noise; the loss is a mean over pairs.

    Robust DPO (Chowdhury et al. 2024, eq. 12): weights (1 - epsilon) / (1 - 2 epsilon) for the chosen row and,
    with the opposite sign, epsilon / (1 - 2 epsilon) for the rejected one. Its objective sets
    ``reflect_undesirable`` to false.

    Args:
        label_smoothing: probability epsilon in [0, 0.5) that a preference label is flipped.

    Raises:
        ValueError: epsilon is outside its range; when called: a row has no paired completion.
    """

    needs = Needs(pairs=True, undesirable=True)

    def __init__(self, *, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.label_smoothing = _epsilon(self, label_smoothing)

    def forward(self, rows: LogProbBatch) -> Judgement:
        require_pairs(self, rows)
        weight = _smoothed(rows, self.label_smoothing)
        return Judgement(
            sign=torch.where(rows.labels.desirable, -torch.ones_like(weight), torch.ones_like(weight)),
            weight=weight / (1 - 2 * self.label_smoothing) * rows.labels.train,
            denominator=denominator_of(rows, "pairs"),
        )
