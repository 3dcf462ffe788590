"""The first sentence of a report: which arm won, by how much, and whether to believe it."""

from __future__ import annotations

import math

from halos_pl.common.messages import counted
from halos_pl.evaluation.metrics import metric_of
from halos_pl.study.comparison import Comparison
from halos_pl.study.digits import of_comparison, of_estimate, p_value
from halos_pl.study.results import Results


def first_line(results: Results) -> str:
    """One sentence on the primary metric; before that, whether the positive control holds and any arm has learned."""
    metric = results.primary
    _, what, more = metric_of(metric)
    measured = [arm for arm in results.ranked if (metric, arm.name) in results.estimates]
    done, runs, arms = len(results.done), len(results.runs), len(results.study.arms)
    so_far = f"So far ({done} of {runs} runs, {len(measured)} of {arms} arms): " if done < runs else ""
    if done and results.control is not None and not results.control.holds:
        return f"{so_far}No positive control: {results.control.why}; so this study claims nothing."
    if done and not measured:
        return f"Nothing to compare: none of {counted(done, 'finished run')} has {metric}, the primary metric."
    if results.baseline not in measured or (len(measured) == 1 < arms):
        lacks = (
            f", none of the baseline {results.baseline.name}" if measured and results.baseline not in measured else ""
        )
        return f"Nothing to compare yet: {done} of {runs} runs finished{lacks}."
    best = measured[0]
    means = {arm.name: results.estimates[metric, arm.name] for arm in measured}
    mean = of_estimate(means[best.name])
    learned = results.learned(metric)
    if results.nothing_learned:
        c = learned.get(best.name) or next(iter(learned.values()))
        return (
            f"{so_far}No sign of learning: on {metric} ({what}), no arm is significantly better than the untrained"
            f" model; the best, {c.arm}, has {of_estimate(means[c.arm])}, a {_kind(c)} of {of_comparison(c)}{_p(c)}."
        )
    if arms == 1:
        gain = learned.get(best.name)
        if gain is None:
            return f"{so_far}{best.name} has {mean} on {metric} ({what}); there is nothing to compare it with."
        gained = f"{of_comparison(gain)} against the untrained model; {belief(gain)}"
        return f"{so_far}{best.name} has {mean} on {metric} ({what}), {gained}."
    against = results.comparisons(metric)
    if best is not results.baseline:
        comparison, before = against.get(best.name), ""
    else:  # the test is of the second best against the baseline
        comparison = next((against[arm.name] for arm in measured[1:] if arm.name in against), None)
        before = f"{comparison.arm} is next, " if comparison else ""
    level = [name for name, e in means.items() if math.isclose(e.value, means[best.name].value)]
    line = f"{best.name} {'won' if more is not None else 'is highest'} on {metric} ({what}) with {mean}"
    if len(level) > 1:
        line = f"{' and '.join(level)} are tied on {metric} ({what}) with {mean}"
    if comparison is None:
        return f"{so_far}{line}; no other arm shares a seed with it."
    difference = f"{before}{of_comparison(comparison)} against {results.baseline.name}"
    # The means are over all runs, the difference over seeds that both arms have; ratios are of geometric means.
    if (comparison.effect - comparison.null) * (1 if more is not False else -1) * (-1 if before else 1) < 0:
        pairs = "" if comparison.scale == "difference" else f"{_kind(comparison)}s of "
        of = f"{pairs}{counted(comparison.seeds, 'seed')} that both have"
        return f"{so_far}{line}; but over {of}, {difference}: do not believe the order, as these disagree."
    return f"{so_far}{line}; {difference}; {belief(comparison)}."


def _kind(c: Comparison) -> str:
    return "ratio" if c.scale == "ratio" else "difference"


def _p(c: Comparison) -> str:
    return f" ({p_value(c.adjusted if c.adjusted is not None else c.p)})" if c.p == c.p else ""


def belief(c: Comparison) -> str:
    """Whether to believe a difference, and why."""
    return {
        "significant over seeds": f"believe it: the difference is significant over seeds{_p(c)}",
        "differs in these runs only": "do not generalize: these runs differ, but runs with other seeds may not",
        "equivalent": f"treat them as equal: they are {c.verdict}",
        "identical": "these runs agree on every example, which does not show that the arms are equivalent",
        "one seed so far": "too early to say: only one seed has finished",
        "exploratory": "do not rely on it: it was not tested",
    }.get(c.decision, f"do not believe it: the difference is not significant{_p(c)}")
