"""Laws of the rows' own weights, for all losses: a weight multiplies a row's share of a sum, and no denominator."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_halos import OBJECTIVES, one_for_each_need
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.conformance.check import checks_of
from halos_pl.labels import Labels
from halos_pl.objective.baselines import NLL, Centring, KLPenalty, Unlikelihood
from halos_pl.objective.build import load_objective
from halos_pl.objective.feedback import Binary, Feedback, GroupAdvantage, Judgement
from halos_pl.objective.halo import HALO, Objective, TermContext
from halos_pl.objective.reference_points import MismatchedKL, Zero
from halos_pl.objective.rewards import LogRatio
from halos_pl.testing import random_rows
from value_functions import KahnemanTversky, Logistic

seeds = st.integers(0, 2**31 - 1)
TERMS = {
    "nll of a row": lambda: NLL(per="row"),
    "unlikelihood": Unlikelihood,
    "penalty": KLPenalty,
    "centring": lambda: Centring(weight=0.5),
}
every = pytest.mark.parametrize("name", [*one_for_each_need(OBJECTIVES), *TERMS])
loaded = cache(load_objective)


def made(name: str) -> Objective:
    return TERMS[name]() if name in TERMS else copy.deepcopy(loaded(name))


def weighted(rows: LogProbBatch, weight: Tensor) -> LogProbBatch:
    return replace(rows, labels=replace(rows.labels, weight=weight.float()))


def drawn(rows: LogProbBatch, seed: int) -> Tensor:
    """Weights of which some are 0, equal in both rows of a pair."""
    weight = torch.randint(0, 5, (len(rows),), generator=torch.Generator().manual_seed(seed)).float() / 2
    pair = rows.labels.pair
    return torch.where(pair < 0, weight, torch.maximum(weight, weight[pair]))


def loss(name: str, rows: LogProbBatch) -> float:
    return made(name)(rows).loss.item()


def gradients(name: str, rows: LogProbBatch) -> list[Tensor]:
    leaves = [each for each in (rows.policy_logps, rows.scalar) if each is not None]
    found = torch.autograd.grad(made(name)(rows).loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, found, strict=True)]


@every
@given(seed=seeds)
@settings(max_examples=4)
def test_the_loss_is_linear_in_the_weights(name: str, seed: int) -> None:
    """It is the sum of each row's weight times the row's share, which is the loss if only that row has a weight."""
    rows = random_rows(seed, 3)
    weight, ones = drawn(rows, seed), torch.eye(len(rows))
    shares = [loss(name, weighted(rows, one)) for one in ones]
    assert loss(name, rows) == pytest.approx(sum(shares), rel=1e-5, abs=1e-7)
    expected = float(np.dot(weight.numpy(), shares))
    assert loss(name, weighted(rows, weight)) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert loss(name, weighted(rows, torch.zeros(len(rows)))) == 0


@every
@given(seed=seeds, factor=st.sampled_from([0.25, 2.0, 8.0]))
@settings(max_examples=3)
def test_equal_weights_scale_the_loss_and_its_gradient(name: str, seed: int, factor: float) -> None:
    rows = random_rows(seed, 3)
    same = weighted(rows, torch.full((len(rows),), factor))
    assert loss(name, same) == pytest.approx(factor * loss(name, rows), rel=1e-6)
    for one, other in zip(gradients(name, same), gradients(name, rows), strict=True):
        assert torch.allclose(one, factor * other, rtol=1e-6)


@every
@given(seed=seeds)
@settings(max_examples=3)
def test_mismatched_rows_have_no_weight(name: str, seed: int) -> None:
    """z0 does not depend on any weight, so that of a row without a loss changes nothing."""
    rows = random_rows(seed, 3)
    other = torch.where(rows.labels.mismatched, 7.0, 1.0)
    assert loss(name, weighted(rows, other)) == loss(name, rows)


ROWWISE = [
    name
    for name in [*OBJECTIVES, *TERMS]
    if not made(name).needs.pairs and not made(name).needs.whole_step and name not in ("aot_unpaired", "centring")
]


@pytest.mark.parametrize("name", ROWWISE)
@given(seed=seeds)
@settings(max_examples=3)
def test_a_row_without_weight_has_no_gradient(name: str, seed: int) -> None:
    rows = random_rows(seed, 3)
    weight = drawn(rows, seed)
    for gradient in gradients(name, weighted(rows, weight)):
        assert not gradient[weight == 0].any()


@given(seed=seeds, beta=st.floats(0.01, 2), good=st.floats(0, 3), bad=st.floats(0, 3))
def test_kto_with_weights_equals_equation_8_with_each_loss_multiplied(seed: int, beta: float, good: float, bad: float):
    rows = random_rows(seed, 4)
    weight = drawn(rows, seed)
    halo = HALO(
        reward=LogRatio(),
        reference_point=MismatchedKL(),
        value_function=Logistic(beta=beta),
        feedback=Binary(lambda_desirable=good, lambda_undesirable=bad),
        reflect_undesirable=True,
        loss_offset=1.0,
    )
    r = ((rows.policy_logps - rows.reference_logps) * rows.mask).sum(dim=1).detach().numpy()
    desirable, mismatched = rows.labels.desirable.numpy(), rows.labels.mismatched.numpy()
    u = r - max(0.0, r[mismatched].mean())
    each = np.where(desirable, good, bad) * (1 - 1 / (1 + np.exp(-beta * np.where(desirable, u, -u))))
    expected = (weight.numpy() * each)[~mismatched].sum() / 8
    assert halo(weighted(rows, weight)).loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", [n for n in [*OBJECTIVES, *TERMS] if not made(n).needs.whole_step])
@given(seed=seeds, cut=st.integers(1, 3))
@settings(max_examples=3)
def test_the_split_into_micro_batches_does_not_matter(name: str, seed: int, cut: int) -> None:
    rows = random_rows(seed, 4)
    rows = weighted(rows, drawn(rows, seed))
    objective = made(name)
    context = objective.prepare(rows.detach())
    chosen = (rows.labels.desirable & rows.labels.train).nonzero().squeeze(1)
    parts = [torch.cat([some, rows.labels.pair[some]]) for some in (chosen[:cut], chosen[cut:])]
    total = sum(objective.compute_loss(rows.select(part), context.select(part)).loss.item() for part in parts)
    assert total == pytest.approx(loss(name, rows), rel=1e-5, abs=1e-7)


@given(seed=seeds)
def test_the_advantage_does_not_depend_on_weights(seed: int) -> None:
    rows = random_rows(seed, 4)
    for one, other in zip(GroupAdvantage()(rows), GroupAdvantage()(weighted(rows, drawn(rows, seed))), strict=True):
        assert torch.equal(one, other)


# -- lambda_desirable: auto ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.5, 4.0])
@pytest.mark.parametrize("absent", [False, True])
def test_auto_reaches_rho_with_weights(target: float, absent: bool) -> None:
    """Weights are drawn anew in each step, and desirable rows have three times those of the others."""
    generator = torch.Generator().manual_seed(0)
    feedback = Binary(lambda_desirable="auto", lambda_undesirable=0.7, rho=target)
    halo = HALO(
        reward=LogRatio(),
        reference_point=Zero(),
        value_function=KahnemanTversky(),
        feedback=feedback,
        reflect_undesirable=True,
    )
    good = torch.arange(24) % 4 != 0
    reached = []
    for step in range(40):
        u = torch.randn(24, 1, generator=generator) * (1 + 3 * good[:, None])
        weight = torch.rand(24, generator=generator) * (1 + 2 * good)
        if absent and step % 5 == 0:
            weight[good] = 0
        rows = LogProbBatch(u.requires_grad_(), torch.zeros(24, 1), torch.ones(24, 1).bool(), Labels(good))
        result = halo(weighted(rows, weight))
        ((_, slopes),) = result.slopes
        sums = slopes.of_class(True), slopes.of_class(False)
        assert sums[0].row_weight.item() == pytest.approx(weight[good].sum().item())
        if float(sums[0].slope):
            reached.append(float(sums[0].slope / sums[1].slope))
    assert np.exp(np.mean(np.log(reached[3:]))) == pytest.approx(target, rel=0.08)


@given(seed=seeds, factor=st.sampled_from([0.125, 4.0]))
def test_the_unit_of_weights_does_not_matter_to_auto(seed: int, factor: float) -> None:
    rows = random_rows(seed, 5, 0)
    weight = drawn(rows, seed)
    one, other = (Binary(lambda_desirable="auto", rho=2.0) for _ in range(2))
    assert torch.equal(one(weighted(rows, weight)).weight, other(weighted(rows, factor * weight)).weight)


# -- the check ----------------------------------------------------------------------------------------------


class Ignoring(HALO):
    """Forgets the rows' weights."""

    def prepare(self, rows: LogProbBatch) -> TermContext:
        return super().prepare(weighted(rows, torch.ones(len(rows))))


class Averaging(HALO):
    """Divides by the sum of the weights."""

    def prepare(self, rows: LogProbBatch) -> TermContext:
        context = super().prepare(rows)
        return replace(context, denominator=(rows.labels.weight * rows.labels.train).sum())


class Twice(Feedback):
    """Multiplies by the rows' weights, which the loss does again."""

    def forward(self, rows: LogProbBatch) -> Judgement:
        judged = Binary()(rows)
        return judged._replace(weight=judged.weight * rows.labels.weight)


def parts(feedback: Feedback) -> dict:
    return {
        "reward": LogRatio(),
        "reference_point": Zero(),
        "value_function": Logistic(),
        "feedback": feedback,
        "reflect_undesirable": True,
    }


@pytest.mark.parametrize(
    ("wrong", "clause"),
    [
        (Ignoring(**parts(Binary())), "identity"),
        (Averaging(**parts(Binary())), "identity"),
        (HALO(**parts(Twice())), "feedback_weight"),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_the_check_finds_who_treats_weights_otherwise(wrong: HALO, clause: str) -> None:
    [found] = [each for each in checks_of(wrong).clauses if each.name == clause]
    assert found.witness()
