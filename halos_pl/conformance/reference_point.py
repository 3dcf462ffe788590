"""Clauses of a reference point: a location of the rewards it averages, the same however a step is split."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.strategies import Step, smallest
from halos_pl.conformance.witness import WrongShape, listed, number, pair
from halos_pl.objective import mean_of_tokens
from halos_pl.outcomes import Needs, Rows
from halos_pl.reference_points import MismatchedKL, ReferencePoint, RunningMean, TokenKL
from halos_pl.rewards import LogRatio, Reward

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

_CLAMP = "the paper's own: no KL divergence is negative, so a negative estimate becomes 0 (Ethayarajh et al. 2024, 4.1)"
_EXACT = "the KL divergence is summed over the vocabulary, so it does not look at the rewards that it is the mean of"
# What the library's own reference points are known to fail, by their exact class: a subclass answers for itself.
EXPECTED: dict[type[ReferencePoint], dict[str, str]] = {
    MismatchedKL: {"reference_in_range": _CLAMP, "reference_shift_equivariant": _CLAMP},
    TokenKL: {"reference_in_range": _EXACT, "reference_shift_equivariant": _EXACT},
}


def expected(reference_point: ReferencePoint) -> dict[str, str]:
    """Clauses that ``reference_point`` is known to fail, with the reason."""
    kind = type(reference_point)
    if kind is RunningMean:
        return expected(reference_point.of)  # type: ignore[arg-type]
    return EXPECTED.get(kind, {})


class _Ranks:
    """Two ranks as two threads of this process, which meet at each collective operation.

    torch.distributed itself is replaced for as long as it takes, so that a plug-in that calls it directly is served
    as well as one that uses ``halos_pl.distributed``. A real process group would take seconds to start.
    """

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.barrier = threading.Barrier(count)
        self.slots: list[Any] = [None] * count
        self.local = threading.local()

    def exchange(self, value: Any) -> list[Any]:
        """What every rank brought, in the order of the ranks."""
        self.slots[self.local.rank] = value
        self.barrier.wait(timeout=5)
        everything = list(self.slots)
        self.barrier.wait(timeout=5)
        return everything

    def all_reduce(self, tensor: Tensor, op: Any = None, *args: Any, **kwargs: Any) -> None:
        kinds: dict[str, Any] = {"SUM": torch.sum, "MAX": torch.amax, "MIN": torch.amin, "PRODUCT": torch.prod}
        stacked = torch.stack(self.exchange(tensor.detach().clone()))
        name = next((name for name in kinds if name in str(op).upper()), "SUM")
        reduced = kinds[name](stacked, dim=0)
        tensor.data.copy_(reduced / self.count if "AVG" in str(op).upper() else reduced)

    def all_gather(self, out: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        for place, value in zip(out, self.exchange(tensor.detach().clone()), strict=True):
            place.copy_(value)

    def all_gather_object(self, out: list[Any], value: Any, *args: Any, **kwargs: Any) -> None:
        out[:] = self.exchange(value)

    def gather_with_gradient(self, tensor: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(self.exchange(tensor))

    @contextmanager
    def in_place_of_torch(self) -> Iterator[None]:
        """torch.distributed as these ranks see it."""
        home = "torch.distributed."
        stand_ins: dict[str, Any] = {
            home + "is_available": lambda: True,
            home + "is_initialized": lambda: True,
            home + "get_world_size": lambda *a, **k: self.count,
            home + "get_rank": lambda *a, **k: self.local.rank,
            home + "all_reduce": self.all_reduce,
            home + "all_gather": self.all_gather,
            home + "all_gather_object": self.all_gather_object,
            home + "barrier": lambda *a, **k: self.exchange(None),
            home + "nn.functional.all_gather": self.gather_with_gradient,
        }
        with ExitStack() as stack:
            for name, stand_in in stand_ins.items():
                stack.enter_context(mock.patch(name, stand_in))
            yield

    def run(self, jobs: list[Callable[[], Any]]) -> list[Any]:
        """The results of one job a rank.

        Raises:
            Exception: what a job raised, or that the ranks did not make the same calls.
        """
        results: list[Any] = [None] * self.count
        errors: list[Exception] = []

        def work(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = jobs[rank]()
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        with self.in_place_of_torch():
            threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(self.count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            errors.sort(key=lambda e: isinstance(e, threading.BrokenBarrierError))
            if isinstance(errors[0], threading.BrokenBarrierError):
                raise RuntimeError("the ranks do not make the same calls of torch.distributed")
            raise errors[0]
        return results


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
        examples: int = 100,
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

    def rows(self, step: Step) -> Rows:
        """The rows that the reference point is called with: those with a loss only, where it is read off row by row."""
        rows = step.rows()
        return rows if self.target.scope == "step" else rows.select(rows.train.nonzero().squeeze(1))

    def rewards(self, rows: Rows) -> Tensor:
        """Rewards as an objective hands them over, float [n], nats."""
        with torch.no_grad():
            return mean_of_tokens(duplicate(self.reward)(rows), rows.mask)

    def estimate(self, rewards: Tensor, rows: Rows) -> Tensor:
        """z0 of each row by a fresh copy, [n], nats, without gradient."""
        with torch.no_grad():
            return self.fresh()(rewards.clone(), rows).expand(len(rows)).to(torch.float64)

    def reads(self, rewards: Tensor, rows: Rows) -> Tensor:
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
        """Z0 lies between the least and the largest of the rewards that it depends on."""

        def fault(step: Step) -> str | None:
            rows = self.rows(step)
            drawn = self.rewards(rows)
            depends = self.reads(drawn, rows)
            # Close together, away from 0, and all the same: an estimate that is off by a little is out of range.
            for rewards in (drawn, 0.1 * drawn + 5, 0.1 * drawn - 5, torch.full_like(drawn, 1.5)):
                z0 = self.estimate(rewards, rows)
                slack = RELATIVE * (rewards.abs().max() + 1e-30)
                for i in range(len(rows)):
                    averaged = rewards[depends[i]] if bool(depends[i].any()) else rewards
                    if not averaged.min() - slack <= z0[i] <= averaged.max() + slack:
                        return f"rewards {listed(averaged)}, z0 = {number(float(z0[i]))}"
            return None

        return self._degenerate() or self._smallest(fault, examples=max(10, self.examples // 8))

    def reference_shift_equivariant(self) -> str | None:
        """All rewards c nats higher, z0 c nats higher, over several steps."""

        def fault(step: Step) -> str | None:
            rows = self.rows(step)
            rewards = self.rewards(rows)
            for c in (1.0, -3.5, 10.0):
                before, after = self.fresh(), self.fresh()
                for later in (0.0, 0.7, -0.4):
                    given = rewards * (1 + later)
                    with torch.no_grad():
                        a = before(given.clone(), rows).expand(len(rows)).double()
                        b = after(given + c, rows).expand(len(rows)).double()
                    wrong = ~((b - a - c).abs() <= RELATIVE * (given.abs().max() + abs(c)))
                    if bool(wrong.any()):
                        i = int(wrong.nonzero()[0])
                        return (
                            f"rewards {listed(given)}: z0 = {number(float(a[i]))}; all {c:+g}: z0 ="
                            f" {number(float(b[i]))}"
                        )
            return None

        return self._degenerate() or self._smallest(fault, max(10, self.examples // 2))

    def reference_permutation_equivariant(self) -> str | None:
        """The rows in another order, the same z0 for each."""

        def fault(step: Step) -> str | None:
            rows = self.rows(step)
            rewards = self.rewards(rows)
            z0 = self.estimate(rewards, rows)
            orders = [torch.arange(len(rows)).flip(0)]
            orders.append(torch.randperm(len(rows), generator=torch.Generator().manual_seed(step.seed)))
            for order in orders:
                moved = self.estimate(rewards[order], rows.select(order))
                wrong = ~((moved - z0[order]).abs() <= RELATIVE * (rewards.abs().max() + z0.abs().max()))
                if bool(wrong.any()) and not self._tied(rewards):
                    i = int(wrong.nonzero()[0])
                    a, b = pair(float(z0[order][i]), float(moved[i]))
                    return f"rewards {listed(rewards)}: z0 = {a}; in the order {order.tolist()}: {b}"
            return None

        return self._smallest(fault, max(10, self.examples // 2))

    @staticmethod
    def _tied(rewards: Tensor) -> bool:
        """Rows with the same reward, whose ranks are a matter of order."""
        return len(rewards.unique()) < len(rewards)

    def reference_detached(self) -> str | None:
        """Of scope ``step``: no gradient through z0, neither of the rewards nor of the policy."""
        if self.target.scope != "step":
            return None

        def fault(step: Step) -> str | None:
            rows = step.rows()
            policy = rows.policy_logps.clone().requires_grad_()
            rows = replace(rows, policy_logps=policy)
            with torch.enable_grad():
                rewards = mean_of_tokens(duplicate(self.reward)(rows), rows.mask)
                rewards = rewards if rewards.requires_grad else rewards.clone().requires_grad_()
                z0 = self.fresh()(rewards, rows)
                if not z0.requires_grad:
                    return None
                into = torch.autograd.grad(z0.sum(), [rewards, policy], allow_unused=True)
            for what, gradient in zip(("rewards", "policy's log-probs"), into, strict=True):
                if gradient is not None:
                    return f"rewards {listed(rewards)}: dz0 / d{what} = {listed(gradient)}, scope is step"
            return None

        return self._smallest(fault)

    def reference_split(self) -> str | None:
        """The same z0 on two ranks as on one, and in micro-batches as in one; nothing read that was not asked for."""
        return (
            self._smallest(self._unscored_rows)
            or self._smallest(self._micro_batches)
            or self._smallest(self._two_ranks, max(10, self.examples // 4))
        )

    def _unscored_rows(self, step: Step) -> str | None:
        asked = self.target.needs
        if self.target.scope != "step" or asked.step_rewards or asked.whole_step:
            return None
        rows = step.rows()
        z0 = self.estimate(self.rewards(rows), rows)
        blank = replace(rows, policy_logps=torch.where(rows.probe[:, None], rows.policy_logps, 0.0))
        other = self.estimate(self.rewards(blank), blank)
        wrong = ~((z0 - other).abs() <= RELATIVE * z0.abs().max())
        if not bool(wrong.any()):
            return None
        i = int(wrong.nonzero()[0])
        a, b = pair(float(z0[i]), float(other[i]))
        return f"z0 = {a}, {b} before rows have been scored that `needs` does not ask for (step_rewards)"

    def _units(self, rows: Rows) -> list[list[int]]:
        """Rows that are never split: pairs, and whole prompts where they are asked for."""
        units: dict[tuple[str, int], list[int]] = {}
        for i, (rival, group) in enumerate(zip(rows.rival.tolist(), rows.group.tolist(), strict=True)):
            if self.needs.groups and not rows.probe[i]:
                units.setdefault(("group", group), []).append(i)
            else:
                units.setdefault(("row", min(i, rival) if rival >= 0 else i), []).append(i)
        return list(units.values())

    def _micro_batches(self, step: Step) -> str | None:
        if self.target.scope == "step" or self.target.needs.whole_step:
            return None
        rows = self.rows(step)
        rewards = self.rewards(rows)
        z0 = self.estimate(rewards, rows)
        for unit in self._units(rows):
            index = torch.tensor(unit)
            part = self.estimate(rewards[index], rows.select(index))
            wrong = ~((part - z0[index]).abs() <= RELATIVE * rewards.abs().max())
            if bool(wrong.any()):
                i = int(wrong.nonzero()[0])
                a, b = pair(float(z0[index][i]), float(part[i]))
                return f"rewards {listed(rewards)}: z0 = {a} of row {unit[i] + 1}; in a micro-batch of {len(unit)}: {b}"
        return None

    def _two_ranks(self, step: Step) -> str | None:
        rows = self.rows(step)
        rewards = self.rewards(rows)
        z0 = self.estimate(rewards, rows)
        units = self._units(rows)
        if len(units) < 2 or (self.target.needs.whole_step and self._tied(rewards)):
            return None
        cut = 1 + step.seed % (len(units) - 1)
        parts = [torch.tensor([i for unit in half for i in unit]) for half in (units[:cut], units[cut:])]
        if any(not bool(rows.train[index].any()) for index in parts):
            return None
        jobs: list[Callable[[], Tensor]] = [
            lambda index=index: self.estimate(rewards[index], rows.select(index))  # type: ignore[misc]
            for index in parts
        ]
        for index, part in zip(parts, _Ranks().run(jobs), strict=True):
            wrong = ~((part - z0[index]).abs() <= RELATIVE * (rewards.abs().max() + z0.abs().max()))
            if bool(wrong.any()):
                i = int(wrong.nonzero()[0])
                a, b = pair(float(z0[index][i]), float(part[i]))
                return f"rewards {listed(rewards)}: z0 = {a}; on ranks of {len(parts[0])} and {len(parts[1])} rows: {b}"
        return None

    def reference_finite(self) -> str | None:
        """A finite number for each row, from a step of one row to rewards of 1e4 nats."""

        def fault(step: Step) -> str | None:
            rows = self.rows(step)
            drawn = self.rewards(rows)
            size = drawn.abs().max() + 1e-9
            for rewards in (drawn, -drawn, drawn / size * 1e4, torch.zeros_like(drawn), drawn * 0 - 1e4):
                shape = self.fresh()(rewards.clone(), rows).shape
                if tuple(shape) not in ((), (len(rows),)):
                    return WrongShape(f"{len(rows)} rows, z0 of shape {tuple(shape)}")
                z0 = self.estimate(rewards, rows)
                if not bool(z0.isfinite().all()):
                    return f"rewards {listed(rewards)}: z0 = {listed(z0)}"
            return None

        return self._smallest(fault, max(10, self.examples // 2))
