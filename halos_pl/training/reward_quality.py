"""How well the rewards of held-out rows rank them: accuracy, calibration and AUROC, with 95% intervals.

Rows with the same prompt are not independent, so variances are those of sums over prompts. Shares get the interval of
Wilson 1927 for the number of independent pairs with the same variance.
"""

from __future__ import annotations

import math

import torch
from scipy.special import expit
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from halos_pl.batch import LogProbBatch
from halos_pl.distributed import gather_over_ranks
from halos_pl.objective.halo import Objective

#: Names of the figures of pairs, and of rows of both classes.
OF_PAIRS = (
    "rewards/accuracies_low",
    "rewards/accuracies_high",
    "rewards/calibration_error",
    "rewards/calibration_slope",
    "rewards/calibration_slope_low",
    "rewards/calibration_slope_high",
)
OF_ROWS = ("rewards/auroc_low", "rewards/auroc_high")

_Z = 1.959964  # of a two-sided 95% interval


def is_learned(objective: Objective) -> bool:
    """Whether the reward that an objective reports is that of a reward model."""
    return objective.halo is not None and objective.halo.reward.needs.scalar


class RewardQuality:
    """Collects held-out rewards until their figures are read.

    Args:
        beta: Scale of the rewards, 1 / nats: sigmoid(beta * margin) is the probability that the chosen row wins.
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self.reset()

    def reset(self) -> None:
        """Forgets all rewards."""
        self._columns: list[Tensor] = []

    def add(self, rows: LogProbBatch, reward: Tensor) -> None:
        """Adds the rewards [n] of rows, none of them mismatched, whose pairs are complete or absent."""
        labels = rows.labels
        other = torch.where(labels.pair < 0, math.nan, reward[labels.pair].double())
        columns = reward, labels.desirable, labels.group, other
        self._columns.append(torch.stack([column.double().cpu() for column in columns], dim=1))

    def figures(self, device: torch.device) -> dict[str, float]:
        """The figures over all ranks; without pairs or without both classes, those that need them are missing."""
        here = torch.cat(self._columns) if self._columns else torch.zeros(0, 4, dtype=torch.float64)
        columns = [gather_over_ranks(here[:, i].to(device))[0].cpu() for i in range(4)]
        reward, desirable, prompt, other = columns[0], columns[1] > 0.5, columns[2], columns[3]
        _, prompt = prompt.unique(return_inverse=True)
        figures: dict[str, float] = {}
        pairs = desirable & ~other.isnan()
        if bool(pairs.any()):
            figures |= _of_pairs(self._beta * (reward - other)[pairs], prompt[pairs])
        if bool(desirable.any()) and not bool(desirable.all()):
            figures |= _auroc(reward, desirable, prompt)
        return figures


def _variance(values: Tensor, prompt: Tensor) -> float:
    """Variance of the mean of ``values`` [n], whose deviations are summed by prompt; 0 if it is only rounding."""
    sums = torch.zeros(int(prompt.max()) + 1, dtype=torch.float64).index_add(0, prompt, values - values.mean())
    number = len(prompt.unique())
    variance = float(sums.square().sum()) / len(values) ** 2 * number / max(number - 1, 1)
    return variance if variance > 1e-24 * float(values.square().mean()) else 0.0


def _interval(share: float, variance: float, number: int) -> tuple[float, float]:
    """The interval of Wilson for a share with this variance; ``number`` independent items if the variance is 0."""
    from statsmodels.stats.proportion import proportion_confint  # here: it takes a second, and few runs need it

    number = share * (1 - share) / variance if variance > 0 else number  # type: ignore[assignment]
    low, high = proportion_confint(share * number, number, alpha=0.05, method="wilson")
    return float(low), float(high)


def _of_pairs(margin: Tensor, prompt: Tensor) -> dict[str, float]:
    """Figures of margins beta * (r_chosen - r_rejected), float64 [n]."""
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    accuracy = float(right.mean())
    low, high = _interval(accuracy, _variance(right, prompt), len(prompt.unique()))
    # Each pair is shown in both orders, as the chosen row would always win.
    both = torch.sigmoid(torch.cat([margin, -margin])), torch.arange(2 * len(margin)) < len(margin)
    error = float(binary_calibration_error(both[0], both[1].long(), n_bins=10, norm="l1"))
    slope = _calibration_slope(margin, prompt)
    return dict(zip(OF_PAIRS, (low, high, error, *slope), strict=False))


def _calibration_slope(margin: Tensor, prompt: Tensor) -> list[float]:
    """The factor by which margins should be multiplied to be log-odds, with its interval (Cox 1958).

    It maximizes the likelihood of the preferences. It has no finite value, and the list is empty, if all pairs are
    ranked right, or all wrong. If the prompts do not vary, the interval is that of the likelihood with one pair each.
    """
    if bool((margin >= 0).all()) or bool((margin <= 0).all()):
        return []
    values, slope = margin.numpy() / float(margin.abs().mean()), 0.0
    for _ in range(100):  # Newton's method on a concave function
        wrong = expit(-slope * values)
        step = (wrong * values).sum() / max((wrong * (1 - wrong) * values**2).sum(), 1e-300)
        slope += float(max(-2.0, min(2.0, step)))
        if abs(step) < 1e-10:
            break
    wrong = torch.from_numpy(expit(-slope * values))
    unit = torch.from_numpy(values)
    curvature = max(float((wrong * (1 - wrong) * unit.square()).mean()), 1e-300)
    variance = _variance(wrong * unit, prompt) or curvature / len(prompt.unique())
    error = math.sqrt(variance) / curvature
    return [(slope + z * error) / float(margin.abs().mean()) for z in (0.0, -_Z, _Z)]


def _auroc(reward: Tensor, desirable: Tensor, prompt: Tensor) -> dict[str, float]:
    """The interval of the area under the ROC curve, with the variance of Obuchowski 1997."""
    contribution = torch.empty_like(reward)
    area = 0.0
    for kind in (True, False):
        mine, others = reward[desirable == kind], reward[desirable != kind].sort().values
        below = (torch.searchsorted(others, mine) + torch.searchsorted(others, mine, right=True)).double()
        share = below / (2 * len(others)) if kind else 1 - below / (2 * len(others))
        area = float(share.mean())
        contribution[desirable == kind] = area + len(reward) / len(mine) * (share - area)
    return dict(zip(OF_ROWS, _interval(area, _variance(contribution, prompt), len(prompt.unique())), strict=True))
