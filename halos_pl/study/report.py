"""The report of a study: ``report.md`` with pictures beside it, and one ``report.html`` that holds everything."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from PIL import Image

from halos_pl.conformance.check import reports
from halos_pl.export import module_of_run
from halos_pl.files import write
from halos_pl.messages import plain
from halos_pl.study.evaluate import METRICS, PER_TOKEN, measured_how
from halos_pl.study.execute import PLAN, failure, state
from halos_pl.study.plan import Arm, command, default_folder
from halos_pl.study.results import Results, Versus, shown, summary
from halos_pl.study.statistics import Estimate

CURVES = {
    "rewards/margins": "reward margin between the classes",
    "outcome/z0": "reference point z0, nats",
    "outcome/z0_standard_error": "standard error of z0, nats",
    "outcome/gains": "share of outcomes in gains",
}
COLOURS = ("#1b7f5c", "#c2452d", "#3b6fb6", "#8a5ca8", "#b8860b", "#4a4a4a", "#d16ba5", "#2aa1a1")


def _saved(figure: Figure, out: Path) -> Path:
    """Writes a picture in few colours: a third of the size, which a repository keeps for good."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    Image.open(buffer).convert("RGB").quantize(64).save(out, optimize=True)
    return out


def _drawn(arm: Arm) -> str:
    """An arm's name as matplotlib shows it as it is: no formula, and not left out of a legend."""
    name = arm.name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _forest(results: Results, out: Path) -> Path | None:
    metrics = [m for m in results.study.metrics if any((m, a.name) in results.estimates for a in results.study.arms)]
    arms = [a for a in results.study.arms if results.seeds(a)]
    if not metrics or not arms:
        return None
    real = {(v.metric, v.arm.name) for v in results.versus if v.shown}
    figure = Figure(figsize=(8, (0.34 * len(arms) + 0.95) * len(metrics)), layout="constrained")
    for axis, metric in zip(np.atleast_1d(figure.subplots(len(metrics), 1)), metrics, strict=True):
        for place, arm in enumerate(arms):
            e = results.estimates.get((metric, arm.name))
            if e is None:
                continue
            colour = COLOURS[5] if arm is results.baseline else COLOURS[0] if (metric, arm.name) in real else "0.65"
            axis.plot([e.low, e.high], [place, place], color=colour, linewidth=2)
            axis.plot(e.value, place, "o", color=colour)
            for seed in results.seeds(arm):
                values = results.values(metric, arm, [seed])
                assert values is not None
                axis.plot(values.mean(), place + 0.22, "|", color=colour, alpha=0.6)
        base = results.estimates.get((metric, results.baseline.name))
        if base is not None:
            axis.axvline(base.value, color="0.75", linewidth=1, zorder=0)
        axis.set_yticks(range(len(arms)), [textwrap.fill(_drawn(arm), 30) for arm in arms], fontsize=8)
        axis.set_ylim(len(arms) - 0.4, -0.6)
        axis.set_title(textwrap.fill(f"{metric}: {METRICS[metric][1]}", 80), fontsize=9, loc="left")
        axis.grid(axis="x", color="0.92")
    return _saved(figure, out)


def _curves(results: Results, out: Path) -> Path | None:
    known = [name for name in CURVES if any(results.curve(run, name)[0] for run in results.done)]
    if not known:
        return None
    figure = Figure(figsize=(8, 2.6 * len(known)), layout="constrained")
    for axis, name in zip(np.atleast_1d(figure.subplots(len(known), 1, sharex=True)), known, strict=True):
        for number, arm in enumerate(results.study.arms):
            curves = [results.curve(run, name) for run in results.done if run.arm is arm]
            shared = sorted(set.intersection(*(set(steps) for steps, _ in curves))) if curves else []
            if not shared:
                continue
            values = np.array([[dict(zip(*curve, strict=True))[step] for step in shared] for curve in curves])
            colour = COLOURS[number % len(COLOURS)]
            style = "-" if number < len(COLOURS) else "--"
            axis.plot(shared, values.mean(axis=0), label=_drawn(arm), color=colour, linewidth=1.4, linestyle=style)
            if len(values) > 1:
                axis.fill_between(shared, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        axis.set_title(CURVES[name], fontsize=9, loc="left")
        axis.grid(color="0.92")
    axis.set_xlabel("optimizer step")
    axes = figure.get_axes()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return _saved(figure, out)


def _value_functions(results: Results, out: Path) -> Path | None:
    drawn: list[tuple[Arm, Any, list[tuple[float, bool]]]] = []
    for arm in results.study.arms:
        run = results.first_run(arm)
        halo = module_of_run(run.folder).halo if run else None
        if halo is not None and (outcomes := results.outcomes(arm)):
            drawn.append((arm, halo.value_function, outcomes))
    if not drawn:
        return None
    rows = -(-len(drawn) // 2)
    figure = Figure(figsize=(8, 2.3 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, 2)).flatten()
    for axis, (arm, v, outcomes) in zip(axes, drawn, strict=False):
        reach = max(1.0, float(np.quantile([abs(u) for u, _ in outcomes], 0.98)) * 1.2)
        grid = torch.linspace(-reach, reach, 401)
        with torch.no_grad():
            axis.plot(grid, v(grid), color=COLOURS[5])
        beside = axis.twinx()
        for wanted, colour in ((True, COLOURS[0]), (False, COLOURS[1])):
            some = [min(max(u, -reach), reach) for u, desirable in outcomes if desirable is wanted]
            beside.hist(some, bins=np.linspace(-reach, reach, 31).tolist(), color=colour, alpha=0.4)
        beside.set_yticks([])
        axis.axvline(0, color="0.85", linewidth=0.8, zorder=0)
        axis.set_title(_drawn(arm), fontsize=9, loc="left")
    for axis in axes[len(drawn) :]:
        axis.set_axis_off()
    figure.supxlabel("outcome, nats", fontsize=8)
    return _saved(figure, out)


def _heat_map(results: Results, out: Path) -> Path | None:
    """The first metric over two options with numbers, where the arms are a grid of them."""
    keys = [
        key
        for key in dict.fromkeys(key for arm in results.study.arms for key in arm.options)
        if all(isinstance(arm.options.get(key), (int, float)) for arm in results.study.arms)
        and len({arm.options[key] for arm in results.study.arms}) > 1
    ]
    metric = results.study.metrics[0]
    found = {
        arm: results.estimates[metric, arm.name]
        for arm in results.study.arms
        if (metric, arm.name) in results.estimates
    }
    places = [tuple(arm.options[key] for key in keys) for arm in results.study.arms]
    if len(keys) != 2 or not found or len(set(places)) < len(places):  # several arms in one place cannot be drawn
        return None
    columns, rows = (sorted({arm.options[key] for arm in results.study.arms}) for key in keys)
    values = np.full((len(rows), len(columns)), np.nan)
    for arm, e in found.items():
        values[rows.index(arm.options[keys[1]]), columns.index(arm.options[keys[0]])] = e.value
    figure = Figure(figsize=(1.6 + 0.9 * len(columns), 1.4 + 0.6 * len(rows)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(values, origin="lower", cmap="viridis", aspect="auto")
    for i, j in np.argwhere(np.isfinite(values)):
        ink = "black" if values[i, j] > np.nanmin(values) + 0.6 * np.ptp(values[np.isfinite(values)]) else "white"
        axis.text(j, i, f"{values[i, j]:.3g}", ha="center", va="center", color=ink, fontsize=8)
    axis.set_xticks(range(len(columns)), [f"{c:g}" for c in columns])
    axis.set_yticks(range(len(rows)), [f"{r:g}" for r in rows])
    axis.set(xlabel=keys[0].rpartition(".")[2], ylabel=keys[1].rpartition(".")[2], title=metric)
    figure.colorbar(image)
    return _saved(figure, out)


PICTURES = {
    "forest.png": (
        "Metrics by arm",
        "95 % intervals; green: a difference to the baseline (the line) is shown; small marks are single seeds",
        _forest,
    ),
    "heat_map.png": ("Over the grid", "The first metric", _heat_map),
    "curves.png": ("Along training", "Means over seeds; bands from the smallest to the largest", _curves),
    "value_functions.png": (
        "Value functions",
        "Each over its arm's outcomes u = r - z0, in nats, of the last rows: green desirable, red undesirable",
        _value_functions,
    ),
}


def _data(results: Results) -> list[str]:
    """Hashes of what the runs were trained and measured on, as it was then."""
    trained = {pair for run in results.done for pair in summary(run).get("digests", {}).items()}
    measured = {pair for run in results.done for pair in measured_how(run.folder).get("files", {}).items()}
    return [
        *(f"trained on {path}, sha256 of its tokens and rows {digest}" for path, digest in sorted(trained)),
        *(f"measured with {path}, sha256 {digest}" for path, digest in sorted(measured)),
    ]


def _ends(results: Results) -> list[dict[str, Any]]:
    """Training figures at the last step, the mean over the seeds and each seed's."""
    rows = []
    for arm in results.study.arms:
        own = [run for run in results.done if run.arm is arm]
        figures = []
        for name in CURVES:
            last = [values[-1] for _, values in (results.curve(run, name) for run in own) if values]
            each = f" ({', '.join(f'{value:.3g}' for value in last)})" if len(last) > 1 else ""
            figures.append(f"{np.mean(last):.3g}{each}" if last else "")
        rows.append({"arm": arm.name, "figures": figures})
    return rows if any(any(row["figures"]) for row in rows) else []


def _verdicts(results: Results) -> dict[str, str]:
    found = {}
    for arm in results.study.arms:
        run = results.first_run(arm)
        if run is not None:
            found[arm.name] = reports(module_of_run(run.folder).objective)["icml"].verdict
    return found


def _made(results: Results) -> list[dict[str, Any]]:
    """What made the runs, and how many of them each; several where code, libraries or machine changed in between."""
    found: Counter[str] = Counter()
    for run in results.done:
        by, trained = measured_how(run.folder).get("by") or {}, summary(run).get("by") or {}
        for key in ("revision", "halos_pl") if by and trained else ():
            if trained.get(key, by.get(key)) != by.get(key):
                by[key] = f"{trained[key]}, measured by {by.get(key)}"
        found[json.dumps(by, sort_keys=True)] += 1
    return [{"runs": count, **json.loads(by)} for by, count in found.most_common()]


def _of(versus: Versus | None, e: Estimate | None) -> str:
    """Which n a difference is of, where the arm has more seeds than it shares with the baseline."""
    shared = versus.comparison.difference.seeds if versus else 0
    return f" (of {shared} seeds)" if e and shared < e.seeds else ""


def _perplexity(metric: str, e: Estimate) -> str:
    """What a negative log-prob per token comes to, in the usual words."""
    return f" (perplexity {math.exp(e.value):.3g})" if metric in PER_TOKEN else ""


def content(results: Results) -> dict[str, Any]:
    """All that both forms of the report say."""
    arms = results.study.arms
    verdicts = _verdicts(results)
    plan = json.loads((results.out / PLAN).read_text(encoding="utf-8"))
    names = [plan["study"], *(["--over", plan["over"]] if plan["over"] else [])]
    if results.out != default_folder(plan["study"], plan["over"]):
        names += ["--out", str(results.out)]
    versus = {(v.metric, v.arm.name): v for v in results.versus}
    tables: list[dict[str, Any]] = []
    for metric in results.study.metrics:
        rows = []
        for arm in arms:
            e, v = results.estimates.get((metric, arm.name)), versus.get((metric, arm.name))
            c = v.comparison if v else None
            rows.append(
                {
                    "arm": arm.name,
                    "mean": f"{e.value:.4g}" if e else "missing",
                    "figure": f"{shown(e)}{_perplexity(metric, e)}" if e else "missing",
                    "n": f"{e.examples} x {e.seeds}" if e else "0",
                    "difference": f"{shown(c.difference, '+')}{_of(v, e)}" if c else "",
                    "p": f"{c.adjusted:.2g}" if c else "",
                    "permutation": f"{c.permutation:.2g}" if c else "",
                    "wilcoxon": f"{c.wilcoxon:.2g}" if c else "",
                    "effect": f"{c.effect:+.2f}" if c else "",
                    "said": "baseline" if arm is results.baseline else v.said if v else "missing",
                    "how": "shown" if v and v.shown else "runs" if v and v.runs_differ else "",
                    "test": c.test if c else "",
                }
            )
        _, what, more = METRICS[metric]
        wanted = "" if more is None else ", more is better" if more else ", less is better"
        tables.append({"metric": metric, "what": f"{what}{wanted}", "rows": rows})
    missing = [
        {
            "run": str(run.folder),
            "state": "left out" if run in results.faults else state(run),
            "error": results.faults.get(run) or (failure(run)["error"] if state(run) == "failed" else ""),
        }
        for run in results.runs
        if run not in results.done
    ]
    return {
        "title": Path(plan["study"]).stem.replace("_", " "),
        "overview": [(arm.name, [table["rows"][i] for table in tables]) for i, arm in enumerate(arms)],
        "note": results.study.note,
        "headline": results.headline(),
        "tables": tables,
        "baseline": results.baseline.name,
        "arms": [
            {
                "name": arm.name,
                "verdict": verdicts.get(arm.name, "no run finished yet"),
                "seeds": len(results.seeds(arm)),
            }
            for arm in arms
        ],
        "missing": missing,
        "command": command(["ablate", *names]),
        "commands": [(command(run.fit), command(results.study.evaluation(run))) for run in results.runs],
        "curves": list(CURVES.values()),
        "ends": _ends(results),
        "made": _made(results),
        "data": _data(results),
    }


# What Markdown would read as more than text, and only there: "beta * margin" and "[0.1, 0.2]" are none of it.
_MARKUP = re.compile(r"[\\`|$]|[*~](?=\S)|(?<=\S)[*~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|^[#+=-]|#$")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}
# Renderers make links of them without any brackets.
_LINK = re.compile(r"(?<=\w):(?=//)|(?<=www)\.", re.IGNORECASE)


def markdown(text: str) -> str:
    """A text as Markdown that shows it as it is, in one line: in a paragraph, a heading or the cell of a table."""
    line = " ".join(plain(text).split())
    line = re.sub("[&<>@]", lambda found: _HTML[found[0]], _NUMBERED.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", line)))
    return _LINK.sub(lambda found: f"&#{ord(found[0])};", line)


def _escaped(said: Any) -> Any:
    """All texts of a report's content as Markdown."""
    if isinstance(said, str):
        return markdown(said)
    if isinstance(said, dict):
        return {key: _escaped(value) for key, value in said.items()}
    return [_escaped(value) for value in said] if isinstance(said, (list, tuple)) else said


def _fence(commands: str) -> str:
    """Longer than any run of backticks in what it encloses."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", commands)), default=0))


TEMPLATES = Environment(loader=PackageLoader("halos_pl.study", "."), autoescape=lambda name: ".html" in (name or ""))


def write_report(results: Results) -> Path:
    """Writes both forms into the study's folder; also of a study that is not finished.

    Returns:
        the HTML file.
    """
    pictures = []
    for name, (title, caption, draw) in PICTURES.items():
        path = draw(results, results.out / name)
        if path is not None:
            data = base64.b64encode(path.read_bytes()).decode()
            pictures.append({"title": title, "caption": caption, "name": name, "data": data})
    said = content(results)
    commands = "\n".join(["", *(line for pair in said["commands"] for line in pair)])
    commands = plain(f"{said['command']}\n{commands}")
    md = {**_escaped(said), "commands": commands, "fence": _fence(commands)}
    for name, own in {"report.md": md, "report.html": {**said, "commands": commands}}.items():
        text = TEMPLATES.get_template(f"{name}.jinja").render({**own, "pictures": pictures})
        write(results.out / name, plain(text))
    return results.out / "report.html"
