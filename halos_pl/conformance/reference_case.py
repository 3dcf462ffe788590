"""The state that the clauses of a reference point share: rewards to call it with, and its estimates."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.conformance.clause import Case, Law, reasons
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.smallest import smallest
from halos_pl.conformance.steps import Step, kept_together
from halos_pl.conformance.witness import pair
from halos_pl.objective.halo import mean_of_tokens
from halos_pl.objective.reference_points import Estimate, ReferencePoint
from halos_pl.objective.rewards import LogRatio, Reward

# Estimates may use float32 inside, as sums over ranks do, whatever the dtype of the rewards.
RELATIVE = 256 * torch.finfo(torch.float32).eps


class ReferencePointCase(Case):
    """One reference point under check.

    Args:
        reference_point: the target; copies of it are called, so that its memory does not matter.
        laws: its clauses.
        excusable: those of them that its ``excused`` may name.
        reward: source of its rewards; default: ``LogRatio``.
        needs: needs that the rows must meet; default: those of the two.
        examples: number of steps that each clause is tried on.

    Raises:
        TargetError: ``reference_point.excused`` names a clause that is not ``excusable``.
    """

    def __init__(
        self,
        reference_point: ReferencePoint,
        laws: tuple[Law, ...],
        excusable: tuple[Law, ...],
        *,
        reward: Reward | None = None,
        needs: Needs | None = None,
        examples: int = 60,
    ) -> None:
        super().__init__(reference_point, laws)
        self.excused = reasons(reference_point, "excused", excusable)
        self.target = reference_point
        self.reward = reward or LogRatio()
        self.needs = needs or (self.reward.needs | reference_point.needs)
        self.examples = examples

    def smallest(self, fault: Callable[[Step], str | None], examples: int | None = None) -> str | None:
        """The witness of the smallest faulty step, else None."""
        return smallest(fault, self.needs, examples=examples or self.examples)

    def fresh(self) -> ReferencePoint:
        """A copy in training mode that has not been called."""
        return duplicate(self.target)

    def rows(self, step: Step) -> LogProbBatch:
        """The rows that the reference point is called with; for scope ``row``, only those with a loss."""
        rows = step.rows()
        return rows if self.target.scope == "step" else rows.select(rows.labels.train.nonzero().squeeze(1))

    def rewards(self, rows: LogProbBatch) -> Tensor:
        """Rewards as an objective passes them, float [n], nats."""
        with torch.no_grad():
            return mean_of_tokens(duplicate(self.reward)(rows), rows.mask)

    def estimate(self, rewards: Tensor, rows: LogProbBatch, copy: ReferencePoint | None = None) -> Tensor:
        """z0 of each row from ``copy``, or from a fresh one, without gradient; nats, float64 [n]."""
        with torch.no_grad():
            estimate: Estimate = (copy or self.fresh())(rewards.clone(), rows)
            return estimate.value.expand(len(rows)).to(torch.float64)

    def estimates(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        """z0 of each row on the first two calls of one copy, and in evaluation after them, [3, n]."""
        copy = self.fresh()
        in_training = [self.estimate(rewards, rows, copy), self.estimate(1.7 * rewards - 0.4, rows, copy)]
        return torch.stack([*in_training, self.estimate(0.3 * rewards + 1, rows, copy.eval())])

    def reads(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        """Whether z0 of row i depends on the reward of row j, BoolTensor [n, n], found by changing one at a time."""
        z0 = self.estimate(rewards, rows)
        depends = torch.zeros(len(rows), len(rows), dtype=torch.bool)
        span = float(rewards.abs().max()) + 1
        for j in range(len(rows)):
            for change in (1e-2 * span, -1e-2 * span, 20 * span, -20 * span):
                moved = rewards.clone()
                moved[j] += change
                depends[:, j] |= self.estimate(moved, rows) != z0
        return depends

    @cached_property
    def constant(self) -> float | None:
        """The constant value of z0; None if it depends on the rewards or the rows."""
        seen: set[float] = set()

        def look(step: Step) -> str | None:
            rows = self.rows(step)
            rewards = self.rewards(rows)
            for shown in (rewards, rewards * 3 - 2, rewards + 5, -rewards):
                seen.update(self.estimate(shown, rows).tolist())
            return None

        self.smallest(look, examples=20)
        return seen.pop() if len(seen) == 1 else None

    def constant_witness(self) -> str | None:
        """A witness that z0 does not depend on the rewards; else None."""
        return None if self.constant is None else f"z0 = {self.constant:g} whatever the rewards"

    def parts(self, rows: LogProbBatch, most: int = 12) -> list[Tensor]:
        """The micro-batches of a step: each of the units that stay together, or up to ``most`` runs of them."""
        units = kept_together(rows, self.needs)
        size = -(-len(units) // most)
        runs = [units[first : first + size] for first in range(0, len(units), size)]
        return [torch.tensor([i for unit in run for i in unit]) for run in runs]


def first_difference(one: Tensor, other: Tensor, rewards: Tensor, rows: LogProbBatch) -> tuple[str, str] | None:
    """The first two numbers that differ between estimates [calls, n], among rows that carry a loss; else None."""
    most = RELATIVE * (one.abs().max() + rewards.abs().max())
    wrong = (~((one - other).abs() <= most) & rows.labels.train).nonzero()
    return pair(float(one[tuple(wrong[0])]), float(other[tuple(wrong[0])])) if len(wrong) else None


def untied(rewards: Tensor) -> Tensor:
    """The rewards, all made distinct, since the ranks of equal rewards depend on their order."""
    return rewards + 1e-3 * torch.pi * (1 + rewards.abs().max()) * torch.arange(len(rewards)).to(rewards)
