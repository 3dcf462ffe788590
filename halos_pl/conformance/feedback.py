"""The clauses of a feedback: a in {-1, +1}, w >= 0, neither depends on theta, a denominator above 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.conformance.clause import Clause, Law, explained
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.histories import HISTORIES, Told, retold, told
from halos_pl.conformance.later import EXAMPLES, PartCase, state_of
from halos_pl.conformance.ranks import Ranks, namespaces
from halos_pl.conformance.smallest import smallest
from halos_pl.conformance.step_split import shares
from halos_pl.conformance.steps import Step, asked, fitted_to, padded, paddings, renumbered, rerouted, unscored
from halos_pl.conformance.witness import WrongShape, changed, copied, listed, number, pair
from halos_pl.objective.feedback import Feedback, Judgement

# Weights and denominators are float32.
RELATIVE = 64 * torch.finfo(torch.float32).eps


def labels(rows: LogProbBatch) -> str:
    """The labels in short: D for desirable, U for undesirable, p for a mismatched row."""
    names = [
        "p" if p else "D" if d else "U"
        for p, d in zip(rows.labels.mismatched.tolist(), rows.labels.desirable.tolist(), strict=True)
    ]
    return f"rows {' '.join(names[:12])}{' ...' if len(names) > 12 else ''}"


class FeedbackCase(PartCase):
    """One feedback under check.

    Args:
        feedback: the target; copies of it are called.
        needs: needs of the objective, which decide what the rows provide; default: those of the feedback.
        examples: number of steps on which each clause is tried.
    """

    target: Feedback
    has_slope = False

    def __init__(self, feedback: Feedback, *, needs: Needs | None = None, examples: int = 60) -> None:
        super().__init__(feedback, CLAUSES)
        self.target = feedback
        self.needs = needs or feedback.needs
        self.examples = examples
        self.history: Told = []
        self._judged: dict[Step, list[tuple[str, LogProbBatch, Judgement]]] = {}

    def judged(self, rows: LogProbBatch) -> Judgement:
        """Sign, weight and denominator from a fresh copy."""
        return Judgement(*duplicate(self.target)(rows))

    def judgements(self, step: Step) -> list[tuple[str, LogProbBatch, Judgement]]:
        """Judgements of a fresh copy, of one copy on further steps of that kind, and of that copy in evaluation."""
        if step not in self._judged:
            rows = self.rows(step)
            judgements = [("", rows, self.judged(rows))]
            same = duplicate(self.target)
            for call in range(1 if step.large else 4):
                later = self.rows(step.later(call))
                judgements.append((f", on call {call + 1}", later, Judgement(*same(later))))
            self._judged[step] = [*judgements, (", in evaluation", rows, Judgement(*same.eval()(rows)))]
        return self._judged[step]

    def smallest(self, fault: Callable[[Step], str | None], examples: int | None = None) -> str | None:
        """The witness of the smallest faulty step, else None."""
        return smallest(fault, self.needs, mismatched=True, examples=examples or self.examples)

    def drawn(self, number: int) -> LogProbBatch:
        """Rows of a small step."""
        return self.rows(fitted_to(Step(units=2 + number, mismatched=1, tokens=2, seed=number), self.needs, True))

    def called(self, part: nn.Module, rows: LogProbBatch) -> Tensor:
        """Signs, weights and denominator in one tensor [2n + 1]."""
        return torch.cat([figures.flatten() for figures in part(rows)])

    def lived(self) -> Iterator[tuple[str, PartCase]]:
        """Cases of the feedback after each history that has changed it."""
        before = state_of(duplicate(self.target))
        for words, steps in HISTORIES.items():
            part = duplicate(self.target)
            history = told(part, steps, lambda number: self.drawn(3 + number))
            if state_of(part) != before:
                case = self.of(part, EXAMPLES)
                case.origin, case.history = self.target, history
                yield words, case

    @property
    def remark(self) -> str | None:
        """Whether weights follow earlier steps, in words; None if they do not, or cannot be judged."""
        try:
            histories = sum(case.origin is not None for _, case in self.later)
        except (Exception, SystemExit):  # the clauses report it
            return None
        many = f"weights follow earlier steps: judged before the first, and at {histories} histories"
        return many if histories else None

    def of(self, part: Feedback, examples: int) -> FeedbackCase:  # type: ignore[override]
        """The same case of another feedback."""
        return FeedbackCase(part, needs=self.needs, examples=examples)

    def rows(self, step: Step) -> LogProbBatch:
        """The rows of a step as in training: float32, with what the feedback's objective asks for."""
        return asked(step.rows(torch.float32), self.needs)


@explained(
    example="""
        def forward(self, rows):
            sign = torch.where(rows.labels.desirable, 1.0, 0.0)
            return Judgement(sign, rows.labels.train.float(), rows.labels.train.sum().float())
        """,
    cure="""Return torch.where(rows.labels.desirable, -1.0, 1.0), for mismatched rows too. The weight decides how much a
    row counts.""",
)
def feedback_sign(case: FeedbackCase) -> str | None:
    """The sign of each row is -1 (desirable: raising its value lowers the loss) or +1."""

    def fault(step: Step) -> str | None:
        for when, rows, (sign, _, _) in case.judgements(step):
            if tuple(sign.shape) != (len(rows),):
                return WrongShape(f"{len(rows)} rows, signs of shape {tuple(sign.shape)}")
            if bool((sign.abs() != 1).any()):
                return f"{labels(rows)}: signs {listed(sign)}{when}"
        return None

    return case.smallest(fault)


@explained(
    example="""
        def forward(self, rows):
            sign = torch.where(rows.labels.desirable, -1.0, 1.0)
            return Judgement(sign, torch.ones(len(rows)), rows.labels.train.sum().float())
        """,
    cure="""Multiply weights by rows.labels.train, which is False for mismatched rows, and not by rows.labels.weight. A
    row that pulls the other way has the other sign, not a negative weight. Declare needs = Needs(undesirable=True) if
    undesirable rows count.""",
)
def feedback_weight(case: FeedbackCase) -> str | None:
    """Weights are at least 0, exactly 0 for mismatched rows, and above 0 for some row of some step.

    If `needs` names neither `undesirable` nor `pairs`, undesirable rows have weight 0, since training drops them.
    The rows' own weights are left to the loss, which multiplies by them: another unit of theirs changes nothing.
    """
    counted = False

    def fault(step: Step) -> str | None:
        nonlocal counted
        for when, rows, (_, weight, _) in case.judgements(step):
            if tuple(weight.shape) != (len(rows),):
                return WrongShape(f"{len(rows)} rows, weights of shape {tuple(weight.shape)}")
            wrong = ~(weight >= 0) | ((weight != 0) & rows.labels.mismatched)
            if bool(wrong.any()):
                i = int(wrong.nonzero()[0])
                kind = labels(rows.select(torch.tensor([i]))).removeprefix("rows ")
                shown = f"{labels(rows)}: weights {listed(weight)}"
                return f"{shown}, {number(float(weight[i]))} of a row {kind} of {rows.mask[i].sum()} tokens{when}"
            if not (case.needs.undesirable or case.needs.pairs) and bool((weight[~rows.labels.desirable] != 0).any()):
                return f"{labels(rows)}: weights {listed(weight)}, but `needs` does not name `undesirable`"
            counted |= bool((weight > 0).any())
        rows = case.rows(step)
        judged = case.judged(replace(rows, labels=replace(rows.labels, weight=4 * rows.labels.weight)))
        witness = _differs(case.judged(rows), judged, torch.arange(len(rows)), judged.denominator)
        return witness and f"{labels(rows)}: {witness} if all rows have four times their own weight"

    witness = case.smallest(fault)
    return witness if witness or counted else "every row has weight 0, so nothing is learnt"


@explained(
    example="""
        def forward(self, rows):
            sign = torch.where(rows.labels.desirable, -1.0, 1.0)
            weight = rows.policy_logps.detach().sum(dim=1).exp() * rows.labels.train
            return Judgement(sign, weight, rows.labels.train.sum().float())
        """,
    cure="""Use labels, scores and masks only, or reference_logps with needs = Needs(reference=True, step_rewards=True);
    .detach() removes the gradient, not the dependence. Anything that depends on the policy belongs in the value
    function.""",
)
def feedback_independent_of_theta(case: FeedbackCase) -> str | None:
    """Sign, weight and denominator do not depend on the policy, and carry no gradient."""

    def fault(step: Step) -> str | None:
        rows, reference = case.rows(step), step.rows(torch.float32).reference_logps
        assert reference is not None
        leaf = rows.policy_logps.clone().requires_grad_()
        kept = copied(rows)
        one = case.judged(replace(rows, policy_logps=leaf))
        if witness := changed(kept, replace(rows, policy_logps=leaf)):
            return f"{labels(kept)}: {witness}"
        others = [rows.policy_logps * 0.5, reference, torch.zeros_like(rows.policy_logps)]
        judged = []
        for number_, policy in enumerate(others[: 1 if step.huge else None]):
            # The exact KL divergence, the scalars and the routing depend on the policy, too.
            kl = None if rows.kl is None else rows.kl * number_
            scalar = None if rows.scalar is None else rows.scalar * number_
            routing = rerouted(rows, step.seed + 3 + number_)
            judged.append(case.judged(replace(rows, policy_logps=policy, kl=kl, scalar=scalar, routing=routing)))
        for name, a in one._asdict().items():
            if a.requires_grad:
                return f"{labels(rows)}: the {name} has a gradient in the policy's log-probs"
            for policy, other in zip(others, judged, strict=False):
                b = getattr(other, name)
                if a.shape != b.shape or not bool(((a == b) | (a.isnan() & b.isnan())).all()):
                    return (
                        f"{labels(rows)}: {name} {listed(a)} with log-probs {listed(rows.policy_logps)},"
                        f" {listed(b)} with {listed(policy)}"
                    )
        if not case.needs.step_rewards and (
            witness := _differs(one, before := case.judged(unscored(rows)), torch.arange(len(rows)), before.denominator)
        ):
            return f"{labels(rows)}: {witness} before their log-probs are computed (needs step_rewards)"
        return None

    return case.smallest(fault, case.examples // 2)


@explained(
    example="""
        def forward(self, rows):
            sign = torch.where(rows.labels.desirable, -1.0, 1.0)
            return Judgement(sign, torch.rand(len(rows)) * rows.labels.train, rows.labels.train.sum().float())
        """,
    cure="""Remove random draws, counters, running averages and branches on self.training. Random changes of labels are
    a transform of the data (data.transforms).""",
)
def feedback_deterministic(case: FeedbackCase) -> str | None:
    """The same rows get the same judgement on every call, in training and in evaluation, in every mode and dtype."""

    def fault(step: Step) -> str | None:
        rows = case.rows(step)
        place = torch.arange(len(rows))
        first, same = case.judged(rows), duplicate(case.target)
        for call in range(1, 2 if step.huge else 6):
            same.train(call % 4 > 0)
            again = Judgement(*same(case.rows(step.later(call)) if call == 3 else rows))
            if call != 3 and (witness := _differs(first, again, place, again.denominator)):
                return f"{labels(rows)}: {witness} on call {call}{'' if same.training else ', in evaluation'}"
        return None

    witness = case.smallest(fault, max(12, case.examples // 4))
    return witness or ((elsewhere := case.changes()) and f"sign, weight or denominator {elsewhere}")


@explained(
    example="""
        def forward(self, rows):
            sign = torch.where(rows.labels.desirable, -1.0, 1.0)
            return Judgement(sign, rows.labels.train.float(), torch.tensor(1.0))
        """,
    cure="""Return a sum over this rank's rows as the denominator, such as rows.labels.train.sum().float(), not a mean
    or a constant. If weights depend on counts over the step, sum these counts first with
    halos_pl.distributed.sum_over_ranks. A rank may have no rows, and no rows have no maximum.""",
)
def feedback_split(case: FeedbackCase) -> str | None:
    """A row gets the same judgement in any order, with any padding, any numbers of prompts and on any rank.

    The ranks' denominators add up to that of the step. Which rank observed what in earlier steps makes no difference.
    """
    witness = case.smallest(partial(_other_layouts, case), max(10, case.examples // 2))
    return witness or case.smallest(partial(_ranks, case), max(10, case.examples // 4))


def _differs(whole: Judgement, other: Judgement, index: Tensor, denominator: Tensor) -> str | None:
    """Where the judgement of the rows ``index``, or the denominator, differs, in words; else None."""
    counts = whole.weight[index] > RELATIVE * whole.weight.abs().max()  # others have no sign to speak of
    for name in ("sign", "weight") if len(index) else ():
        one, two = getattr(whole, name)[index], getattr(other, name)
        wrong = ~((one - two).abs() <= RELATIVE * one.abs().max())
        wrong = (wrong & counts if name == "sign" else wrong).nonzero()
        if len(wrong):
            a, b = pair(float(one[wrong[0]]), float(two[wrong[0]]))
            return f"{name} {a} of row {int(index[wrong[0]]) + 1}, {b}"
    if not bool((whole.denominator - denominator).abs() <= RELATIVE * whole.denominator.abs()):
        return "denominator {}, {}".format(*pair(float(whole.denominator), float(denominator)))
    return None


def _other_layouts(case: FeedbackCase, step: Step) -> str | None:
    rows = case.rows(step)
    whole = case.judged(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(step.seed))
    place = torch.arange(len(rows))
    for index, layout, where in (
        (place.flip(0), rows.select(place.flip(0)), "in the opposite order"),
        (order, rows.select(order), f"in the order {[i + 1 for i in order.tolist()][:12]}"),
        *((place, padded(rows, n), f"with {n} more columns of padding") for n in paddings(step)),
        (place, renumbered(rows, step), "with other numbers of the prompts"),
    )[: 1 if step.huge else None]:
        judged = case.judged(layout)
        if witness := _differs(whole, judged, index, judged.denominator):
            return f"{labels(rows)}: {witness} {where}"
    return None


def _ranks(case: FeedbackCase, step: Step) -> str | None:
    rows = case.rows(step)
    whole = case.judged(rows)
    before = case.target if case.origin is None else case.origin
    for count in (3,) if step.huge else (2, 3):
        parts = shares(rows, case.needs, step.seed, count)
        jobs: list[Callable[[], Any]] = [
            partial(_on_rank, case, duplicate(before), rows.select(index), partial(_share, case, step, count, rank))
            for rank, index in enumerate(parts)
        ]
        judged = Ranks(count).run(jobs, namespaces(case.target))
        summed = torch.stack([part.denominator for part in judged]).sum()
        for index, part in zip(parts, judged, strict=True):
            if witness := _differs(whole, part, index, summed):
                return f"{labels(rows)}: {witness} on ranks of {' and '.join(str(len(i)) for i in parts)} rows"
    return None


def _share(case: FeedbackCase, step: Step, ranks: int, rank: int, rows: LogProbBatch) -> Tensor:
    """Positions of the rows of an earlier step on a rank."""
    return shares(rows, case.needs, step.seed, ranks)[rank]


def _on_rank(
    case: FeedbackCase, part: Feedback, rows: LogProbBatch, share: Callable[[LogProbBatch], Tensor]
) -> Judgement:
    """The judgement of a rank's rows by ``part``, once it has observed the rank's ``share`` of the history."""
    retold(part, case.history, share)
    return Judgement(*part(rows))


@explained(
    example="""
        def forward(self, rows):
            sign = torch.where(rows.labels.desirable, -1.0, 1.0)
            weight = rows.labels.train / (rows.mask.sum(dim=1) - 1)
            return Judgement(sign, weight, rows.labels.train.sum().float())
        """,
    cure="""Beware of divisions by counts that may be 0 (clamp(min=1)), such as those of a class that a step lacks, and
    rows of one token. Return the denominator as a tensor without dimensions.""",
)
def feedback_finite(case: FeedbackCase) -> str | None:
    """Signs, weights and denominator are finite, and the denominator is a scalar, above 0 if any row counts."""

    def fault(step: Step) -> str | None:
        for when, rows, (sign, weight, denominator) in case.judgements(step):
            if not isinstance(denominator, Tensor) or denominator.dim() != 0:
                return f"{labels(rows)}: the denominator {denominator} is not a scalar{when}"
            figures = torch.cat([weight.flatten(), sign.flatten(), denominator.flatten()])
            counts = bool((weight.nan_to_num() != 0).any())
            if not bool(figures.isfinite().all()) or (counts and not float(denominator) > 0):
                return f"{labels(rows)}: weights {listed(weight)}, denominator {float(denominator):g}{when}"
            if not float(denominator) >= 0:
                return f"{labels(rows)}: denominator {float(denominator):g}{when}"
        return None

    return case.smallest(fault) or case.device()


CLAUSES: tuple[Law, ...] = (
    feedback_sign,
    feedback_weight,
    feedback_independent_of_theta,
    feedback_deterministic,
    feedback_split,
    feedback_finite,
)


def clauses(case: FeedbackCase) -> Iterator[Clause]:
    """The clauses of a feedback."""
    for law in case.laws:
        if law is feedback_weight:
            yield case.clause(law, note=lambda: case.note(feedback_weight) or case.remark)
        else:
            yield case.clause(law)
