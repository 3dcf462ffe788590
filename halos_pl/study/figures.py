"""The figures of a study's report, drawn from its recorded numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from halos_pl.evaluation.metrics import metric_of
from halos_pl.study.comparison import Comparison
from halos_pl.study.drawing import COLOURS, MARKERS, NOT, SIGNIFICANT, WIDTH, label, legend, legend_size, looks
from halos_pl.study.results import Results
from halos_pl.study.spec import Arm
from halos_pl.study.tune import short_key

#: Inches per line, and characters per inch, of 9-point text.
LINE, CHARACTERS = 0.17, 11.5
OUTCOMES: dict[str, dict[str, Any]] = {
    "outcome/desirable": {"color": "#56B4E9", "alpha": 0.6},
    "outcome/undesirable": {"edgecolor": "#D55E00", "histtype": "step", "linewidth": 1.4},
}


@dataclass(frozen=True)
class Curve:
    """A training figure of the report: its title and unit."""

    title: str
    unit: str


#: Metrics of the distance from the reference; a study with both is drawn over the first.
KLS = ("kl", "kl_held_out")

#: Curves by metric of ``values.csv.gz``.
CURVES = {
    "training/margin": Curve("reward margin between the classes, without beta", "nats"),
    "training/z0": Curve("reference point z0", "nats"),
    "training/z0_standard_error": Curve("standard error of z0", "nats"),
    "training/gains": Curve("outcomes that are gains", "share"),
    "training/rho": Curve("rho: slopes of desirable rows over those of undesirable ones", "ratio"),
}


def unit_of(metric: str) -> str:
    """The unit of a metric of ``halos evaluate``."""
    what = metric_of(metric)[1]
    for unit in ("nats per token", "nats", "tokens", "share", "squared error"):
        if unit in what:
            return unit
    return what


def _list(axes: Any) -> list[Any]:
    """Axes as a list; matplotlib returns a single one without an array."""
    return list(np.atleast_1d(axes).flatten())


def _by_seed(results: Results, c: Comparison) -> list[float]:
    """The effect of a comparison for each seed alone."""
    arms = {arm.name: arm for arm in results.study.arms}
    arm, other = arms[c.arm], arms.get(c.reference)
    effects = []
    for seed in results.seeds(arm):
        one = results.values(c.metric, arm, [seed])
        if other is None:
            two = results.of_baseline(c.metric, c.reference)
        else:
            two = results.values(c.metric, other, [seed]) if seed in results.seeds(other) else None
        if one is not None and two is not None:
            a, b = float(one.mean()), float(two.mean())
            effects.append(a / b if c.scale == "ratio" else a - b)
    return effects


def _places(ticks: list[str]) -> tuple[list[float], float]:
    """The position of each arm, in lines of text from the top, so that labels do not overlap; and the total height."""
    rooms = np.array([max(1.9, tick.count("\n") + 1.6) for tick in ticks])
    return (rooms.cumsum() - rooms / 2).tolist(), float(rooms.sum())


def _below(comparisons: dict[str, Comparison]) -> str:
    """The label of the axis for effects."""
    some = next(iter(comparisons.values()))
    if some.scale == "ratio":
        return label(f"ratio to {some.reference}", 26)
    return f"{label(f'difference from {some.reference}', 26)}\n{unit_of(some.metric)}"


def _panel(axis: Axes, results: Results, places: dict[str, float], comparisons: dict[str, Comparison]) -> None:
    """Effects with intervals, one line per arm; markers are filled if significant."""
    some = next(iter(comparisons.values()))
    for name, place in places.items():
        if (c := comparisons.get(name)) is None:
            continue
        colour, fill, width = (SIGNIFICANT, SIGNIFICANT, 2.2) if c.significant else (NOT, "white", 1.4)
        axis.plot([c.low, c.high], [place, place], color=colour, linewidth=width)
        axis.plot(c.effect, place, "o", markeredgecolor=colour, markerfacecolor=fill, markersize=5)
        seeds = _by_seed(results, c)
        axis.plot(seeds, [place + 0.55] * len(seeds), "|", color=colour, markersize=5)
    axis.axvline(some.null, color="black", linewidth=0.8, zorder=1.7)  # above the grid, below the intervals
    if some.scale == "ratio":
        _ratio_axis(axis)
    if some.reference in places:
        place = places[some.reference]
        room = axis.transAxes.inverted().transform(axis.transData.transform((some.null, place)))[0]
        axis.text(
            some.null, place, " baseline ", fontsize=8, color=NOT, va="center", ha="left" if room < 0.5 else "right"
        )
    axis.set_xlabel(_below(comparisons), fontsize=9)
    axis.grid(axis="x", color="0.92")
    axis.tick_params(axis="x", labelsize=8)
    if some.scale == "difference":
        axis.locator_params(axis="x", nbins=5)


def _ratio_axis(axis: Axes) -> None:
    """A log axis with a few plain numbers; matplotlib's labels overlap if it spans less than a decade."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    narrow = high / low < 20
    axis.xaxis.set_major_locator(MaxNLocator(4) if narrow else LogLocator(numticks=5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def forest(results: Results, width: float = WIDTH) -> Figure | None:
    """Paired differences with intervals, from the baseline and from the model before training."""
    panels = {}
    for metric in results.study.metrics:
        if both := [each for each in (results.comparisons(metric), results.learned(metric)) if each]:
            panels[metric] = both
    if not panels:
        return None
    names = [arm.name for arm in results.ranked if results.seeds(arm)]
    ticks = [label(name, round(width * 3.9) if width == WIDTH else 16) for name in names]
    at, lines = _places(ticks)
    places = dict(zip(names, at, strict=True))
    titles = {m: "\n".join(textwrap.wrap(f"{m}: {metric_of(m)[1]}", round(width * CHARACTERS))) for m in panels}
    rows = {metric: 1 if width == WIDTH else len(both) for metric, both in panels.items()}
    heights = []
    for metric, both in panels.items():
        below = sorted(_below(each).count("\n") + 3.4 for each in both)[-rows[metric] :]
        heights.append(LINE * (lines * rows[metric] + sum(below) + titles[metric].count("\n") + 1))
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = _list(figure.subfigures(len(panels), 1, height_ratios=heights))
    for part, (metric, both) in zip(parts, panels.items(), strict=True):
        part.suptitle(titles[metric], fontsize=9, x=0.01, ha="left")
        axes = _list(part.subplots(rows[metric], len(both) // rows[metric], sharey=True))
        for axis, each in zip(axes, both, strict=True):
            _panel(axis, results, places, each)
        axes[0].set_ylim(lines, 0)
        axes[0].set_yticks(at, ticks, fontsize=9)
        for axis in axes[:: len(both) // rows[metric]]:
            axis.tick_params(axis="y", labelsize=9)
            axis.set_ylabel("arm", fontsize=9)
    return figure


def curves(results: Results, width: float = WIDTH) -> Figure | None:
    """Training figures by step."""
    drawn = [name for name in CURVES if any(results.figures(arm, name) for arm in results.study.arms)]
    if not drawn:
        return None
    styles = looks(results)
    arms = [arm for arm in results.ranked if any(results.figures(arm, name) for name in drawn)]
    names, columns, below = legend_size(arms, width)
    figure = Figure(figsize=(width, 2.3 * len(drawn) + below), layout="constrained")
    handles = {}
    for axis, name in zip(_list(figure.subplots(len(drawn), 1, sharex=True)), drawn, strict=True):
        for arm in arms:
            by_seed = results.figures(arm, name)
            shared = sorted(set.intersection(*map(set, by_seed)), key=int) if by_seed else []
            if not shared:
                continue
            values = np.array([[each[step] for step in shared] for each in by_seed])
            steps, style = [int(step) for step in shared], styles[arm.name]
            every = max(1, len(steps) // 8)
            (handles[arm.name],) = axis.plot(steps, values.mean(axis=0), linewidth=1.5, markevery=every, **style)
            if len(values) > 1:
                low, high = values.min(axis=0), values.max(axis=0)
                axis.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axis.set_title("\n".join(textwrap.wrap(CURVES[name].title, round(width * 10))), fontsize=9, loc="left")
        axis.set_ylabel(CURVES[name].unit, fontsize=9)
        axis.grid(color="0.92")
    axis.set_xlabel("optimizer step", fontsize=9)
    legend(figure, handles, names, columns)
    return figure


def frontier(results: Results, width: float = WIDTH) -> Figure | None:
    """The primary metric against KL, on a log scale where all means are above 0; None without both metrics."""
    metric = results.primary
    kl = next((kl for kl in KLS if kl in results.study.metrics and metric not in KLS), None)
    means = {arm: [results.estimates.get((each, arm.name)) for each in (kl, metric)] for arm in results.ranked if kl}
    points = {arm: (x, y) for arm, (x, y) in means.items() if x is not None and y is not None}
    if kl is None or not points:
        return None
    names, columns, below = legend_size(list(points), width)
    figure = Figure(figsize=(width, 3.2 + below), layout="constrained")
    axis, handles = figure.subplots(), {}
    if all(x.low > 0 for x, _ in points.values()):
        axis.set_xscale("log")
    order = list(looks(results))
    for arm, (x, y) in points.items():
        place = order.index(arm.name)
        handles[arm.name] = axis.errorbar(
            x.value,
            y.value,
            xerr=[[x.value - x.low], [x.high - x.value]],
            yerr=[[y.value - y.low], [y.high - y.value]],
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[1 + place // len(COLOURS) % (len(MARKERS) - 1)],
            linestyle="",
            markersize=5,
            linewidth=1.4,
        )
    for number, name in enumerate(results.baselines):
        if (values := results.of_baseline(metric, name)) is not None:
            mean, side = float(values.mean()), number % 2  # two of them may have equal means
            axis.axhline(mean, color=NOT, linewidth=0.8, linestyle="--", zorder=1.7)
            how: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "fontsize": 8, "color": NOT}
            axis.text((0.01, 0.99)[side], mean, label(name), va="bottom", ha=("left", "right")[side], **how)
    if axis.get_xscale() == "log":
        _ratio_axis(axis)
    axis.set_xlabel(f"{kl}, {unit_of(kl)}", fontsize=9)
    axis.set_ylabel(f"{metric}, {unit_of(metric)}", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(color="0.92")
    legend(figure, handles, names, columns)
    return figure


def value_functions(results: Results, width: float = WIDTH) -> Figure | None:
    """v over the outcomes of each arm's last rows."""
    drawn: list[tuple[Arm, dict[float, float]]] = []
    for arm in results.ranked:
        for drawn_once in results.figures(arm, "value_function")[:1]:
            drawn.append((arm, {float(u): y for u, y in drawn_once.items()}))
    if not drawn:
        return None
    columns = 2 if width == WIDTH else 1
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(width, 2.2 * rows + 0.3), layout="constrained")
    axes = _list(figure.subplots(rows, columns))
    for number, (axis, (arm, points)) in enumerate(zip(axes, drawn, strict=False)):
        reach = max(points)
        axis.plot(list(points), list(points.values()), color="black")
        beside = axis.twinx()
        bins = np.linspace(-reach, reach, 31).tolist()
        for name, how in OUTCOMES.items():
            some = [float(np.clip(u, -reach, reach)) for each in results.figures(arm, name) for u in each.values()]
            beside.hist(some, bins=bins, **how)
        axis.set_zorder(beside.get_zorder() + 1)  # v is drawn over the outcomes
        axis.patch.set_visible(False)
        axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.set_title(label(arm.name, 34), fontsize=9, loc="left")
        axis.set_ylabel("value v(u)", fontsize=8)
        beside.set_ylabel("rows", fontsize=8)
        if number >= len(drawn) - columns:
            axis.set_xlabel("outcome u, nats", fontsize=8)
        for each in (axis, beside):
            each.tick_params(labelsize=8)
    for axis in axes[len(drawn) :]:
        axis.set_axis_off()
    return figure


def heat_map(results: Results, width: float = WIDTH) -> Figure | None:
    """The primary metric over two numeric options, if the arms are a grid of them."""
    arms = results.study.arms
    keys = [
        key
        for key in dict.fromkeys(key for arm in arms for key in arm.options)
        if not (results.study.tune and key == results.study.tune.option)
        and all(isinstance(arm.options.get(key), (int, float)) for arm in arms)
        and len({arm.options[key] for arm in arms}) > 1
    ]
    together: dict[tuple[float, ...], list[str]] = {}  # options that are equal in each arm are one side of the grid
    for key in keys:
        together.setdefault(tuple(arm.options[key] for arm in arms), []).append(key)
    names = {some[0]: " = ".join(map(short_key, some)) for some in together.values()}
    keys = list(names)
    metric = results.primary
    estimates = {arm: results.estimates[metric, arm.name] for arm in arms if (metric, arm.name) in results.estimates}
    places = [tuple(arm.options[key] for key in keys) for arm in arms]
    if len(keys) != 2 or not estimates or len(set(places)) < len(places):  # several arms at one point cannot be drawn
        return None
    if width < WIDTH:  # the longer side runs down
        keys.sort(key=lambda key: len({arm.options[key] for arm in arms}))
    columns, rows = (sorted({arm.options[key] for arm in arms}) for key in keys)
    values = np.full((len(rows), len(columns)), np.nan)
    for arm, e in estimates.items():
        values[rows.index(arm.options[keys[1]]), columns.index(arm.options[keys[0]])] = e.value
    size = min(width, 2.2 + 0.9 * len(columns))
    cell = (size - 1.6) / len(columns)
    figure = Figure(figsize=(size, 1.5 + (0.55 if cell > 0.5 else 0.7) * len(rows)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(values, origin="lower", cmap="viridis", aspect="auto")
    finite = values[np.isfinite(values)]
    for i, j in np.argwhere(np.isfinite(values)):
        ink = "black" if values[i, j] > finite.min() + 0.6 * np.ptp(finite) else "white"
        turned = 0 if cell > 0.5 else 90  # where a cell is narrower than its number
        axis.text(j, i, f"{values[i, j]:.3g}", ha="center", va="center", color=ink, fontsize=9, rotation=turned)
    axis.set_xticks(range(len(columns)), [f"{c:g}" for c in columns], rotation=0 if cell > 0.5 else 90)
    axis.set_yticks(range(len(rows)), [f"{r:g}" for r in rows])
    axis.set_xlabel(label(names[keys[0]]), fontsize=9)
    axis.set_ylabel(label(names[keys[1]]), fontsize=9)
    axis.set_title(metric, fontsize=9, loc="left")
    figure.colorbar(image, label=f"{metric}, {unit_of(metric)}")
    return figure


#: Title, caption and drawing function by file name.
PICTURES: dict[str, tuple[str, str, Callable[..., Figure | None]]] = {
    "forest.png": (
        "Differences",
        "Paired differences with uncorrected 95% intervals. Filled: significant over seeds after correction. Ticks:"
        " single seeds",
        forest,
    ),
    "frontier.png": (
        "Frontier",
        "Means of the primary metric and of KL, with uncorrected 95% intervals. Dashed: baselines that are not arms",
        frontier,
    ),
    "heat_map.png": ("Over the grid", "Mean of the primary metric", heat_map),
    "curves.png": ("Training", "Mean over seeds; bands from the smallest to the largest seed", curves),
    "value_functions.png": (
        "Value functions",
        "v(u) of each arm over the outcomes u = r - z0 of its last rows: desirable (blue), undesirable (red outlines)",
        value_functions,
    ),
}
