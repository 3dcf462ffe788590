"""Clauses of a reference point: a location of the rewards it averages, the same however a step is split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.ranks import Ranks, namespaces
from halos_pl.conformance.steps import Step, kept_together, smallest, two_ranks
from halos_pl.conformance.witness import WrongShape, listed, number, pair
from halos_pl.objective.halo import mean_of_tokens
from halos_pl.objective.reference_points import Estimate, MismatchedKL, ReferencePoint, RunningMean, TokenKL
from halos_pl.objective.rewards import LogRatio, Reward

CLAUSES = (
    "reference_in_range",
    "reference_shift_equivariant",
    "reference_permutation_equivariant",
    "reference_detached",
    "reference_split",
    "reference_finite",
)
# Estimates may be float32 inside (sums over ranks are), whatever the rewards are.
RELATIVE = 256 * torch.finfo(torch.float32).eps

_ITSELF = "expected of {base} itself, not of a subclass with a forward of its own"
_CLAMP = "the paper's own: no KL divergence is negative, so a negative estimate becomes 0 (Ethayarajh et al. 2024, 4.1)"
_EXACT = "the KL divergence is summed over the vocabulary, so it does not look at the rewards that it is the mean of"
# What the library's own reference points are known to fail; a subclass with another forward answers for itself.
EXPECTED: dict[type[ReferencePoint], dict[str, str]] = {
    MismatchedKL: {"reference_in_range": _CLAMP, "reference_shift_equivariant": _CLAMP},
    TokenKL: {"reference_in_range": _EXACT, "reference_shift_equivariant": _EXACT},
}


def _known(reference_point: ReferencePoint) -> tuple[type[ReferencePoint], dict[str, str]] | None:
    """The class of the library that it is or extends, and what that is known to fail."""
    if type(reference_point) is RunningMean:
        return _known(reference_point.of)  # type: ignore[arg-type]
    return next(((base, why) for base, why in EXPECTED.items() if isinstance(reference_point, base)), None)


def expected(reference_point: ReferencePoint) -> dict[str, str]:
    """Clauses that ``reference_point`` is known to fail, with the reason."""
    averaged: Any = reference_point.of if type(reference_point) is RunningMean else reference_point
    known = _known(reference_point)
    return known[1] if known and type(averaged).forward is known[0].forward else {}


def hints(reference_point: ReferencePoint) -> dict[str, str]:
    """What is to be said of clauses that a class of the library is known to fail and a subclass of it fails as well."""
    known = _known(reference_point)
    if known is None or expected(reference_point):
        return {}
    return dict.fromkeys(known[1], _ITSELF.format(base=known[0].__name__))


class ReferencePointChecks:
    """The clauses of one reference point; each ``None`` where it holds, else a witness.

    Args:
        reference_point: the target; copies of it are called, so that what it remembers does not matter.
        reward: what its rewards come from.
        needs: what the rows must provide; left out, what the two ask for.
        examples: how many steps each clause is tried on.
    """

    def __init__(
        self,
        reference_point: ReferencePoint,
        *,
        reward: Reward | None = None,
        needs: Needs | None = None,
        examples: int = 60,
    ) -> None:
        self.target = reference_point
        self.reward = reward or LogRatio()
        self.needs = needs or (self.reward.needs | reference_point.needs)
        self.examples = examples

    def _smallest(self, fault: object, examples: int | None = None) -> str | None:
        return smallest(fault, self.needs, examples=examples or self.examples)  # type: ignore[arg-type]

    def fresh(self) -> ReferencePoint:
        """A copy in training mode that has not been called."""
        return duplicate(self.target)

    def rows(self, step: Step) -> LogProbBatch:
        """The rows that the reference point is called with: those with a loss only, where it is read off row by row."""
        rows = step.rows()
        return rows if self.target.scope == "step" else rows.select(rows.labels.train.nonzero().squeeze(1))

    def rewards(self, rows: LogProbBatch) -> Tensor:
        """Rewards as an objective hands them over, float [n], nats."""
        with torch.no_grad():
            return mean_of_tokens(duplicate(self.reward)(rows), rows.mask)

    def estimate(self, rewards: Tensor, rows: LogProbBatch, copy: ReferencePoint | None = None) -> Tensor:
        """z0 of each row by ``copy``, or by a fresh one, [n], nats, without gradient."""
        with torch.no_grad():
            return (copy or self.fresh())(rewards.clone(), rows).value.expand(len(rows)).to(torch.float64)

    def estimates(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        """z0 of each row on the first and the second call of one copy, and in evaluation after them, [3, n]."""
        copy = self.fresh()
        found = [self.estimate(rewards, rows, copy), self.estimate(1.7 * rewards - 0.4, rows, copy)]
        return torch.stack([*found, self.estimate(0.3 * rewards + 1, rows, copy.eval())])

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
    def degenerate(self) -> float | None:
        """The number that z0 is whatever the rewards and the rows are; None where it depends on anything."""
        seen: set[float] = set()

        def fault(step: Step) -> str | None:
            rows = self.rows(step)
            rewards = self.rewards(rows)
            for given in (rewards, rewards * 3 - 2, rewards + 5, -rewards):
                seen.update(self.estimate(given, rows).tolist())
            return None

        self._smallest(fault, examples=20)
        return seen.pop() if len(seen) == 1 else None

    def _degenerate(self) -> str | None:
        return None if self.degenerate is None else f"z0 = {self.degenerate:g} whatever the rewards"

    def reference_in_range(self) -> str | None:
        """Z0 lies between the least and the largest of the rewards that it depends on, of this and earlier steps.

        And is not in every step each row's own reward, which would leave no outcome but 0.
        """
        compared = False

        def fault(step: Step) -> str | None:
            nonlocal compared
            rows = self.rows(step)
            drawn = self.rewards(rows)
            if int(rows.labels.train.sum()) > 1:
                off = (self.estimate(drawn, rows) - drawn).abs()[rows.labels.train]
                compared |= bool((off > RELATIVE * drawn.abs().max()).any())
            given = drawn.clone()
            with torch.no_grad():
                self.fresh()(given, rows)
            if not torch.equal(given, drawn):
                return f"rewards {listed(drawn)} are {listed(given)} after the call: changed in place"
            everyone = torch.ones(len(rows), len(rows), dtype=torch.bool)
            depends = everyone if step.large else self.reads(drawn, rows)
            depends[~depends.any(dim=1)] = True
            same = self.fresh()
            seen: list[Tensor] = []
            # Close together, away from 0, far out, all the same: an estimate that is off by a little is out of range.
            for rewards in (
                drawn,
                0.1 * drawn + 5,
                0.1 * drawn - 5,
                torch.full_like(drawn, 1.5),
                torch.full_like(drawn, 7e3),
                torch.full_like(drawn, -7e3),
            ):
                found = self._outside(self.estimate(rewards, rows), rewards, rows, depends)
                if found:
                    return found
                seen.append(rewards)
                found = self._outside(self.estimate(rewards, rows, same), torch.cat(seen), rows)
                if found:
                    return f"{found}, on call {len(seen)}"
            found = self._outside(self.estimate(drawn, rows, same.eval()), torch.cat(seen), rows)
            return found and f"{found}, in evaluation after {len(seen)} calls"

        found = self._degenerate() or self._smallest(fault, examples=max(10, self.examples // 8))
        return found or (None if compared else "z0 is each row's own reward, so that every outcome is 0")

    @staticmethod
    def _outside(z0: Tensor, rewards: Tensor, rows: LogProbBatch, depends: Tensor | None = None) -> str | None:
        """A row with a loss whose z0 lies outside of the ``rewards``, or of those that it depends on, [n, n]."""
        slack = RELATIVE * (rewards.abs().max() + 1e-30)
        low, high = rewards.min(), rewards.max()
        if depends is not None:
            low = torch.where(depends, rewards, torch.inf).min(dim=1).values
            high = torch.where(depends, rewards, -torch.inf).max(dim=1).values
        wrong = (~((low - slack <= z0) & (z0 <= high + slack)) & rows.labels.train).nonzero()
        if not len(wrong):
            return None
        i = int(wrong[0])
        return f"rewards {listed(rewards if depends is None else rewards[depends[i]])}, z0 = {number(float(z0[i]))}"

    def reference_shift_equivariant(self) -> str | None:
        """All rewards c nats higher, z0 c nats higher, over several steps and in evaluation after them."""

        def fault(step: Step) -> str | None:
            rows = self.rows(step)
            rewards = self._untied(self.rewards(rows))
            for c in (1.0, -3.5, 10.0):
                before, after = self.fresh(), self.fresh()
                for later in (0.0, 0.7, -0.4, 0.2):
                    given = rewards * (1 + later)
                    if later == 0.2:
                        before.eval()
                        after.eval()
                    a, b = self.estimate(given, rows, before), self.estimate(given + c, rows, after)
                    wrong = ~((b - a - c).abs() <= RELATIVE * (given.abs().max() + abs(c))) & rows.labels.train
                    if bool(wrong.any()):
                        i = int(wrong.nonzero()[0])
                        return (
                            f"rewards {listed(given)}: z0 = {number(float(a[i]))}; all {c:+g}: z0 ="
                            f" {number(float(b[i]))}"
                        )
            return None

        return self._degenerate() or self._smallest(fault, max(10, self.examples // 3))

    def reference_permutation_equivariant(self) -> str | None:
        """The rows in another order, the same z0 for each."""

        def fault(step: Step) -> str | None:
            rows = self.rows(step)
            rewards = self._untied(self.rewards(rows))
            z0 = self.estimates(rewards, rows)
            orders = [torch.arange(len(rows)).flip(0)]
            orders.append(torch.randperm(len(rows), generator=torch.Generator().manual_seed(step.seed)))
            for order in orders:
                permuted = rows.select(order)
                wrong = self._differs(z0[:, order], self.estimates(rewards[order], permuted), rewards, permuted)
                if wrong:
                    return f"rewards {listed(rewards)}: z0 = {wrong[0]}; in the order {order.tolist()[:12]}: {wrong[1]}"
            return None

        return self._smallest(fault, max(10, self.examples // 4))

    @staticmethod
    def _differs(one: Tensor, other: Tensor, rewards: Tensor, rows: LogProbBatch) -> tuple[str, str] | None:
        """The first two numbers that differ, of estimates [calls, n] of those rows that carry a loss."""
        most = RELATIVE * (one.abs().max() + rewards.abs().max())
        wrong = (~((one - other).abs() <= most) & rows.labels.train).nonzero()
        return pair(float(one[tuple(wrong[0])]), float(other[tuple(wrong[0])])) if len(wrong) else None

    @staticmethod
    def _untied(rewards: Tensor) -> Tensor:
        """All different, since the ranks of equal rewards are a matter of order."""
        return rewards + 1e-3 * torch.pi * (1 + rewards.abs().max()) * torch.arange(len(rewards)).to(rewards)

    def reference_detached(self) -> str | None:
        """Of scope ``step``: no gradient through z0, neither of the rewards nor of the policy."""
        if self.target.scope != "step":
            return None

        def fault(step: Step) -> str | None:
            same = self.fresh()
            for call in range(4):
                rows = step.rows()
                policy = (rows.policy_logps * (1 + call)).requires_grad_()
                rows = replace(rows, policy_logps=policy)
                with torch.enable_grad():
                    rewards = mean_of_tokens(duplicate(self.reward)(rows), rows.mask)
                    rewards = rewards if rewards.requires_grad else rewards.clone().requires_grad_()
                    z0 = same.train(call < 3)(rewards, rows).value
                    if not z0.requires_grad:
                        continue
                    into = torch.autograd.grad(z0.sum(), [rewards, policy], allow_unused=True)
                for what, gradient in zip(("rewards", "policy's log-probs"), into, strict=True):
                    if gradient is not None:
                        shown = f"rewards {listed(rewards)}: dz0 / d{what} = {listed(gradient)}, scope is step"
                        return f"{shown}, on call {call + 1}" if call else shown
            return None

        return self._smallest(fault, max(10, self.examples // 2))

    def reference_split(self) -> str | None:
        """The same z0 on two ranks as on one, and in micro-batches as in one; nothing read that was not asked for."""
        return (
            self._smallest(self._unscored_rows)
            or self._smallest(self._micro_batches, max(10, self.examples // 2))
            or self._smallest(self._two_ranks, max(10, self.examples // 6))
        )

    def _unscored_rows(self, step: Step) -> str | None:
        asked = self.target.needs
        if self.target.scope != "step" or asked.step_rewards or asked.whole_step:
            return None
        rows = step.rows()
        z0 = self.estimate(self.rewards(rows), rows)
        blank = replace(rows, policy_logps=torch.where(rows.labels.mismatched[:, None], rows.policy_logps, 0.0))
        other = self.estimate(self.rewards(blank), blank)
        wrong = ~((z0 - other).abs() <= RELATIVE * z0.abs().max()) & rows.labels.train
        if not bool(wrong.any()):
            return None
        i = int(wrong.nonzero()[0])
        a, b = pair(float(z0[i]), float(other[i]))
        return f"z0 = {a}, {b} before rows have been scored that `needs` does not ask for (step_rewards)"

    def parts(self, rows: LogProbBatch, most: int = 12) -> list[Tensor]:
        """The micro-batches of a step: each of the units that stay together, or up to ``most`` runs of them."""
        units = kept_together(rows, self.needs)
        size = -(-len(units) // most)
        runs = [units[first : first + size] for first in range(0, len(units), size)]
        return [torch.tensor([i for unit in run for i in unit]) for run in runs]

    def _micro_batches(self, step: Step) -> str | None:
        if self.target.scope == "step" or self.target.needs.whole_step:
            return None
        rows = self.rows(step)
        rewards = self.rewards(rows)
        z0 = self.estimates(rewards, rows)
        for index in self.parts(rows):
            part = self.estimates(rewards[index], rows.select(index))
            wrong = self._differs(z0[:, index], part, rewards, rows.select(index))
            if wrong:
                shown = f"rewards {listed(rewards)}: z0 = {wrong[0]} of one of rows {listed(index + 1)}"
                return f"{shown}; in a micro-batch of these {len(index)}: {wrong[1]}"
        return None

    def _two_ranks(self, step: Step) -> str | None:
        rows = self.rows(step)
        rewards = self._untied(self.rewards(rows))
        z0 = self.estimates(rewards, rows)
        parts = two_ranks(rows, self.needs, step.seed)
        if not parts:
            return None
        jobs: list[Callable[[], Tensor]] = [
            lambda index=index: self.estimates(rewards[index], rows.select(index))  # type: ignore[misc]
            for index in parts
        ]
        for index, part in zip(parts, Ranks().run(jobs, self._namespaces), strict=True):
            wrong = self._differs(z0[:, index], part, rewards, rows.select(index))
            if wrong:
                a, b = wrong
                return f"rewards {listed(rewards)}: z0 = {a}; on ranks of {len(parts[0])} and {len(parts[1])} rows: {b}"
        return None

    @cached_property
    def _namespaces(self) -> list[dict[str, Any]]:
        return namespaces(self.target)

    def reference_finite(self) -> str | None:
        """A finite number for each row, from a step of one row to rewards of 1e4 nats."""

        def fault(step: Step) -> str | None:
            rows = self.rows(replace(step, alone=self.needs.groups))
            drawn = self.rewards(rows)
            size = drawn.abs().max() + 1e-9
            for rewards in (drawn, -drawn, drawn / size * 1e4, torch.zeros_like(drawn), drawn * 0 - 1e4):
                estimate = self.fresh()(rewards.clone(), rows)
                if not isinstance(estimate, Estimate):
                    return WrongShape(f"it returns a {type(estimate).__name__}, not an Estimate")
                shape = estimate.value.shape
                if tuple(shape) not in ((), (len(rows),)):
                    return WrongShape(f"{len(rows)} rows, z0 of shape {tuple(shape)}")
                z0 = self.estimates(rewards, rows)
                if not bool(z0[:, rows.labels.train].isfinite().all()):
                    call = int((~z0[:, rows.labels.train].isfinite()).any(dim=1).nonzero()[0])
                    when = ("", ", on call 2", ", in evaluation after 2 calls")[call]
                    return f"rewards {listed(rewards)}: z0 = {listed(z0[call])}{when}"
            return None

        return self._smallest(fault, max(10, self.examples // 4))
