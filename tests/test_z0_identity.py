"""What KTO's z0 estimates: with y' ~ q(.|x), the law of other prompts' completions, E_q[r] = KL(q||ref) - KL(q||pi).

Policies are tables over all completions of two tokens, in float64. Expectations are sums over all completions, pairs of
rows or batches; nothing is sampled except where the data's own random choice of y' is tested. ``original`` is the
formula of the paper, written out; the package's ``MismatchedKL`` averages in float32.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.data.mismatches import mismatches
from halos_pl.labels import Labels
from halos_pl.objective.reference_points import Estimate, MismatchedKL
from halos_pl.objective.rewards import LogRatio

seeds = st.integers(0, 2**31 - 1)
prompts = st.integers(2, 4)
vocabularies = st.integers(2, 3)
FLOAT32 = 1e-5


def token_tables(seed: int, n: int, k: int, scale: float = 1.0) -> Tensor:
    """log p of every completion's two tokens: float64 [n, k * k, 2]; the second token depends on the first."""
    generator = torch.Generator().manual_seed(seed)
    first = (scale * torch.randn(n, k, 1, generator=generator, dtype=torch.float64)).log_softmax(1)
    second = (scale * torch.randn(n, k, k, generator=generator, dtype=torch.float64)).log_softmax(2)
    return torch.stack([first.expand(n, k, k), second], dim=-1).view(n, k * k, 2)


def kl(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, with 0 log 0 = 0."""
    return (torch.special.xlogy(p, p) - torch.where(p > 0, p * log_q, 0.0)).sum(-1)


def mismatched_rows(policy: Tensor, reference: Tensor) -> LogProbBatch:
    """Rows that only feed the reference point, from log-probs of their tokens, float [rows, tokens]."""
    n = len(policy)
    labels = Labels(torch.zeros(n, dtype=torch.bool), mismatched=torch.ones(n, dtype=torch.bool))
    return LogProbBatch(policy, reference, torch.ones_like(policy, dtype=torch.bool), labels)


def estimate(rows: LogProbBatch, *, clamp: bool) -> Estimate:
    return MismatchedKL(clamp=clamp)(LogRatio()(rows), rows)


def original(rows: LogProbBatch, *, clamp: bool) -> float:
    assert rows.reference_logps is not None
    mean = float((rows.policy_logps.sum(1) - rows.reference_logps.sum(1)).mean())
    return max(0.0, mean) if clamp else mean


def one_prompt(policy: Tensor, reference: Tensor, counts: Tensor) -> LogProbBatch:
    """Mismatched rows of one prompt whose completions y' come ``counts[y']`` times: q = counts / their sum."""
    chosen = torch.arange(len(counts)).repeat_interleave(counts)
    return mismatched_rows(policy[chosen, None], reference[chosen, None])


def counts_of(seed: int, m: int) -> Tensor:
    return torch.randint(1, 9, (m,), generator=torch.Generator().manual_seed(seed))


# -- The identity ----------------------------------------------------------------------------------------------


@given(seed=seeds, n=prompts, k=vocabularies, each=st.integers(1, 3))
def test_over_all_mismatches_of_a_data_set_the_mean_is_a_difference_of_divergences(seed, n, k, each):
    """Rows (x_i, y_j) of all i and all j with another prompt, ``each`` rows a prompt."""
    policy, reference = token_tables(seed, n, k), token_tables(seed + 1, n, k)
    completions = torch.randint(0, k * k, (n, each), generator=torch.Generator().manual_seed(seed + 2))
    pairs = [(x, int(y)) for x in range(n) for other in range(n) if other != x for y in completions[other]]
    x, y = torch.tensor(pairs).T
    rows = mismatched_rows(policy[x, y], reference[x, y])
    q = torch.zeros(n, k * k, dtype=torch.float64).index_put((x, y), torch.ones(()).double(), accumulate=True)
    q /= q.sum(1, keepdim=True)
    expected = float((kl(q, reference.sum(-1)) - kl(q, policy.sum(-1))).mean())
    assert original(rows, clamp=False) == pytest.approx(expected, abs=1e-12)
    assert float(estimate(rows, clamp=False).value) == pytest.approx(expected, abs=FLOAT32)
    clamped = estimate(rows, clamp=True)
    assert float(clamped.value) == pytest.approx(max(0.0, expected), abs=FLOAT32)
    if abs(expected) > FLOAT32:
        assert float(clamped.clamped) == (kl(q, policy.sum(-1)).mean() > kl(q, reference.sum(-1)).mean())


@given(seed=seeds, m=st.integers(2, 6))
def test_it_is_the_policys_divergence_where_the_completions_are_its_own(seed, m):
    counts = counts_of(seed, m)
    q, reference = counts / counts.sum().double(), token_tables(seed, 1, m)[0].sum(-1)[:m].log_softmax(0)
    divergence = float(kl(q, reference))
    assert original(one_prompt(q.log(), reference, counts), clamp=True) == pytest.approx(divergence, abs=1e-12)
    z0 = estimate(one_prompt(q.log(), reference, counts), clamp=True).value
    assert float(z0) == pytest.approx(divergence, abs=FLOAT32)


@given(seed=seeds, m=st.integers(2, 6))
def test_it_is_never_above_0_where_the_completions_are_the_references(seed, m):
    """There it is -KL(ref || pi): whatever the policy has learned, KTO's z0 is 0."""
    counts = counts_of(seed, m)
    q, policy = counts / counts.sum().double(), token_tables(seed, 1, m)[0].sum(-1)[:m].log_softmax(0)
    rows = one_prompt(policy, q.log(), counts)
    assert original(rows, clamp=False) == pytest.approx(-float(kl(q, policy)), abs=1e-12)
    assert float(estimate(rows, clamp=True).value) <= FLOAT32


@given(seed=seeds, m=st.integers(2, 6), toward=st.floats(0.01, 1))
def test_it_rises_toward_q_and_no_further_than_its_divergence(seed, m, toward):
    """A policy that is mixed with q gains at least that share of KL(q || ref); no policy gains more than all of it."""
    counts = counts_of(seed, m)
    q, reference = counts / counts.sum().double(), token_tables(seed, 1, m)[0].sum(-1)[:m].log_softmax(0)
    mixed = ((1 - toward) * reference.exp() + toward * q).log()
    gained, most = original(one_prompt(mixed, reference, counts), clamp=False), float(kl(q, reference))
    assert toward * most - 1e-12 <= gained <= most + 1e-12
    other = token_tables(seed + 1, 1, m)[0].sum(-1)[:m].log_softmax(0)
    assert original(one_prompt(other, reference, counts), clamp=False) <= most + 1e-12


@pytest.mark.parametrize(
    ("policy", "reference", "expected"),
    [
        ([1.0, 0.0], [0.5, 0.5], -torch.inf),  # KL(q || pi) is infinite
        ([0.5, 0.5], [1.0, 0.0], torch.inf),  # KL(q || ref) is
        ([1.0, 0.0], [1.0, 0.0], torch.nan),  # both are: no difference
    ],
)
def test_where_a_divergence_is_infinite_there_is_no_estimate(policy, reference, expected):
    tables = (torch.tensor(each, dtype=torch.float64).log() for each in (policy, reference))
    mean = estimate(one_prompt(*tables, torch.tensor([1, 1])), clamp=False).value
    assert torch.equal(mean.isnan(), torch.tensor(expected).isnan())
    assert mean.isnan() or float(mean) == expected


@given(seed=seeds, m=st.integers(2, 6))
def test_near_the_reference_it_moves_with_the_step_and_the_divergence_with_its_square(seed, m):
    """pi_t = ref * exp(t g) / Z: E_q[r] = t (E_q[g] - E_ref[g]) + O(t^2), whereas KL(pi_t || ref) = t^2 Var_ref(g) / 2.

    So after a small step the estimate is far larger than the divergence, and either sign is possible.
    """
    counts = counts_of(seed, m)
    q, reference = counts / counts.sum().double(), token_tables(seed, 1, m)[0].sum(-1)[:m].log_softmax(0)
    g, ref = token_tables(seed + 1, 1, m)[0].sum(-1)[:m], reference.exp()
    mean, t = ref @ g, 1e-4
    policy = (reference + t * g).log_softmax(0)
    slope = original(one_prompt(policy, reference, counts), clamp=False) / t
    bound = 1e-3 * (1 + float(g.abs().max()) ** 2)
    assert slope == pytest.approx(float(q @ g - mean), abs=bound)
    variance = float(ref @ (g - mean).square())
    assert float(kl(policy.exp(), reference)) / t**2 == pytest.approx(variance / 2, abs=bound * (1 + variance) * 10)


# -- Batches ---------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(seed=seeds, m=st.integers(2, 4), shift=st.floats(-1, 1))
def test_the_clamped_batch_estimate_is_biased_upwards(seed, m, shift):
    """Over all batches of 1, 2 and 3 independent rows: E max(0, z) = max(0, E z) + min(E z+, E z-).

    The surplus falls with the batch size, and is 0 if and only if no two batches have opposite signs.
    """
    rewards = 2 * torch.randn(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    reference = torch.full((m,), 1 / m, dtype=torch.float64).log()
    means = []
    for size in (1, 2, 3):
        batches = [torch.tensor(batch) for batch in product(range(m), repeat=size)]
        rows = [mismatched_rows((reference + rewards)[batch, None], reference[batch, None]) for batch in batches]
        z = torch.tensor([original(each, clamp=False) for each in rows], dtype=torch.float64)
        clamped = [estimate(each, clamp=True) for each in rows]
        values = torch.stack([each.value for each in clamped])
        assert float(z.mean()) == pytest.approx(
            float(rewards.mean()), abs=1e-12
        )  # the batch size does not move the mean
        surplus = min(float(z.clamp(min=0).mean()), float((-z).clamp(min=0).mean()))
        used, least = float(values.mean()), max(0.0, float(z.mean()))
        assert used >= least - FLOAT32
        assert used == pytest.approx(least + surplus, abs=FLOAT32)
        assert (surplus == 0) == bool((z >= 0).all() or (z <= 0).all())
        if z.abs().min() > FLOAT32:
            assert sum(float(each.clamped) for each in clamped) == int((z < 0).sum())
        means.append(used)
    assert all(later <= earlier + FLOAT32 for earlier, later in pairwise(means))


def test_a_clamp_rate_above_one_half_does_not_make_z0_0():
    """Two of three batches clamped, and the mean of the estimates used is still 1 nat where the divergence is 0."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    batches = [estimate(mismatched_rows(zero + reward, zero), clamp=True) for reward in (-1.5, -1.5, 3.0)]
    assert [float(each.clamped) for each in batches] == [1, 1, 0]
    assert sum(float(each.value) for each in batches) / 3 == pytest.approx(1.0)


@pytest.mark.parametrize("each", [1, 2])
def test_every_other_prompts_completion_is_as_likely(each):
    """q of a step: if its prompts have as many rows, a row's y' is any row of another prompt with equal probability."""
    n, draws, random = 6, 4000, Random(0)
    rows = [row // each for row in range(n)]
    seen = Counter((i, j) for _ in range(draws) for i, j in enumerate(mismatches(rows, random)))
    possible = [(i, j) for i in range(n) for j in range(n) if rows[i] != rows[j]]
    assert sorted(seen) == possible
    share = n / len(possible)
    assert all(abs(seen[pair] / draws - share) < 5 * (share * (1 - share) / draws) ** 0.5 for pair in possible)
