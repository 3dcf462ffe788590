"""The first sentence of a study's report: which arm won, by how much, and whether to believe it."""

from __future__ import annotations

import math

from halos_pl.study.comparison import Comparison
from halos_pl.study.digits import of_comparison, of_estimate, p_value
from halos_pl.study.evaluate import METRICS
from halos_pl.study.results import Results


def first_line(results: Results) -> str:
    """One sentence on the primary metric. Says first of all where no arm is better than the model before training."""
    metric = results.primary
    _, what, more = METRICS[metric]
    measured = [arm for arm in results.ranked if (metric, arm.name) in results.estimates]
    if results.baseline not in measured or (len(measured) == 1 < len(results.study.arms)):
        lacks = f", none of {results.baseline.name}" if measured and results.baseline not in measured else ""
        return f"Nothing to compare yet: {len(results.done)} of {len(results.runs)} runs are finished{lacks}."
    best = measured[0]
    mean = of_estimate(results.estimates[metric, best.name])
    runs, arms = (len(results.done), len(results.runs)), (len(measured), len(results.study.arms))
    so_far = f"So far ({runs[0]} of {runs[1]} runs, {arms[0]} of {arms[1]} arms): " if runs[0] < runs[1] else ""
    learned = results.learned(metric)
    if results.nothing_learned:
        c = learned.get(best.name) or next(iter(learned.values()))
        return (
            f"{so_far}Nothing was learned that these data can show: on {metric} ({what}) no arm is significantly better"
            f" than the model before training; the best, {c.arm}, has {mean}, {of_comparison(c)} against the"
            f" untrained model{_p(c)}."
        )
    against = results.comparisons(metric)
    if best is not results.baseline:
        found, sign = against.get(best.name), f"against {results.baseline.name}"
    else:  # the next best, whose difference to the baseline is the one that was tested
        found = next((against[arm.name] for arm in measured[1:] if arm.name in against), None)
        sign = f"{found.arm} comes next, against {best.name}" if found else ""
    means = {arm.name: results.estimates[metric, arm.name].value for arm in measured}
    level = [name for name, value in means.items() if math.isclose(value, means[best.name])]
    won = "won" if more is not None else "is highest"
    line = f"{best.name} {won} on {metric} ({what}) with {mean}"
    if len(level) > 1:
        line = f"{' and '.join(level)} are level on {metric} ({what}) with {mean}"
    if found is None:
        alone = "there is no other arm to compare it with"
        return f"{so_far}{line}; {'no other arm shares a seed with it' if len(measured) > 1 else alone}."
    return f"{so_far}{line}; {sign}: {of_comparison(found)}; {belief(found)}."


def _p(c: Comparison) -> str:
    return f" ({p_value(c.adjusted if c.adjusted is not None else c.p)})" if c.p == c.p else ""


def belief(c: Comparison) -> str:
    """Whether to believe a difference, and why."""
    return {
        "significant over seeds": f"believe it: it is significant over seeds{_p(c)}",
        "differs in these runs only": "do not generalise it: these runs differ, and other seeds may not",
        "equivalent": f"count them as equal: they are {c.said}",
        "identical": "count them as equal: no example differs",
        "one seed so far": "too early to say: there is one seed so far",
        "exploratory": "do not rely on it: it was not tested",
    }.get(c.decision, f"do not believe it: it is {c.said}{_p(c)}")
