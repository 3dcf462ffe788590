"""Clauses of a reward: r = l(y) * log[pi_theta / pi_ref] with l > 0, and blind to padding."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.strategies import Step, smallest
from halos_pl.conformance.witness import WrongShape, listed, number, pair
from halos_pl.outcomes import Rows
from halos_pl.rewards import Reward

CLAUSES = ("reward_shape", "reward_zero_at_reference", "reward_linear", "reward_padding")
# arXiv v1 allows any parameterised reward.
ICML_ONLY = ("reward_zero_at_reference", "reward_linear")


def padded(rows: Rows, columns: int) -> Rows:
    """The same rows in a wider batch: every [n, T] field gets columns of zeros (False in the mask)."""
    wide = {
        f.name: F.pad(value, (0, columns))
        for f in fields(rows)
        if isinstance(value := getattr(rows, f.name), Tensor) and value.dim() == 2
    }
    return replace(rows, **wide)


class RewardChecks:
    """The clauses of one reward; each ``None`` where it holds, else a witness.

    Args:
        reward: the target; copies of it are called.
        examples: how many steps each clause is tried on.
    """

    def __init__(self, reward: Reward, *, examples: int = 100) -> None:
        self.target = reward
        self.examples = examples

    def _smallest(self, fault: object) -> str | None:
        return smallest(fault, self.target.needs, examples=self.examples)  # type: ignore[arg-type]

    def fresh(self) -> Reward:
        """A copy that has not been called."""
        return duplicate(self.target)

    def reward_shape(self) -> str | None:
        """One number for each row, or one for each token, of the log-probs' dtype."""

        def fault(step: Step) -> str | None:
            for dtype in (torch.float64, torch.float32):
                rows = padded(step.rows(dtype), 2)
                n, width = rows.policy_logps.shape
                r = self.fresh()(rows)
                if not isinstance(r, Tensor) or tuple(r.shape) not in ((n,), (n, width)) or n == width:
                    if isinstance(r, Tensor) and n == width and tuple(r.shape) in ((n,), (n, width)):
                        continue
                    shape = tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__
                    return WrongShape(f"{n} rows of {width} tokens, reward of shape {shape}")
                if r.dtype != dtype:
                    return f"log-probs in {str(dtype)[6:]}, reward in {str(r.dtype)[6:]}"
            return None

        return self._smallest(fault)

    def reward_zero_at_reference(self) -> str | None:
        """R is 0 where policy equals reference."""

        def fault(step: Step) -> str | None:
            rows = step.rows()
            assert rows.reference_logps is not None
            r = self.fresh()(replace(rows, policy_logps=rows.reference_logps.clone()))
            r = torch.where(rows.mask, r, 0.0) if r.dim() == 2 else r
            floor = 1e-9 * (1 + rows.reference_logps.abs().sum())
            wrong = (~(r.abs() <= floor)).nonzero()
            if not len(wrong):
                return None
            row = int(wrong[0, 0])
            logps = rows.reference_logps[row][rows.mask[row]]
            return f"policy = reference = {listed(logps)}, reward {number(float(r[tuple(wrong[0].tolist())]))}"

        return self._smallest(fault)

    def reward_linear(self) -> str | None:
        """The slope of r in each log-prob of its row is one number l > 0 whatever the policy is, elsewhere 0."""

        def fault(step: Step) -> str | None:
            rows = step.rows()
            n = len(rows)
            policies = [step.rows().policy_logps]
            for seed in (1, 2):
                other = torch.Generator().manual_seed(step.seed + seed)
                drawn = -torch.rand(rows.mask.shape, generator=other, dtype=torch.float64) * 3 * step.scale
                policies.append(torch.where(rows.mask, drawn, 0.0))
            first: Tensor | None = None
            values = []
            reward = self.fresh()
            for policy in policies:
                leaf = policy.clone().requires_grad_()
                r = reward(replace(rows, policy_logps=leaf))
                tokens = r.dim() == 2
                per_row = torch.where(rows.mask, r, 0.0).sum(dim=1) if tokens else r
                # Two sums of the rows with other weights have slopes in proportion to them, unless rows mix.
                weights = torch.rand(2, n, generator=torch.Generator().manual_seed(step.seed), dtype=leaf.dtype) + 0.5
                slopes = [_slope((w * per_row).sum(), leaf) / w[:, None] for w in weights]
                values.append(per_row.detach())
                size = slopes[0].abs().max()
                if bool(((slopes[0] - slopes[1]).abs() * rows.mask > 1e-6 * size + 1e-12).any()):
                    return _mixed(per_row, leaf, rows)
                own = slopes[0]
                scale = torch.where(rows.mask, own, 0.0).sum(dim=1) / rows.mask.sum(dim=1)
                uneven = (own - scale[:, None]).abs() * rows.mask > 1e-6 * scale.abs()[:, None] + 1e-12
                for i in range(n):
                    logps = f"policy {listed(policy[i][rows.mask[i]])}"
                    logps += f", reference {listed(rows.reference_logps[i][rows.mask[i]])}"  # type: ignore[index]
                    if bool(uneven[i].any()):
                        return f"{logps}: slopes {listed(own[i][rows.mask[i]])} of the reward in the tokens differ"
                    if not scale[i] > 1e-12:
                        return f"{logps}: slope {float(scale[i]):.6g} of the reward in the log-ratio"
                    if first is not None and not (scale[i] - first[i]).abs() <= 1e-6 * first[i].abs():
                        a, b = pair(float(first[i]), float(scale[i]))
                        return f"{logps}: slope {b} of the reward in the log-ratio, {a} with another policy"
                first = scale if first is None else first
            assert first is not None
            for policy, value in zip(policies[1:], values[1:], strict=True):
                moved = first * (policy - policies[0]).sum(dim=1)
                off = (value - values[0] - moved).abs() - 1e-8 * (1 + moved.abs() + value.abs() + values[0].abs())
                if bool((~(off <= 0)).any()):
                    i = int((~(off <= 0)).nonzero()[0])
                    a, b = pair(float(value[i] - values[0][i]), float(moved[i]))
                    change = float((policy - policies[0])[i].sum())
                    return f"the log-ratio changes by {change:.6g} nats, the reward by {a} and not by {b}"
            return None

        return self._smallest(fault)

    def reward_padding(self) -> str | None:
        """More padding changes nothing."""

        def fault(step: Step) -> str | None:
            rows = step.rows()
            r = self.fresh()(rows)
            for columns in (1, 4):
                wide = self.fresh()(padded(rows, columns))
                if r.dim() == 2:
                    same = wide[:, : r.shape[1]].masked_select(rows.mask), r.masked_select(rows.mask)
                else:
                    same = wide, r
                if same[0].shape != same[1].shape:
                    return f"reward of shape {tuple(r.shape)}, {tuple(wide.shape)} with {columns} more columns"
                wrong = (~((same[0] - same[1]).abs() <= 1e-9 * (1 + r.abs().max()))).nonzero()
                if len(wrong):
                    a, b = pair(float(same[1][wrong[0, 0]]), float(same[0][wrong[0, 0]]))
                    width = rows.mask.shape[1]
                    return f"reward {a} in a batch of {width} tokens, {b} with {columns} more of padding"
            return None

        return self._smallest(fault)


def _slope(total: Tensor, leaf: Tensor) -> Tensor:
    if not total.requires_grad:
        return torch.zeros_like(leaf)
    (slope,) = torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if slope is None else slope


def _mixed(per_row: Tensor, leaf: Tensor, rows: Rows) -> str:
    """Which row's reward depends on which other row, in words."""
    n = len(rows)
    others = [(i, j) for i in range(n) for j in range(n) if i != j]
    found = [(i, j, _slope(per_row[i], leaf)[j][rows.mask[j]].abs().max()) for i, j in others]
    i, j, size = max(found, key=lambda item: float(item[2]))
    return f"the reward of row {i + 1} changes by {float(size):.6g} per nat of row {j + 1}"
