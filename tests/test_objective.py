"""Laws of the objective over plain tensors: identities with formulas written out here, and invariances."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_halos import OBJECTIVES as NAMES
from run_halos import ROOT

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.baselines import NLL
from halos_pl.objective.build import load_objective
from halos_pl.objective.composite import Sum
from halos_pl.objective.feedback import Binary, Pairwise
from halos_pl.objective.halo import HALO
from halos_pl.objective.reference_points import (
    BatchQuantile,
    LeaveOneOut,
    MismatchedKL,
    PairedCompletion,
    RunningMean,
    Zero,
)
from halos_pl.objective.rewards import LogProb, LogRatio
from halos_pl.testing import random_rows
from value_functions import Identity, KahnemanTversky, Logistic, LogSigmoid

seeds = st.integers(0, 2**31 - 1)


def sigma(x):
    return 1 / (1 + np.exp(-x))


def kto(beta=0.1, desirable=1.0, undesirable=1.0, reward=None, reference_point=None) -> HALO:
    return HALO(
        reward=reward or LogRatio(),
        reference_point=reference_point or MismatchedKL(),
        value_function=Logistic(beta=beta),
        feedback=Binary(lambda_desirable=desirable, lambda_undesirable=undesirable),
        reflect_undesirable=True,
        loss_offset=1.0,
    )


def dpo(beta=0.1, smoothing=0.0, reward=None) -> HALO:
    return HALO(
        reward=reward or LogRatio(),
        reference_point=PairedCompletion(),
        value_function=LogSigmoid(beta=beta),
        feedback=Pairwise(label_smoothing=smoothing),
        reflect_undesirable=False,
    )


def as_numpy(rows: LogProbBatch):
    policy, reference = rows.policy_logps.detach().numpy(), rows.reference_logps.numpy()
    r = np.array([(policy - reference)[i][rows.mask.numpy()[i]].sum() for i in range(len(rows))])
    return r, rows.labels.desirable.numpy(), rows.labels.mismatched.numpy(), rows.labels.pair.numpy()


@given(
    seed=seeds,
    pairs=st.integers(1, 5),
    mismatched=st.integers(1, 4),
    beta=st.floats(0.01, 2),
    wd=st.floats(0, 3),
    wu=st.floats(0, 3),
)
def test_kto_equals_equation_8(seed, pairs, mismatched, beta, wd, wu):
    rows = random_rows(seed, pairs, mismatched)
    r, desirable, mismatched, _ = as_numpy(rows)
    z0 = max(0.0, r[mismatched].mean())
    losses = [
        wd * (1 - sigma(beta * (r[i] - z0))) if desirable[i] else wu * (1 - sigma(beta * (z0 - r[i])))
        for i in range(len(r))
        if not mismatched[i]
    ]
    assert kto(beta, wd, wu)(rows).loss.item() == pytest.approx(np.mean(losses), rel=1e-6)


@given(seed=seeds, pairs=st.integers(1, 5), beta=st.floats(0.01, 2), smoothing=st.floats(0, 0.49))
def test_conservative_dpo_equals_its_formula(seed, pairs, beta, smoothing):
    rows = random_rows(seed, pairs)
    r, desirable, mismatched, pair = as_numpy(rows)
    gaps = np.array([r[i] - r[pair[i]] for i in range(len(r)) if desirable[i] and not mismatched[i]])
    expected = -(1 - smoothing) * np.log(sigma(beta * gaps)) - smoothing * np.log(sigma(-beta * gaps))
    assert dpo(beta, smoothing)(rows).loss.item() == pytest.approx(expected.mean(), rel=1e-6)


@given(seed=seeds, beta=st.floats(0.01, 2))
def test_kto_gradient_equals_the_papers(seed, beta):
    """lambda * s(1 - s) * beta * d(y) for each token, s = sigmoid(beta * u), no gradient through z0."""
    rows = random_rows(seed, 3)
    kto(beta)(rows).loss.backward()
    r, desirable, mismatched, _ = as_numpy(rows)
    s = sigma(beta * (r - max(0.0, r[mismatched].mean())))
    expected = np.where(desirable, -1, 1) * s * (1 - s) * beta / 6
    expected = np.where(mismatched, 0, expected)[:, None] * np.ones(rows.mask.shape)
    assert torch.allclose(rows.policy_logps.grad, torch.from_numpy(expected), atol=1e-7)


@given(seed=seeds)
def test_nll_equals_the_mean_over_desirable_tokens(seed):
    rows = random_rows(seed, 3)
    kept = (rows.labels.desirable & ~rows.labels.mismatched)[:, None] & rows.mask
    assert NLL()(rows).loss.item() == pytest.approx(-rows.policy_logps[kept].mean().item(), rel=1e-6)


@pytest.mark.parametrize(("make", "loss"), [(kto, 0.5), (dpo, np.log(2))])
def test_loss_at_the_start_where_policy_equals_reference(make, loss):
    rows = random_rows(0, 4)
    rows = dataclasses.replace(rows, reference_logps=rows.policy_logps.detach().clone())
    result = make()(rows)
    assert bool((result.outcomes.reward == 0).all())
    assert result.loss.item() == pytest.approx(loss, rel=1e-7)


@given(seed=seeds, wd=st.floats(0, 3), wu=st.floats(0, 3))
def test_kto_starts_at_half_the_mean_weight(seed, wd, wu):
    rows = random_rows(seed, 3)
    rows = dataclasses.replace(rows, reference_logps=rows.policy_logps.detach().clone())
    assert kto(desirable=wd, undesirable=wu)(rows).loss.item() == pytest.approx((wd + wu) / 4, rel=1e-6, abs=1e-9)


FILES = {
    name: partial(copy.deepcopy, load_objective(ROOT / "experiments" / "objectives" / f"{name}.yaml")) for name in NAMES
}
OBJECTIVES = FILES | {
    "cdpo": lambda: dpo(smoothing=0.2),
    "kto, per token": lambda: kto(reward=LogRatio(length_normalised=True)),
    "no reference model, read the same": lambda: HALO(
        reward=LogProb(),
        reference_point=MismatchedKL(clamp=False),
        value_function=Logistic(),
        feedback=Binary(),
        reflect_undesirable=False,
    ),
    "leave one out": lambda: kto(reference_point=LeaveOneOut()),
    "median": lambda: kto(reference_point=BatchQuantile()),
    "running mismatches": lambda: kto(reference_point=RunningMean(of=MismatchedKL(), decay=0.9)),
}
every = pytest.mark.parametrize("name", OBJECTIVES)


@every
@given(seed=seeds, data=st.data())
@settings(max_examples=10)
def test_order_of_rows_does_not_matter(name, seed, data):
    rows = random_rows(seed, 3)
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    # z0 is a float32 mean, whose last digit (6e-8 nats) depends on the order of the sum; the loss may be far smaller,
    # as values of both signs cancel.
    assert OBJECTIVES[name]()(rows.select(order)).loss.item() == pytest.approx(
        OBJECTIVES[name]()(rows).loss.item(), rel=1e-6, abs=1e-7
    )


@every
@given(seed=seeds, extra=st.integers(1, 4))
@settings(max_examples=10)
def test_padding_does_not_matter(name, seed, extra):
    rows = random_rows(seed, 3)
    pad = lambda t: torch.nn.functional.pad(t, (0, extra))  # noqa: E731
    wide = dataclasses.replace(
        rows,
        policy_logps=pad(rows.policy_logps),
        reference_logps=pad(rows.reference_logps),
        mask=pad(rows.mask),
    )
    assert OBJECTIVES[name]()(wide).loss.item() == pytest.approx(OBJECTIVES[name]()(rows).loss.item(), rel=1e-6)


def gradients(rows):
    """The gradients of the outputs that the loss has read."""
    found = [x.grad for x in (rows.policy_logps, rows.scalar) if x.grad is not None]
    assert found
    return found


@pytest.mark.parametrize("name", [name for name, make in OBJECTIVES.items() if not make().needs.whole_step])
@given(seed=seeds, cut=st.integers(1, 3))
@settings(max_examples=10)
def test_the_split_into_micro_batches_does_not_matter(name, seed, cut):
    """Losses and gradients of the parts, pairs kept together, sum to those of the whole step."""
    whole, split = random_rows(seed, 4), random_rows(seed, 4)
    objective = OBJECTIVES[name]()
    loss = objective(whole).loss
    loss.backward()
    objective = OBJECTIVES[name]()
    context = objective.prepare(split.detach())
    chosen = (split.labels.desirable & ~split.labels.mismatched).nonzero().squeeze(1)
    total = 0.0
    for some in (chosen[:cut], chosen[cut:]):
        index = torch.cat([some, split.labels.pair[some]])
        part = objective.compute_loss(split.select(index), context.select(index)).loss
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    for part, of_whole in zip(gradients(split), gradients(whole), strict=True):
        assert torch.allclose(part, of_whole, atol=1e-9)


@every
@given(seed=seeds)
@settings(max_examples=10)
def test_mismatched_rows_get_no_gradient(name, seed):
    rows = random_rows(seed, 3)
    OBJECTIVES[name]()(rows).loss.backward()
    assert all(bool((gradient[rows.labels.mismatched] == 0).all()) for gradient in gradients(rows))


@given(seed=seeds)
def test_both_readings_agree_for_point_symmetric_values_only(seed):
    rows = random_rows(seed, 3)

    def gradient(v, reflected):
        halo = HALO(
            reward=LogRatio(),
            reference_point=MismatchedKL(),
            value_function=v,
            feedback=Binary(),
            reflect_undesirable=reflected,
        )
        return torch.autograd.grad(halo(rows).loss, rows.policy_logps)[0]

    for v in (Logistic(), Identity()):
        assert torch.allclose(gradient(v, False), gradient(v, True), atol=1e-9)
    for v in (LogSigmoid(), KahnemanTversky()):
        assert not torch.allclose(gradient(v, False), gradient(v, True), atol=1e-9)


@given(seed=seeds)
def test_extreme_rows_are_ignored(seed):
    """Prop. 4.1: KTO's gradient tends to 0 as the outcome leaves for either side."""
    near, far = random_rows(seed, 2), random_rows(seed, 2, scale=1.0)
    shift = torch.where(far.labels.mismatched, 0.0, 2000.0)[:, None]
    moved = far.reference_logps - shift * torch.where(torch.arange(len(far)) % 2 == 0, 1.0, -1.0)[:, None]
    far = dataclasses.replace(far, reference_logps=torch.where(far.mask, moved, 0.0))
    kto()(near).loss.backward()
    kto()(far).loss.backward()
    assert near.policy_logps.grad.abs().max() > 1e-3
    assert far.policy_logps.grad.abs().max() < 1e-30


@given(seed=seeds, shift=st.floats(-3, 3))
def test_shifting_rewards_by_a_constant_cancels_against_their_own_mean(seed, shift):
    """Thm. 4.2: invisible to a reference point that follows the reward; visible to one that does not."""
    rows = random_rows(seed, 3)
    per_row = shift / rows.mask.sum(1, keepdim=True)
    shifted = dataclasses.replace(rows, reference_logps=torch.where(rows.mask, rows.reference_logps - per_row, 0.0))

    def loss(reference, rows):
        return HALO(
            reward=LogRatio(),
            reference_point=reference,
            value_function=Logistic(beta=1.0),
            feedback=Binary(lambda_undesirable=0.0),
            reflect_undesirable=True,
        )(rows).loss.item()

    follows = MismatchedKL(clamp=False)
    assert loss(follows, shifted) == pytest.approx(loss(follows, rows), abs=1e-6)
    if abs(shift) > 0.01:
        assert abs(loss(Zero(), shifted) - loss(Zero(), rows)) > 1e-5


def test_a_denominator_below_one_divides_and_zero_does_not():
    class Few(Binary):
        def forward(self, rows):
            judgement = super().forward(rows)
            return judgement._replace(weight=judgement.weight * 0.1, denominator=judgement.denominator * 0.1)

    rows = random_rows(0, 2)
    halos = [
        HALO(
            reward=LogRatio(),
            reference_point=MismatchedKL(),
            value_function=Logistic(beta=0.1),
            feedback=feedback(),
            reflect_undesirable=True,
        )
        for feedback in (Binary, Few)
    ]
    assert halos[1](rows).loss.item() == pytest.approx(halos[0](rows).loss.item(), rel=1e-6)


def test_an_explicit_weight_of_zero_is_zero():
    rows = random_rows(3, 3)
    result = kto(undesirable=0.0)(rows)
    result.loss.backward()
    assert bool((rows.policy_logps.grad[~rows.labels.desirable] == 0).all())


def test_equal_policy_and_reference_is_not_read_as_padding():
    """A log-ratio of exactly 0 is a value, not a mask: the per-token mean stays finite."""
    rows = random_rows(1, 3)
    rows = dataclasses.replace(rows, reference_logps=rows.policy_logps.detach().clone())
    result = kto(reward=LogRatio(length_normalised=True))(rows)
    result.loss.backward()
    assert result.loss.isfinite()
    assert bool(rows.policy_logps.grad.isfinite().all())
    assert rows.policy_logps.grad.abs().max() > 0


def test_wrong_shapes_are_refused_not_broadcast():
    rows = random_rows(1, 2)
    with pytest.raises(ValueError, match=r"pair has shape \(7, 1\)"):
        dataclasses.replace(rows.labels, pair=rows.labels.pair[:, None])
    with pytest.raises(ValueError, match="reference_logps"):
        dataclasses.replace(rows, reference_logps=rows.reference_logps[:, :1])
    with pytest.raises(ValueError, match="labels"):
        dataclasses.replace(rows, labels=rows.labels.select(torch.tensor([0, 1])))


def test_one_class_only_is_defined():
    rows = random_rows(1, 3)
    keep = (rows.labels.desirable | rows.labels.mismatched).nonzero().squeeze(1)
    assert kto()(rows.select(keep)).loss.isfinite()
    undesirable = (~rows.labels.desirable).nonzero().squeeze(1)
    assert NLL()(rows.select(undesirable)).loss.item() == 0


def test_needs_are_the_union_of_the_parts():
    assert kto().needs == Needs(reference=True, mismatched=True, undesirable=True)
    assert dpo().needs == Needs(reference=True, pairs=True, undesirable=True)
    assert NLL().needs == Needs()
    assert Sum([dpo(), NLL()]).needs == dpo().needs


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Binary(lambda_desirable=-1.0), "lambda_desirable is -1"),
        (lambda: Pairwise(label_smoothing=0.5), "label_smoothing is 0.5"),
        (lambda: RunningMean(decay=1.0), "decay is 1.0"),
        (lambda: Sum([]), "no terms"),
    ],
)
def test_numbers_outside_their_range_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_the_reading_of_undesirable_rows_is_true_or_false():
    parts = {"reward": LogRatio(), "reference_point": Zero(), "value_function": Identity(), "feedback": Binary()}
    with pytest.raises(TypeError, match="reflect_undesirable is 'reflect'"):
        HALO(**parts, reflect_undesirable="reflect")


def test_missing_pieces_are_named():
    rows = random_rows(1, 2)
    alone = dataclasses.replace(
        rows, labels=dataclasses.replace(rows.labels, pair=torch.full_like(rows.labels.pair, -1))
    )
    with pytest.raises(ValueError, match="no paired completion"):
        dpo()(alone)
    with pytest.raises(ValueError, match="no mismatched rows"):
        kto()(rows.select(rows.labels.train.nonzero().squeeze(1)))
    with pytest.raises(ValueError, match="reference log-probs"):
        kto()(dataclasses.replace(rows, reference_logps=None))


# -- reference points -----------------------------------------------------------------------------------


@given(seed=seeds)
def test_mismatched_kl_is_the_clamped_mean_of_mismatched_rows_without_gradient(seed):
    rows = random_rows(seed, 2, 5)
    reward = LogRatio()(rows).float()
    z0 = MismatchedKL()
    estimate = z0(reward, rows)
    got = estimate.value
    values = reward[rows.labels.mismatched].detach().double()
    assert not got.requires_grad
    assert got.item() == pytest.approx(max(0.0, values.mean().item()), abs=1e-6)
    d = {k: v.item() for k, v in estimate.figures().items()}
    assert d["estimate"] == pytest.approx(values.mean().item(), abs=1e-6)
    assert d["standard_error"] == pytest.approx(values.std().item() / 5**0.5, rel=1e-4)
    assert (d["clamped"], d["rows"]) == (float(values.mean() < 0), 5)


@given(seeds=st.lists(seeds, min_size=1, max_size=5))
def test_running_mean_is_the_mean_of_all_rows_so_far(seeds):
    z0, seen = RunningMean(), []
    for i, seed in enumerate(seeds):
        rows = random_rows(seed, 1 + i % 3, 2)
        reward = LogRatio()(rows).detach().float()
        seen += reward[rows.labels.train].tolist()
        assert z0(reward, rows).value.item() == pytest.approx(np.mean(seen), abs=1e-5)
    z0.eval()
    assert z0(reward + 7, rows).value.item() == pytest.approx(np.mean(seen), abs=1e-5)
    copy = RunningMean()
    copy.load_state_dict(z0.state_dict())
    assert copy.mean == z0.mean
    assert copy.count == len(seen)


def test_exponential_running_mean_starts_at_the_first_steps_mean():
    z0, rows = RunningMean(decay=0.9), random_rows(0, 2)
    reward = torch.ones(len(rows))
    assert z0(reward, rows).value.item() == 1
    assert z0(3 * reward, rows).value.item() == pytest.approx(0.9 * 1 + 0.1 * 3)
