"""Finding 1: its decisions have the error rates that the study's header states, on simulated runs."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
from run_halos import ROOT

from halos_pl.study.run_variance import Runs

sys.path.insert(0, str(ROOT / "experiments/ablations"))

from rho_finding import MARGIN, Arm, Finding, rate_at

TARGETS, SEEDS, EXAMPLES = (0.5, 1.0, 2.0, 4.0), (0, 1, 2), 40


def simulated(rng: np.random.Generator, ratio: float, run_sd: float, example_sd: float, off: float = 1.0) -> Finding:
    """Runs whose KL falls with rho; one value function has ``ratio`` times that of the others."""
    seeds, arms = rng.normal(0, 0.5, 3), []
    shared = rng.normal(0, 0.3, EXAMPLES)
    for function in ("logistic", "identity", "log sigmoid", "cara", "other"):
        own = shared + rng.normal(0, example_sd, EXAMPLES)
        for target in TARGETS:
            level = -np.log(target) + (np.log(ratio) if function == "other" else 0.0)
            logs = level + seeds[:, None] + rng.normal(0, run_sd, (3, 1)) + own + rng.normal(0, 0.02, (3, EXAMPLES))
            achieved = target * (off if function == "cara" else 1.0)
            arms.append(Arm(function, target, (achieved,) * 3, Runs(np.exp(logs), SEEDS)))
    return Finding(arms)


def test_equivalence_is_rarely_claimed_at_the_margin_and_difference_rarely_without_one() -> None:
    rng, number = np.random.default_rng(0), 150
    at_margin: Counter[str] = Counter()
    equal: Counter[str] = Counter()
    for _ in range(number):
        # A level of 5 % / 4; three standard errors of the count above it.
        at_margin[simulated(rng, MARGIN, 0.03, 0.02).contrasts[-1].decision] += 1
        equal[simulated(rng, 1.0, 0.03, 0.02).decision] += 1
    assert at_margin["equivalent"] <= number * 0.0125 + 3 * np.sqrt(number * 0.0125)
    assert equal["refuted"] <= number * 0.1 + 3 * np.sqrt(
        number * 0.09
    )  # four two-sided intervals of level 1 - 2 * 5 % / 4


def test_the_stated_power_is_the_share_of_equivalent_decisions() -> None:
    rng = np.random.default_rng(1)
    for run_sd in (0.04, 0.06):
        found = [simulated(rng, 1.0, run_sd, 0.02).contrasts[-1] for _ in range(100)]
        share = np.mean([each.decision == "equivalent" for each in found])
        assert abs(share - np.mean([each.power for each in found])) < 0.15


def test_arms_off_their_target_are_excluded() -> None:
    finding = simulated(np.random.default_rng(2), 1.0, 0.03, 0.02, off=1.2)
    assert {arm.function for arm in finding.arms} - {arm.function for arm in finding.kept} == {"cara"}
    assert "cara" not in [each.function for each in finding.contrasts]
    assert finding.decision != "holds"
    assert any("excluded: +20 %" in line for line in finding.lines())


def test_shares_of_the_variance_sum_to_one_and_rho_explains_what_it_causes() -> None:
    shares = simulated(np.random.default_rng(3), 1.0, 0.01, 0.0).explained()
    assert abs(sum(shares.values()) - 1) < 1e-9
    assert shares["rho"] > 0.99


def test_the_rate_for_a_divergence_is_that_of_the_power_law_through_the_runs() -> None:
    rates = [1e-4, 2e-4, 4e-4]
    for power, scale in ((2.0, 3e7), (3.5, 1e13), (2.0, 1e6), (2.0, 1e9)):  # the last two need rates outside the grid
        kl = [scale * rate**power for rate in rates]
        assert abs(rate_at(rates, kl) / scale ** (-1 / power) - 1) < 1e-9
