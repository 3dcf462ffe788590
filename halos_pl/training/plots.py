"""Plots of a run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from value_functions import ValueFunction, reward_scale

DESIRABLE, UNDESIRABLE, NEUTRAL = "#1b7f5c", "#c2452d", "#4a4a4a"


def _column(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    kept = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    return [step for step, _ in kept], [value for _, value in kept]


def _figure(height: float, gap: float) -> Figure:
    """Seven inches wide, with fixed margins for title and labels: an automatic layout would draw the figure twice."""
    figure = Figure(figsize=(7, height))
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.5 / height, top=1 - 0.35 / height, hspace=gap)
    return figure


def plot_training(metrics: Path, out: Path, *, beta: float = 1.0) -> Path | None:
    """Rewards by class and the reference point over optimizer steps, all times beta, and the loss below.

    Args:
        metrics: a run's ``metrics.csv``, whose rewards are beta * r.
        out: the PNG to write.
        beta: the value function's beta, 1 / nats.

    Returns:
        ``out``, or None if the run logged no loss.
    """
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not _column(rows, "loss")[0]:
        return None
    figure = _figure(6, gap=0.08)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for name, label, colour, style, scale in (
        ("rewards/chosen", "β·r, desirable rows", DESIRABLE, "-", 1.0),
        ("rewards/rejected", "β·r, undesirable rows", UNDESIRABLE, "-", 1.0),
        ("outcome/z0", "β·z0, reference point", NEUTRAL, "--", beta),
    ):
        steps, values = _column(rows, name)
        if steps:
            above.plot(steps, [scale * v for v in values], label=label, color=colour, linestyle=style)
    above.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    if above.get_legend_handles_labels()[0]:
        above.legend(frameon=False)
    above.set_ylabel("reward")
    below.plot(*_column(rows, "loss"), color=NEUTRAL)
    below.set(xlabel="optimizer step", ylabel="loss")
    figure.savefig(out, dpi=120)
    return out


def plot_value_function(
    value_function: ValueFunction, moments: Mapping[str, Sequence[tuple[float, bool]]], out: Path
) -> Path:
    """Plots v, and below it the outcomes of some rows at several moments of the run.

    Args:
        value_function: the value function of the top panel, on the CPU.
        moments: rows as (outcome u in nats, whether the row is desirable), by name of the moment.
        out: the PNG to write.
    """
    everything = torch.tensor([u for rows in moments.values() for u, _ in rows])
    # The axis covers the bulk of the rows; outliers are drawn at its ends.
    reach = max(1.0, 1.1 * float(everything.abs().quantile(0.99)))
    # v is drawn as far as it bends, which may be far beyond the rows.
    beta = reward_scale(value_function)
    shape = max(reach, 4 / beta) if beta > 0 else reach
    figure = _figure(2.4 + 1.6 * len(moments), gap=0.25)
    panels = figure.subplots(1 + len(moments), 1, height_ratios=[2.0, *[1.4] * len(moments)])
    grid = torch.linspace(-shape, shape, 801)
    with torch.no_grad():
        panels[0].plot(grid, value_function.cpu()(grid), color=NEUTRAL)
    panels[0].axvspan(-reach, reach, color="0.92", zorder=0, label="range of the panels below")
    panels[0].legend(frameon=False, loc="upper left")
    panels[0].set(ylabel="value v(u)", title=repr(value_function), xlim=(-shape, shape))
    bins = torch.linspace(-reach, reach, 61).tolist()
    for panel, (moment, rows) in zip(panels[1:], moments.items(), strict=True):
        for wanted, label, colour in ((True, "desirable", DESIRABLE), (False, "undesirable", UNDESIRABLE)):
            shown = [min(max(u, -reach), reach) for u, desirable in rows if desirable is wanted]
            panel.hist(shown, bins=bins, alpha=0.6, label=label, color=colour, histtype="stepfilled")
        panel.set(ylabel="rows", xlim=(-reach, reach))
        panel.legend(frameon=False, title=moment)
    for panel in panels:
        panel.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    panels[-1].set_xlabel("outcome u = r − z0 (nats)")
    figure.savefig(out, dpi=120)
    return out
