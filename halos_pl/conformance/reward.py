"""The clauses of a reward: r = l(y) * log[pi_theta / pi_ref] with l > 0, a function of its row, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.conformance.clause import Case, Clause, Law, explained
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.smallest import smallest
from halos_pl.conformance.steps import Step, kept_together
from halos_pl.conformance.witness import WrongShape, changed, copied, listed, number, pair
from halos_pl.objective.rewards import Reward


def padded(rows: LogProbBatch, columns: int) -> LogProbBatch:
    """The same rows in a wider batch: every [n, T] field gets columns of zeros (False in the mask)."""
    wide: dict[str, Any] = {
        f.name: F.pad(value, (0, columns))
        for f in fields(rows)
        if isinstance(value := getattr(rows, f.name), Tensor) and value.dim() == 2
    }
    return replace(rows, **wide)


class RewardCase(Case):
    """One reward under check.

    Args:
        reward: the target; copies of it are called.
        examples: number of steps on which each clause is tried.
    """

    def __init__(self, reward: Reward, *, examples: int = 60) -> None:
        super().__init__(reward, CLAUSES)
        self.target = reward
        self.examples = examples

    def smallest(self, fault: Callable[[Step], str | None], examples: int | None = None) -> str | None:
        """The witness of the smallest faulty step, else None."""
        return smallest(fault, self.target.needs, examples=examples or self.examples)

    def fresh(self) -> Reward:
        """A copy that has not been called."""
        return duplicate(self.target)


@explained(
    example="""
        needs = Needs(reference=True)

        def forward(self, rows):
            return (rows.policy_logps - rows.reference_logps).sum(dim=1, keepdim=True)
        """,
    cure="Sum over tokens with sum(dim=1), without keepdim or squeeze, and do not cast.",
)
def reward_shape(case: RewardCase) -> str | None:
    """The reward is one number for each row, [n], or one for each token, [n, T], in the dtype of the log-probs."""

    def fault(step: Step) -> str | None:
        exact: Tensor | None = None
        for dtype in (torch.float64, torch.float32):
            rows = padded(step.rows(dtype), 2)
            n, width = rows.policy_logps.shape
            r = case.fresh()(rows)
            if not isinstance(r, Tensor) or tuple(r.shape) not in ((n,), (n, width)) or n == width:
                if isinstance(r, Tensor) and n == width and tuple(r.shape) in ((n,), (n, width)):
                    continue
                shape = tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__
                return WrongShape(f"{n} rows of {width} tokens, reward of shape {shape}")
            if r.dtype != dtype:
                return f"log-probs in {str(dtype)[6:]}, reward in {str(r.dtype)[6:]}"
            r = torch.where(rows.mask, r, 0.0) if r.dim() == 2 else r
            exact = r.detach() if exact is None else exact
            if not bool(((r - exact).abs() <= 1e-3 * (exact.abs() + exact.abs().max())).all()):
                i = int((r - exact).abs().nan_to_num(nan=torch.inf).argmax())
                a, b = pair(float(exact.flatten()[i]), float(r.flatten()[i]))
                return f"reward {a} in float64, {b} in float32"
        return None

    return case.smallest(fault)


@explained(
    example="""
        def forward(self, rows):
            return rows.policy_logps.sum(dim=1)
        """,
    cure="""Subtract rows.reference_logps (with needs = Needs(reference=True)), and remove offsets, margins and bonuses:
    a constant in the loss is model.loss_offset. For a loss without a reference model, use --definition v1.""",
)
def reward_zero_at_reference(case: RewardCase) -> str | None:
    """Where the policy equals the reference model, the reward is 0. ICML 2024 only; arXiv v1 allows any reward."""

    def fault(step: Step) -> str | None:
        rows = step.rows()
        assert rows.reference_logps is not None
        r = case.fresh()(replace(rows, policy_logps=rows.reference_logps.clone()))
        r = torch.where(rows.mask, r, 0.0) if r.dim() == 2 else r
        floor = 1e-9 * (1 + rows.reference_logps.abs().sum())
        wrong = (~(r.abs() <= floor)).nonzero()
        if not len(wrong):
            return None
        row = int(wrong[0, 0])
        logps = rows.reference_logps[row][rows.mask[row]]
        return f"policy = reference = {listed(logps)}, reward {number(float(r[tuple(wrong[0].tolist())]))}"

    return case.smallest(fault)


@explained(
    example="""
        needs = Needs(reference=True)

        def forward(self, rows):
            return (rows.policy_logps - rows.reference_logps).sum(dim=1).clamp(-5, 5)
        """,
    cure="""Keep the reward linear in the log-ratio (dividing by the length is fine), and move clamps, squares and
    saturation into the value function.""",
)
def reward_linear(case: RewardCase) -> str | None:
    """The reward is l * log(pi_theta / pi_ref) with one factor l > 0 per row, which does not depend on the policy.

    ICML 2024 only; arXiv v1 allows any reward.
    """

    def fault(step: Step) -> str | None:
        rows = step.rows()
        n = len(rows)
        policies = [step.rows().policy_logps]
        for seed in (1, 2):
            other = torch.Generator().manual_seed(step.seed + seed)
            drawn = -torch.rand(rows.mask.shape, generator=other, dtype=torch.float64) * 3 * step.scale
            policies.append(torch.where(rows.mask, drawn, 0.0))
        first: Tensor | None = None
        values: list[Tensor] = []
        reward = case.fresh()
        for policy in policies:
            leaf = policy.clone().requires_grad_()
            # The exact KL divergence depends on the policy, too.
            kl = None if rows.kl is None else rows.kl * (1 + len(values))
            r = reward(replace(rows, policy_logps=leaf, kl=kl))
            tokens = r.dim() == 2
            per_row = torch.where(rows.mask, r, 0.0).sum(dim=1) if tokens else r
            # The slopes of two differently weighted sums are proportional to the weights, unless rows mix.
            weights = torch.rand(2, n, generator=torch.Generator().manual_seed(step.seed), dtype=leaf.dtype) + 0.5
            slopes = [_slope((w * per_row).sum(), leaf) / w[:, None] for w in weights]
            values.append(per_row.detach())
            size = slopes[0].abs().max()
            if bool(((slopes[0] - slopes[1]).abs() * rows.mask > 1e-6 * size + 1e-12).any()):
                off = (slopes[0] - slopes[1]).abs() * rows.mask
                return _mixed(per_row, leaf, int(off.max(dim=1).values.argmax()))
            slope = slopes[0]
            scale = torch.where(rows.mask, slope, 0.0).sum(dim=1) / rows.mask.sum(dim=1)
            uneven = (slope - scale[:, None]).abs() * rows.mask > 1e-6 * scale.abs()[:, None] + 1e-12
            moved = torch.zeros_like(scale) if first is None else (scale - first).abs() - 1e-6 * first.abs()
            wrong = uneven.any(dim=1) | ~(scale > 1e-12) | ~(moved <= 0)
            if bool(wrong.any()):
                i = int(wrong.nonzero()[0])
                logps = f"policy {listed(policy[i][rows.mask[i]])}"
                logps += f", reference {listed(rows.reference_logps[i][rows.mask[i]])}"  # type: ignore[index]
                if bool(uneven[i].any()):
                    return f"{logps}: slopes {listed(slope[i][rows.mask[i]])} of the reward in the tokens differ"
                if not scale[i] > 1e-12:
                    return f"{logps}: slope {float(scale[i]):.6g} of the reward in the log-ratio"
                a, b = pair(float(first[i]), float(scale[i]))  # type: ignore[index]
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

    return case.smallest(fault)


@explained(
    example="""
        needs = Needs(reference=True)

        def forward(self, rows):
            ratio = (rows.policy_logps - rows.reference_logps).sum(dim=1)
            return ratio / len(rows)
        """,
    cure="""Remove statistics of the batch, counters and branches on self.training. Comparing rows is the job of the
    reference point; weighting them is the job of the feedback.""",
)
def reward_of_its_row(case: RewardCase) -> str | None:
    """The reward of a row depends on that row alone: not on other rows, on earlier calls, or on evaluation mode."""

    def fault(step: Step) -> str | None:
        rows = step.rows()
        r = _per_row(case.fresh(), rows)
        units = kept_together(rows, case.target.needs)
        for chosen in (units[0], units[-1], [i for unit in units[::2] for i in unit]):
            index = torch.tensor(chosen)
            witness = _differs(r[index], _per_row(case.fresh(), rows.select(index)))
            if witness:
                return f"{witness} among {len(chosen)} of the {len(rows)} rows alone"
        same = case.fresh()
        for call in range(1 if step.large else 4):
            later = step.later(call).rows()
            before = copied(later)
            witness = _differs(_per_row(case.fresh(), copied(later)), _per_row(same, later))
            if witness:
                return f"{witness} on call {call + 1}"
            if changed(before, later):
                return changed(before, later)
        witness = _differs(r, _per_row(same.eval(), rows))
        return witness and f"{witness} in evaluation, after other calls"

    return case.smallest(fault, case.examples // 2)


def _per_row(reward: Reward, rows: LogProbBatch) -> Tensor:
    """Rewards [n], those of tokens summed."""
    r = reward(rows).detach()
    return torch.where(rows.mask, r, 0.0).sum(dim=1) if r.dim() == 2 else r


def _differs(one: Tensor, other: Tensor) -> str | None:
    """Where the rewards of a row differ, in words; else None."""
    wrong = ~((one - other).abs() <= 1e-9 * (1e-9 + one.abs().max())) & ~(one.isnan() & other.isnan())
    if not bool(wrong.any()):
        return None
    i = int(wrong.nonzero()[0])
    return "reward {} of a row, {}".format(*pair(float(one[i]), float(other[i])))


@explained(
    example="""
        needs = Needs(reference=True)

        def forward(self, rows):
            return (rows.policy_logps - rows.reference_logps).mean(dim=1)
        """,
    cure="""Log-probs of padding are 0, so sums may include it, but nothing else may: divide by rows.mask.sum(dim=1),
    and find the last token with the mask, not in the last column.""",
)
def reward_padding(case: RewardCase) -> str | None:
    """More padding does not change the reward, and a reward per token is finite on padding."""

    def fault(step: Step) -> str | None:
        rows = step.rows()
        r = case.fresh()(rows)
        for columns in (1, 4, 60):
            wide = case.fresh()(padded(rows, columns))
            if r.dim() == 2:
                blank = wide[~padded(rows, columns).mask]
                if not bool(blank.isfinite().all()):
                    # An objective multiplies by a weight of 0 there, and 0 * nan is nan.
                    return f"reward {float(blank[~blank.isfinite()][0])} of padding: a weight of 0 times it is nan"
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

    return case.smallest(fault)


def _slope(total: Tensor, leaf: Tensor) -> Tensor:
    if not total.requires_grad:
        return torch.zeros_like(leaf)
    (slope,) = torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if slope is None else slope


def _mixed(per_row: Tensor, leaf: Tensor, row: int) -> str:
    """Which other row's reward depends on ``row``, in words."""
    sizes = [float(_slope(r, leaf)[row].abs().max()) if i != row else -1.0 for i, r in enumerate(per_row)]
    i = max(range(len(sizes)), key=sizes.__getitem__)
    return f"the reward of row {i + 1} changes by {sizes[i]:.6g} per nat of row {row + 1}"


CLAUSES: tuple[Law, ...] = (reward_shape, reward_zero_at_reference, reward_linear, reward_of_its_row, reward_padding)
# arXiv v1 allows any parameterised reward.
ICML_ONLY = (reward_zero_at_reference, reward_linear)


def clauses(case: RewardCase) -> Iterator[Clause]:
    """The clauses of a reward."""
    for law in case.laws:
        yield case.clause(law, icml_only=law in ICML_ONLY)
