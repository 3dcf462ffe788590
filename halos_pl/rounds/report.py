"""The report of online training: ``report.md``, ``report.json`` and a plot."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from halos_pl.common.files import write
from halos_pl.common.messages import counted, listed
from halos_pl.provenance import provenance
from halos_pl.rounds.results import Results, meaning_of
from halos_pl.rounds.spec import FIRST, OFFLINE
from halos_pl.study.comparison import Comparison
from halos_pl.study.digits import of_comparison, of_estimate, p_value
from halos_pl.study.markdown import markdown

REPORT, DATA, PLOT = "report.md", "report.json", "rounds.png"
#: Width of the plot in inches.
WIDTH = 7.5
#: Said of scores that compare two answers.
RELATIVE = (
    "A score compares an answer with the first model's to the same prompt, so the first model has a score in each round"
    " but none of its own. A difference from it is that of the two scores of a round; one between two models is that of"
    " their differences from the first model."
)


def write_report(results: Results) -> Path:
    """Writes the three files; returns the path of ``report.md``."""
    figure = plot(results)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    (results.out / PLOT).write_bytes(image.getvalue())
    write(results.out / DATA, json.dumps(data(results), indent=2) + "\n")
    path = results.out / REPORT
    write(path, text(results))
    return path


def verdict(c: Comparison) -> str:
    """The decision on a comparison of two runs over prompts, in a few words."""
    if c.exploratory:
        return "exploratory"
    p = f" ({p_value(c.adjusted)})" if c.adjusted is not None and math.isfinite(c.adjusted) else ""
    if c.decision == "differs in these runs only":
        return f"significant over prompts{p}"
    if c.decision == "identical":
        return "identical on every prompt"
    return f"{c.verdict}{p}"


def first_line(results: Results) -> str:
    """The result in one paragraph: the last round against the first model and against the offline run."""
    study, metric = results.study, results.study.primary
    if not results.online:
        return "No round is finished yet."
    last = results.online[-1]
    so_far = f"So far ({len(results.online)} of {study.rounds} rounds): " if len(results.online) < study.rounds else ""
    steps = sum(results.facts(each)["steps"] for each in results.rounds if each.number)
    mean, against = results.estimate(last, metric), results.against_first(metric).get(last)
    if mean is None or against is None:
        return f"{so_far}nothing to compare: no held-out answer has a {metric}."
    line = (
        f"{so_far}After {counted(len(results.online), 'round')} ({counted(steps, 'step')}), {metric} is"
        f" {of_estimate(mean)}, {of_comparison(against)} against the first model: {verdict(against)}."
    )
    if offline := results.against_offline(metric):
        mean = results.estimate(OFFLINE, metric)
        assert mean is not None
        line += (
            f" The offline run with as many steps has {of_estimate(mean)}; the last round has {of_comparison(offline)}"
            f" against it: {verdict(offline)}."
        )
    return line


def text(results: Results) -> str:
    """The report as Markdown."""
    study = results.study
    mean = results.estimate(results.online[-1], study.primary) if results.online else None
    prompts = f"{mean.examples} held-out prompts, {counted(study.answers, 'answer')} to each" if mean else ""
    lines = [f"# Rounds of {markdown(study.path.stem)}", "", *([markdown(study.note), ""] if study.note else [])]
    lines += [markdown(first_line(results)), ""]
    if not results.online:
        return "\n".join(lines)
    lines += [
        f"Intervals (95%) and tests are over {prompts}, paired by prompt. They treat each run as fixed: runs with"
        " other seeds may differ. Only the first metric is tested, with Holm's correction for the number of models.",
        "",
        f"![Metrics by round]({PLOT})",
        "",
        "## Means on held-out prompts",
        "",
        *_table(["model", *results.metrics], [_means(results, name) for name in results.values]),
        "",
        "## Differences from the first model",
        "",
        *_differences(results),
        "",
    ]
    if offline := [c for metric in results.metrics if (c := results.against_offline(metric))]:
        lines += ["## The last round against the offline run", "", f"Both took {_steps(results)} optimizer steps.", ""]
        lines += [*_table(["metric", "difference", "verdict"], [_row(c) for c in offline]), ""]
    lines += ["## Metrics", "", *(f"- {name}: {meaning_of(name).meaning}" for name in results.metrics), ""]
    lines += ["A difference of length and KL is a ratio if both means are positive. KL is from the first model.", ""]
    if results.relative:
        lines += [RELATIVE, ""]
    lines += ["## Training", "", *_training(results), ""]
    reference = study.reference or "as configured"
    lines += [f"Reference: {reference}. Optimizer's state: {study.optimizer}. Objective: {study.objective}.", ""]
    return "\n".join(lines)


def _steps(results: Results) -> int:
    return sum(int(results.facts(each)["steps"]) for each in results.rounds if each.number)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [[markdown(cell) for cell in row] for row in (head, *rows)]
    ruled = [lines[0], ["---"] * len(head), *lines[1:]]
    return [f"| {' | '.join(row)} |" for row in ruled]


def _means(results: Results, name: str) -> list[str]:
    estimates = [results.estimate(name, metric) for metric in results.metrics]
    return [name, *("" if each is None else of_estimate(each) for each in estimates)]


def _row(c: Comparison) -> list[str]:
    return [c.metric, of_comparison(c), verdict(c)]


def _differences(results: Results) -> list[str]:
    rows = []
    for metric in results.metrics:
        if metric != "kl":  # that of the first model is 0
            rows += [[metric, name, of_comparison(c), verdict(c)] for name, c in results.against_first(metric).items()]
    return _table(["metric", "model", "difference", "verdict"], rows)


def _training(results: Results) -> list[str]:
    rows = []
    for each in results.rounds:
        facts = results.facts(each)
        feedback = listed(facts.get("feedback", {}))
        seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in facts["seconds"].items())
        rows.append([each.name, feedback or str(each.labels), str(facts["steps"]), str(facts["seed"]), seconds])
    return _table(["model", "feedback", "steps", "seed", "seconds"], rows)


def data(results: Results) -> dict[str, Any]:
    """The numbers of the report."""
    study = results.study
    differences = {metric: results.against_first(metric) for metric in results.metrics}
    offline = {metric: results.against_offline(metric) for metric in results.metrics}
    content: dict[str, Any] = _finite(
        {
            "file": str(study.path),
            "primary": study.primary,
            "summary": first_line(results),
            "rounds": {"finished": len(results.online), "planned": study.rounds},
            "means": {
                name: {metric: asdict(e) for metric in results.metrics if (e := results.estimate(name, metric))}
                for name in results.values
            },
            "against_first": {
                metric: {name: _compared(c) for name, c in comparisons.items()}
                for metric, comparisons in differences.items()
            },
            "against_offline": {metric: _compared(c) for metric, c in offline.items() if c},
            "training": {each.name: results.facts(each) for each in results.rounds},
            "by": provenance(),
        }
    )
    return content


def _compared(c: Comparison) -> dict[str, Any]:
    kept = ("scale", "effect", "low", "high", "p", "adjusted", "decision", "examples")
    return {name: getattr(c, name) for name in kept} | {"verdict": verdict(c), "detectable": c.detectable}


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON cannot express by None."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(results: Results) -> Figure:
    """Each metric over rounds with its 95% intervals over prompts, and the offline run as a dashed line."""
    metrics = results.metrics
    columns = 2 if len(metrics) > 1 else 1
    lines = math.ceil(len(metrics) / columns) or 1
    figure = Figure(figsize=(WIDTH, 2.6 * lines), layout="constrained")
    for place, metric in enumerate(metrics, start=1):
        axis = figure.add_subplot(lines, columns, place)
        estimates = [results.estimate(name, metric) for name in (FIRST, *results.online)]
        points = [(number, e) for number, e in enumerate(estimates) if e is not None]
        means = [e.value for _, e in points]
        errors = [[e.value - e.low for _, e in points], [e.high - e.value for _, e in points]]
        axis.errorbar([number for number, _ in points], means, yerr=errors, marker="o", capsize=3, color="#0072B2")
        if OFFLINE in results.values and (offline := results.estimate(OFFLINE, metric)):
            axis.axhline(offline.value, color="#777777", linestyle="--", label="offline run")
            axis.axhspan(offline.low, offline.high, color="#777777", alpha=0.15)
            axis.legend(frameon=False, fontsize=8)
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel("round (0: first model)", fontsize=8)
        axis.set_xticks(range(len(estimates)))
        axis.tick_params(labelsize=8)
    return figure
