"""The report of a study: ``report.md`` with figures beside it, and a self-contained ``report.html``.

Both are computed from ``values.csv.gz``, ``record.json`` and the study's YAML.
"""

from __future__ import annotations

import base64
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from halos_pl.common.files import write
from halos_pl.common.messages import counted, plain
from halos_pl.evaluation.metrics import PER_TOKEN, RATIOS, is_share, metric_of
from halos_pl.provenance import NO_CHECKOUT
from halos_pl.study import tables
from halos_pl.study.comparison import Comparison
from halos_pl.study.digits import decimals, number, of_comparison, of_estimate, p_value, short
from halos_pl.study.drawing import NARROW, png
from halos_pl.study.figures import CURVES, PICTURES, unit_of
from halos_pl.study.first_line import first_line
from halos_pl.study.headline import headline
from halos_pl.study.markdown import escaped, fence
from halos_pl.study.results import Results
from halos_pl.study.spec import BEFORE, command, default_folder
from halos_pl.study.statistics import Estimate, estimate
from halos_pl.study.trivial import STRATA

METHODS = (
    "An example is everything measured on one prompt. Differences are paired by example and by seed. With several "
    "seeds they are tested by a t test over seeds and examples: the variance between runs is pooled over all arms, and "
    "the tests with each arm's own variance must agree. With one seed they are tested over examples (McNemar's test "
    "for binary metrics, otherwise a permutation test). {family} The other metrics are exploratory: they have "
    "uncorrected 95% intervals and no decision. 'Differs in these runs only' is tested over examples, with the runs "
    "taken as fixed. Positive metrics such as KL are compared by ratios, on the log scale, unless the mean of a run "
    "is not above 0. '80% power for' is the smallest difference that the corrected test would detect with that "
    "probability, given the variances estimated here."
)
SEVERAL = (
    "On the primary metric, p is corrected for all comparisons with the baseline ({method}): at most 5% of studies "
    "without any difference claim one."
)
UNCONTROLLED = (
    "An example is everything measured on one prompt. Differences are paired by example and by seed. As the study has "
    "no positive control, nothing is tested: all differences have uncorrected 95% intervals and no decision. Positive "
    "metrics such as KL are compared by ratios, on the log scale, unless the mean of a run is not above 0."
)
ALONE = "On the primary metric, the arm is tested against the model before training."
TEMPLATES = Environment(loader=PackageLoader("halos_pl.study", "."), autoescape=lambda name: ".html" in (name or ""))


def _ends(results: Results) -> list[dict[str, Any]]:
    """Training figures at the last step: the mean over seeds, and each seed."""
    rows = []
    for arm in results.ranked:
        figures = []
        for name in CURVES:
            last = [curve[max(curve, key=int)] for curve in results.figures(arm, name)]
            each = f" ({', '.join(map(short, last))})" if len(last) > 1 else ""
            figures.append(f"{short(float(np.mean(last)))}{each}" if last else "")
        rows.append({"arm": arm.name, "figures": figures})
    return rows if any(any(row["figures"]) for row in rows) else []


def _perplexity(metric: str, e: Estimate) -> str:
    """The perplexity of a negative log-prob per token."""
    return f" (perplexity {math.exp(e.value):.3g})" if metric in PER_TOKEN else ""


def _of(c: Comparison, e: Estimate) -> str:
    """The seeds of a difference, if the arm has more than it shares with its reference."""
    return f" (of {counted(c.seeds, 'seed')})" if c.seeds < e.seeds else ""


def _decided(c: Comparison) -> dict[str, str]:
    """The cells of a table with the decision."""
    p = "" if math.isnan(c.p) else p_value(c.p if c.adjusted is None else c.adjusted)
    return {
        "p": p.removeprefix("p ").removeprefix("= "),
        "verdict": c.verdict,
        "how": "significant" if c.significant else "runs" if c.runs_only else "",
    }


def _row(metric: str, name: str, e: Estimate | None, places: int, *, none: bool) -> dict[str, Any]:
    """The cells that every row of a table has.

    Args:
        metric, name: metric and arm.
        e: mean; None if it was not measured.
        places: decimals of a mean without an interval, the same for all rows, unless it would round the mean to 0.
        none: whether this is a baseline that is not an arm.
    """
    if e and e.value and not round(e.value, places):
        places = max(places, decimals(e.value, e.low, e.high))
    return {
        "arm": name,
        "none": none,
        "mean": number(e.value, places) if e else "–",
        "figure": f"{of_estimate(e)}{_perplexity(metric, e)}" if e else "–",
        "n": (str(e.examples) if none else f"{e.examples} x {e.seeds}") if e else "–",
        **dict.fromkeys(("difference", "p", "verdict", "how", "learned"), ""),
    }


def _table(results: Results, metric: str) -> dict[str, Any]:
    """One metric: a row per arm, the best first, and one per baseline that is not an arm."""
    several = len(results.study.arms) > 1
    against, learned, rows = results.comparisons(metric), results.learned(metric), []
    estimates = [e for (name, _), e in results.estimates.items() if name == metric]
    places = statistics.median_low(decimals(e.value, e.low, e.high) for e in estimates) if estimates else 0
    for arm in results.ranked:
        e, c, before = results.estimates.get((metric, arm.name)), against.get(arm.name), learned.get(arm.name)
        row = _row(metric, arm.name, e, places, none=False)
        row["verdict"] = "missing" if e is None else "baseline" if several else "exploratory"
        if c is not None and e is not None:
            row |= {
                "difference": f"{of_comparison(c)}{_of(c, e)}",
                **_decided(c),
            }
        if before is not None:
            row["learned"] = of_comparison(before)
            if not before.exploratory:
                row |= _decided(before)
        rows.append(row)
    for name in results.baselines:
        values = results.of_baseline(metric, name)
        e = None if values is None else estimate(values, share=is_share(metric), positive=metric in RATIOS)
        rows.append(_row(metric, name, e, places, none=True) | {"verdict": "not trained" if e else "not measured"})
    _, what, more = metric_of(metric)
    wanted = "" if more is None else "; higher is better" if more else "; lower is better"
    return {
        "metric": metric,
        "head": f"{metric}, {unit_of(metric)}",
        "primary": metric == results.primary,
        "what": f"{what[0].upper()}{what[1:]}{wanted}",
        "rows": rows,
    }


def _by_length(results: Results) -> list[dict[str, Any]]:
    """Reward accuracy by which completion has fewer words, and the mean of pairs whose lengths differ."""
    rows = []
    every = [*((arm.name, False) for arm in results.ranked), *((name, True) for name in results.baselines)]
    for name, none in every:
        cells, ends = [], []
        for stratum, side in STRATA.items():
            values = results.stratum(name, stratum)
            if values is None:
                cells.append("–")
                continue
            e = estimate(values, share=True)
            cells.append(f"{of_estimate(e)} ({e.examples})")
            if side:
                ends.append(e.value)
        balanced = f"{np.mean(ends):.2f}" if len(ends) == 2 else "–"
        if any(cell != "–" for cell in cells):
            rows.append({"arm": name, "none": none, "figures": [*cells, balanced]})
    return rows


def _listed(names: list[str]) -> str:
    """Names of runs, seeds of the same arm together: ``kto/seed-0, seed-1; dpo/seed-0``."""
    arms: dict[str, list[str]] = {}
    for arm, _, seed in (name.rpartition("/") for name in names):
        arms.setdefault(arm, []).append(seed)
    return "; ".join(f"{arm}/{', '.join(seeds)}" for arm, seeds in arms.items())


def _made(by: dict[str, Any], *, named: bool) -> str:
    """The runs made by one combination of code, libraries and machine; with their names if there are several such."""
    runs = counted(by["runs"], "run") + (f" ({_listed(by.get('names', []))})" if named else "")
    if "revision" not in by:
        return f"{runs} without a recorded revision"
    place, version = by["revision"], by.get("halos_pl")
    place = place if place == NO_CHECKOUT else f"at revision {place}"
    code = f"{place}" if version in (None, by["revision"]) else f"by halos_pl {version}, in a folder {place}"
    versions = ", ".join(f"{name} {number}" for name, number in by.get("versions", {}).items())
    return f"{runs} {code}; {versions}; {by.get('machine')}"


def content(results: Results) -> dict[str, Any]:
    """The content of both forms of the report."""
    arms, record = results.ranked, results.record
    study = record.get("study", str(results.study.path))
    overrides = record.get("overrides")
    out = Path(record.get("out", results.out))
    names = [study, *(["--overrides", overrides] if overrides else [])]
    if out != default_folder(study, overrides):
        names += ["--out", str(out)]
    names += ["--anyway"] if record.get("anyway") else []
    tested = any(c.margin is not None for c in results.comparisons(results.primary).values())
    method = "Bonferroni, since equivalence is tested too" if tested else "Holm 1979"
    family = SEVERAL.format(method=method) if len(results.study.arms) > 1 else ALONE
    metrics = [_table(results, metric) for metric in results.study.metrics]
    rows = [row["arm"] for row in metrics[0]["rows"]]
    verdicts = record.get("verdicts", {})
    planned = [run for run in (*results.study.trials(out), *results.study.runs(out)) if run.arm.decided]
    unrecorded = [run for run in results.runs if run not in results.done] if not record else []
    return {
        "title": Path(study).stem.replace("_", " ") if record else results.out.resolve().name.replace("_", " "),
        "overview": [(name, [table["rows"][i] for table in metrics]) for i, name in enumerate(rows)],
        "note": results.study.note,
        "headline": first_line(results),
        "details": headline(results),
        "tables": metrics,
        "methods": METHODS.format(family=family) if results.claims else UNCONTROLLED,
        "claims": results.claims,
        "versus": results.baseline.name if len(results.study.arms) > 1 else BEFORE,
        "several": len(results.study.arms) > 1,
        "baseline": results.baseline.name,
        "learned": bool(results.learned(results.primary)),
        "lengths": _by_length(results),
        "arms": [
            {
                "name": arm.name,
                "verdict": verdicts.get(arm.name, "not recorded" if not record else "no run finished yet"),
                "seeds": len(results.seeds(arm)),
            }
            for arm in arms
        ],
        "missing": [
            *record.get("missing", []),
            *({"run": str(run.folder), "state": "not recorded", "error": ""} for run in unrecorded),
        ],
        "command": command(["ablate", *names]),
        "commands": [(command(run.fit), command(results.study.evaluation(run))) for run in planned],
        "curves": [f"{curve.title}, {curve.unit}" for curve in CURVES.values()],
        "ends": _ends(results),
        "tuning": tables.tuning(results),
        "trained": tables.trained(results),
        "made": [_made(by, named=len(record["made"]) > 1) for by in record.get("made", [])],
        "data": [*record.get("data", [])],
    }


def write_report(results: Results) -> Path:
    """Writes both forms into the folder of a study, finished or not, from :meth:`Results.recorded`.

    Returns:
        the HTML file.
    """
    results = results.recorded()
    pictures = []
    for name, (title, caption, draw) in PICTURES.items():
        path = results.out / name
        if (figure := draw(results)) is None:
            path.unlink(missing_ok=True)  # from an earlier report
            continue
        data = png(figure)
        path.write_bytes(data)
        small = png(draw(results, NARROW) or figure)
        shown = {"wide": base64.b64encode(data).decode(), "narrow": base64.b64encode(small).decode()}
        pictures.append({"title": title, "caption": caption, "name": name, **shown})
    texts = content(results)
    commands = "\n".join(["", *(line for pair in texts["commands"] for line in pair)])
    commands = plain(f"{texts['command']}\n{commands}")
    md = {**escaped(texts), "commands": commands, "fence": fence(commands)}
    for name, values in {"report.md": md, "report.html": {**texts, "commands": commands}}.items():
        text = TEMPLATES.get_template(f"{name}.jinja").render({**values, "pictures": pictures})
        write(results.out / name, plain(text))
    return results.out / "report.html"
