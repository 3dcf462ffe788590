"""Clauses of a feedback: a in {-1, +1}, w >= 0, neither depends on theta, a denominator above 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.ranks import Ranks, namespaces
from halos_pl.conformance.reward import padded
from halos_pl.conformance.steps import Step, smallest, two_ranks
from halos_pl.conformance.witness import WrongShape, changed, copied, listed, number, pair
from halos_pl.objective.feedback import Feedback, Judgement

CLAUSES = (
    "feedback_sign",
    "feedback_weight",
    "feedback_independent_of_theta",
    "feedback_deterministic",
    "feedback_split",
    "feedback_finite",
)
# Weights and denominators are float32.
RELATIVE = 64 * torch.finfo(torch.float32).eps


def labels(rows: LogProbBatch) -> str:
    """Who is who, in words: D for desirable, U for undesirable, p for a mismatched row."""
    names = [
        "p" if p else "D" if d else "U"
        for p, d in zip(rows.labels.mismatched.tolist(), rows.labels.desirable.tolist(), strict=True)
    ]
    return f"rows {' '.join(names[:12])}{' ...' if len(names) > 12 else ''}"


class FeedbackChecks:
    """The clauses of one feedback; each ``None`` where it holds, else a witness.

    Args:
        feedback: the target; copies of it are called.
        examples: how many steps each clause is tried on.
    """

    def __init__(self, feedback: Feedback, *, examples: int = 60) -> None:
        self.target = feedback
        self.examples = examples
        self._judged: dict[Step, list[tuple[str, LogProbBatch, Judgement]]] = {}

    def judged(self, rows: LogProbBatch) -> Judgement:
        """Sign, weight and denominator."""
        return Judgement(*duplicate(self.target)(rows))

    def judgements(self, step: Step) -> list[tuple[str, LogProbBatch, Judgement]]:
        """Of a fresh copy; of one copy on further steps of that kind; and of that copy in evaluation."""
        if step not in self._judged:
            rows = step.rows()
            found = [("", rows, self.judged(rows))]
            same = duplicate(self.target)
            for call in range(1 if step.large else 4):
                later = step.later(call).rows()
                found.append((f", on call {call + 1}", later, Judgement(*same(later))))
            self._judged[step] = [*found, (", in evaluation", rows, Judgement(*same.eval()(rows)))]
        return self._judged[step]

    def _smallest(self, fault: object, examples: int | None = None) -> str | None:
        return smallest(fault, self.target.needs, mismatched=True, examples=examples or self.examples)  # type: ignore[arg-type]

    def feedback_sign(self) -> str | None:
        """-1 or +1 for each row."""

        def fault(step: Step) -> str | None:
            for when, rows, (sign, _, _) in self.judgements(step):
                if tuple(sign.shape) != (len(rows),):
                    return WrongShape(f"{len(rows)} rows, signs of shape {tuple(sign.shape)}")
                if bool((sign.abs() != 1).any()):
                    return f"{labels(rows)}: signs {listed(sign)}{when}"
            return None

        return self._smallest(fault)

    def feedback_weight(self) -> str | None:
        """At least 0 for each row, 0 for mismatched rows, and above 0 for some row of some step."""
        counted = False

        def fault(step: Step) -> str | None:
            nonlocal counted
            for when, rows, (_, weight, _) in self.judgements(step):
                if tuple(weight.shape) != (len(rows),):
                    return WrongShape(f"{len(rows)} rows, weights of shape {tuple(weight.shape)}")
                wrong = ~(weight >= 0) | ((weight != 0) & rows.labels.mismatched)
                if bool(wrong.any()):
                    i = int(wrong.nonzero()[0])
                    kind = labels(rows.select(torch.tensor([i]))).removeprefix("rows ")
                    shown = f"{labels(rows)}: weights {listed(weight)}"
                    return f"{shown}, {number(float(weight[i]))} of a row {kind} of {rows.mask[i].sum()} tokens{when}"
                counted |= bool((weight > 0).any())
            return None

        found = self._smallest(fault)
        return found if found or counted else "every row weighs 0, so nothing is learnt"

    def feedback_independent_of_theta(self) -> str | None:
        """The same judgement whatever the policy says, without gradient."""

        def fault(step: Step) -> str | None:
            rows = step.rows()
            leaf = rows.policy_logps.clone().requires_grad_()
            before = copied(rows)
            one = self.judged(replace(rows, policy_logps=leaf))
            if found := changed(before, replace(rows, policy_logps=leaf)):
                return f"{labels(before)}: {found}"
            assert rows.reference_logps is not None
            others = [rows.policy_logps * 0.5, rows.reference_logps, torch.zeros_like(rows.policy_logps)]
            for name, a in one._asdict().items():
                if a.requires_grad:
                    return f"{labels(rows)}: the {name} has a gradient in the policy's log-probs"
                for number_, policy in enumerate(others):
                    # The exact KL divergence is the policy's as well.
                    kl = None if rows.kl is None else rows.kl * number_
                    b = getattr(self.judged(replace(rows, policy_logps=policy, kl=kl)), name)
                    if a.shape != b.shape or not bool(((a == b) | (a.isnan() & b.isnan())).all()):
                        return (
                            f"{labels(rows)}: {name} {listed(a)} with log-probs {listed(rows.policy_logps)},"
                            f" {listed(b)} with {listed(policy)}"
                        )
            return None

        return self._smallest(fault, self.examples // 2)

    def feedback_deterministic(self) -> str | None:
        """The same judgement of the same rows on later calls and in evaluation."""

        def fault(step: Step) -> str | None:
            rows = step.rows()
            place = torch.arange(len(rows))
            first, same = self.judged(rows), duplicate(self.target)
            for call in range(1, 6):
                same.train(call % 4 > 0)
                again = Judgement(*same(step.later(call).rows() if call == 3 else rows))
                if call != 3 and (found := self._differs(first, again, place, again.denominator)):
                    return f"{labels(rows)}: {found} on call {call}{'' if same.training else ', in evaluation'}"
            return None

        return self._smallest(fault, max(10, self.examples // 4))

    def feedback_split(self) -> str | None:
        """The same of a row in another order, beside more padding and on two ranks, whose denominators add up."""
        found = self._smallest(self._other_layouts, max(10, self.examples // 2))
        return found or self._smallest(self._two_ranks, max(10, self.examples // 4))

    @staticmethod
    def _differs(whole: Judgement, other: Judgement, index: Tensor, denominator: Tensor) -> str | None:
        """What of the rows ``index`` is judged otherwise, in words, or that the denominator is another one."""
        for name in ("sign", "weight"):
            one, two = getattr(whole, name)[index], getattr(other, name)
            wrong = (~((one - two).abs() <= RELATIVE * one.abs().max())).nonzero()
            if len(wrong):
                a, b = pair(float(one[wrong[0]]), float(two[wrong[0]]))
                return f"{name} {a} of row {int(index[wrong[0]]) + 1}, {b}"
        if not bool((whole.denominator - denominator).abs() <= RELATIVE * whole.denominator.abs()):
            return "denominator {}, {}".format(*pair(float(whole.denominator), float(denominator)))
        return None

    def _other_layouts(self, step: Step) -> str | None:
        rows = step.rows()
        whole = self.judged(rows)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(step.seed))
        place = torch.arange(len(rows))
        for index, given, where in (
            (place.flip(0), rows.select(place.flip(0)), "in the opposite order"),
            (order, rows.select(order), f"in the order {[i + 1 for i in order.tolist()][:12]}"),
            (place, padded(rows, 3), "with three columns of padding more"),
        ):
            judged = self.judged(given)
            if found := self._differs(whole, judged, index, judged.denominator):
                return f"{labels(rows)}: {found} {where}"
        return None

    def _two_ranks(self, step: Step) -> str | None:
        rows = step.rows()
        parts = two_ranks(rows, self.target.needs, step.seed)
        if not parts:
            return None
        whole = self.judged(rows)
        jobs: list[Callable[[], Any]] = [lambda index=index: self.judged(rows.select(index)) for index in parts]  # type: ignore[misc]
        judged = Ranks().run(jobs, namespaces(self.target))
        summed = torch.stack([part.denominator for part in judged]).sum()
        for index, part in zip(parts, judged, strict=True):
            if found := self._differs(whole, part, index, summed):
                return f"{labels(rows)}: {found} on ranks of {len(parts[0])} and {len(parts[1])} rows"
        return None

    def feedback_finite(self) -> str | None:
        """Weights and denominator are finite, and the denominator is above 0 where a row counts."""

        def fault(step: Step) -> str | None:
            step = replace(step, alone=self.target.needs.groups)
            for when, rows, (sign, weight, denominator) in self.judgements(step):
                if not isinstance(denominator, Tensor) or denominator.dim() != 0:
                    return f"{labels(rows)}: the denominator {denominator} is no scalar{when}"
                figures = torch.cat([weight.flatten(), sign.flatten(), denominator.flatten()])
                counts = bool((weight.nan_to_num() != 0).any())
                if not bool(figures.isfinite().all()) or (counts and not float(denominator) > 0):
                    return f"{labels(rows)}: weights {listed(weight)}, denominator {float(denominator):g}{when}"
                if not float(denominator) >= 0:
                    return f"{labels(rows)}: denominator {float(denominator):g}{when}"
            return None

        return self._smallest(fault)
