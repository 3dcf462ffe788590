"""The clauses of a reward: r = l(y) * log[pi_theta / pi_ref] with l > 0, a function of (x, y) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.conformance.clause import Clause, Law, explained
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.later import PartCase
from halos_pl.conformance.single_precision import off_in_single_precision
from halos_pl.conformance.smallest import smallest
from halos_pl.conformance.step_split import kept_together
from halos_pl.conformance.steps import Step, asked, fitted_to, padded, paddings, renumbered, rerouted
from halos_pl.conformance.witness import WrongShape, changed, copied, listed, number, pair
from halos_pl.objective.rewards import Reward

# A factor may be computed in float32, such as mask.sum(1) ** 0.7, also where log-probs are float64.
RELATIVE = 16 * torch.finfo(torch.float32).eps


class RewardCase(PartCase):
    """One reward under check.

    Args:
        reward: the target; copies of it are called.
        needs: needs of the objective, which decide what the rows provide; default: those of the reward.
        examples: number of steps on which each clause is tried.
    """

    target: Reward

    def __init__(self, reward: Reward, *, needs: Needs | None = None, examples: int = 60) -> None:
        super().__init__(reward, CLAUSES)
        self.target = reward
        self.needs = needs or reward.needs
        self.examples = examples

    def smallest(self, fault: Callable[[Step], str | None], examples: int | None = None) -> str | None:
        """The witness of the smallest faulty step, else None."""
        return smallest(fault, self.needs, examples=examples or self.examples)

    def rows(self, step: Step, dtype: torch.dtype = torch.float64) -> LogProbBatch:
        """The rows of a step, with what the reward's objective asks for."""
        return asked(step.rows(dtype), self.needs)

    def fresh(self) -> Reward:
        """A copy that has not been called."""
        return duplicate(self.target)

    def drawn(self, number: int) -> LogProbBatch:
        """Rows of a small step, in float32."""
        return self.rows(fitted_to(Step(units=1 + number, tokens=3, seed=number), self.needs, None), torch.float32)

    def called(self, part: nn.Module, rows: LogProbBatch) -> Tensor:
        """Rewards [n], those of tokens summed."""
        r: Tensor = part(rows)
        return torch.where(rows.mask, r, 0.0).sum(dim=1) if r.dim() == 2 else r

    def of(self, part: Reward, examples: int) -> RewardCase:  # type: ignore[override]
        """The same case of another reward."""
        return RewardCase(part, needs=self.needs, examples=examples)


@explained(
    example="""
        needs = Needs(reference=True)

        def forward(self, rows):
            return (rows.policy_logps - rows.reference_logps).sum(dim=1, keepdim=True)
        """,
    cure="Sum over tokens with sum(dim=1), without keepdim or squeeze, and do not cast.",
)
def reward_shape(case: RewardCase) -> str | None:
    """The reward is one number for each row, [n], or one for each token, [n, T], in the dtype of the log-probs.

    In float32, as in training, values and slopes are those in float64 up to rounding.
    """

    def fault(step: Step) -> str | None:
        for dtype in (torch.float64, torch.float32):
            rows = padded(case.rows(step, dtype), 2)
            n, width = rows.policy_logps.shape
            r = case.fresh()(rows)
            if not isinstance(r, Tensor) or tuple(r.shape) not in ((n,), (n, width)) or n == width:
                if isinstance(r, Tensor) and n == width and tuple(r.shape) in ((n,), (n, width)):
                    continue
                shape = tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__
                return WrongShape(f"{n} rows of {width} tokens, reward of shape {shape}")
            if r.dtype != dtype:
                return f"log-probs in {str(dtype)[6:]}, reward in {str(r.dtype)[6:]}"
        return off_in_single_precision(case.fresh, case.rows(step, torch.float32), case.needs)

    return case.smallest(fault) or case.device()


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
        rows, reference = case.rows(step), step.rows().reference_logps
        assert reference is not None
        r = case.fresh()(replace(rows, policy_logps=reference.clone()))
        r = torch.where(rows.mask, r, 0.0) if r.dim() == 2 else r
        wrong = (~(r.abs() <= 1e-9 * (1 + reference.abs().sum()))).nonzero()
        if not len(wrong):
            return None
        row = int(wrong[0, 0])
        logps = reference[row][rows.mask[row]]
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
        rows = case.rows(step)
        n = len(rows)
        policies = [rows.policy_logps.clone()]
        for seed in (1, 2):
            other = torch.Generator().manual_seed(step.seed + seed)
            drawn = -torch.rand(rows.mask.shape, generator=other, dtype=torch.float64) * 3 * step.scale
            policies.append(torch.where(rows.mask, drawn, 0.0))
        first: Tensor | None = None
        values: list[Tensor] = []
        reward = case.fresh()
        for policy in policies:
            leaf = policy.clone().requires_grad_()
            # The exact KL divergence and the routing depend on the policy, too.
            kl = None if rows.kl is None else rows.kl * (1 + len(values))
            r = reward(replace(rows, policy_logps=leaf, kl=kl, routing=rerouted(rows, step.seed + 2 + len(values))))
            tokens = r.dim() == 2
            per_row = torch.where(rows.mask, r, 0.0).sum(dim=1) if tokens else r
            # The slopes of two differently weighted sums are proportional to the weights, unless rows mix. Those of
            # training differ by magnitudes, with the size of the step and the slope of the value function.
            weights = torch.rand(2, n, generator=torch.Generator().manual_seed(step.seed), dtype=leaf.dtype)
            weights = torch.stack([weights[0] + 0.5, 10 ** (12 * weights[1] - 8)])
            slopes = [_slope((w * per_row).sum(), leaf) / w[:, None] for w in weights]
            values.append(per_row.detach())
            size = slopes[0].abs().max()
            if bool(((slopes[0] - slopes[1]).abs() * rows.mask > 1e-6 * size + 1e-12).any()):
                off = (slopes[0] - slopes[1]).abs() * rows.mask
                return _mixed(per_row, leaf, weights, int(off.max(dim=1).values.argmax()))
            slope = slopes[0]
            scale = torch.where(rows.mask, slope, 0.0).sum(dim=1) / rows.mask.sum(dim=1)
            uneven = (slope - scale[:, None]).abs() * rows.mask > 1e-6 * scale.abs()[:, None] + 1e-12
            moved = torch.zeros_like(scale) if first is None else (scale - first).abs() - 1e-6 * first.abs()
            wrong = uneven.any(dim=1) | ~(scale > 0) | ~(moved <= 0)
            if bool(wrong.any()):
                i = int(wrong.nonzero()[0])
                logps = f"policy {listed(policy[i][rows.mask[i]])}"
                if rows.reference_logps is not None:
                    logps += f", reference {listed(rows.reference_logps[i][rows.mask[i]])}"
                if bool(uneven[i].any()):
                    return f"{logps}: slopes {listed(slope[i][rows.mask[i]])} of the reward in the tokens differ"
                if not scale[i] > 0:
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
            return ratio * torch.where(rows.labels.desirable, 1.0, 2.0)
        """,
    cure="""Read the row's own log-probs and mask only. Remove labels, scores, statistics of the batch, counters and
    branches on self.training. Comparing rows is the job of the reference point; weighting them is the job of the
    feedback.""",
)
def reward_of_its_row(case: RewardCase) -> str | None:
    """The reward is a function of (x, y): rows with the same tokens and log-probs have the same reward.

    It does not depend on labels, scores, pairs or mismatches, on other rows, on earlier calls, or on evaluation mode.
    """

    def fault(step: Step) -> str | None:
        rows = case.rows(step)
        r = case.called(case.fresh(), rows)
        for other, where in _relabelled(rows, step, case.needs):
            witness = _differs(r, case.called(case.fresh(), other))
            if witness:
                return f"{witness} {where}"
        for kept, other in _among_others(rows):
            witness = _differs(r[kept], case.called(case.fresh(), other)[kept])
            if witness:
                return f"{witness} if other rows have other log-probs"
        units = kept_together(rows, case.needs)
        largest = next(unit for unit in units if int(r.abs().argmax()) in unit)  # others may have a reward of 0
        chosen = units[0], largest, units[-1], [i for unit in units[::2] for i in unit]
        for some in (*chosen, [], list(range(len(rows)))[::-1]):  # a rank, or its last micro-batch, may have no rows
            index = torch.tensor(some, dtype=torch.long)
            witness = _differs(r[index], case.called(case.fresh(), rows.select(index)))
            if witness:
                return f"{witness} among {len(some)} of the {len(rows)} rows alone, or in another order"
        same = case.fresh()
        for call in range(1 if step.large else 4):
            later = case.rows(step.later(call))
            before = copied(later)
            witness = _differs(case.called(case.fresh(), copied(later)), case.called(same, later))
            if witness:
                return f"{witness} on call {call + 1}"
            if witness := changed(before, later):
                return witness
        witness = _differs(r, case.called(same.eval(), rows))
        return witness and f"{witness} in evaluation, after other calls"

    witness = case.smallest(fault, max(12, case.examples // 2))
    return witness or ((elsewhere := case.changes()) and f"reward {elsewhere}")


def _relabelled(rows: LogProbBatch, step: Step, needs: Needs) -> Iterator[tuple[LogProbBatch, str]]:
    """The rows with other labels but the same tokens and log-probs, and the difference in words."""
    labels = rows.labels
    same, unpaired = torch.zeros_like(labels.group), torch.full_like(labels.pair, -1)
    others: list[tuple[dict[str, Tensor], str]] = [
        ({"desirable": ~labels.desirable}, "with the other label"),
        ({"score": 1000.0 - 3 * torch.arange(len(rows)).to(labels.score)}, "with another score"),
        ({"score": same.to(labels.score)}, "if all scores are the same"),
        ({"weight": 1.5 + labels.weight.flip(0)}, "with another weight"),
        ({"mismatched": torch.ones_like(labels.mismatched), "pair": unpaired}, "if it is mismatched"),
        ({"group": renumbered(rows, step).labels.group}, "whose prompt has another number"),
        ({"group": same}, "if all rows answer the same prompt"),
    ]
    if not needs.pairs:
        others.append(({"pair": unpaired}, "without its pair"))
        others.append(({"mismatched": torch.zeros_like(labels.mismatched)}, "if it is not mismatched"))
    for columns, where in others:
        yield replace(rows, labels=replace(labels, **columns)), where


def _among_others(rows: LogProbBatch) -> Iterator[tuple[Tensor, LogProbBatch]]:
    """Some rows (BoolTensor [n]), and a batch in which the others have log-probs and lengths of their neighbours."""
    neighbour = torch.arange(len(rows)).roll(1)
    for kept in (rows.labels.desirable, ~rows.labels.desirable, torch.arange(len(rows)) % 2 == 0):
        contents = rows.select(torch.where(kept, torch.arange(len(rows)), neighbour))
        policy = torch.where(kept[:, None], contents.policy_logps, 1.5 * contents.policy_logps)
        yield kept, replace(contents, policy_logps=policy, labels=rows.labels)


def _differs(one: Tensor, other: Tensor) -> str | None:
    """Where the rewards of a row differ, in words; else None."""
    if not len(one):
        return None
    most = RELATIVE * one.abs() + 1e-9 * (1e-9 + one.abs().max())
    wrong = ~((one - other).abs() <= most) & ~(one.isnan() & other.isnan())
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
        rows = case.rows(step)
        r = case.fresh()(rows)
        for columns in paddings(step):
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


def _mixed(per_row: Tensor, leaf: Tensor, weights: Tensor, row: int) -> str:
    """Which other row's reward depends on ``row``, in words; looks at the first rows only.

    If none does, which ``weights`` [2, n] of the row do not scale its slope.
    """
    sizes = [float(_slope(r, leaf)[row].abs().max()) if i != row else -1.0 for i, r in enumerate(per_row[:20])]
    i = max(range(len(sizes)), key=sizes.__getitem__)
    if sizes[i] > 0:
        return f"the reward of row {i + 1} changes by {sizes[i]:.6g} per nat of row {row + 1}"
    slopes = [float((_slope(w * per_row[row], leaf)[row] / w).abs().max()) for w in weights[:, row]]
    times = [f"{float(w):.3g}" for w in weights[:, row]]
    a, b = pair(*slopes)
    return f"slope {a} of the reward in a log-prob if its gradient is multiplied by {times[0]}, {b} if by {times[1]}"


CLAUSES: tuple[Law, ...] = (reward_shape, reward_zero_at_reference, reward_linear, reward_of_its_row, reward_padding)
# arXiv v1 allows any parameterised reward.
ICML_ONLY = (reward_zero_at_reference, reward_linear)


def clauses(case: RewardCase) -> Iterator[Clause]:
    """The clauses of a reward."""
    for law in case.laws:
        clause = case.clause(law)
        yield replace(clause, definitions=("icml",)) if law in ICML_ONLY else clause
