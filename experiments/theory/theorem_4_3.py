"""Compares the fitted policies of theorem_4_3.yaml with what Theorem 4.3 predicts, prompt by prompt.

    python experiments/theory/theorem_4_3.py runs/theorem_4_3

The KTO paper's Theorem 4.3 (arXiv v4): two of three annotators prefer y_a, one y_b. With Delta = log pi_ref(y_b) -
log pi_ref(y_a), DPO's optimal policy prefers y_b where 2/3 < sigma(beta Delta), that is beta Delta > log 2;
loss-neutral KTO's prefers y_a. Prints the counts, and writes switch.png to the folder.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from matplotlib.figure import Figure
from scipy.special import expit

from halos_pl.candidates.report import read_sweep
from halos_pl.candidates.values import read_record
from halos_pl.study.drawing import WIDTH, look, png

#: The majority's share of the votes.
SHARE = 2 / 3


def optimum(before: float, beta: float) -> float:
    """log pi(y_a)/pi(y_b) of DPO's optimal policy, from that of pi_ref."""
    return before + math.log(SHARE / (1 - SHARE)) / beta


def main() -> None:
    """Reads the folder of the sweep, prints the counts and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    spec, values = read_sweep(folder)
    before: list[float] = read_record(folder)["before"]
    betas = [beta for (beta,) in dict.fromkeys(cell.axes for cell in spec.cells)]
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    panels = dict(zip(betas, figure.subplots(1, len(betas), sharey=True, squeeze=False)[0], strict=True))
    print(f"{len(before)} prompts; the reference prefers the minority at {sum(gap < 0 for gap in before)}")
    for cell, rounds in values.of_prompts().items():
        ((_, _, gaps),) = rounds.values()
        beta = float(cell.axes[0])
        minority = [optimum(gap, beta) < 0 for gap in before]
        follows = sum(gap > 0 for gap in gaps)
        where = sum(gap > 0 for gap, other in zip(gaps, minority, strict=True) if other)
        line = f"beta {beta:g}, {cell.arm}: follows the majority at {follows} of {len(gaps)} prompts"
        line += f", and at {where} of the {sum(minority)} where DPO's optimum does not"
        if cell.arm == "dpo":
            off = max(abs(gap - optimum(old, beta)) for gap, old in zip(gaps, before, strict=True))
            agreed = sum((gap < 0) == other for gap, other in zip(gaps, minority, strict=True))
            line += f"; as DPO's optimum at {agreed}, at most {off:.2g} nats from it"
        strength = [-beta * gap for gap in before]
        if beaten := [x for x, gap in zip(strength, gaps, strict=True) if gap <= 0]:
            won = max((x for x, gap in zip(strength, gaps, strict=True) if gap > 0), default=-math.inf)
            line += f"; beta Delta is up to {won:.3g} where it follows, and from {min(beaten):.3g} on where it does not"
        print(line)
        number = list(spec.arms).index(cell.arm)
        style = look(number) | {"linestyle": "", "marker": "os"[number % 2], "markersize": 7 - 3 * number}
        panels[cell.axes[0]].plot(strength, expit(gaps), label=cell.arm, markerfacecolor="none", **style)
    for beta, axis in panels.items():
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks([-10, 0, 1, 10, 100], ["-10", "0", "1", "10", "100"])
        axis.minorticks_off()
        axis.axvline(math.log(SHARE / (1 - SHARE)), color="0.6", linewidth=0.8, zorder=1.7)
        axis.axhline(0.5, color="0.6", linewidth=0.8, zorder=1.7)
        axis.set_title(f"beta {beta:g}", fontsize=9, loc="left")
        axis.set_xlabel(r"$\beta\Delta$", fontsize=9)
        axis.tick_params(labelsize=8)
    panels[betas[0]].set_ylabel(r"fitted $\pi(y_a)\,/\,(\pi(y_a)+\pi(y_b))$", fontsize=9)
    panels[betas[0]].legend(frameon=False, fontsize=8, loc="lower left")
    (folder / "switch.png").write_bytes(png(figure))
    print(folder / "switch.png")


if __name__ == "__main__":
    main()
