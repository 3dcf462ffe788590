"""Laws of the figures that tell how a step is going: displacement, effective rows, rewards over lengths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_halos import ROOT

from halos_pl.batch import LogProbBatch
from halos_pl.conformance.ranks import Ranks
from halos_pl.labels import Labels
from halos_pl.objective.baselines import NLL
from halos_pl.objective.build import load_objective
from halos_pl.objective.composite import Sum
from halos_pl.objective.feedback import Binary, Pairwise
from halos_pl.objective.halo import HALO, Objective
from halos_pl.objective.reference_points import MismatchedKL, PairedCompletion, Zero
from halos_pl.objective.rewards import LogRatio, TokenLogRatio
from halos_pl.testing import fit, pair_rows, random_rows
from halos_pl.training.metrics import Means, derived, row_figures
from value_functions import Identity, KahnemanTversky, Logistic, LogSigmoid, ValueFunction

seeds = st.integers(0, 2**31 - 1)
NEW = {
    "logps/displacement",
    "lengths/chosen",
    "lengths/rejected",
    "rewards/length_correlation",
    "outcome/effective_rows",
}


def kto(v: ValueFunction | None = None, feedback: Binary | None = None, **parts: Any) -> HALO:
    settings: dict[str, Any] = {"reward": LogRatio(), "reference_point": MismatchedKL(), "reflect_undesirable": True}
    return HALO(value_function=v or Logistic(), feedback=feedback or Binary(), **(settings | parts))


def dpo(v: ValueFunction | None = None, feedback: Pairwise | None = None) -> HALO:
    return HALO(
        reward=LogRatio(),
        reference_point=PairedCompletion(),
        value_function=v or LogSigmoid(),
        feedback=feedback or Pairwise(),
        reflect_undesirable=False,
    )


def figures(objective: Objective, rows: LogProbBatch, parts: list[torch.Tensor] | None = None) -> dict[str, float]:
    """The logged figures of a step; ``parts`` are positions among the rows that carry a loss."""
    train = rows.labels.train_index
    context = objective.prepare(rows.detach())
    means = Means()
    for places in parts or [torch.arange(len(train))]:
        index = train[places]
        part = rows.select(index)
        result = objective.compute_loss(part, context.select(index))
        means.add(row_figures(part.detach(), result, objective.halo))
    return derived(means.compute())


def by_hand(rows: LogProbBatch) -> dict[str, np.ndarray]:
    """r in nats, number of tokens and label of each row that carries a loss."""
    mask, keep = rows.mask.numpy(), ~rows.labels.mismatched.numpy()
    r = ((rows.policy_logps.detach().numpy() - rows.reference_logps.numpy()) * mask).sum(axis=1)
    return {
        "r": r[keep],
        "tokens": mask.sum(axis=1)[keep],
        "good": rows.labels.desirable.numpy()[keep],
        "z0": max(0.0, r[~keep].mean()) if (~keep).any() else 0.0,
    }


def pairs_split(rows: LogProbBatch, size: int) -> list[torch.Tensor]:
    """Parts of ``size`` pairs each, in another order than the rows'."""
    train = rows.labels.train_index
    chosen = [i for i in range(len(train)) if rows.labels.desirable[train[i]]][::-1]
    place = {int(row): i for i, row in enumerate(train)}
    pairs = [[place[int(rows.labels.pair[train[i]])], i] for i in chosen]
    return list(torch.tensor(pairs).flatten().split(2 * size))


# -- displacement and lengths -------------------------------------------------------------------------------


@given(seed=seeds, pairs=st.integers(1, 5))
def test_displacement_is_the_mean_log_ratio_of_chosen_rows(seed, pairs):
    rows = random_rows(seed, pairs, scale=10.0)
    known = by_hand(rows)
    for objective in (kto(), dpo(), kto(reward=LogRatio(length_normalised=True)), NLL()):
        logged = figures(objective, rows)
        assert logged["logps/displacement"] == pytest.approx(known["r"][known["good"]].mean(), rel=1e-5, abs=1e-6)
        assert logged["lengths/chosen"] == known["tokens"][known["good"]].mean()
        assert logged["lengths/rejected"] == known["tokens"][~known["good"]].mean()


def test_displacement_needs_a_reference_and_a_chosen_row():
    rows = random_rows(0, 3)
    alone = LogProbBatch(rows.policy_logps, None, rows.mask, rows.labels)
    assert "logps/displacement" not in figures(NLL(), alone)
    bad = rows.select((~rows.labels.desirable).nonzero().squeeze(1))
    assert math.isnan(figures(kto(), bad)["logps/displacement"])


# -- effective rows -----------------------------------------------------------------------------------------


def kish(size: np.ndarray) -> float:
    return np.abs(size).sum() ** 2 / (size**2).sum() / len(size)


def sigma(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@given(seed=seeds, pairs=st.integers(1, 5), good=st.floats(0.1, 3), bad=st.floats(0.1, 3))
def test_effective_rows_of_kto(seed, pairs, good, bad):
    rows = random_rows(seed, pairs, scale=10.0)
    known = by_hand(rows)
    s = sigma(0.1 * (known["r"] - known["z0"]))
    size = np.where(known["good"], good, bad) * s * (1 - s)
    logged = figures(kto(feedback=Binary(lambda_desirable=good, lambda_undesirable=bad)), rows)
    assert logged["outcome/effective_rows"] == pytest.approx(kish(size), rel=1e-5)
    assert 1 / len(size) - 1e-9 <= logged["outcome/effective_rows"] <= 1 + 1e-9


@given(seed=seeds, pairs=st.integers(1, 5), smoothing=st.sampled_from([0.0, 0.2]))
def test_effective_rows_of_dpo_are_those_of_its_pairs(seed, pairs, smoothing):
    rows = random_rows(seed, pairs, scale=10.0)
    r, labels = by_hand(rows)["r"], rows.labels
    chosen = labels.desirable.nonzero().squeeze(1).tolist()
    margins = np.array([r[i] - r[int(labels.pair[i])] for i in chosen])
    size = np.abs(0.1 * ((1 - smoothing) * sigma(-0.1 * margins) - smoothing * sigma(0.1 * margins)))
    logged = figures(dpo(LogSigmoid(beta=0.1), Pairwise(label_smoothing=smoothing)), rows)
    assert logged["outcome/effective_rows"] == pytest.approx(kish(size), rel=1e-4)


@given(seed=seeds, pairs=st.integers(1, 5))
def test_a_rejected_row_counts_where_the_chosen_one_is_lowered_as_well(seed, pairs):
    """The slopes of APO-down's two terms nearly cancel in chosen rows; the rejected ones have no weight."""
    rows = random_rows(seed, pairs, scale=10.0)
    r, labels = by_hand(rows)["r"], rows.labels
    chosen = labels.desirable.nonzero().squeeze(1).tolist()
    alone, margins = r[chosen], np.array([r[i] - r[int(labels.pair[i])] for i in chosen])
    bell = [sigma(0.1 * x) * (1 - sigma(0.1 * x)) for x in (alone, margins)]
    logged = figures(load_objective("apo_down"), rows)
    assert logged["outcome/effective_rows"] == pytest.approx(
        kish(np.concatenate([bell[0] - bell[1], bell[1]])), rel=1e-4
    )


@given(seed=seeds, pairs=st.integers(1, 5), scale=st.floats(1e-3, 1e3))
def test_effective_rows_do_not_depend_on_the_scale_of_the_loss(seed, pairs, scale):
    rows = random_rows(seed, pairs, scale=10.0)
    one, other = (Binary(lambda_desirable=w, lambda_undesirable=2 * w) for w in (1.0, scale))
    expected = figures(kto(feedback=one), rows)["outcome/effective_rows"]
    assert figures(kto(feedback=other), rows)["outcome/effective_rows"] == pytest.approx(expected, rel=1e-5)
    assert figures(kto(Identity()), rows)["outcome/effective_rows"] == pytest.approx(1.0)


def toy(rewards: list[float], good: list[bool] | None = None, tokens: list[int] | None = None) -> LogProbBatch:
    """Rows with these rewards, on the first token; all desirable and of one token by default."""
    longest = max(tokens or [1])
    policy = torch.zeros(len(rewards), longest)
    policy[:, 0] = torch.tensor(rewards)
    mask = torch.arange(longest) < torch.tensor(tokens or [1] * len(rewards))[:, None]
    labels = Labels(torch.tensor(good or [True] * len(rewards)))
    return LogProbBatch(policy.requires_grad_(), torch.zeros_like(policy), mask, labels)


def test_rows_that_are_saturated_do_not_count():
    """Even where float32 would round the square of a slope to 0."""
    objective = kto(Logistic(beta=1.0), reference_point=Zero())
    logged = figures(objective, toy([0.5] * 3 + [90.0] * 5))
    assert logged["outcome/effective_rows"] == pytest.approx(3 / 8)
    logged = figures(objective, toy([-60.0] * 3 + [-80.0] * 5))
    assert logged["outcome/effective_rows"] == pytest.approx(3 / 8)


def test_rows_without_weight_do_not_count():
    rows = toy([0.5] * 3 + [1.0] * 5, [True] * 3 + [False] * 5)
    one_sided = Binary(lambda_desirable=1.0, lambda_undesirable=0.0)
    assert figures(kto(feedback=one_sided, reference_point=Zero()), rows)["outcome/effective_rows"] == pytest.approx(1)


@given(seed=seeds)
def test_effective_rows_of_a_sum_are_those_of_all_its_halos(seed):
    rows = random_rows(seed, 3, scale=10.0)
    whole = kto(feedback=Binary(lambda_desirable=2.0, lambda_undesirable=3.0))
    sides = [Binary(lambda_desirable=2.0, lambda_undesirable=0.0), Binary(lambda_desirable=0.0, lambda_undesirable=3.0)]
    parts = Sum([NLL(), *(kto(feedback=side) for side in sides)])
    expected = figures(whole, rows)["outcome/effective_rows"]
    assert figures(parts, rows)["outcome/effective_rows"] == pytest.approx(expected, rel=1e-5)


@given(seed=seeds)
def test_a_reward_per_token_sums_over_tokens(seed):
    rows = random_rows(seed, 3)
    tokens = by_hand(rows)["tokens"]
    logged = figures(kto(Identity(), reward=TokenLogRatio(), reference_point=Zero()), rows)
    assert logged["outcome/effective_rows"] == pytest.approx(kish(tokens), rel=1e-5)


def test_effective_rows_are_absent_without_slopes_and_while_the_policy_is_its_reference():
    flat = kto(Logistic(beta=1.0), reference_point=Zero())
    assert math.isnan(figures(flat, toy([200.0] * 4))["outcome/effective_rows"])
    rows = random_rows(0, 4)
    start = LogProbBatch(rows.policy_logps, rows.policy_logps.detach(), rows.mask, rows.labels)
    assert math.isnan(figures(kto(KahnemanTversky()), start)["outcome/effective_rows"])


# -- rewards over lengths -----------------------------------------------------------------------------------


@given(seed=seeds, pairs=st.integers(2, 6))
def test_the_correlation_is_pearsons(seed, pairs):
    rows = random_rows(seed, pairs, scale=10.0)
    known = by_hand(rows)
    for objective in (kto(), dpo(), NLL()):
        logged = figures(objective, rows)["rewards/length_correlation"]
        if known["tokens"].std() == 0:
            assert math.isnan(logged)
        else:
            assert logged == pytest.approx(np.corrcoef(known["r"], known["tokens"])[0, 1], rel=1e-4, abs=1e-5)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=2, max_size=8),
    slope=st.floats(0.1, 10),
    shift=st.floats(-1e3, 1e3),
    falling=st.booleans(),
)
def test_a_reward_that_is_linear_in_length_has_correlation_1(lengths, slope, shift, falling):
    sign = -1.0 if falling else 1.0
    rows = toy([shift + sign * slope * length for length in lengths], tokens=lengths)
    logged = figures(kto(reference_point=Zero()), rows)["rewards/length_correlation"]
    if len(set(lengths)) == 1:
        assert math.isnan(logged)
    else:
        assert logged == pytest.approx(sign, abs=1e-3)


@pytest.mark.parametrize(
    "rows",
    [
        toy([3.0], tokens=[4]),
        toy([1.0, 2.0, 3.0], tokens=[7, 7, 7]),
        toy([0.1, 0.1, 0.1], tokens=[5, 6, 700]),  # 0.1 is no binary fraction
        toy([1e-6, 0.0, -1e-6], tokens=[5, 6, 7]),  # rounding, where the policy is its reference
    ],
)
def test_the_correlation_is_absent_where_it_is_undefined(rows):
    assert math.isnan(figures(kto(reference_point=Zero()), rows)["rewards/length_correlation"])


# -- a step, however it is computed -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("make", [kto, dpo, lambda: kto(reward=TokenLogRatio())])
def test_the_figures_do_not_depend_on_micro_batches_or_order(make, size):
    rows = random_rows(3, 7, scale=10.0)
    whole, split = figures(make(), rows), figures(make(), rows, pairs_split(rows, size))
    assert whole.keys() >= NEW
    assert split == pytest.approx(whole, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_figures_do_not_depend_on_ranks(ranks):
    """Ranks with different numbers of rows, and one without desirable rows."""
    rows = random_rows(5, 7, 6, scale=10.0)
    good = rows.labels.desirable
    owner = torch.where(good, 0, torch.arange(len(rows)) % ranks)
    shares = [(owner == rank).nonzero().squeeze(1) for rank in range(ranks)]
    expected = figures(kto(), rows)
    found = Ranks(ranks).run([lambda share=share: figures(kto(), rows.select(share)) for share in shares])
    for of_rank in found:
        of_rank.pop("rewards/accuracies")  # the pairs are torn apart
        assert of_rank.keys() >= NEW
        assert of_rank == pytest.approx({name: expected[name] for name in of_rank}, rel=1e-5, abs=1e-6)


# -- a run --------------------------------------------------------------------------------------------------


def test_a_fit_logs_them_once_the_policy_has_moved(tiny_folder):
    steps = fit(load_objective("dpo"), pair_rows(12), tiny_folder, steps=3, batch_size=4).steps
    first, *later = [{name for name, value in step.items() if not math.isnan(value)} for step in steps]
    assert first >= {"logps/displacement", "lengths/chosen", "lengths/rejected"}
    assert not first & {"rewards/length_correlation", "outcome/effective_rows"}
    assert steps[0]["logps/displacement"] == 0
    for names in later:
        assert names >= NEW
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text("utf-8")
    assert all(f"`{name}`" in page for name in NEW)
    assert not {name for name in steps[-1] if name.count("/") > 1}  # what they are computed from
