"""The figures of a sweep: a map of the differences between arms, and the arms themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from halos_pl.candidates.differences import Difference, Mean
from halos_pl.candidates.spec import Cell, Sweep
from halos_pl.study.drawing import WIDTH, label, look

#: Colours of losses and gains, which colour-blind readers can tell apart.
DIVERGING = "PuOr"


def axes_name(sweep: Sweep, axes: tuple[Any, ...]) -> str:
    """Such as ``beta 0.1``."""
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in axes]
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in zip(sweep.axes, shown, strict=True))


def _grid(sweep: Sweep, panels: list[Any], height: float) -> tuple[Figure, list[Any]]:
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).flatten())
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure, axes


def heat_map(sweep: Sweep, found: Mapping[Cell, Difference]) -> Figure | None:
    """The difference from the baseline by noise and desirable share; a star marks a significant one."""
    if not found or len(sweep.noise) * len(sweep.desirable) < 2:
        return None
    panels = list(dict.fromkeys((cell.arm, cell.axes) for cell in found))
    most = max(abs(each.effect) for each in found.values()) or 1.0
    figure, drawn = _grid(sweep, panels, 0.9 + 0.42 * len(sweep.noise))
    for axis, (arm, axes) in zip(drawn, panels, strict=False):
        table = np.full((len(sweep.noise), len(sweep.desirable)), np.nan)
        for i, noise in enumerate(sweep.noise):
            for j, share in enumerate(sweep.desirable):
                if (each := found.get(Cell(arm, axes, noise, share))) is not None:
                    table[i, j] = each.effect
                    colour = "white" if abs(each.effect) > 0.7 * most else "black"
                    text = f"{each.effect:+.3f}{'*' if each.decided else ''}"
                    axis.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
        image = axis.imshow(table, cmap=DIVERGING, vmin=-most, vmax=most, aspect="auto", origin="lower")
        axis.set_xticks(range(len(sweep.desirable)), [f"{share:.0%}" for share in sweep.desirable], fontsize=8)
        axis.set_yticks(range(len(sweep.noise)), [f"{noise:.0%}" for noise in sweep.noise], fontsize=8)
        axis.set_title(label(f"{arm} - {sweep.reference_arm}: {axes_name(sweep, axes)}".rstrip(": "), 44), fontsize=9)
    for axis in drawn:
        last = axis.get_subplotspec().is_last_row()
        axis.set_xlabel("chosen completions kept" if last else "", fontsize=9)
        axis.set_ylabel("preferences flipped" if axis.get_subplotspec().is_first_col() else "", fontsize=9)
    bar = figure.colorbar(image, ax=drawn, shrink=0.7)
    bar.set_label(f"difference of {sweep.primary}", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def lines(sweep: Sweep, found: Mapping[Cell, Mean]) -> Figure | None:
    """The primary metric by noise, a panel for each desirable share and value of the axes."""
    if len(sweep.noise) < 2:
        return None
    panels = list(dict.fromkeys((cell.axes, cell.desirable) for cell in found))
    figure, drawn = _grid(sweep, panels, 1.7)
    styles = {arm: look(number) for number, arm in enumerate(sorted(sweep.arms, key=sweep.reference_arm.__ne__))}
    handles = {}
    for axis, (axes, share) in zip(drawn, panels, strict=False):
        for arm, style in styles.items():
            cells = [Cell(arm, axes, noise, share) for noise in sweep.noise]
            points = [(cell.noise, found[cell]) for cell in cells if cell in found]
            x, y, sd = [n for n, _ in points], [m.value for _, m in points], [m.seed_sd for _, m in points]
            handles[arm] = axis.errorbar(x, y, yerr=sd, linewidth=1.3, capsize=2, **style)
        if sweep.primary in ("accuracy", "follows", "chosen"):
            axis.axhline(0.5, color="0.6", linewidth=0.8, zorder=1.7)
        name = f"{axes_name(sweep, axes)}, {share:.0%} of chosen kept".lstrip(", ")
        axis.set_title(name, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(color="0.92")
        axis.set_xticks(sweep.noise, [f"{noise:.0%}" for noise in sweep.noise], fontsize=7)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(sweep.primary, fontsize=9)
        if axis.get_subplotspec().is_last_row():
            axis.set_xlabel("preferences flipped", fontsize=9)
    names = [*map(label, handles)]
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": 9}
    figure.legend([*handles.values()], names, title="bars: standard deviation over seeds", title_fontsize=8, **place)
    return figure
