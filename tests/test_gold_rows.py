"""Gold answers, the rows that nobody compared with others: only terms that need them see them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, replace
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_steps import batch as pairs_of_all_lengths
from torch import Tensor
from transformers import AutoModelForCausalLM

from halos_pl.batch import LogProbBatch, Needs, TokenBatch
from halos_pl.conformance.objective import sum_of_terms
from halos_pl.conformance.steps import Step, fitted_to, large_steps
from halos_pl.labels import Labels
from halos_pl.objective.baselines import NLL
from halos_pl.objective.build import load_objective
from halos_pl.objective.composite import Sum
from halos_pl.objective.feedback import Binary
from halos_pl.objective.halo import HALO, Objective, Result
from halos_pl.objective.policy_weighted import PolicyWeighted
from halos_pl.objective.policy_weights import PairProbability
from halos_pl.objective.reference_points import MismatchedKL
from halos_pl.objective.rewards import LogRatio
from halos_pl.plan.rows import assumed, longest
from halos_pl.policy.reference import FixedModel
from halos_pl.policy.sampling import PolicySamples
from halos_pl.policy.scorer import Scorer
from halos_pl.testing import random_rows, tiny_tokenizer
from halos_pl.training.engine import StepEngine
from halos_pl.training.parts import Part
from value_functions import Logistic

seeds = st.integers(0, 2**31 - 1)
# A z0 of mismatched rows, pairs, state, rows of other ranks, a mean over tokens, a sum already.
HALOS = ("kto", "dpo", "bco", "aot", "simpo", "cpo")


def with_gold(name: str, **options: Any) -> Sum:
    return Sum([load_objective(name), NLL(rows="gold", **options)])


def drawn(seed: int, *, pairs: int = 3, gold: int = 2) -> LogProbBatch:
    """Pairs, mismatched rows and gold answers in random order, with weights."""
    rows = random_rows(seed, pairs, gold=gold).detach()
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, 5, (len(rows),), generator=draw).float() / 2
    weight = torch.where(rows.labels.pair < 0, weight, torch.maximum(weight, weight[rows.labels.pair]))
    rows = replace(rows, labels=replace(rows.labels, weight=weight))
    return rows.select(torch.randperm(len(rows), generator=draw))


def judged(rows: LogProbBatch) -> LogProbBatch:
    return rows.select((~rows.labels.gold).nonzero().squeeze(1))


def likelihood(rows: LogProbBatch) -> Tensor:
    """The mean of -log p over the tokens of the gold answers, each weighted, written out row by row."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for i in rows.labels.gold.nonzero().squeeze(1).tolist():
        total = total - rows.labels.weight[i] * rows.policy_logps[i][rows.mask[i]].sum()
        tokens += int(rows.mask[i].sum())
    return total / tokens


@pytest.mark.parametrize("name", HALOS)
@given(seed=seeds)
@settings(max_examples=8)
def test_the_loss_is_that_of_the_other_rows_and_the_likelihood_of_the_gold_answers(name: str, seed: int) -> None:
    rows = drawn(seed)
    result, alone = with_gold(name)(rows), load_objective(name)(judged(rows))
    assert result.loss.item() == pytest.approx((alone.loss + likelihood(rows)).item(), rel=1e-6, abs=1e-9)
    assert result.outcomes is not None
    assert alone.outcomes is not None
    for column in fields(result.outcomes):
        assert torch.equal(getattr(result.outcomes, column.name), getattr(alone.outcomes, column.name)), column.name


@pytest.mark.parametrize("name", [name for name in HALOS if name != "aot"])  # which needs the whole step at once
@given(seed=seeds, cuts=st.lists(st.integers(0, 8), max_size=4))
@settings(max_examples=8)
def test_the_parts_of_a_step_sum_to_it(name: str, seed: int, cuts: list[int]) -> None:
    """Also parts of gold answers only, and of none."""
    rows, objective = drawn(seed), with_gold(name)
    whole = deepcopy(objective)(rows).loss
    units: dict[int, list[int]] = {}
    for i in rows.labels.train_index.tolist():
        units.setdefault(min(i, int(rows.labels.pair[i])) if rows.labels.pair[i] >= 0 else i, []).append(i)
    ordered = [units[i] for i in torch.randperm(10 * len(rows)).tolist() if i in units]
    edges = [0, *sorted(min(cut, len(ordered)) for cut in cuts), len(ordered)]
    context, total = objective.prepare(rows), torch.zeros((), dtype=torch.float64)
    for start, end in pairwise(edges):
        index = torch.tensor([i for unit in ordered[start:end] for i in unit], dtype=torch.long)
        total = total + objective.compute_loss(rows.select(index), context.select(index)).loss
    assert total.item() == pytest.approx(whole.item(), rel=1e-6, abs=1e-9)


def test_a_context_can_be_selected_from_twice() -> None:
    rows, objective = drawn(0), with_gold("kto")
    context, train = objective.prepare(rows), rows.labels.train_index
    half = torch.arange(0, len(train), 2)
    twice = context.select(train).select(half)
    losses = [objective.compute_loss(rows.select(train[half]), c).loss for c in (twice, context.select(train[half]))]
    assert torch.equal(*losses)


def test_desirable_and_all_leave_gold_answers_out() -> None:
    rows = drawn(1)
    for kind in ("desirable", "all"):
        both = Sum([NLL(rows=kind), NLL(rows="gold")])(rows).loss  # type: ignore[arg-type]
        alone = NLL(rows=kind)(judged(rows)).loss  # type: ignore[arg-type]
        assert both.item() == pytest.approx((alone + likelihood(rows)).item())


class NeedsGold(LogRatio):
    needs = Needs(gold=True)


class WeighsGold(PairProbability):
    needs = Needs(gold=True)


def kto(**parts: Any) -> HALO:
    usual: dict[str, Any] = {"reward": LogRatio(), "reference_point": MismatchedKL(), "value_function": Logistic()}
    return HALO(**usual | parts, feedback=Binary(), reflect_undesirable=True)


@pytest.mark.parametrize(
    "refused",
    [
        lambda: load_objective("kto")(drawn(0)),
        lambda: load_objective("cpo")(drawn(0)),
        lambda: NLL()(drawn(0)),
        lambda: NLL(rows="silver"),  # type: ignore[arg-type]
        lambda: kto(reward=NeedsGold()),
        lambda: PolicyWeighted(halo=kto(), policy_weight=WeighsGold()),
        lambda: Labels(torch.tensor([True]), mismatched=torch.tensor([True]), gold=torch.tensor([True])),
        lambda: Labels(torch.tensor([True, False]), torch.tensor([1, 0]), gold=torch.tensor([True, False])),
        lambda: Labels(torch.tensor([True]), gold=torch.tensor([True, False])),
    ],
)
def test_what_would_be_silently_wrong_is_refused_in_one_line(refused: Any) -> None:
    with pytest.raises(ValueError, match="gold") as error:
        refused()
    assert "\n" not in str(error.value)


def test_an_objective_without_gold_answers_gives_bits_as_before() -> None:
    """With a term that needs them, and no such row in the step, too."""
    rows = random_rows(3, 3)
    assert rows.without_gold() is rows
    assert torch.equal(with_gold("kto")(rows).loss, load_objective("kto")(rows).loss)


# -- the suite ----------------------------------------------------------------------------------------------


class Own(Sum):
    """Adds up as a sum does."""


class Twice(Sum):
    """Counts gold answers twice."""

    def compute_loss(self, rows: LogProbBatch, context: Any) -> Result:
        result = super().compute_loss(rows, context)
        return replace(result, loss=result.loss - rows.policy_logps[rows.labels.gold].sum() / 100)


def test_the_suite_draws_gold_answers_for_objectives_that_need_them() -> None:
    needs = load_objective("tpo").needs
    small = [fitted_to(Step(seed=s, units=1 + s, mismatched=s), needs, None) for s in range(4)]
    for step in (*small, *large_steps(needs)):
        labels = step.rows().labels
        assert 0 < int(labels.gold.sum()) <= max(step.units, 76)
        assert bool((labels.pair >= 0)[~labels.gold & ~labels.mismatched].all())
        assert set(labels.group[labels.gold].tolist()) <= set(labels.group[~labels.gold].tolist())
    terms = list(load_objective("tpo").terms)  # type: ignore[arg-type]
    assert sum_of_terms(Own(terms), 12) is None  # type: ignore[arg-type]
    assert sum_of_terms(Twice(terms), 12)  # type: ignore[arg-type]


# -- the engine ---------------------------------------------------------------------------------------------


def tokens(pairs: int = 3, *, mismatched: bool = True) -> TokenBatch:
    """Pairs and mismatched rows of all lengths, with a gold answer for each pair after it."""
    rows = pairs_of_all_lengths(pairs, mismatched=mismatched)
    gold = [torch.arange(7 + i, 9 + 3 * i) for i in range(pairs)]
    n, labels = len(rows), rows.labels
    none = torch.zeros(pairs, dtype=torch.bool)
    whole = TokenBatch(
        prompts=rows.prompts,
        completions=[*rows.completions, *gold],
        prompt=torch.cat([rows.prompt, torch.arange(pairs)]),
        labels=Labels(
            desirable=torch.cat([labels.desirable, ~none]),
            pair=torch.cat([labels.pair, torch.full((pairs,), -1)]),
            mismatched=torch.cat([labels.mismatched, none]),
            group=torch.cat([labels.group, torch.arange(pairs) // 2]),
            gold=torch.arange(n + pairs) >= n,
        ),
        row_ids=[*rows.row_ids, *(f"file:{i}#gold" for i in range(pairs))],
    )
    each = [[2 * i, 2 * i + 1, n + i] for i in range(pairs)]
    return whole.select(torch.tensor([*(i for unit in each for i in unit), *range(2 * pairs, n)]))


class Steps:
    def __init__(self, folder: Any) -> None:
        self.policy, self.reference = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
        with torch.no_grad():
            for weight in self.reference.parameters():
                weight.mul_(0.9)

    def __call__(
        self, objective: Objective, rows: TokenBatch, most: int | None = None
    ) -> tuple[list[Part], float, dict[str, Tensor]]:
        """Parts, loss and gradient."""
        self.policy.zero_grad()
        scorer = Scorer(self.policy)
        parts = StepEngine(objective, scorer, FixedModel(self.reference, scorer), most).step(rows)
        gradient = {name: p.grad.clone() for name, p in self.policy.named_parameters()}
        return parts, sum(part.result.loss.item() for part in parts), gradient


@pytest.fixture(scope="module")
def steps(tiny_folder: Any) -> Steps:
    return Steps(tiny_folder)


@pytest.mark.parametrize("name", ["kto", "aot", "tpo"])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_micro_batches_of_any_size_give_the_same_step(steps: Steps, name: str, most: int) -> None:
    def objective() -> Objective:
        return load_objective("tpo") if name == "tpo" else with_gold(name)

    rows = tokens(mismatched=name == "kto")
    _, loss, gradient = steps(objective(), rows)
    _, again, other = steps(objective(), rows, most)
    assert again == pytest.approx(loss, rel=1e-5)
    for weight, of_whole in gradient.items():
        torch.testing.assert_close(other[weight], of_whole, rtol=1e-4, atol=1e-6, msg=weight)


@pytest.mark.parametrize("most", [None, 2])
def test_parts_are_what_they_are_without_gold_answers(steps: Steps, most: int | None) -> None:
    """Rows, names and outcomes: all that metrics, predictions and callbacks read."""
    rows = tokens()
    alone = rows.select((~rows.labels.gold).nonzero().squeeze(1))
    parts, _, _ = steps(with_gold("kto"), rows, most)
    found: dict[str, Any] = {}
    for part in parts:
        assert part.result.outcomes is not None
        assert not part.rows.labels.has_gold
        assert part.index.tolist() == part.numbers
        assert len(part.rows) == len(part.numbers) == len(part.result.outcomes.outcome)
        found |= dict(zip(part.row_ids, part.result.outcomes.outcome.tolist(), strict=True))
    expected: dict[str, Any] = {}
    for part in steps(load_objective("kto"), alone, most)[0]:
        assert part.result.outcomes is not None
        expected |= dict(zip(part.row_ids, part.result.outcomes.outcome.tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match="gold"):
        steps(load_objective("kto"), rows)


def test_the_divergence_is_that_of_the_judged_rows(steps: Steps) -> None:
    rows, scorer = tokens(), Scorer(steps.policy)
    engine = StepEngine(with_gold("kto"), scorer, FixedModel(steps.reference, scorer))
    (kl, count), *_ = engine.divergences(rows)
    kept = ~(rows.labels.gold | rows.labels.mismatched)
    assert len(kl) == int(kept.sum())
    assert int(count) == sum(len(rows.completions[i]) for i in kept.nonzero().squeeze(1).tolist())


def test_no_completion_is_sampled_for_a_gold_answer(steps: Steps) -> None:
    rows = tokens(mismatched=False)
    sampled = PolicySamples(Scorer(steps.policy), tiny_tokenizer(), 3)(rows)
    of = [name.removeprefix("sample for ") for name in sampled.row_ids[len(rows) :]]
    assert of == [name for name in rows.row_ids if not name.endswith("#gold")]
    assert sampled.labels.mismatched.tolist() == [False] * len(rows) + [True] * len(of)
    assert sampled.labels.gold.sum() == rows.labels.gold.sum()
    places = {name: i for i, name in enumerate(rows.row_ids)}
    for k, name in enumerate(of, start=len(rows)):
        assert sampled.prompt[k] == rows.prompt[places[name]]
        assert sampled.labels.group[k] == rows.labels.group[places[name]]


def test_batches_move_and_are_sent_with_their_gold_answers() -> None:
    rows = tokens()
    sent: Any = ForkingPickler.loads(ForkingPickler.dumps(rows))  # type: ignore[attr-defined]
    for there in (sent, rows.to("cpu"), rows.select(torch.arange(len(rows)), list(range(len(rows))))):
        assert torch.equal(there.labels.gold, rows.labels.gold)
        assert there.labels.host == rows.labels.host


# -- a plan -------------------------------------------------------------------------------------------------


def test_a_plan_counts_gold_answers() -> None:
    needs = load_objective("tpo").needs
    made = assumed(3, 10, needs)
    assert len(made) == len(assumed(3, 10, replace(needs, gold=False))) + 3
    assert int(made.labels.gold.sum()) == 3
    rows = tokens()
    largest = longest(rows, 2, replace(needs, mismatched=True))
    sizes = sorted(len(rows.prompts[rows.prompt[i]]) + len(rows.completions[i]) for i in (2, 5, 8))
    chosen = largest.labels.gold.nonzero().squeeze(1).tolist()
    assert sorted(len(largest.prompts[largest.prompt[i]]) + len(largest.completions[i]) for i in chosen) == sizes[1:]
    assert int((largest.labels.pair >= 0).sum()) == 4
