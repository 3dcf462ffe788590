"""The picture at the top of README.md: python docs/picture.py [PNG]."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from halos_pl.objective.build import load_objective
from halos_pl.objective.halo import HALO

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "assets" / "value_functions.png"
#: Objective file, label and colour.
LOSSES = (
    ("kto", "KTO", "#1b7f5c"),
    ("dpo", "DPO", "#3560a8"),
    ("kto_kahneman_tversky", "Kahneman-Tversky", "#c2452d"),
    ("ipo", "IPO", "#b8860b"),
    ("hinge", "hinge (RSO)", "#7a4fa3"),
    ("kto_identity", "risk-neutral", "#8a8a8a"),
)


def main(out: Path = PICTURE) -> None:
    """Draws the value functions of six losses, each shifted and scaled so that v(0) = 0 and v(1) = 1."""
    u = torch.linspace(-20, 20, 801)
    figure = Figure(figsize=(8, 3.6))
    figure.subplots_adjust(left=0.09, right=0.76, bottom=0.15, top=0.96)
    axes = figure.subplots()
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    for name, label, colour in LOSSES:
        objective = load_objective(ROOT / "experiments" / "objectives" / f"{name}.yaml")
        assert isinstance(objective, HALO)
        v = objective.value_function
        at_zero, at_one = v(torch.tensor([0.0, 1.0]))
        axes.plot(u, (v(u) - at_zero) / (at_one - at_zero), label=label, color=colour, linewidth=1.8)
    axes.set(xlim=(-20, 20), ylim=(-32, 16), ylabel="value v(u)")
    axes.set_xlabel("← losses      outcome u = r − z0 (nats)      gains →")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
