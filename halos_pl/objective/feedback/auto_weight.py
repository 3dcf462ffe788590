"""A weight that follows the slopes of earlier steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from halos_pl.distributed import sum_over_ranks
from halos_pl.labels import Labels
from halos_pl.objective.feedback.slopes import Slopes

#: Weight of the older steps in the running mean of a class's slopes: half of it is about the last step.
DECAY = 0.5
#: The largest ratio to reach, and the inverse of the smallest: beyond it, float32 weights overflow or vanish.
LARGEST = 1e6
#: lambda_D makes up for a difference between the classes of at most this factor.
MOST = 1000.0


class AutoWeight(nn.Module):
    """lambda_D for which the slopes of desirable rows sum to rho times those of undesirable rows.

    lambda_D = rho * lambda_U * (n_U * m_U) / (n_D * m_D), where n is the sum of the rows' own weights of a class in the
    step, over all ranks (their number, if all are 1), and m the mean |dv/du| of such rows in earlier steps, weighted
    alike: a running mean over the steps that have any. A step in which a class has no weight takes n_U / n_D of all
    earlier steps. Steps do not count while the policy is its reference;
    until rows of both classes have been seen, the ratios of earlier steps are 1.

    All numbers are in the state dict, and equal on all ranks. They are not buffers, as a Trainer in half precision
    would round buffers.

    Args:
        rho: ratio to reach, above 0.
        lambda_undesirable: weight of undesirable rows, above 0.

    Raises:
        ValueError: an argument is not a positive number.
    """

    def __init__(self, *, rho: float, lambda_undesirable: float) -> None:
        super().__init__()
        if isinstance(rho, bool) or not isinstance(rho, int | float) or not 1 / LARGEST <= rho <= LARGEST:
            raise ValueError(f"Binary: rho is {rho!r}; it must be a number from {1 / LARGEST:g} to {LARGEST:g}")
        if not 0 < lambda_undesirable < math.inf:
            raise ValueError(
                f"Binary: lambda_undesirable is {lambda_undesirable}, and no weight of desirable rows gives the ratio"
                " rho to rows without one; set it above 0"
            )
        self.rho, self.lambda_undesirable = float(rho), float(lambda_undesirable)
        # Of desirable and undesirable rows: the sum of their own weights, a decaying sum over steps of their mean
        # slope, and the same sum of ones.
        self._classes = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        self._latest: Tensor | None = None  # sums of the last step, which stay on the device until they are needed

    def observe(self, slopes: Slopes) -> None:
        """Takes in the slopes of this rank's share of a step; every rank must call it once a step."""
        self._take_in()
        of_classes = (slopes.of_class(True), slopes.of_class(False))
        sums = [figure for each in of_classes for figure in (each.row_weight, each.slope, each.weight)] + [slopes.moved]
        # The denominator is the same on all ranks.
        self._latest = torch.cat([sum_over_ranks(torch.stack(sums)), slopes.denominator.detach().view(1)])

    def _take_in(self) -> None:
        if self._latest is None:
            return
        *sums, moved, denominator = self._latest.tolist()
        self._latest = None
        for kept, (rows, slope, weight) in zip(self._classes, (sums[:3], sums[3:]), strict=True):
            if moved and weight:
                kept[0] += rows
                kept[1] = DECAY * kept[1] + slope * denominator / weight
                kept[2] = DECAY * kept[2] + 1.0

    def get_extra_state(self) -> list[list[float]]:
        self._take_in()
        return [list(kept) for kept in self._classes]

    def set_extra_state(self, state: list[list[float]]) -> None:
        self._classes, self._latest = [list(map(float, kept)) for kept in state], None

    def forward(self, labels: Labels) -> Tensor:
        """lambda_D of a step, float scalar; every rank must call it.

        Args:
            labels: labels of this rank's rows.
        """
        self._take_in()
        of_rows = labels.weight * labels.train
        good, bad = sum_over_ranks(
            torch.stack([(of_rows * side).sum() for side in (labels.desirable, ~labels.desirable)])
        )
        rows, slopes = self._known()
        of_step = torch.where(
            (good > 0) & (bad > 0), bad / torch.where(good > 0, good, 1.0), torch.full_like(good, rows)
        )
        return (of_step * slopes).clamp(1 / MOST, MOST) * (self.rho * self.lambda_undesirable)

    def _known(self) -> tuple[float, float]:
        """n_U / n_D and m_U / m_D of earlier steps; 1 if they have had no rows of a class."""
        (good_rows, good, good_steps), (bad_rows, bad, bad_steps) = self._classes
        if not (good_steps and bad_steps):
            return 1.0, 1.0
        good, bad = good / good_steps, bad / bad_steps
        # v may be flat at all rows of a class.
        return bad_rows / good_rows, min(bad / good, MOST) if good else MOST if bad else 1.0

    def extra_repr(self) -> str:
        return f"rho={self.rho:g}, lambda_undesirable={self.lambda_undesirable:g}"
