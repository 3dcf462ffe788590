"""Policies over candidates: the package's own losses on them, exactly, and all seeds at once."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from theory_scripts import script
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.candidates import CandidateKL, Candidates, Votes, draw, fit, losses
from halos_pl.candidates.fitting import refuse
from halos_pl.common.experiments import objectives
from halos_pl.labels import Labels
from halos_pl.objective.build import load_objective
from halos_pl.objective.halo import Objective
from halos_pl.objective.reference_points import Estimate, ReferencePoint

seeds = st.integers(0, 2**31 - 1)
CANDIDATE_KL = {"reference_point": "CandidateKL"}


def kto(beta: float = 0.5) -> Objective:
    return load_objective("kto", CANDIDATE_KL | {"value_function.init_args.beta": beta})


def dpo(beta: float = 0.5) -> Objective:
    return load_objective("dpo", {"value_function.init_args.beta": beta})


class Given(ReferencePoint):
    """A z0 that is known."""

    def __init__(self, z0: Tensor) -> None:
        super().__init__()
        self.z0 = z0

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        return Estimate(self.z0)


def ragged(seed: int, *, dimension: int = 3, sizes: tuple[int, ...] = (2, 4, 1, 3)) -> tuple[list[int], Tensor, Tensor]:
    """Prompt of each completion, log pi_ref and features, in float64."""
    generator = torch.Generator().manual_seed(seed)
    prompt = [x for x, size in enumerate(sizes) for _ in range(size)]
    draws = torch.randn(len(prompt), 1 + dimension, generator=generator, dtype=torch.float64)
    return prompt, 5 * draws[:, 0], draws[:, 1:]


def by_hand(prompt: list[int], logits: list[float]) -> list[float]:
    """log pi of each completion, one by one."""
    sums = {
        x: math.log(sum(math.exp(s) for s, other in zip(logits, prompt, strict=True) if other == x)) for x in prompt
    }
    return [s - sums[x] for s, x in zip(logits, prompt, strict=True)]


def pairs_of(place: Tensor) -> Tensor:
    """Preferences of the prompts with several completions of `ragged`."""
    return place[torch.tensor([[0, 1], [2, 4], [5, 3], [7, 9]])]


@given(seed=seeds)
def test_policy_and_kl_are_those_of_enumeration(seed):
    prompt, reference, features = ragged(seed)
    candidates, place = Candidates.of(torch.tensor(prompt), reference, features)
    theta = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logps = candidates.logps(theta)
    kl = candidates.kl(logps)
    before = by_hand(prompt, reference.tolist())
    for i in range(2):
        after = by_hand(prompt, (reference + features @ theta[i]).tolist())
        assert logps[i].flatten()[place].tolist() == pytest.approx(after, abs=1e-9)
        for x in range(4):
            terms = [math.exp(a) * (a - b) for a, b, y in zip(after, before, prompt, strict=True) if y == x]
            assert kl[i, x].item() == pytest.approx(sum(terms), abs=1e-9)
    assert kl[:, 2].tolist() == [0, 0]  # the prompt with a single candidate
    assert logps.flatten(1)[:, place].exp().sum(1).tolist() == pytest.approx([4, 4])


@settings(max_examples=5)
@given(seed=seeds)
def test_the_order_of_candidates_changes_nothing(seed):
    prompt, reference, features = ragged(seed)
    order = torch.randperm(len(prompt), generator=torch.Generator().manual_seed(seed))
    theta = torch.ones(1, 3, dtype=torch.float64)
    fits = []
    for index in (torch.arange(len(prompt)), order):
        candidates, place = Candidates.of(torch.tensor(prompt)[index], reference[index], features[index])
        place = place[index.argsort()]
        votes = draw(pairs_of(place), [0, 1], count=3, noise=0.3, paired=False)
        fitted = fit(kto(), candidates, votes, rates=[0.1], steps=5)
        fits.append((candidates.logps(theta).flatten(1)[0, place], fitted.theta, fitted.loss))
    for one, other in zip(*fits, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


@pytest.mark.parametrize("name", ["kto", "dpo", "apo_zero_unpaired", "ipo", "cpo_simpo", "aot", "bco", "robust_dpo"])
def test_loss_and_gradient_are_those_of_the_objective_on_ordinary_rows(name):
    """z0 and log-probs are computed here one by one; also for objectives that torch cannot vectorise."""
    changes = {} if name != "cpo_simpo" else {"reward": {"class_path": "LogProb"}, "extra_terms": None}
    objective = load_objective(name, CANDIDATE_KL if name == "kto" else changes)
    prompt, reference, features = ragged(7)
    candidates, place = Candidates.of(torch.tensor(prompt), reference, features)
    votes = draw(pairs_of(place), [3, 4], count=3, noise=0.4, paired=True)
    theta = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    at_once = name not in ("aot", "bco")
    together = losses(objective if at_once else [copy.deepcopy(objective) for _ in range(2)], candidates, theta, votes)
    (gradient,) = torch.autograd.grad(together.sum(), theta)
    number = {int(p): k for k, p in enumerate(place)}
    before = torch.cat([reference[[i for i, y in enumerate(prompt) if y == x]].log_softmax(0) for x in range(4)])
    for i in range(2):
        rows = [number[int(p)] for p in votes.rows[i]]
        logits = reference + features @ theta[i]
        after = torch.cat([logits[[j for j, y in enumerate(prompt) if y == x]].log_softmax(0) for x in range(4)])
        kl = [
            sum((after.exp() * (after - before))[j] for j, y in enumerate(prompt) if y == prompt[row]) for row in rows
        ]
        ordinary = copy.deepcopy(objective)
        if name == "kto":
            ordinary = load_objective("kto")
            ordinary.reference_point = Given(torch.stack(kl).detach())
        loss = ordinary(
            LogProbBatch(
                policy_logps=after[rows, None],
                reference_logps=before[rows, None],
                mask=torch.ones(len(rows), 1, dtype=torch.bool),
                labels=Labels(votes.desirable, pair=votes.pair, group=torch.tensor([prompt[row] for row in rows])),
            )
        ).loss
        assert together[i].item() == pytest.approx(loss.item(), rel=1e-6)
        (of_one,) = torch.autograd.grad(loss, theta)
        assert torch.allclose(gradient[i], of_one[i], rtol=1e-5, atol=1e-8)
        assert of_one[i].abs().max() > 0


@pytest.mark.parametrize("name", ["kto", "dpo", "bco"])
def test_seeds_in_a_batch_are_those_of_single_runs(name, monkeypatch):
    objective = load_objective(name, CANDIDATE_KL if name == "kto" else {})
    prompt, reference, features = ragged(2)
    candidates, place = Candidates.of(torch.tensor(prompt), reference, features)

    def drawn(seeds: list[int]) -> Votes:
        return draw(pairs_of(place), seeds, count=3, noise=0.3, desirable=0.5, paired=objective.needs.pairs)

    together = fit(objective, candidates, drawn([0, 1, 2]), rates=[0.03, 0.3], steps=7)
    assert together.theta.shape == (2, 3, 3)
    for i in range(3):
        for k, rate in enumerate([0.03, 0.3]):
            alone = fit(objective, candidates, drawn([i]), rates=[rate], steps=7)
            assert torch.allclose(alone.theta[0, 0], together.theta[k, i], atol=1e-9)
            assert torch.allclose(alone.loss[0, 0], together.loss[k, i])
    assert len({tuple(theta.tolist()) for theta in together.theta.flatten(0, 1)}) > 2  # seeds and rates differ
    monkeypatch.setattr("halos_pl.candidates.fitting.MOST", 1)  # each in turn
    assert torch.allclose(
        fit(objective, candidates, drawn([0, 1, 2]), rates=[0.03, 0.3], steps=7).theta, together.theta
    )


def test_one_step_is_adams():
    """The first step of Adam has the size of the rate in each direction, against the gradient."""
    prompt, reference, features = ragged(3)
    candidates, place = Candidates.of(torch.tensor(prompt), reference, features)
    votes = draw(pairs_of(place), [0], count=4, paired=False)
    zero = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses(kto(), candidates, zero, votes).sum(), zero)
    theta = fit(kto(), candidates, votes, rates=[0.1], steps=1).theta
    assert torch.allclose(theta[0], -0.1 * gradient.sign(), rtol=1e-4)


def test_a_lone_candidate_and_a_single_label_are_defined():
    """A prompt with one candidate has no choice: reward, z0 and gradient are 0."""
    candidates, place = Candidates.of(torch.tensor([0, 1, 1]), torch.zeros(3), torch.eye(3)[:, :2])
    alone = Votes(place[None, :1], torch.tensor([True]), torch.tensor([-1]))
    fitted = fit(kto(), candidates, alone, rates=[0.1], steps=3)
    assert fitted.theta.abs().max() == 0
    assert fitted.loss.item() == 0.5
    for label in (True, False):
        votes = Votes(place[None, 1:2], torch.tensor([label]), torch.tensor([-1]))
        fitted = fit(kto(), candidates, votes, rates=[0.1], steps=20)
        assert bool(fitted.theta.isfinite().all())
        moved = candidates.logps(fitted.theta[0]).flatten()[place[1]] - math.log(0.5)
        assert (moved > 0.1) if label else (moved < -0.1)


# -- Theorem 4.3: contradictory votes on a prompt, with a free logit per candidate ---------------------------


@pytest.mark.parametrize(("agree", "rare"), [(2, 0.02), (2, 0.4), (3, 0.02)])
def test_free_logits_reach_the_optima_of_theorem_4_3(agree, rare):
    """DPO: where the slope of its loss vanishes, as found by bisection; KTO: the majority, however rare it was."""
    theory, beta, people = script("contradictory_preferences"), 0.5, 4 if agree == 3 else 3
    reference = torch.tensor([rare, 1 - rare], dtype=torch.float64).log()
    candidates, place = Candidates.of(torch.tensor([0, 0]), reference)
    pairs = torch.stack([place if i < agree else place.flip(0) for i in range(people)])
    found = {}
    for name, objective in (("dpo", dpo(beta)), ("kto", kto(beta))):
        votes = draw(pairs, [0], count=people, paired=objective.needs.pairs)
        theta = fit(objective, candidates, votes, rates=[0.2], steps=200).theta[0]
        found[name] = candidates.logps(theta)[0, 0].exp().item()
    assert found["dpo"] == pytest.approx(theory.optimum(theory.dpo(beta), reference, agree, people), abs=1e-3)
    assert (found["dpo"] < 0.5) == (agree / people < theory.threshold(beta, reference))
    assert found["kto"] > 0.99
    assert theory.optimum(theory.kto(beta), reference, agree, people) > 0.99


@pytest.mark.parametrize("before", [-9.0, -1.0, 0.5])
def test_the_predicted_gap_is_dpos_optimum(before):
    """Against bisection of the slope of the package's own DPO."""
    theory, beta = script("contradictory_preferences"), 0.5
    reference = torch.tensor([0.0, -before], dtype=torch.float64).log_softmax(0)
    share = theory.optimum(theory.dpo(beta), reference, 2, 3)
    assert script("theorem_4_3").optimum(before, beta) == pytest.approx(math.log(share / (1 - share)), abs=1e-3)


# -- Votes ------------------------------------------------------------------------------------------------


@given(seed=seeds, noise=st.sampled_from([0.0, 0.25, 0.5, 1.0]), share=st.sampled_from([0.1, 0.5, 1.0]))
def test_draw_keeps_and_turns_exactly_the_shares(seed, noise, share):
    pairs = torch.arange(40).view(20, 2)  # an even place is better than the next
    every, paired = (
        draw(pairs, [seed], count=12, noise=noise, desirable=share, paired=paired) for paired in (False, True)
    )
    kept = max(1, round(12 * share))
    assert every.rows.shape == (1, 12 + kept)
    assert len(every.rows.unique()) == 12 + kept
    assert int(every.desirable.sum()) == kept
    assert paired.rows.tolist() == every.rows[:, : 2 * kept].tolist()
    assert paired.pair.tolist() == [i ^ 1 for i in range(2 * kept)]
    assert every.pair[2 * kept :].tolist() == [-1] * (12 - kept)
    undesirable = every.rows[0][~every.desirable]
    assert int((undesirable % 2 == 0).sum()) == round(12 * noise)
    again = draw(pairs, [seed], count=12, noise=noise, paired=True).rows
    assert again[:, : 2 * kept].tolist() == paired.rows.tolist()  # the share takes away, and changes nothing else


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"count": 3}, "votes is 3"),
        ({"count": 0}, "votes is 0"),
        ({"noise": 1.5}, "noise"),
        ({"desirable": 0}, "desirable"),
    ],
)
def test_impossible_draws_are_refused(settings, fault):
    with pytest.raises(ValueError, match=fault):
        draw(torch.tensor([[0, 1], [2, 3]]), [0], **{"count": 2, "paired": True} | settings)


# -- What is refused --------------------------------------------------------------------------------------

ACCEPTED = {
    *("aot", "aot_unpaired", "apo_down", "apo_zero", "apo_zero_unpaired", "bco", "bco_pair", "cdpo", "discopop", "dpo"),
    *("dpo_alpha", "dpo_forward_kl", "dpo_jensen_shannon", "exo_pair", "hinge", "humanline_dpo", "ipo"),
    *("kto_zero_reference", "nca_pair", "robust_dpo", "slic", "sppo_hard", "tr_dpo"),
    *("beta_dpo", "dpo_sigmoid", "infonca", "mnpo", "npo", "plackett_luce"),
}


def test_losses_per_token_and_of_other_rows_are_refused():
    """A candidate has no tokens: SimPO or SFT would silently be another loss."""
    refused = [name for name in objectives() if name not in ACCEPTED]
    assert {"kto", "simpo", "sft", "grpo", "dpo_length_normalised", "humanline_kto"} <= {*refused}
    for name in refused:
        with pytest.raises(ValueError, match="candidate"):
            refuse(load_objective(name))


def test_every_accepted_objective_can_be_fitted():
    prompt, reference, features = ragged(5)
    candidates, place = Candidates.of(torch.tensor(prompt), reference.float(), features.float())
    votes = draw(pairs_of(place), [0, 1], count=4, noise=0.25, paired=True)
    for name in sorted(ACCEPTED):
        fitted = fit(load_objective(name), candidates, votes, rates=[0.01], steps=2)
        assert bool(fitted.theta.isfinite().all()), name
        assert fitted.theta.abs().max() > 0, name


def test_the_exact_reference_point_refuses_a_language_models_rows():
    rows = LogProbBatch(
        torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3).bool(), Labels(torch.tensor([True, False]))
    )
    with pytest.raises(ValueError, match="MismatchedKL, TokenKL or SampledKL"):
        kto()(rows)
    assert CandidateKL.per_row


def test_incomplete_sets_are_refused():
    with pytest.raises(ValueError, match="each prompt"):
        Candidates.of(torch.tensor([0, 2]), torch.zeros(2))
    with pytest.raises(ValueError, match="features are not all finite"):
        Candidates.of(torch.tensor([0, 0]), torch.zeros(2), torch.tensor([[0.0], [torch.nan]]))
