"""The state that the clauses of a reference point share: rewards to call it with, and its estimates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.conformance.clause import Law
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.later import PartCase
from halos_pl.conformance.smallest import smallest
from halos_pl.conformance.step_split import kept_together
from halos_pl.conformance.steps import Step, asked, fitted_to, gradient_of, with_leaf
from halos_pl.conformance.witness import pair
from halos_pl.objective.halo import mean_of_tokens
from halos_pl.objective.reference_points import Estimate, ReferencePoint
from halos_pl.objective.rewards import LogRatio, Reward

# Estimates may use float32 inside, as sums over ranks do, whatever the dtype of the rewards.
RELATIVE = 256 * torch.finfo(torch.float32).eps


class ReferencePointCase(PartCase):
    """One reference point under check.

    Args:
        reference_point: the target; copies of it are called, so that its memory does not matter.
        laws: its clauses.
        reward: source of its rewards; default: ``LogRatio``.
        needs: needs of the objective, which the rows meet; default: those of the two, of which the rows that the
            reference point is called with provide its own.
        examples: number of steps that each clause is tried on.

    Attributes:
        clamped: whether an estimate was 0 because it was clamped from below.
    """

    target: ReferencePoint

    def __init__(
        self,
        reference_point: ReferencePoint,
        laws: tuple[Law, ...],
        *,
        reward: Reward | None = None,
        needs: Needs | None = None,
        examples: int = 60,
    ) -> None:
        super().__init__(reference_point, laws)
        self.target = reference_point
        self.reward = reward or LogRatio()
        self.needs = needs or (self.reward.needs | reference_point.needs)
        self._asked, self._shown = needs, needs or reference_point.needs
        self.examples = examples
        self.clamped = False
        self.has_slope = reference_point.scope == "row"

    def smallest(self, fault: Callable[[Step], str | None], examples: int | None = None) -> str | None:
        """The witness of the smallest faulty step, else None."""
        return smallest(fault, self.needs, examples=examples or self.examples)

    def fresh(self) -> ReferencePoint:
        """A copy in training mode that has not been called."""
        return duplicate(self.target)

    def drawn(self, number: int) -> LogProbBatch:
        """Rows of a small step, in float32."""
        step = Step(units=2 + number, tokens=3, seed=number, grouped=self.needs.groups)
        return self.shown(self.rows(fitted_to(step, self.needs, None), torch.float32))

    def called(self, part: nn.Module, rows: LogProbBatch) -> Tensor:
        """z0 of each row, [n], for as many rewards: 1, 1.3, 1.6, ... nats, so that steps of other sizes differ."""
        value: Tensor = part(_rising(rows), rows).value
        return value.expand(len(rows))

    def repeated(self, rows: LogProbBatch) -> Callable[[Any], Tensor]:
        """z0 for the same rewards and rows, which are made once."""
        rewards = _rising(rows)
        return lambda part: part(rewards, rows).value

    def with_history(self, law: Law) -> bool:
        """A mean over steps remembers the rewards of other steps, which those of a clause need not include."""
        return law.__name__ not in ("reference_in_range", "reference_shift_equivariant")

    def of(self, part: ReferencePoint, examples: int) -> ReferencePointCase:  # type: ignore[override]
        """The same case of another reference point."""
        return ReferencePointCase(part, self.laws, reward=self.reward, needs=self._asked, examples=examples)

    def rows(self, step: Step, dtype: torch.dtype | None = None) -> LogProbBatch:
        """The rows that the reference point is called with; default: in float32, as in training, for every other step.

        For scope ``row``, only those with a loss.
        """
        dtype = dtype or (torch.float32 if step.seed % 2 else torch.float64)
        rows = asked(step.rows(dtype), self.needs)
        return rows if self.target.scope == "step" else rows.select(rows.labels.train.nonzero().squeeze(1))

    def rewards(self, rows: LogProbBatch) -> Tensor:
        """Rewards as an objective passes them, float [n], nats."""
        with torch.no_grad():
            return mean_of_tokens(duplicate(self.reward)(rows), rows.mask)

    def slopes(self, rows: LogProbBatch) -> Tensor:
        """Slopes of the rewards in the log-probs of the tokens, float [n, T]."""
        policy, rows = with_leaf(rows, self.needs)
        rewards = mean_of_tokens(duplicate(self.reward)(rows), rows.mask)
        return gradient_of(rewards.sum(), policy)[:, : rows.mask.shape[1]] * rows.mask

    def expected(self, rows: LogProbBatch) -> Tensor:
        """Each row's expected reward if every token is drawn anew from the policy, float [n], nats.

        The expected log-ratio of a token drawn from the policy is the exact KL divergence. A row that is not mismatched
        has none, and gets NaN.
        """
        if rows.kl is None:
            return torch.full((len(rows),), torch.nan)
        expected = (self.slopes(rows) * rows.kl).sum(dim=1).double()
        return torch.where(rows.labels.mismatched, expected, torch.nan)

    def raised(self, rows: LogProbBatch, c: float) -> LogProbBatch:
        """The rows, with exact KL divergences at which each row's expected reward is ``c`` nats higher."""
        if rows.kl is None:
            return rows
        slopes = self.slopes(rows)
        each = torch.where(rows.mask, c / slopes.sum(dim=1, keepdim=True), 0.0).nan_to_num(0.0, 0.0, 0.0)
        return replace(rows, kl=rows.kl + each * rows.labels.mismatched[:, None])

    def estimate(self, rewards: Tensor, rows: LogProbBatch, copy: ReferencePoint | None = None) -> Tensor:
        """z0 of each row from ``copy``, or from a fresh one, without gradient; nats, float64 [n]."""
        with torch.no_grad():
            estimate: Estimate = (copy or self.fresh())(rewards.clone(), self.shown(rows))
            return estimate.value.expand(len(rows)).to(torch.float64)

    def shown(self, rows: LogProbBatch) -> LogProbBatch:
        """The rows without what the reference point has not asked for."""
        return asked(rows, self._shown)

    def estimates(self, rewards: Tensor, rows: LogProbBatch, *, once: bool = False) -> Tensor:
        """z0 of each row on the first two calls of one copy, and in evaluation after them, [3, n]; or once, [1, n]."""
        copy = self.fresh()
        if once:
            return self.estimate(rewards, rows, copy)[None]
        in_training = [self.estimate(rewards, rows, copy), self.estimate(1.7 * rewards - 0.4, rows, copy)]
        return torch.stack([*in_training, self.estimate(0.3 * rewards + 1, rows, copy.eval())])

    def reads(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        """What z0 of row i depends on, found by changing one number at a time.

        Returns:
            BoolTensor [n, 2n]: on the reward of row j (column j), on its exact KL divergence (column n + j).
        """
        n, z0 = len(rows), self.estimate(rewards, rows)
        depends = torch.zeros(n, 2 * n, dtype=torch.bool)
        span = float(rewards.abs().max()) + 1
        for j in range(n):
            for change in (1e-2 * span, -20 * span, 20 * span):
                moved = rewards.clone()
                moved[j] += change
                depends[:, j] |= self.estimate(moved, rows) != z0
        for j in [] if rows.kl is None else rows.labels.mismatched.nonzero().squeeze(1).tolist():
            kl = rows.kl.clone()  # type: ignore[union-attr]
            kl[j] += rows.mask[j]
            depends[:, n + j] = self.estimate(rewards, replace(rows, kl=kl)) != z0
        return depends

    @cached_property
    def attains_zero(self) -> bool:
        """Whether z0 = 0 is a mean of rewards E_Q[r], whatever the policy.

        Policy and reference both sum to 1, so after each prefix some token is at least as likely under the policy as
        under the reference, and some at most. It suffices that r >= 0 for completions of the first, and r <= 0 for
        completions of the second.
        """

        def fault(step: Step) -> str | None:
            reference = step.rows().reference_logps
            assert reference is not None
            for factor, side in ((0.5, 1), (1.5, -1)):
                rows = asked(replace(step.rows(), policy_logps=factor * reference), self.needs)
                if bool((side * self.rewards(rows) < -1e-9 * reference.abs().max()).any()):
                    return "r < 0 where every token is likelier under the policy, or r > 0 where none is"
            return None

        return self.smallest(fault, examples=20) is None

    @cached_property
    def constant(self) -> float | None:
        """The constant value of z0; None if it depends on the rewards or the rows."""
        seen: set[float] = set()

        def look(step: Step) -> str | None:
            rows = self.rows(step)
            if len(seen) > 1 or step.huge:
                return None
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


def _rising(rows: LogProbBatch) -> Tensor:
    """Rewards of 1, 1.3, 1.6, ... nats, [n], with the gradient of a sum of the policy's outputs if these have one."""
    rising = 1 + 0.3 * torch.arange(len(rows)).to(rows.policy_logps)
    outputs = rows.policy_logps.sum(dim=1) if rows.scalar is None else rows.scalar
    return rising + (outputs - outputs.detach()) if outputs.requires_grad else rising


def first_difference(one: Tensor, other: Tensor, rewards: Tensor, rows: LogProbBatch) -> tuple[str, str] | None:
    """The first two numbers that differ between estimates [calls, n], among rows that carry a loss; else None."""
    if not len(rows):
        return None
    most = RELATIVE * (one.abs().max() + rewards.abs().max())
    wrong = (~((one - other).abs() <= most) & rows.labels.train).nonzero()
    return pair(float(one[tuple(wrong[0])]), float(other[tuple(wrong[0])])) if len(wrong) else None


def untied(rewards: Tensor) -> Tensor:
    """The rewards, all made distinct, since the ranks of equal rewards depend on their order."""
    return rewards + 1e-3 * torch.pi * (1 + rewards.abs().max()) * torch.arange(len(rewards)).to(rewards)
