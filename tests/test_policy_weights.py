"""Weights that depend on the policy: one declared slot, held constant, and named in the verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.conformance.check import checks_of
from halos_pl.labels import Labels
from halos_pl.objective.composite import Sum
from halos_pl.objective.feedback import (
    Binary,
    EveryRow,
    GroupAdvantage,
    Pairwise,
    SoftmaxOfScores,
)
from halos_pl.objective.halo import HALO
from halos_pl.objective.policy_weighted import PolicyWeighted
from halos_pl.objective.policy_weights import FutureKL, GapTemperature, PairProbability, PolicyWeight
from halos_pl.objective.reference_points import Calibrated, GroupLogSumExp, PairedCompletion, QuantileCalibrated, Zero
from halos_pl.objective.rewards import LogRatio, TokenLogRatio
from halos_pl.testing import random_rows
from value_functions import Identity, LogSigmoid, RatioClip


def dpo() -> HALO:
    parts: dict[str, Any] = {"reward": LogRatio(), "reference_point": PairedCompletion(), "feedback": Pairwise()}
    return HALO(**parts, value_function=LogSigmoid(beta=0.1), reflect_undesirable=False)


class Given(PolicyWeight):
    """A constant."""

    def __init__(self, number: float = 1.0, acts_on: Literal["loss", "outcome"] = "loss") -> None:
        super().__init__()
        self.number, self.acts_on = number, acts_on

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        return torch.full_like(rewards, self.number)


def loss_and_slope(objective: Any, rows: LogProbBatch) -> tuple[Tensor, Tensor]:
    leaf = rows.policy_logps.detach().clone().requires_grad_()
    loss = objective(replace(rows, policy_logps=leaf)).loss
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("number", [0.0, 1.0, 2.5])
def test_a_constant_weight_scales_the_loss_and_a_constant_scale_the_temperature(number):
    rows = random_rows(0, 4)
    loss, slope = loss_and_slope(dpo(), rows)
    weighted, of_weighted = loss_and_slope(PolicyWeighted(halo=dpo(), policy_weight=Given(number)), rows)
    torch.testing.assert_close((weighted, of_weighted), (number * loss, number * slope))
    if number:
        hotter = dpo()
        hotter.value_function = LogSigmoid(beta=0.1 * number)
        scaled = PolicyWeighted(halo=dpo(), policy_weight=Given(number, "outcome"))
        torch.testing.assert_close(loss_and_slope(scaled, rows), loss_and_slope(hotter, rows))


@pytest.mark.parametrize("number", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_weight_is_refused(number):
    with pytest.raises(ValueError, match="Given returns a weight that is negative or not finite"):
        PolicyWeighted(halo=dpo(), policy_weight=Given(number))(random_rows(0, 2))


class Returning(PolicyWeight):
    """What it is given, whatever that is."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        return self.what


@pytest.mark.parametrize("what", [0.5, None, torch.ones(1)])
def test_what_is_no_number_for_each_row_is_refused(what):
    with pytest.raises(ValueError, match=r"^Returning returns"):
        PolicyWeighted(halo=dpo(), policy_weight=Returning(what))(random_rows(0, 2))


def test_a_weight_acts_on_the_loss_or_the_outcome():
    with pytest.raises(ValueError, match=r"^Given: acts_on"):
        PolicyWeighted(halo=dpo(), policy_weight=Given(0.5, "outcomes"))  # type: ignore[arg-type]


class Hostile(PolicyWeight):
    """1 where a token or row counts, NaN elsewhere."""

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        counted = rows.mask & rows.labels.train[:, None]
        return torch.where(counted if rewards.dim() > 1 else rows.labels.train, 1.0, torch.nan)


@pytest.mark.parametrize("acts_on", ["loss", "outcome"])
def test_numbers_outside_the_rows_tokens_do_not_matter(acts_on):
    halo = HALO(
        reward=TokenLogRatio(),
        reference_point=Zero(),
        value_function=RatioClip(high=1.2),
        feedback=Binary(denominator="tokens"),
        reflect_undesirable=False,
    )
    rows, weight = random_rows(3, 3), Hostile()
    assert not rows.mask.all()
    weight.acts_on = acts_on
    objective = PolicyWeighted(halo=halo, policy_weight=weight)
    torch.testing.assert_close(loss_and_slope(objective, rows), loss_and_slope(halo, rows))


def test_the_gap_needs_a_reward_per_row():
    halo = dpo()
    halo.reward = TokenLogRatio()
    with pytest.raises(ValueError, match="needs a reward per row"):
        PolicyWeighted(halo=halo, policy_weight=GapTemperature())(random_rows(0, 2))


def test_a_policy_weight_excludes_a_ratio_of_slopes_to_reach():
    halo = HALO(
        reward=LogRatio(),
        reference_point=Zero(),
        value_function=LogSigmoid(),
        feedback=Binary(lambda_desirable="auto", rho=1.0),
        reflect_undesirable=True,
    )
    with pytest.raises(ValueError, match="rho cannot be set together with a policy weight"):
        PolicyWeighted(halo=halo, policy_weight=Given())


def test_the_running_gap_changes_in_training_only_and_is_in_the_state():
    rows, weight = random_rows(1, 4), GapTemperature()
    objective = PolicyWeighted(halo=dpo(), policy_weight=weight)
    objective.eval()(rows)
    assert weight.mean == 0.0
    objective.train()(rows)
    assert weight.mean != 0.0
    other = PolicyWeighted(halo=dpo(), policy_weight=GapTemperature())
    other.load_state_dict(objective.state_dict())
    torch.testing.assert_close(loss_and_slope(other, rows), loss_and_slope(objective, rows))


class Leaky(PolicyWeighted):
    """Its weight has a gradient."""

    def compute_loss(self, rows: LogProbBatch, context: Any) -> Any:
        return super().compute_loss(rows, replace(context, weight=context.weight * rows.policy_logps.sum(dim=1).exp()))


class OfTheRank(PolicyWeight):
    """Depends on how many rows this rank has."""

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        return torch.full_like(rewards, float(len(rows)))


class Random(PolicyWeight):
    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        return torch.rand_like(rewards)


@pytest.mark.parametrize(
    "objective",
    [
        Leaky(halo=dpo(), policy_weight=PairProbability()),
        PolicyWeighted(halo=dpo(), policy_weight=OfTheRank()),
        PolicyWeighted(halo=dpo(), policy_weight=Random()),
    ],
)
def test_the_check_finds_a_weight_that_is_not_held_constant_or_depends_on_the_split(objective):
    [clause] = [clause for clause in checks_of(objective, examples=20).clauses if clause.name == "policy_weight"]
    assert clause.witness()


@pytest.mark.parametrize("weight", [PairProbability(), GapTemperature(), Given()])
def test_the_verdict_names_the_weights_alone_and_in_a_sum(weight):
    weighted = PolicyWeighted(halo=dpo(), policy_weight=weight)
    for objective in (weighted, Sum([dpo(), weighted])):
        checks = checks_of(objective, examples=10)
        assert checks.verdict([], "icml") == "composite: policy-dependent weights"
        [clause] = [clause for clause in checks.clauses if clause.name.endswith("policy_weight")]
        assert clause.witness() is None


def test_token_weights_need_a_reward_per_token():
    with pytest.raises(ValueError, match="needs a reward per token"):
        PolicyWeighted(halo=dpo(), policy_weight=FutureKL())(random_rows(0, 2))


def test_token_weights_do_not_depend_on_padding():
    halo = HALO(
        reward=TokenLogRatio(),
        reference_point=Zero(),
        value_function=RatioClip(high=1.2),
        feedback=Binary(denominator="tokens"),
        reflect_undesirable=False,
    )
    rows = random_rows(2, 3, 0)
    wide = torch.nn.functional.pad
    padded = replace(
        rows,
        policy_logps=wide(rows.policy_logps, (0, 3)),
        reference_logps=wide(rows.reference_logps, (0, 3)),
        mask=wide(rows.mask, (0, 3)),
    )
    objective = PolicyWeighted(halo=halo, policy_weight=FutureKL(half_life=2.0, low=0.5, high=2.0))
    one, other = loss_and_slope(objective, rows), loss_and_slope(objective, padded)
    torch.testing.assert_close(one, (other[0], other[1][:, :-3]))


# -- groups of one, and scores that are all equal --------------------------------------------------------------


def group_of(scores: list[float]) -> LogProbBatch:
    n = len(scores)
    draw = torch.Generator().manual_seed(n)
    policy, reference = (-torch.rand(n, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    group, score = torch.zeros(n, dtype=torch.long), torch.tensor(scores)
    labels = Labels(torch.arange(n) == 0, group=group, score=score - score.mean())
    return LogProbBatch(policy, reference, torch.ones(n, 2, dtype=torch.bool), labels)


LISTWISE: dict[str, dict[str, Any]] = {
    "infonca": {"reference_point": GroupLogSumExp(beta=0.1), "feedback": SoftmaxOfScores()},
    "plackett_luce": {
        "reference_point": GroupLogSumExp(beta=0.1, over="not_better"),
        "feedback": EveryRow(per_prompt=True),
    },
}


@pytest.mark.parametrize("parts", LISTWISE.values(), ids=LISTWISE)
def test_a_group_of_one_has_no_listwise_loss(parts):
    halo = HALO(reward=LogRatio(), value_function=Identity(beta=0.1), reflect_undesirable=False, **parts)
    loss, slope = loss_and_slope(halo, group_of([2.0]))
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    torch.testing.assert_close(slope, torch.zeros_like(slope))


def test_equal_scores_push_towards_equal_rewards():
    halo = HALO(reward=LogRatio(), value_function=Identity(beta=0.1), reflect_undesirable=False, **LISTWISE["infonca"])
    rows = group_of([1.0, 1.0, 1.0])
    _, slope = loss_and_slope(halo, rows)
    r = (rows.policy_logps - rows.reference_logps).sum(dim=1)
    assert slope[r.argmax()].sum() > 0 > slope[r.argmin()].sum()


@pytest.mark.parametrize("scores", [[3.0], [0.5, 0.5, 0.5]])
@pytest.mark.parametrize("scale", ["prompt", "step", "none"])
def test_without_differences_of_score_no_row_has_an_advantage(scores, scale):
    assert GroupAdvantage(scale=scale)(group_of(scores)).weight.abs().max() == 0


@pytest.mark.parametrize("z0", [Calibrated(), Calibrated(baseline="soft", temperature=0.5)])
@pytest.mark.parametrize("scores", [[3.0], [0.5, 0.5, 0.5]])
def test_without_differences_of_score_the_target_is_the_reference(z0, scores):
    rows = group_of(scores)
    torch.testing.assert_close(z0(torch.zeros(len(rows)).double(), rows).value, torch.zeros(len(rows)).double())


def test_quantile_targets_sum_to_a_distribution_where_ranks_are_the_reference():
    """With uniform quantiles, E_ref[exp(target)] = 1: exactly what the paper's log Z is for."""
    n = 400
    rows = group_of([float(i) for i in range(n)])
    target = QuantileCalibrated(beta=0.5)(torch.zeros(n).double(), rows).value
    assert target.exp().mean().item() == pytest.approx(1.0, abs=1e-4)


def test_needs_of_a_policy_weight_reach_the_objective():
    objective = PolicyWeighted(halo=dpo(), policy_weight=PairProbability())
    assert objective.needs == Needs(reference=True, pairs=True, undesirable=True, step_rewards=True)
