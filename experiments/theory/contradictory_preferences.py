"""Theorem 4.3 of the KTO paper as a plot: whom do DPO and KTO follow when preferences contradict each other?

    python experiments/theory/contradictory_preferences.py [OUT_FOLDER]

For one prompt, a share p > 1/2 of people prefers y_a to y_b, the rest the opposite, and the reference model rarely
gives y_a. DPO's optimum satisfies sigma(beta * (r_a - r_b)) = p, that is, pi(y_a) / pi(y_b) =
(p / (1 - p))^(1 / beta) * pi_ref(y_a) / pi_ref(y_b): below the p where this ratio is 1, the minority's y_b remains the
likelier answer. Loss-neutral KTO (lambda_D = lambda_U) converges to the majority's y_a for every p (Ethayarajh et al.,
ICML 2024, Thm. 4.3).

Each curve shows where the gradient of this package's objective vanishes or, if it never does, the limit of gradient
descent; only the threshold comes from a formula. Prints a table and writes contradictory_preferences.png to OUT_FOLDER
(default: beside this file).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.labels import Labels
from halos_pl.objective.feedback import Binary, Pairwise
from halos_pl.objective.halo import HALO, Objective
from halos_pl.objective.reference_points import MismatchedKL, PairedCompletion, ReferencePoint
from halos_pl.objective.rewards import LogRatio
from value_functions import Logistic, LogSigmoid

MAJORITY, MINORITY = 0, 1
REACH = 25.0  # largest logit: a policy with pi(y_a) = 1 - 1e-11 counts as the limit 1


def dpo(beta: float) -> HALO:
    """DPO, Rafailov et al. 2023, eq. 7."""
    return HALO(
        reward=LogRatio(),
        reference_point=PairedCompletion(),
        value_function=LogSigmoid(beta=beta),
        feedback=Pairwise(),
        reflect_undesirable=False,
    )


def kto(beta: float, reference_point: ReferencePoint | None = None, *, undesirable_weight: float = 1.0) -> HALO:
    """KTO, Ethayarajh et al. 2024, eq. 8; loss-neutral unless ``undesirable_weight`` differs from 1."""
    return HALO(
        reward=LogRatio(),
        reference_point=reference_point or MismatchedKL(),
        value_function=Logistic(beta=beta),
        feedback=Binary(lambda_undesirable=undesirable_weight),
        reflect_undesirable=True,
        loss_offset=1.0,
    )


def contradictory_rows(policy: Tensor, reference: Tensor, agree: int, pairs: int) -> LogProbBatch:
    """All pairs of one prompt, ``agree`` of them with y_a preferred, then mismatched rows with the same completions.

    Args:
        policy, reference: log-probs of the answers in nats, float [answers]; the first two are y_a and y_b.
        agree: number of pairs in which y_a is preferred.
        pairs: number of pairs.

    Returns:
        4 * ``pairs`` rows of one token: chosen and rejected alternate; the second half consists of mismatched rows.
    """
    chosen = torch.tensor([MAJORITY] * agree + [MINORITY] * (pairs - agree))
    outcome = torch.stack([chosen, 1 - chosen], dim=1).flatten()
    n = len(outcome)
    place = torch.arange(n)
    everything = torch.cat([outcome, outcome])
    return LogProbBatch(
        policy_logps=policy[everything, None],
        reference_logps=reference[everything, None],
        mask=torch.ones(2 * n, 1, dtype=torch.bool),
        labels=Labels(
            desirable=torch.cat([place % 2 == 0] * 2),
            pair=torch.cat([place ^ 1, torch.full((n,), -1)]),
            mismatched=torch.cat([torch.zeros(n), torch.ones(n)]).bool(),
        ),
    )


def slope(objective: Objective, logit: float, reference: Tensor, agree: int, pairs: int) -> float:
    """d loss / d logit of y_a for the policy softmax([logit, 0]) over two answers."""
    s = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    policy = torch.stack([s, torch.zeros_like(s)]).log_softmax(0)
    loss = objective(contradictory_rows(policy, reference, agree, pairs)).loss
    return float(torch.autograd.grad(loss, s)[0])


def optimum(objective: Objective, reference: Tensor, agree: int, pairs: int) -> float:
    """The pi(y_a) to which gradient descent converges from any start.

    Exact if the slope changes sign at most once: DPO's loss is convex in the logit, and KTO's slope never changes sign.
    A reference point without gradient is held fixed at each step, as in training.
    """

    def at(logit: float) -> float:
        return slope(objective, logit, reference, agree, pairs)

    low, high = at(-REACH), at(REACH)
    end = REACH if high < 0 else -REACH
    rest = float(brentq(at, -REACH, REACH, xtol=1e-12)) if low < 0 < high else end
    return 1 / (1 + math.exp(-rest))


def threshold(beta: float, reference: Tensor) -> float:
    """The p at which p^(1/beta) * pi_ref(y_a) = (1 - p)^(1/beta) * pi_ref(y_b)."""
    return float(torch.sigmoid(beta * (reference[MINORITY] - reference[MAJORITY])))


def plot(betas: Sequence[float], rare: float, pairs: int, out: Path) -> list[tuple[float, float, float, float]]:
    """Plots both optima against p, one panel per beta.

    Returns:
        Rows of (beta, p, optimum of DPO, optimum of KTO).
    """
    reference = torch.tensor([rare, 1 - rare], dtype=torch.float64).log()
    shares = list(range(pairs // 2 + 1, pairs))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(betas), sharey=True, squeeze=False)[0]
    optima = []
    for panel, beta in zip(panels, betas, strict=True):
        rows = [
            (beta, k / pairs, optimum(dpo(beta), reference, k, pairs), optimum(kto(beta), reference, k, pairs))
            for k in shares
        ]
        optima += rows
        p = [row[1] for row in rows]
        panel.plot(p, [row[3] for row in rows], color="#1b7f5c", label="KTO, λ_D = λ_U")
        panel.plot(p, [row[2] for row in rows], color="#c2452d", label="DPO")
        edge = threshold(beta, reference)
        panel.axvline(edge, color="#4a4a4a", linestyle="--", linewidth=1, label=f"threshold p = {edge:.3f}")
        panel.axhline(0.5, color="0.8", linewidth=0.8, zorder=0)
        panel.set(title=f"β = {beta:g}, π_ref(y_a) = {rare:g}", xlabel="share p that prefers y_a", xlim=(0.5, 1))
        panel.legend(frameon=False, loc="best")
    panels[0].set_ylabel("π(y_a) at the optimum")
    figure.savefig(out, dpi=110)
    return optima


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_folder", nargs="?", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().out_folder
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "contradictory_preferences.png"
    pairs = 50
    rows = plot((0.1, 0.5), 0.02, pairs, out)
    table = Table(
        "beta", "p", "DPO: π(y_a)", "KTO: π(y_a)", "DPO follows", title="Optimum under contradictory preferences"
    )
    for beta, p, of_dpo, of_kto in rows:
        if round(p * pairs) % 5 == 0:
            follows = "majority" if of_dpo > 0.5 else "minority"
            table.add_row(f"{beta:g}", f"{p:.2f}", f"{of_dpo:.3f}", f"{of_kto:.3f}", follows)
    Console().print(table)
    print(out)


if __name__ == "__main__":
    main()
