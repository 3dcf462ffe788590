"""The theorems of the KTO paper (Ethayarajh et al., ICML 2024, section 4) on small tabular policies.

A policy is a softmax over a handful of outcomes of a prompt, a row is one outcome (one token), and every loss is the
package's own ``HALO`` of plug-ins, in float64. Each test says under which assumptions its theorem holds.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from theory_scripts import script
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.labels import Labels
from halos_pl.objective.feedback import Binary
from halos_pl.objective.halo import HALO
from halos_pl.objective.reference_points import Estimate, MismatchedKL, PairedCompletion, ReferencePoint, Zero
from halos_pl.objective.rewards import LogRatio
from value_functions import Identity, Logistic, LogSigmoid, ValueFunction

contradictory = script("contradictory_preferences")
SCRIPT = Path(contradictory.__file__)

seeds = st.integers(0, 2**31 - 1)
betas = st.floats(0.05, 2)
weights = st.floats(0.125, 4, width=32)  # feedback holds them in float32


class Given(ReferencePoint):
    """A z0 that follows nothing: numbers in nats, a scalar or one a row."""

    def __init__(self, z0: Tensor | float) -> None:
        super().__init__()
        self.z0 = torch.as_tensor(z0, dtype=torch.float64)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        return Estimate(self.z0)


class OwnExpectation(ReferencePoint):
    """z0 = E_Q[r(x, .)] of each prompt's own rewards: rows are all (x, y), prompt after prompt.

    Args:
        q: probabilities of a reference-point distribution, float [prompts, outcomes].
    """

    def __init__(self, q: Tensor) -> None:
        super().__init__()
        self.q = q

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        mean = (self.q * rewards.view_as(self.q)).sum(1, keepdim=True)
        return Estimate(mean.expand_as(self.q).flatten())


def one_token_rows(policy: Tensor, reference: Tensor, desirable: Tensor, pair: Tensor | None = None) -> LogProbBatch:
    """A row an entry of ``policy`` (float [n], nats), none of them a mismatched row."""
    n = len(policy)
    return LogProbBatch(
        policy_logps=policy[:, None],
        reference_logps=reference[:, None],
        mask=torch.ones(n, 1, dtype=torch.bool),
        labels=Labels(desirable=desirable, pair=torch.full((n,), -1) if pair is None else pair),
    )


def halo(value_function: ValueFunction, z0: ReferencePoint, *, desirable=1.0, undesirable=1.0) -> HALO:
    return HALO(
        reward=LogRatio(),
        reference_point=z0,
        value_function=value_function,
        feedback=Binary(lambda_desirable=desirable, lambda_undesirable=undesirable),
        reflect_undesirable=True,
        loss_offset=1.0,
    )


def random_policy(seed: int, *shape: int) -> Tensor:
    """Log-probs over the last dimension, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


# -- Proposition 4.1: KTO does not learn from rows whose outcome is extreme --------------------------------


def gradient_of_one_row(v: ValueFunction, u: float, z0: float, desirable: bool, weight: float = 1.0) -> float:
    """d loss / d r of a lone row with outcome ``u``, for a z0 that is held fixed."""
    reward = torch.tensor([u + z0], dtype=torch.float64, requires_grad=True)
    rows = one_token_rows(reward, torch.zeros(1, dtype=torch.float64), torch.tensor([desirable]))
    loss = halo(v, Given(z0), desirable=weight, undesirable=weight)(rows).loss
    return torch.autograd.grad(loss, reward)[0].item()


@given(u=st.floats(-60, 60), z0=st.floats(-5, 5), beta=betas, weight=weights, desirable=st.booleans())
def test_kto_gradient_in_the_reward_is_the_papers(u, z0, beta, weight, desirable):
    """lambda * sigma(beta u) * (1 - sigma(beta u)) * beta * d, d = -1 for a desirable row and +1 for the other kind."""
    # cosh needs no sigmoid: sigma(x) * (1 - sigma(x)) = 1 / (4 cosh^2(x / 2))
    expected = weight * beta * (-1 if desirable else 1) / (4 * math.cosh(beta * u / 2) ** 2)
    # u is the difference of r and z0, so it is known to 1e-15 nats; deep in the tail 1 - sigma is rounded as well.
    assert gradient_of_one_row(Logistic(beta=beta), u, z0, desirable, weight) == pytest.approx(
        expected, rel=1e-9, abs=1e-15
    )


@given(far=st.floats(1, 1e4), side=st.sampled_from([-1, 1]), z0=st.floats(-5, 5), beta=betas, desirable=st.booleans())
def test_kto_gradient_tends_to_zero_on_both_sides(far, side, z0, beta, desirable):
    """Prop. 4.1 with a rate: at most beta * exp(-beta * |u|), and never larger farther out."""

    def size(u: float) -> float:
        return abs(gradient_of_one_row(Logistic(beta=beta), u, z0, desirable))

    assert size(side * far) <= beta * math.exp(-beta * far) * (1 + 1e-6) + 1e-15
    assert size(side * (far + 1)) <= size(side * far) + 1e-15


@given(seed=seeds, outcomes=st.integers(2, 5), far=st.floats(50, 1e3), side=st.sampled_from([-1, 1]))
def test_an_extreme_outcome_leaves_a_tabular_policy_alone(seed, outcomes, far, side):
    """The same for the logits: the gradient is (d loss / d r) * (e_y - pi), so it vanishes with its factor.

    What is extreme is the reference's log-prob of y; the policy itself is ordinary, so nothing else saturates.
    """
    logits = random_policy(seed, outcomes).requires_grad_()
    policy = logits.log_softmax(0)
    y = seed % outcomes
    reference = policy[y].detach() - side * far
    rows = one_token_rows(policy[[y]], reference[None], torch.tensor([True]))
    (gradient,) = torch.autograd.grad(halo(Logistic(beta=1.0), Zero())(rows).loss, logits)
    factor = gradient_of_one_row(Logistic(beta=1.0), side * far, 0.0, True)
    expected = factor * (torch.eye(outcomes, dtype=torch.float64)[y] - policy.detach().exp())
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-30)
    assert gradient.abs().max() < math.exp(-49)


def test_ignoring_extreme_rows_is_a_property_of_the_value_function():
    """The identity ignores nothing; log sigma ignores gains but not losses: Prop. 4.1 speaks of the logistic."""
    for u in (-1e3, 1e3):
        assert gradient_of_one_row(Identity(beta=0.5), u, 0.0, True) == -0.5
    assert gradient_of_one_row(LogSigmoid(beta=0.5), -1e3, 0.0, True) == -0.5
    assert abs(gradient_of_one_row(LogSigmoid(beta=0.5), 1e3, 0.0, True)) < 1e-100


# -- Theorem 4.2: rewards that differ by h(x) ---------------------------------------------------------------

prompts = st.integers(1, 4)
wide = st.integers(2, 5)


def shifted_table(seed: int, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """log pi, log pi_ref (float [n, m]) and h (float [n, 1], at least 0.1 in size)."""
    h = random_policy(seed + 2, n + 1)[:n, None]  # log-probs: below 0, so never near it by chance of the sign
    return random_policy(seed, n, m), random_policy(seed + 1, n, m), h - 0.1


def values(v: ValueFunction, z0: ReferencePoint, policy: Tensor, reference: Tensor, pair: Tensor | None = None):
    """Human values of all (x, y) as desirable rows; a shift of r by h(x) is one of the reference by -h(x)."""
    desirable = torch.ones(policy.numel(), dtype=torch.bool)
    outcomes = halo(v, z0)(one_token_rows(policy.flatten(), reference.flatten(), desirable, pair)).outcomes
    assert outcomes
    return outcomes.value


@given(seed=seeds, n=prompts, m=wide, beta=betas)
def test_a_shift_by_h_of_x_keeps_the_optimal_policy(seed, n, m, beta):
    """E_pi[r] - beta * KL(pi || pi_ref): its maximiser pi_ref * exp(r / beta) / Z(x) is the same for r and r + h.

    Its being a maximiser is checked too, by the gradient in the logits (the problem is concave in pi).
    """
    reward, reference, h = shifted_table(seed, n, m)

    def best(r: Tensor) -> Tensor:
        return (reference + r / beta).log_softmax(1)

    assert torch.allclose(best(reward), best(reward + h), atol=1e-10)
    for r in (reward, reward + h):
        logits = best(reward).requires_grad_()
        policy = logits.log_softmax(1)
        (gradient,) = torch.autograd.grad((policy.exp() * (r - beta * (policy - reference))).sum(), logits)
        assert gradient.abs().max() < 1e-10 * (1 + r.abs().max() + beta * policy.abs().max())


@given(seed=seeds, n=prompts, beta=betas)
def test_a_shift_by_h_of_x_keeps_the_bradley_terry_likelihood(seed, n, beta):
    """The likelihood is DPO's loss: same loss and same gradient, because both rewards of a pair move by h(x)."""
    policy, reference, h = shifted_table(seed, n, 2)
    policy.requires_grad_()
    desirable = torch.tensor([True, False] * n)
    pair = torch.arange(2 * n) ^ 1

    def loss(log_ref: Tensor) -> Tensor:
        return contradictory.dpo(beta)(one_token_rows(policy.flatten(), log_ref.flatten(), desirable, pair)).loss

    plain, shifted = loss(reference), loss(reference - h)
    gap = (policy - reference)[:, 0] - (policy - reference)[:, 1]
    assert plain.item() == pytest.approx(-torch.sigmoid(beta * gap).log().mean().item(), rel=1e-9)
    assert shifted.item() == pytest.approx(plain.item(), rel=1e-10)
    gradients = [torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (plain, shifted)]
    assert torch.allclose(*gradients, atol=1e-12)


@given(seed=seeds, n=prompts, m=wide, beta=betas)
def test_a_shift_changes_the_values_where_z0_does_not_follow(seed, n, m, beta):
    """A constant, and the policy's KL, which is computed from the policy and so knows nothing of h.

    h(x) < 0 for every prompt here, so that a strictly increasing v moves every single value down and the distribution
    cannot stay the same by a permutation. (For an h of mixed signs the distribution could: "changes" means "in
    general" in the theorem.)
    """
    policy, reference, h = shifted_table(seed, n, m)
    kl = (policy.exp() * (policy - reference)).sum(1, keepdim=True).expand_as(policy).flatten()
    for z0 in (0.0, 1.3, kl):
        plain = values(Logistic(beta=beta), Given(z0), policy, reference)
        shifted = values(Logistic(beta=beta), Given(z0), policy, reference - h)
        assert bool((shifted < plain).all())
        assert (plain.sort().values - shifted.sort().values).min() > 0


@given(seed=seeds, n=prompts, m=wide, beta=betas)
def test_a_shift_cancels_where_z0_is_the_expectation_of_the_same_reward(seed, n, m, beta):
    """z0 = E_Q[r(x, .)] for any Q(. | x) moves by h(x) too, so every value stays: the other half of the theorem."""
    policy, reference, h = shifted_table(seed, n, m)
    uniform = torch.full_like(policy, 1 / m)
    for q in (policy.exp(), reference.exp(), uniform, random_policy(seed + 3, n, m).exp()):
        plain = values(Logistic(beta=beta), OwnExpectation(q), policy, reference)
        shifted = values(Logistic(beta=beta), OwnExpectation(q), policy, reference - h)
        assert torch.allclose(plain, shifted, atol=1e-12)
    # DPO's reference point is such an expectation: Q puts all its mass on the paired completion, of the same prompt.
    place = torch.arange(n * m)
    pair = torch.where(place % m == m - 1, place - (m - 1), place + 1)
    plain, shifted = (
        values(LogSigmoid(beta=beta), PairedCompletion(), policy, r, pair) for r in (reference, reference - h)
    )
    assert torch.allclose(plain, shifted, atol=1e-12)


@given(seed=seeds, n=st.integers(2, 4), m=wide, beta=betas)
def test_the_mismatched_estimate_follows_the_mean_shift_only(seed, n, m, beta):
    """KTO's estimate is one number a step: of h(x) it takes off the mean, not each prompt's own part.

    So the shift cancels for an h that is the same for all prompts, and is seen otherwise. The clamp is off: with it
    not even a constant cancels once the mean is negative.
    """
    policy, reference, h = shifted_table(seed, n, m)
    flat = policy.numel()

    def with_mismatched(log_ref: Tensor) -> Tensor:
        rows = one_token_rows(
            torch.cat([policy.flatten()] * 2),
            torch.cat([log_ref.flatten()] * 2),
            torch.ones(2 * flat, dtype=torch.bool),
        )
        rows.labels.mismatched = torch.arange(2 * flat) >= flat
        outcomes = halo(Logistic(beta=beta), MismatchedKL(clamp=False))(rows).outcomes
        assert outcomes
        return outcomes.outcome

    plain = with_mismatched(reference)
    everywhere = with_mismatched(reference - h.mean())
    by_prompt = with_mismatched(reference - h)
    assert torch.allclose(plain, everywhere, atol=1e-5)  # z0 itself is averaged in float32
    left = (h - h.mean()).expand_as(policy).flatten()
    assert torch.allclose(by_prompt - plain, left, atol=1e-5)


# -- Theorem 4.3: contradictory preferences -----------------------------------------------------------------


@st.composite
def contradictions(draw):
    """(beta, log pi_ref of two outcomes, pairs that prefer y_a, pairs) with p in (1/2, 1)."""
    pairs = draw(st.integers(3, 12))
    agree = draw(st.integers(pairs // 2 + 1, pairs - 1))
    rare = draw(st.floats(0.01, 0.99))
    return draw(betas), torch.tensor([rare, 1 - rare], dtype=torch.float64).log(), agree, pairs


@settings(deadline=None)
@given(case=contradictions())
def test_dpo_follows_the_minority_where_the_theorem_says_so(case):
    """The optimum of the loss itself, found numerically, against pi(a) / pi(b) = (p/(1-p))^(1/beta) * ref(a) / ref(b).

    Below the theorem's condition p^(1/beta) ref(a) < (1-p)^(1/beta) ref(b) it gives y_b more than half, above it y_a:
    the condition is exact for two outcomes, not only sufficient.
    """
    beta, reference, agree, pairs = case
    p = agree / pairs
    odds = math.log(p / (1 - p)) / beta + (reference[0] - reference[1]).item()
    assume(abs(odds) < 20 and abs(odds) > 1e-6)
    found = contradictory.optimum(contradictory.dpo(beta), reference, agree, pairs)
    assert found == pytest.approx(1 / (1 + math.exp(-odds)), rel=1e-6)
    condition = math.log(p) / beta + reference[0].item() < math.log(1 - p) / beta + reference[1].item()
    assert (found < 0.5) == condition == (p < contradictory.threshold(beta, reference))


@settings(deadline=None)
@given(case=contradictions(), z0=st.one_of(st.none(), st.floats(0, 3)))
def test_loss_neutral_kto_follows_the_majority(case, z0):
    """y_a gets all the mass, for every p > 1/2 and however skewed pi_ref is.

    Assumptions: lambda_D = lambda_U, and z0 is held fixed in the gradient, as KTO's is (None: its own estimate from
    mismatched rows). Then up to constants the loss is -(2p - 1) * [v(r_a - z0) - v(r_b - z0)], which falls in r_a and
    rises in r_b. The optimum is at the boundary pi(y_a) = 1: a supremum that no finite logit attains.
    """
    beta, reference, agree, pairs = case
    kto = contradictory.kto(beta, None if z0 is None else Given(z0))
    assert contradictory.optimum(kto, reference, agree, pairs) > 1 - 1e-10
    # ... and no start is caught on the way: the slope in the logit of y_a is negative everywhere.
    for logit in (-8.0, -3.0, -0.5, 0.0, 0.5, 3.0, 8.0):
        assert contradictory.slope(kto, logit, reference, agree, pairs) < 0


@given(case=contradictions(), seed=seeds, m=st.integers(2, 5), z0=st.floats(0, 3))
def test_no_policy_over_more_outcomes_beats_the_majority(case, seed, m, z0):
    """With a fixed z0 the loss has its global optimum at pi(y_a) = 1, also where other outcomes compete.

    The infimum in closed form, s = sigma(beta * (-log ref(a) - z0)): y_a's rows (half of all) are desirable in a share
    p, at 1 - s each, and undesirable in 1 - p, at s each; y_b's the other way round, with sigma(-inf) = 0 for s.
    """
    beta, _, agree, pairs = case
    p = agree / pairs
    reference = random_policy(seed, m)
    kto = contradictory.kto(beta, Given(z0))

    def loss(policy: Tensor) -> float:
        return kto(contradictory.contradictory_rows(policy, reference, agree, pairs)).loss.item()

    s = 1 / (1 + math.exp(beta * (reference[0].item() + z0)))
    best = 0.5 * (p * (1 - s) + (1 - p) * s) + 0.5 * (1 - p)
    limit = torch.full((m,), -1e4, dtype=torch.float64)
    limit[0] = 0.0
    assert loss(limit) == pytest.approx(best, rel=1e-9)
    for i in range(5):
        assert loss(random_policy(seed + 1 + i, m)) > best


@pytest.mark.parametrize(("beta", "inside"), [(3.0, True), (0.1, False)])
def test_balanced_weights_are_an_assumption(beta, inside):
    """With (1 - p) * lambda_U > p * lambda_D people's losses push y_a down as well, and above beta = 1 the optimum is
    no longer pi(y_a) = 1. Below, y_a still wins, as pushing y_b down saturates later: the condition is sufficient."""
    agree, pairs = 2, 3
    reference = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    averse = contradictory.kto(beta, Given(0.0), undesirable_weight=8.0)
    assert (contradictory.slope(averse, 12.0, reference, agree, pairs) > 0) == inside
    assert (contradictory.optimum(averse, reference, agree, pairs) < 1 - 1e-6) == inside


def test_the_theorem_needs_a_reference_point_without_gradient():
    """With z0 = KL(pi || pi_ref) inside the minimisation the best policy is not pi(y_a) = 1.

    There r_a - z0 = 0 and v = 1/2, whereas a policy short of it has r_a > z0 > r_b. KTO's z0 has no gradient, so its
    training goes on to the end all the same; the theorem is about that.
    """
    beta, agree, pairs = 10.0, 3, 4
    reference = torch.tensor([0.5, 0.5], dtype=torch.float64).log()

    def loss(pi_a: float) -> float:
        policy = torch.tensor([pi_a, 1 - pi_a], dtype=torch.float64).log()
        kl = (policy.exp() * (policy - reference)).sum().item()
        return contradictory.kto(beta, Given(kl))(
            contradictory.contradictory_rows(policy, reference, agree, pairs)
        ).loss.item()

    assert loss(0.9) < loss(1 - 1e-12) - 0.05


@given(case=contradictions(), logit=st.floats(-8, 8))
def test_kto_with_the_exact_kl_as_reference_follows_the_majority(case, logit):
    """The definition's own z0, the KL of the policy at hand: held fixed, it too only ever pushes y_a up."""
    beta, reference, agree, pairs = case
    policy = torch.tensor([logit, 0.0], dtype=torch.float64).log_softmax(0)
    kl = (policy.exp() * (policy - reference)).sum()
    assert contradictory.slope(contradictory.kto(beta, Given(kl)), logit, reference, agree, pairs) < 0


def test_the_experiment_draws_its_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "figures")])
    contradictory.main()
    picture = tmp_path / "figures" / "contradictory_preferences.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 100_000
    assert "minority" in capsys.readouterr().out
    assert SCRIPT.with_suffix(".png").exists()
