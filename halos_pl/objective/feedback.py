"""Feedback: which way each row pulls (a), how hard (w), and what the loss is divided by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs


class Judgement(NamedTuple):
    """What people said of each row.

    Attributes:
        sign: float [n], a in {-1, +1}; -1: raising the value lowers the loss (desirable).
        weight: float [n], w >= 0; 0 for mismatched rows.
        denominator: float scalar, what this rank adds to the divisor of the step's loss.
    """

    sign: Tensor
    weight: Tensor
    denominator: Tensor


class Feedback(nn.Module, ABC):
    """Judges rows by their labels alone: never by ``policy_logps``, since a and w do not depend on theta."""

    needs: Needs = Needs(undesirable=True)

    @abstractmethod
    def forward(self, rows: LogProbBatch) -> Judgement:
        """Sign, weight and denominator for ``rows``; the log-probs in them may not have been computed yet."""


Denominator = Literal["rows", "pairs", "tokens"]


def _denominator(rows: LogProbBatch, kind: Denominator) -> Tensor:
    counted = {
        "rows": rows.labels.train,
        "pairs": rows.labels.train & rows.labels.desirable,
        "tokens": rows.mask[rows.labels.train],
    }
    return counted[kind].sum().float()


def _require_pairs(feedback: Feedback, rows: LogProbBatch) -> None:
    if bool(((rows.labels.pair < 0) & rows.labels.train).any()):
        name = type(feedback).__name__
        raise ValueError(f"{name}: a row has no paired completion; this feedback needs data with chosen and rejected")


def _epsilon(feedback: Feedback, label_smoothing: float) -> float:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{type(feedback).__name__}: label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
    return float(label_smoothing)


class Binary(Feedback):
    """Thumbs up or down for each row by itself.

    Ethayarajh et al., ICML 2024, eq. 8. The paper advises lambda_D * n_D / (lambda_U * n_U) in [1, 4/3]
    (arXiv v1), [1, 3/2] (v4, v5).

    Args:
        lambda_desirable: weight of desirable rows (lambda_D), at least 0.
        lambda_undesirable: weight of undesirable rows (lambda_U), at least 0.
        denominator: what the loss is a mean over: ``rows``; ``pairs``, which needs data with chosen and
            rejected; or ``tokens`` of all rows.

    Raises:
        ValueError: for a negative weight, or another denominator; when called, over pairs, for a row without
            a paired completion.
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
            _require_pairs(self, rows)
        like = torch.ones_like(rows.labels.desirable, dtype=torch.float32)
        return Judgement(
            sign=torch.where(rows.labels.desirable, -like, like),
            weight=torch.where(rows.labels.desirable, self.lambda_desirable * like, self.lambda_undesirable * like)
            * rows.labels.train,
            denominator=_denominator(rows, self.denominator),
        )


class Pairwise(Feedback):
    """One completion preferred to its paired completion; the loss is a mean over pairs.

    With label smoothing the rejected row is taken as the preferred one with weight epsilon, which is
    conservative DPO (Mitchell 2023). Without it rejected rows have weight 0: they act as reference only.

    Args:
        label_smoothing: probability epsilon in [0, 0.5) that a preference was recorded the wrong way round.

    Raises:
        ValueError: for an epsilon outside its range; when called, for a row without a paired completion.
    """

    needs = Needs(pairs=True, undesirable=True)

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = _epsilon(self, label_smoothing)

    def forward(self, rows: LogProbBatch) -> Judgement:
        _require_pairs(self, rows)
        like = torch.ones_like(rows.labels.desirable, dtype=torch.float32)
        weight = torch.where(rows.labels.desirable, (1 - self.label_smoothing) * like, self.label_smoothing * like)
        return Judgement(sign=-like, weight=weight * rows.labels.train, denominator=_denominator(rows, "pairs"))


class RobustPairwise(Feedback):
    """One completion preferred to its paired completion, unbiased under label noise; the loss is a mean over pairs.

    Robust DPO (Chowdhury et al. 2024, eq. 12): weights (1 - epsilon) / (1 - 2 epsilon) for the chosen row and,
    with the opposite sign, epsilon / (1 - 2 epsilon) for the rejected one. Its objective reads ``same``.

    Args:
        label_smoothing: probability epsilon in [0, 0.5) that a preference was recorded the wrong way round.

    Raises:
        ValueError: for an epsilon outside its range; when called, for a row without a paired completion.
    """

    needs = Needs(pairs=True, undesirable=True)

    def __init__(self, *, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.label_smoothing = _epsilon(self, label_smoothing)

    def forward(self, rows: LogProbBatch) -> Judgement:
        _require_pairs(self, rows)
        like = torch.ones_like(rows.labels.desirable, dtype=torch.float32)
        weight = torch.where(rows.labels.desirable, (1 - self.label_smoothing) * like, self.label_smoothing * like)
        return Judgement(
            sign=torch.where(rows.labels.desirable, -like, like),
            weight=weight / (1 - 2 * self.label_smoothing) * rows.labels.train,
            denominator=_denominator(rows, "pairs"),
        )


class Flipped(Feedback):
    """Another feedback with the opposite sign: what it raises is lowered.

    A term that also holds the chosen completion down, as in NCA or APO-down.

    Args:
        feedback: whose weights and denominator are kept.
    """

    def __init__(self, feedback: Feedback) -> None:
        super().__init__()
        self.feedback = feedback
        self.needs = feedback.needs

    def forward(self, rows: LogProbBatch) -> Judgement:
        judgement: Judgement = self.feedback(rows)
        return judgement._replace(sign=-judgement.sign)


class GroupAdvantage(Feedback):
    """How much better a row was than its prompt's other rows; the loss is a mean over tokens.

    A = (s - mean) / (std + 0.01) within the rows of one prompt, s = the row's score where the data have scores, else 1
    for a desirable row and 0 for an undesirable one; sign -sign(A), weight |A|. GRPO's advantage (Shao et al. 2024,
    section 4.1.2), offline. A prompt whose rows are all alike has weight 0. The deviation is that of the prompt's own
    rows, and 0.01 is in the unit of the scores; TRL takes the sample's (n - 1) and 1e-4, so that a pair with scores 0
    and 1 has +-0.71 there, and +-0.98 here.

    Args:
        only: rows with a ``positive`` or a ``negative`` advantage; null for both. The other rows get weight 0
            but are counted in the denominator.

    Raises:
        ValueError: for another ``only``.
    """

    needs = Needs(groups=True, undesirable=True)

    def __init__(self, *, only: Literal["positive", "negative"] | None = None) -> None:
        super().__init__()
        if only not in ("positive", "negative", None):
            raise ValueError(f"GroupAdvantage: only is {only!r}; choose positive, negative or null")
        self.only = only

    def forward(self, rows: LogProbBatch) -> Judgement:
        kept = rows.labels.train.float()
        score = rows.labels.score
        same = (
            rows.labels.group[:, None] == rows.labels.group[None, :]
        ).float() * kept  # [n, n], columns of mismatched rows are 0
        count = same.sum(dim=1).clamp(min=1)
        mean = same @ score / count
        std = (same * (score[None, :] - mean[:, None]).square()).sum(dim=1).div(count).sqrt()
        advantage = (score - mean) / (std + 0.01) * kept
        side = {"positive": advantage > 0, "negative": advantage < 0, None: rows.labels.train}[self.only]
        return Judgement(
            sign=torch.where(advantage < 0, torch.ones_like(kept), -torch.ones_like(kept)),
            weight=torch.where(side, advantage.abs(), torch.zeros_like(kept)),
            denominator=_denominator(rows, "tokens"),
        )
