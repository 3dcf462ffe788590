"""Reference points against formulas written out here, and what they say of themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_parts import example, library

import halos_pl.objective.reference_points as reference_points
from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.reference_points import (
    BatchMean,
    BatchQuantile,
    Constant,
    Estimate,
    LeaveOneOut,
    MismatchedKL,
    PairedCompletion,
    RankMatched,
    ReferencePoint,
    RunningMean,
    SampledKL,
    SortedMargins,
    TokenKL,
)
from halos_pl.objective.rewards import LogRatio, PairMargin
from halos_pl.testing import random_rows

seeds = st.integers(0, 2**31 - 1)

EXAMPLES: dict[str, ReferencePoint] = {name: example(cls) for name, cls in library(reference_points.__name__).items()}


def step(seed: int, pairs: int = 4):
    rows = random_rows(seed, pairs)
    kl = torch.rand(rows.mask.shape, dtype=torch.float64) * rows.mask
    rows = dataclasses.replace(rows.detach(), kl=kl)
    return rows, LogRatio()(rows)


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_reports_the_same_four_figures(name):
    rows, rewards = step(0)
    figures = EXAMPLES[name](rewards, rows).figures()
    assert {"estimate", "standard_error", "rows", "clamped"} <= figures.keys()
    assert all(value.dim() == 0 and value.dtype == torch.float32 and value.isfinite() for value in figures.values())


@given(seed=seeds, q=st.floats(0, 1))
def test_batch_mean_and_quantile(seed, q):
    rows, rewards = step(seed)
    own = rewards[rows.labels.train].numpy()
    mean, quantile = BatchMean()(rewards, rows), BatchQuantile(quantile=q)(rewards, rows)
    assert mean.value.item() == pytest.approx(own.mean(), rel=1e-5, abs=1e-6)
    assert mean.figures()["standard_error"].item() == pytest.approx(own.std(ddof=1) / len(own) ** 0.5, rel=1e-5)
    assert quantile.value.item() == pytest.approx(np.quantile(own, q), rel=1e-4, abs=1e-5)


@given(seed=seeds)
def test_leave_one_out_is_the_mean_of_the_prompts_other_rows(seed):
    rows, rewards = step(seed, pairs=3)  # one prompt with four rows, one with two
    z0 = LeaveOneOut()(rewards, rows).value
    for i in rows.labels.train.nonzero().squeeze(1).tolist():
        others = [
            j
            for j in range(len(rows))
            if j != i and rows.labels.group[j] == rows.labels.group[i] and rows.labels.train[j]
        ]
        assert z0[i].item() == pytest.approx(rewards[others].mean().item())


def test_a_row_that_is_alone_with_its_prompt_is_compared_with_the_mean_of_the_step():
    rows, rewards = step(0)
    rows = dataclasses.replace(rows, labels=dataclasses.replace(rows.labels, group=torch.arange(len(rows))))
    alone = LeaveOneOut()(rewards, rows)
    expected = BatchMean()(rewards, rows).value.to(rewards)
    assert torch.allclose(alone.value, expected.expand(len(rows)))
    assert alone.figures()["alone"] == 1


@given(seed=seeds)
def test_rank_matched_are_matched_by_rank(seed):
    rows, rewards = step(seed)
    z0 = RankMatched()(rewards, rows).value
    chosen, rejected = (
        rewards[rows.labels.train & side].sort().values for side in (rows.labels.desirable, ~rows.labels.desirable)
    )
    for i in rows.labels.train.nonzero().squeeze(1).tolist():
        mine, theirs = (chosen, rejected) if rows.labels.desirable[i] else (rejected, chosen)
        assert z0[i] == theirs[int((mine < rewards[i]).sum())]


@given(seed=seeds)
def test_the_gradient_of_a_rank_matched_is_that_of_the_row_it_is_matched_with(seed):
    rows, rewards = step(seed)
    rewards = rewards.requires_grad_()
    u = (rewards - RankMatched()(rewards, rows).value)[rows.labels.train & rows.labels.desirable]
    (slope,) = torch.autograd.grad(u.sum(), rewards)
    assert torch.equal(
        slope, torch.where(rows.labels.mismatched, 0.0, torch.where(rows.labels.desirable, 1.0, -1.0)).double()
    )


def test_rank_matched_need_as_many_of_either_class():
    rows, rewards = step(0)
    first = rows.labels.desirable.nonzero()[0, 0]
    rows.labels.desirable[first] = False
    with pytest.raises(ValueError, match="3 desirable and 5 undesirable"):
        RankMatched()(rewards, rows)


@given(seed=seeds)
def test_sorted_margins_are_the_references_own_sorted(seed):
    rows, _ = step(seed)
    margins = PairMargin()(rows)
    assert bool((margins[rows.labels.mismatched] == 0).all())
    z0 = SortedMargins()(margins, rows).value
    reference = PairMargin()(dataclasses.replace(rows, policy_logps=rows.reference_logps))
    chosen = rows.labels.train & rows.labels.desirable
    delta = margins[chosen].sort().values - reference[chosen].sort().values
    assert torch.allclose((margins - z0)[chosen][margins[chosen].argsort()], delta)
    # Seen from the rejected side the same, with the other sign.
    other = rows.labels.pair[chosen]
    assert torch.allclose((margins - z0)[other], -(margins - z0)[chosen])


@given(seed=seeds)
def test_exact_kl_and_samples_are_means_over_the_mismatched_rows(seed):
    rows, rewards = step(seed)
    assert TokenKL()(rewards, rows).value.item() == pytest.approx(
        rows.kl[rows.labels.mismatched].sum(1).mean().item(), rel=1e-5
    )
    assert SampledKL()(rewards, rows).value.item() == pytest.approx(
        rewards[rows.labels.mismatched].mean().item(), rel=1e-4, abs=1e-6
    )


@given(seeds=st.lists(seeds, min_size=1, max_size=4), decay=st.floats(0, 0.99))
def test_a_running_mean_of_kto_s_estimate(seeds, decay):
    running, expected = RunningMean(of=MismatchedKL(), decay=decay), None
    for seed in seeds:
        rows, rewards = step(seed)
        now = max(0.0, rewards[rows.labels.mismatched].mean().item())
        expected = now if expected is None else decay * expected + (1 - decay) * now
        assert running(rewards, rows).value.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert running.needs == MismatchedKL().needs
    assert running.get_extra_state()["count"] == 3 * len(seeds)  # the mismatched rows


def test_what_cannot_be_is_refused():
    rows, rewards = step(0)
    with pytest.raises(ValueError, match="PairedCompletion gives a number for each row"):
        RunningMean(of=PairedCompletion())
    with pytest.raises(ValueError, match="Constant "):
        RunningMean(of=Constant(value=5.0))
    with pytest.raises(ValueError, match="LeaveOneOut gives a number for each row"):
        RunningMean(of=LeaveOneOut())

    class Silent(ReferencePoint):
        needs = Needs(step_rewards=True)

        def forward(self, rewards: torch.Tensor, rows: LogProbBatch) -> Estimate:
            return Estimate(rewards.mean())

    running = RunningMean(of=Silent())  # it need not say how many rows are behind it
    for reward, mean in ((1.0, 1.0), (3.0, 2.0)):
        assert running(torch.full_like(rewards, reward), rows).value == mean
    with pytest.raises(ValueError, match=r"quantile is 1\.5"):
        BatchQuantile(quantile=1.5)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        SampledKL(max_new_tokens=0)
