"""Laws of rho, the ratio of the classes' slopes, and of the weight that sets it."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halos_pl.batch import LogProbBatch
from halos_pl.conformance import check_halo
from halos_pl.conformance.ranks import Ranks
from halos_pl.distributed import sum_over_ranks
from halos_pl.labels import Labels
from halos_pl.objective.baselines import NLL
from halos_pl.objective.composite import Sum
from halos_pl.objective.feedback import Binary, Feedback, Flipped, GroupAdvantage, Judgement, Pairwise, Slopes
from halos_pl.objective.feedback.slopes import joined
from halos_pl.objective.halo import HALO, Objective, Result
from halos_pl.objective.reference_points import MismatchedKL, PairedCompletion, RankMatched, Zero
from halos_pl.objective.rewards import LogRatio, TokenLogRatio
from halos_pl.testing import binary_rows, fit, random_rows
from halos_pl.training.metrics import Means, derived, row_figures
from value_functions import CARA, Identity, KahnemanTversky, Logistic, LogSigmoid, ValueFunction

seeds = st.integers(0, 2**31 - 1)


def halo(v: ValueFunction, feedback: Feedback | None = None, *, reflect: bool = True, z0: Any = None, r: Any = None):
    return HALO(
        reward=r or LogRatio(),
        reference_point=z0 or MismatchedKL(),
        value_function=v,
        feedback=feedback or Binary(),
        reflect_undesirable=reflect,
    )


def figures(objective: Objective, rows: LogProbBatch, results: list[Result]) -> dict[str, float]:
    """The logged figures of a step in one part."""
    means = Means()
    for result in results:
        means.add(row_figures(rows.select(rows.labels.train_index).detach(), result, objective.halo))
    return derived(means.compute())


def rho(objective: Objective, rows: LogProbBatch) -> float:
    return figures(objective, rows, [objective(rows)])["outcome/rho"]


def sigma(x):
    return 1 / (1 + np.exp(-x))


def kt_slope(u):
    x = 0.1 * u
    return 0.1 * 0.88 * np.where(x >= 0, 1.0, 2.25) * (np.abs(x) + 1e-3) ** -0.12


SLOPES = {
    "logistic": (Logistic(beta=0.1), lambda u: 0.1 * sigma(0.1 * u) * (1 - sigma(0.1 * u))),
    "log_sigmoid": (LogSigmoid(beta=0.1), lambda u: 0.1 * sigma(-0.1 * u)),
    "kahneman_tversky": (KahnemanTversky(), kt_slope),
    "identity": (Identity(beta=0.1), lambda u: 0.1 + 0 * u),
}


@pytest.mark.parametrize("name", SLOPES)
@given(seed=seeds, pairs=st.integers(1, 5), good=st.floats(0.1, 3), bad=st.floats(0.1, 3), reflect=st.booleans())
def test_rho_is_the_ratio_of_sums_of_slopes(name, seed, pairs, good, bad, reflect):
    v, slope = SLOPES[name]
    rows = random_rows(seed, pairs, scale=10.0)
    policy, mask = rows.policy_logps.detach().numpy(), rows.mask.numpy()
    r = ((policy - rows.reference_logps.numpy()) * mask).sum(axis=1)
    desirable, mismatched = rows.labels.desirable.numpy(), rows.labels.mismatched.numpy()
    u = r - max(0.0, r[mismatched].mean())
    chosen = good * slope(u)[desirable & ~mismatched].sum()
    rejected = bad * slope(-u if reflect else u)[~desirable & ~mismatched].sum()
    binary = Binary(lambda_desirable=good, lambda_undesirable=bad)
    logged = rho(halo(v, binary, reflect=reflect), rows)
    assert logged == pytest.approx(chosen / rejected, rel=1e-5)


@given(seed=seeds, pairs=st.integers(1, 4), v=st.sampled_from([LogSigmoid(), Logistic(beta=1.0), CARA()]))
def test_rho_of_dpo_is_1(seed, pairs, v):
    rows = random_rows(seed, pairs)
    for z0, feedback in ((PairedCompletion(), Pairwise()), (RankMatched(), Pairwise(label_smoothing=0.2))):
        assert rho(halo(v, feedback, z0=z0, reflect=False), rows) == pytest.approx(1.0, rel=1e-5)


@given(seed=seeds)
def test_rho_of_a_reward_per_token_sums_over_tokens(seed):
    rows = random_rows(seed, 3)
    tokens = rows.mask & rows.labels.train[:, None]
    of_tokens = {side: int(tokens[rows.labels.desirable == side].sum()) for side in (True, False)}
    logged = rho(halo(Identity(), r=TokenLogRatio(), z0=Zero()), rows)
    assert logged == pytest.approx(of_tokens[True] / of_tokens[False], rel=1e-5)


@given(seed=seeds)
def test_rho_of_a_sum_is_that_of_all_its_halos(seed):
    rows = random_rows(seed, 3)
    whole = halo(Logistic(), Binary(lambda_desirable=2.0, lambda_undesirable=3.0))
    sides = [Binary(lambda_desirable=2.0, lambda_undesirable=0.0), Binary(lambda_desirable=0.0, lambda_undesirable=3.0)]
    parts = Sum([NLL(), *(halo(Logistic(), side) for side in sides)])
    assert rho(parts, rows) == pytest.approx(rho(whole, rows), rel=1e-5)


def test_rho_is_absent_without_a_class_and_while_the_policy_is_its_reference():
    rows, v = random_rows(0, 4), halo(KahnemanTversky())
    assert math.isfinite(rho(v, rows))
    for side in (True, False):
        index = ((rows.labels.desirable == side) | rows.labels.mismatched).nonzero().squeeze(1)
        assert math.isnan(rho(v, rows.select(index)))
    start = LogProbBatch(rows.policy_logps, rows.policy_logps.detach(), rows.mask, rows.labels)
    assert math.isnan(rho(v, start))


def test_rho_of_a_step_does_not_depend_on_its_split():
    rows = random_rows(3, 6)
    objective = halo(Logistic(), Binary(lambda_desirable=2.0))
    context, train = objective.prepare(rows.detach()), rows.labels.train_index
    means = Means()
    for index in train.split(5):
        part = rows.select(index)
        means.add(row_figures(part.detach(), objective.compute_loss(part, context.select(index)), objective))
    assert derived(means.compute())["outcome/rho"] == pytest.approx(rho(objective, rows), rel=1e-6)


# -- lambda_desirable: auto ---------------------------------------------------------------------------------

SHAPES = {"logistic": Logistic(), "kahneman_tversky": KahnemanTversky(), "identity": Identity()}


class Toy:
    """A policy with a few parameters on fixed rows, a share of them desirable."""

    def __init__(self, objective: HALO, share: float, seed: int = 0) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.good = torch.rand(256, generator=self.draw) < share
        self.features = torch.randn(256, 5, generator=self.draw) + 0.5 * self.good[:, None]
        self.weights = torch.zeros(5, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.weights], lr=0.1)
        self.objective = objective

    def step(self, split: int = 16) -> dict[str, float]:
        i = torch.randint(0, 256, (16,), generator=self.draw)
        rows = LogProbBatch(
            (self.features[i] @ self.weights)[:, None],
            torch.zeros(16, 1),
            torch.ones(16, 1).bool(),
            Labels(self.good[i]),
        )
        context = self.objective.prepare(rows.detach())
        results = []
        for index in torch.arange(16).split(split):
            results.append(self.objective.compute_loss(rows.select(index), context.select(index)))
        self.objective.observe(results)
        self.optimizer.zero_grad()
        torch.stack([result.loss for result in results]).sum().backward()
        self.optimizer.step()
        means = Means()
        for index, result in zip(torch.arange(16).split(split), results, strict=True):
            means.add(row_figures(rows.select(index).detach(), result, self.objective))
        return derived(means.compute())


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("target", [0.5, 4.0])
@pytest.mark.parametrize("name", SHAPES)
def test_auto_reaches_rho(name, target, share):
    feedback = Binary(lambda_desirable="auto", lambda_undesirable=0.7, rho=target)
    toy = Toy(halo(SHAPES[name], feedback, z0=Zero()), share)
    reached = [toy.step()["outcome/rho"] for _ in range(40)]
    logs = [math.log(each) for each in reached[3:] if math.isfinite(each)]
    assert math.exp(np.mean(logs)) == pytest.approx(target, rel=0.04)


def test_a_fixed_weight_does_not():
    toy = Toy(halo(KahnemanTversky(), Binary(lambda_desirable=4.0), z0=Zero()), 0.2)
    logs = [math.log(each) for each in [toy.step()["outcome/rho"] for _ in range(40)][3:] if math.isfinite(each)]
    assert math.exp(np.mean(logs)) < 2.0


def test_the_first_weight_follows_from_the_numbers_of_rows():
    rows = random_rows(1, 4, 0)
    more = rows.select((~rows.labels.desirable | (rows.labels.desirable.cumsum(0) <= 1)).nonzero().squeeze(1))
    feedback = Binary(lambda_desirable="auto", lambda_undesirable=0.5, rho=2.0)
    assert feedback(more).weight[more.labels.desirable].tolist() == pytest.approx([2.0 * 0.5 * 4 / 1])
    for side in (True, False):  # a class is absent: nothing to compare with
        alone = rows.select((rows.labels.desirable == side).nonzero().squeeze(1))
        assert feedback(alone).weight.tolist() == pytest.approx([2.0 * 0.5 if side else 0.5] * 4)


def test_steps_without_a_class_keep_what_the_others_told():
    rows = random_rows(2, 6, 0, scale=10.0)
    objective = halo(KahnemanTversky(), Binary(lambda_desirable="auto", rho=1.0), z0=Zero())
    good = rows.select(rows.labels.desirable.nonzero().squeeze(1))
    objective(rows)
    known = float(objective.feedback(rows).weight[rows.labels.desirable][0])
    assert known != pytest.approx(1.0, rel=1e-3)
    for step in range(1, 50):
        objective(good)  # 6 rows of 12, then 12 of 18, ... are desirable
        assert objective.feedback(good).weight.tolist() == pytest.approx([known / (step + 1)] * 6, rel=1e-5)
    fresh = halo(KahnemanTversky(), Binary(lambda_desirable="auto", rho=1.0), z0=Zero())
    for _ in range(5):
        fresh(good)
    assert fresh.feedback(good).weight.tolist() == pytest.approx([1.0] * 6)


def test_the_weight_is_bounded_where_v_is_flat():
    rows = random_rows(2, 6, 0)
    far = LogProbBatch(rows.policy_logps * 1e6, rows.reference_logps, rows.mask, rows.labels)
    objective = halo(Logistic(), Binary(lambda_desirable="auto", rho=2.0), z0=Zero())
    for _ in range(3):
        assert torch.isfinite(objective(far).loss)
    weight = objective.feedback(rows).weight[rows.labels.desirable]
    assert bool((weight >= 2.0 / 1000).all())
    assert bool((weight <= 2.0 * 1000).all())


def auto(z0: Any = None) -> HALO:
    return halo(KahnemanTversky(), Binary(lambda_desirable="auto", rho=2.0), z0=z0)


def test_the_weight_does_not_depend_on_micro_batches():
    whole, split = (Toy(auto(Zero()), 0.5) for _ in range(2))
    for _ in range(10):
        assert split.step(5) == pytest.approx(whole.step(), rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_weight_does_not_depend_on_ranks(ranks):
    steps = [random_rows(seed, 5, 4, scale=5.0) for seed in range(4)]
    alone = auto()
    expected = [[alone(rows), alone.feedback(rows).weight][1] for rows in steps]

    def on_rank(rank: int, objective: HALO):
        def work():
            weights = []
            for rows in steps:
                index = torch.arange(rank, len(rows), ranks)
                objective(rows.select(index))
                weights.append((index, objective.feedback(rows.select(index)).weight))
            return weights, objective.state_dict()

        return work

    found = Ranks(ranks).run([on_rank(rank, auto()) for rank in range(ranks)])
    for weights, state in found:
        assert state == found[0][1]
        for (index, weight), whole in zip(weights, expected, strict=True):
            # The weight of a class, which all ranks share; pairs are not needed here.
            assert torch.allclose(weight, whole[index], rtol=1e-5)


def test_a_resumed_objective_goes_on_exactly():
    steps = [random_rows(seed, 5, 4, scale=5.0) for seed in range(6)]
    whole, first = auto(), auto()
    losses = [whole(rows).loss.item() for rows in steps]
    assert losses[:3] == [first(rows).loss.item() for rows in steps[:3]]
    second, copied = auto(), copy.deepcopy(first)
    second.load_state_dict(first.state_dict())
    for other in (second, copied):
        other.eval()
        other(steps[0])  # a validation leaves no trace
        other.train()
        assert losses[3:] == [other(rows).loss.item() for rows in steps[3:]]


def test_a_number_has_no_state():
    assert not Binary(lambda_desirable=2.0).state_dict()
    assert Binary(lambda_desirable="auto", rho=1.0).state_dict()


def test_flipped_feedback_passes_the_slopes_on():
    rows = random_rows(4, 5, scale=5.0)
    plain, flipped = (wrap(Binary(lambda_desirable="auto", rho=2.0)) for wrap in (lambda f: f, Flipped))
    weights = []
    for feedback in (plain, flipped):
        objective = halo(Logistic(), feedback, reflect=False)
        objective(rows)
        weights.append(feedback(rows).weight)
    assert torch.allclose(*weights)
    assert not torch.allclose(weights[0], Binary(lambda_desirable=2.0)(rows).weight)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"lambda_desirable": "auto"}, "rho"),
        ({"rho": 2.0}, "lambda_desirable"),
        ({"lambda_desirable": 1.0, "rho": 2.0}, "lambda_desirable"),
        *(({"lambda_desirable": "auto", "rho": bad}, f"rho is {bad}") for bad in (0.0, -1.0, math.nan, math.inf)),
        ({"lambda_desirable": "auto", "rho": 1.0, "lambda_undesirable": 0.0}, "lambda_undesirable is 0"),
        ({"lambda_desirable": "much"}, "lambda_desirable is 'much'"),
        ({"lambda_undesirable": "auto"}, "lambda_undesirable is 'auto'"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, why):
    with pytest.raises(ValueError, match=why) as error:
        Binary(**settings)
    assert "\n" not in str(error.value)


def test_a_reference_point_with_gradient_fixes_rho():
    for z0 in (PairedCompletion(), RankMatched()):
        with pytest.raises(ValueError, match=f"rho cannot be set with the reference point {type(z0).__name__}"):
            halo(Logistic(), Binary(lambda_desirable="auto", rho=2.0), z0=z0)


def test_a_loss_that_does_not_tell_its_slopes_is_refused():
    class Own(HALO):
        def compute_loss(self, rows, context):
            return Result(super().compute_loss(rows, context).loss)

    parts = dict(reward=LogRatio(), reference_point=Zero(), value_function=Logistic(), reflect_undesirable=True)
    Own(feedback=Binary(), **parts)(random_rows(0, 2))
    with pytest.raises(ValueError, match=r"Result\.slopes"):
        Own(feedback=Binary(lambda_desirable="auto", rho=1.0), **parts)(random_rows(0, 2))


# -- what halos check says ----------------------------------------------------------------------------------


class Following(Feedback):
    """Weighs desirable rows by the ratio of the last step's slopes."""

    follows_slopes = True

    def __init__(self) -> None:
        super().__init__()
        self.ratio = 1.0

    def get_extra_state(self) -> float:
        return self.ratio

    def set_extra_state(self, state: float) -> None:
        self.ratio = state

    def observe(self, slopes: Slopes) -> None:
        sums = self.sums(torch.stack([slopes.of_class(side).slope for side in (False, True)]))
        self.ratio = self.quotient(*sums.tolist())

    def sums(self, sums: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(sums)

    def quotient(self, bad: float, good: float) -> float:
        return bad / good if good > 1e-6 and bad > 1e-6 else 1.0

    def weight(self, rows: LogProbBatch) -> torch.Tensor:
        return torch.where(rows.labels.desirable, self.ratio, 1.0) * rows.labels.train

    def forward(self, rows: LogProbBatch) -> Judgement:
        train = rows.labels.train.sum().float()
        return Judgement(torch.where(rows.labels.desirable, -1.0, 1.0), self.weight(rows), train)


class OfRank(Following):
    def sums(self, sums: torch.Tensor) -> torch.Tensor:
        return sums


class Forgetful(Following):
    def get_extra_state(self) -> float:
        return 1.0


class Unbounded(Following):
    def quotient(self, bad: float, good: float) -> float:
        return bad / good if good else math.inf


class Negative(Following):
    def quotient(self, bad: float, good: float) -> float:
        return super().quotient(bad, good) - 0.5


class Peeking(Following):
    def weight(self, rows: LogProbBatch) -> torch.Tensor:
        of_policy = rows.policy_logps.detach().sum(dim=1).exp() if self.ratio != 1 else 1.0
        return super().weight(rows) * of_policy


class Counting(Following):
    def weight(self, rows: LogProbBatch) -> torch.Tensor:
        self.ratio = self.ratio * 1.1 if self.ratio != 1 else 1.0
        return super().weight(rows)


@pytest.mark.parametrize(
    ("feedback", "clause"),
    [
        (OfRank, "feedback_split"),
        (Forgetful, "feedback_deterministic"),
        pytest.param(Unbounded, "feedback_finite", marks=pytest.mark.slow),
        pytest.param(Negative, "feedback_weight", marks=pytest.mark.slow),
        pytest.param(Peeking, "feedback_independent_of_theta", marks=pytest.mark.slow),
        pytest.param(Counting, "feedback_deterministic", marks=pytest.mark.slow),
    ],
)
def test_a_fault_that_only_a_history_shows_is_found(feedback, clause):
    report = check_halo(feedback, on_fail="report", max_examples=12)
    assert clause in [row.clause for row in report.clauses if row.status == "failed"]
    row = next(row for row in report.clauses if row.clause == clause)
    assert "after" in row.witness


@pytest.mark.slow
def test_feedback_that_follows_the_slopes_rightly_passes():
    for feedback in (Following(), Binary(lambda_desirable="auto", rho=2.0)):
        report = check_halo(feedback, max_examples=12)
        (weight,) = (row for row in report.clauses if row.clause == "feedback_weight")
        assert report.verdict == "halo"
        assert "earlier steps" in weight.reason
    assert all("earlier" not in (row.reason or "") for row in check_halo(Binary(), max_examples=12).clauses)


@pytest.mark.slow
def test_a_loss_with_auto_has_the_verdict_of_the_loss():
    assert check_halo(auto(), max_examples=12).verdict == "halo (two-sided)"


# -- the slopes themselves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [Binary(), GroupAdvantage()])
def test_nothing_is_observed_without_gradient(feedback):
    rows = random_rows(0, 3)
    with torch.no_grad():
        assert halo(Logistic(), feedback)(rows).slopes == ()


def test_joined_slopes_are_those_of_all_rows():
    rows = random_rows(0, 4)
    objective = halo(Logistic())
    context, train = objective.prepare(rows.detach()), rows.labels.train_index
    (whole,) = objective.compute_loss(rows.select(train), context.select(train)).slopes
    parts = [objective.compute_loss(rows.select(i), context.select(i)).slopes[0][1] for i in train.split(3)]
    assert torch.allclose(joined(parts).slope, whole[1].slope)
    assert torch.equal(joined(parts).select(torch.tensor([1])).weight, whole[1].weight[1:2])


def test_a_fit_logs_rho_and_reaches_it(tiny_folder):
    kto = halo(Logistic(), Binary(lambda_desirable="auto", rho=3.0))
    steps = fit(kto, binary_rows(24), tiny_folder, steps=6, batch_size=8, micro_batch_rows=3, lr=0.05).steps
    assert math.isnan(steps[0]["outcome/rho"])  # the policy is its reference
    assert all(each["outcome/rho"] == pytest.approx(3.0, rel=0.1) for each in steps[2:] if each["outcome/rho"] > 0)
    assert sum(each["outcome/rho"] > 0 for each in steps) >= 3
    assert all(each["outcome/weight_rejected"] == 1.0 for each in steps)


@pytest.mark.parametrize("rho", [0, -1.0, 1e39, 1e-60, math.nan, math.inf, True, "2"])
def test_a_ratio_that_no_float32_weight_can_reach_is_refused(rho: Any) -> None:
    with pytest.raises(ValueError, match="rho is"):
        Binary(lambda_desirable="auto", rho=rho)
    with pytest.raises(ValueError, match="lambda_desirable is inf"):
        Binary(lambda_desirable=math.inf)
