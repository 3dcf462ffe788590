"""The figures of a step, with TRL's names and scales, and outcomes in nats.

Every figure is kept as a sum and a count until it is read, so that micro-batches, batches and ranks of
different sizes, even a rank without rows of some class, add up to the figure of the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.distributed import sum_over_ranks
from halos_pl.objective.feedback import Slopes
from halos_pl.objective.feedback.slopes import AT_START, of_sum
from halos_pl.objective.halo import HALO, Outcomes, Result
from halos_pl.objective.rewards import LogRatio
from value_functions import ValueFunction, reward_scale

Weighted = tuple[Tensor, Tensor]
"""A sum and the count to divide it by, float scalars."""


def over(values: Tensor, where: Tensor) -> Weighted:
    """Sum and count of ``values`` [n] at the rows ``where`` (BoolTensor [n])."""
    return torch.where(where, values.float(), 0.0).sum(), where.sum().float()


def wide(values: Tensor) -> Tensor:
    """``values`` in float64 if the device has it, as sums of very many float32 values, or of squares, lose digits."""
    return values.to(torch.float32 if values.is_mps else torch.float64)


class Losses(dict[str, Tensor]):
    """A step's loss on this rank, and its terms if it has several: sums over micro-batches."""

    def add(self, result: Result) -> None:
        """Adds one micro-batch."""
        terms = {f"loss/{name}": value for name, value in (result.terms or {}).items()}
        for name, value in {"loss": result.loss.detach(), **terms}.items():
            self[name] = self[name] + value if name in self else value


class Means:
    """Weighted means by name, accumulated over batches and, when read, over ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, figures: dict[str, Weighted]) -> None:
        """Adds sums and counts; every rank must add the same names in the same order."""
        for name, pair in figures.items():
            here = wide(torch.stack([p.detach() for p in pair]))
            self._sums[name] = self._sums[name] + here if name in self._sums else here

    def totals(self) -> Tensor:
        """Sums and counts over all ranks, float64 [names, 2], on the device."""
        return sum_over_ranks(torch.stack(list(self._sums.values())))

    def compute(self, totals: Sequence[Sequence[float]] | None = None, *, empty: bool = True) -> dict[str, float]:
        """The means over all ranks; resets them.

        Args:
            totals: :meth:`totals` on the host; by default, this reads them, which waits for the device.
            empty: whether a name with a count of 0 gives NaN; otherwise it is left out. A step without rows of a class
                must log NaN, or Lightning would log an earlier step's value again. Loggers do not get the NaN (see
                ``halos_pl.training.absent``).
        """
        if not self._sums:
            return {}
        names, totals = list(self._sums), self.totals().tolist() if totals is None else totals
        self._sums = {}
        return {
            name: total / count if count else math.nan
            for name, (total, count) in zip(names, totals, strict=True)
            if count or empty
        }


def saturation(value_function: ValueFunction, perceived: Tensor) -> Tensor:
    """BoolTensor [n]: rows where the value's slope is less than 1% of the slope at the reference point.

    Such rows have (almost) no gradient, as in Prop. 4.1 of Ethayarajh et al., ICML 2024.
    """
    # Lightning evaluates in inference mode, whose tensors have no gradient; a copy made outside it does.
    with torch.inference_mode(False), torch.enable_grad():
        u = torch.cat([perceived.detach().clone(), perceived.new_zeros(1)]).clone().requires_grad_()
        (slope,) = torch.autograd.grad(value_function(u).sum(), u)
    return slope[:-1].abs() < 0.01 * slope[-1].abs()


class Suspects:
    """Finds the rows that cause a non-finite loss. Reads nothing from the device until it is asked."""

    def __init__(self) -> None:
        self._parts: list[tuple[list[str], Tensor]] = []

    def add(self, names: list[str], rows: LogProbBatch, result: Result) -> None:
        """Checks a part of a step, whose rows are called ``names``."""
        scores = finite_scores(rows)
        if rows.reference_logps is not None:
            scores &= rows.reference_logps.isfinite().all(dim=1)
        values = torch.ones_like(scores)
        if (outcomes := result.outcomes) is not None:
            for figure in (outcomes.reward, outcomes.reference_point, outcomes.outcome, outcomes.value):
                values &= figure.isfinite()
        self._parts.append((names, torch.stack([scores, values])))

    @property
    def any(self) -> Tensor | float:
        """Whether there are such rows: 1.0 or 0.0, on the device; 0.0 without parts."""
        return torch.stack([(~finite).any() for _, finite in self._parts]).any().float() if self._parts else 0.0

    @property
    def names(self) -> list[str]:
        """Rows whose log-probs or scalars are not finite, or, if there are none, whose outcome or value is not.

        The former make the reference point, and thus the outcome of every row, non-finite.
        """
        finite = [(names, flags.tolist()) for names, flags in self._parts]
        for kind in (0, 1):
            if bad := [n for names, flags in finite for n, good in zip(names, flags[kind], strict=True) if not good]:
                return bad
        return []


def finite_scores(rows: LogProbBatch) -> Tensor:
    """BoolTensor [n]: rows whose log-probs and scalar under the policy, as far as computed, are finite."""
    finite = torch.ones_like(rows.labels.desirable)
    if rows.has_logps:
        finite &= rows.policy_logps.detach().isfinite().all(dim=1)
    return finite if rows.scalar is None else finite & rows.scalar.detach().isfinite()


def into_unit_interval(reward: Tensor) -> Tensor:
    """A strictly increasing map of rewards to (0, 1), float64 [n].

    torchmetrics treats scores outside [0, 1] as logits, batch by batch, and would apply a sigmoid to some
    batches but not to others; and a sigmoid would make large rewards equal.
    """
    reward = (reward.cpu() if reward.is_mps else reward).double()  # Apple's GPUs have no float64
    return 0.5 + 0.5 * reward / (1 + reward.abs())


def logp_figures(rows: LogProbBatch) -> dict[str, Weighted]:
    """Log-probs by class, nats, of n rows without mismatched rows, and how far those of the chosen ones have moved."""
    desirable, logps = rows.labels.desirable, rows.policy_logps.detach().sum(dim=1)
    figures = {"logps/chosen": over(logps, desirable), "logps/rejected": over(logps, ~desirable)}
    if rows.reference_logps is not None:
        figures["logps/displacement"] = over(logps - rows.reference_logps.sum(dim=1), desirable)
    return figures


def length_figures(rows: LogProbBatch) -> dict[str, Weighted]:
    """Tokens with loss by class, of n rows without mismatched rows."""
    desirable, tokens = rows.labels.desirable, rows.mask.sum(dim=1)
    return {"lengths/chosen": over(tokens, desirable), "lengths/rejected": over(tokens, ~desirable)}


_CORRELATION = "rewards/length_correlation"
#: Means that only serve to compute the correlation of rewards r and lengths l, and are not logged.
_MOMENTS = tuple(f"{_CORRELATION}/{name}" for name in ("r", "l", "rr", "ll", "rl", "moved"))
#: A variance below this share of the mean square is rounding of float32 numbers.
_ROUNDING = 1e-12


def correlation_figures(reward: Tensor, tokens: Tensor) -> dict[str, Weighted]:
    """Moments of rewards (nats, float [n]) and lengths (LongTensor [n]); see :func:`correlation`."""
    r, length = wide(reward), wide(tokens)
    n = torch.ones_like(r).sum()
    moments = (r, length, r * r, length * length, r * length, wide(r.abs() > AT_START))
    return {name: (values.sum(), n) for name, values in zip(_MOMENTS, moments, strict=True)}


def correlation(r: float, length: float, rr: float, ll: float, rl: float, moved: float) -> float:
    """Pearson's correlation of rewards r and lengths l.

    Args:
        r, length, rr, ll, rl: Means of r, l, r * r, l * l and r * l over the rows.
        moved: Share of rewards that are not 0 up to rounding.

    Returns:
        NaN if it is undefined: if rewards or lengths do not vary, or all rewards are 0.
    """
    of_rewards, of_lengths = rr - r * r, ll - length * length
    if not (moved and of_rewards > _ROUNDING * rr and of_lengths > _ROUNDING * ll):
        return math.nan
    return max(-1.0, min(1.0, (rl - r * length) / math.sqrt(of_rewards * of_lengths)))


def reward_figures(rows: LogProbBatch, reward: Tensor, beta: float) -> dict[str, Weighted]:
    """Rewards by class, under TRL's names.

    Args:
        rows: n rows without mismatched rows.
        reward: rewards, nats, [n], without gradient.
        beta: scale, 1 / nats; the figures are of beta * r.
    """
    shown = beta * reward
    figures = {
        "rewards/chosen": over(shown, rows.labels.desirable),
        "rewards/rejected": over(shown, ~rows.labels.desirable),
        "outcome/reward": over(reward, torch.ones_like(rows.labels.desirable)),
    }
    # Logged without pairs too: another rank may have some, and every rank logs the same names.
    figures["rewards/accuracies"] = over(
        shown > shown[rows.labels.pair], rows.labels.desirable & (rows.labels.pair >= 0)
    )
    return figures


def outcome_figures(outcomes: Outcomes, value_function: ValueFunction) -> dict[str, Weighted]:
    """Figures of the rows' outcomes relative to the reference point, in nats."""
    everywhere = torch.ones_like(outcomes.outcome, dtype=torch.bool)
    figures = {
        "z0": outcomes.reference_point,
        "u": outcomes.outcome,
        "value": outcomes.value,
        "gains": outcomes.outcome > 0,
        "saturation": saturation(value_function, outcomes.perceived),
    }
    return {f"outcome/{name}": over(values, everywhere) for name, values in figures.items()}


def slope_figures(of_halos: Sequence[tuple[HALO, Slopes]]) -> dict[str, Weighted]:
    """The ratio of the classes' slopes, the mean weight of each class in the first HALO, and what the effective number
    of rows is computed from; see :func:`derived`.
    """
    total = of_sum([slopes for _, slopes in of_halos])
    # A row with which another is compared, with gradient, has a slope without a weight, such as a rejected one in DPO.
    counts = [(slopes.weight > 0) | (halo.reference_point.scope == "row") for halo, slopes in of_halos]
    counted = wide(torch.stack(counts).any(dim=0))
    size, rows = wide(total.size) * counted, counted.sum()
    chosen, rejected = total.of_class(True), total.of_class(False)
    return {
        "outcome/rho": (chosen.slope, rejected.slope),
        "outcome/weight_chosen": (chosen.weight, chosen.rows),
        "outcome/weight_rejected": (rejected.weight, rejected.rows),
        _EFFECTIVE: (size.sum(), rows),
        _SQUARES: (size.square().sum(), rows),
        _MOVED: (total.moved, torch.ones_like(total.moved)),
    }


_EFFECTIVE = "outcome/effective_rows"
#: Mean square of the slopes, and outcomes that are not 0. They only serve other figures, and are not logged.
_SQUARES, _MOVED = "outcome/squares", "outcome/moved"


def derived(means: dict[str, float]) -> dict[str, float]:
    """Adds the figures that are functions of several means, and removes the means that are not logged.

    * ``rewards/margins``, the difference of the two class means, if both exist.
    * ``rewards/length_correlation``, if it is defined and there are rows (see :func:`correlation`).
    * ``outcome/effective_rows``: (sum s)^2 / (n * sum s^2) with s = |dloss/dr|, over the n rows that have weight or, if
      z0 has a gradient, all rows. This is the effective sample size of Kish 1965, section 11.7, divided by n: between
      1 / n and 1.

    rho and the effective rows are absent (NaN) if there are no slopes to compare (for rho: of a class), and while the
    policy is its reference, as slopes at a kink depend on rounding.
    """
    if {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    if means.keys() >= set(_MOMENTS):
        means[_CORRELATION] = correlation(*(means.pop(name) for name in _MOMENTS))
    if _MOVED in means:
        moved, squares = means.pop(_MOVED), means.pop(_SQUARES)
        means["outcome/rho"] = (moved and means["outcome/rho"]) or math.nan
        means[_EFFECTIVE] = means[_EFFECTIVE] ** 2 / squares if moved and squares else math.nan
    return means


def implied_reward(rows: LogProbBatch, result: Result) -> Tensor | None:
    """r of each row, nats, [n]: the objective's, otherwise the log-ratio if there is a reference."""
    if result.outcomes is not None:
        return result.outcomes.reward
    return None if rows.reference_logps is None else LogRatio()(rows).detach()


def row_figures(rows: LogProbBatch, result: Result, halo: HALO | None) -> dict[str, Weighted]:
    """All figures that are logged for rows, none of them mismatched.

    Args:
        rows: n rows with a loss.
        result: the objective's result for them.
        halo: the HALO whose outcomes are logged; None for a pure baseline.
    """
    figures = logp_figures(rows) if rows.has_logps else {}
    figures |= length_figures(rows)
    reward = implied_reward(rows, result)
    if reward is not None:
        figures |= correlation_figures(reward, rows.mask.sum(dim=1))
        figures |= reward_figures(rows, reward, reward_scale(halo.value_function) if halo else 1.0)
    if halo is not None and result.outcomes is not None and result.estimate is not None:
        with torch.autocast(rows.mask.device.type, enabled=False):
            figures |= outcome_figures(result.outcomes, halo.value_function)
        n = rows.mask.new_full((), len(rows), dtype=torch.float32)
        # The mean of no rows is NaN, and NaN * 0 is not 0.
        of_estimate = result.estimate.figures() if len(rows) else dict.fromkeys(result.estimate.figures(), n)
        figures |= {f"outcome/z0_{name}": (value * n, n) for name, value in of_estimate.items()}
        if halo.needs.mismatched and halo.needs.reference:
            figures["kl"] = figures["outcome/z0"]
    if result.slopes:
        figures |= slope_figures(result.slopes)
    return figures
