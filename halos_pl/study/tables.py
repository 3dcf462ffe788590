"""Tables of a report besides the metrics: the tuning, and what the arms were trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

from halos_pl.common.messages import counted
from halos_pl.evaluation.metrics import metric_of
from halos_pl.study.choice import Choice, at_edge
from halos_pl.study.digits import short
from halos_pl.study.recorded import AMOUNTS, CLIPPED
from halos_pl.study.results import Results
from halos_pl.study.tune import is_numeric, text_of

#: The balance of the classes, by step.
RHO = "training/rho"
#: Difference in the share of clipped steps that the report points out.
CLIPPED_APART = 0.25
#: Ratio of two arms' balances of the classes that the report points out.
BALANCES_APART = 1.1


def tuning(results: Results) -> dict[str, Any] | None:
    """The curve of each arm and its chosen value; None if the study tunes nothing."""
    if (tune := results.study.tune) is None:
        return None
    values = list(dict.fromkeys(value for choice in results.choices for value in choice.curve))
    values = sorted(values, key=float) if is_numeric(values) else values
    examples = results.record.get("tuning", {}).get("examples")
    split = f"a validation split of {counted(examples, 'prompt')}" if examples else "a validation split"
    better = "highest" if metric_of(tune.metric).higher_is_better else "lowest"
    seeds = f"seed{'s' * (len(tune.seeds) > 1)} {', '.join(map(str, tune.seeds))}"
    return {
        "what": f"For each arm, the value of {tune.option} with the {better} mean {tune.metric} ({seeds}) on {split},"
        " which nothing else in this report uses. Of equal means the first is chosen; a value with a run that diverged"
        " is never chosen.",
        "values": [text_of(value) for value in values],
        "rows": [
            {"arm": choice.arm, "cells": [_cell(choice, value) for value in values]} for choice in results.choices
        ],
        "notes": notes(results),
    }


def _cell(choice: Choice, value: Any) -> dict[str, Any]:
    """A point of an arm's curve: the mean over seeds, and each seed."""
    each = choice.curve.get(value)
    if each is None:
        text = "not tried"
    elif len(each) < choice.planned:
        text = "missing"
    elif not all(map(math.isfinite, each)):
        text = "diverged"
    else:
        text = short(fmean(each)) + (f" ({', '.join(map(short, each))})" if len(each) > 1 else "")
    return {"text": text, "chosen": choice.value is not None and value == choice.value}


def notes(results: Results) -> list[str]:
    """A sentence on arms whose choice is at the edge of their values, and one for each arm without a choice."""
    untuned = [f"{choice.arm}: {choice.why_not}." for choice in results.choices if choice.why_not]
    return [*filter(None, [at_edge(results.choices)]), *untuned]


def trained(results: Results) -> dict[str, Any] | None:
    """The rows, tokens and optimizer steps that each arm was trained on; None if no run has recorded them."""
    found = {arm.name: results.figures(arm, "trained") for arm in results.ranked}
    if not any(found.values()):
        return None
    rows, balances = [], _balances(results)
    for name, runs in found.items():
        cells = [_range(sorted({run[key] for run in runs if key in run})) for key in AMOUNTS]
        rows.append({"arm": name, "figures": [*cells, _percent(clipped(runs)), _mean_text(balances.get(name, []))]})
    return {
        "heads": [*AMOUNTS.values(), "steps with a clipped gradient", "ρ"],
        "rows": rows,
        "differ": " ".join(unequal(results)),
    }


def unequal(results: Results) -> list[str]:
    """A sentence on each way in which the arms were trained differently beside their settings."""
    return list(filter(None, (_amounts(results), _clipping(results), _weighting(results))))


def _amounts(results: Results) -> str:
    """A sentence on the amounts in which the arms differ, over the seeds that all have; empty if they do not."""
    arms = [arm for arm in results.ranked if results.figures(arm, "trained")]
    seeds = set.intersection(*(set(results.seeds(arm)) for arm in arms)) if arms else set()
    parts = []
    for key, name in AMOUNTS.items():
        runs = {arm.name: results.figures(arm, "trained", seeds) for arm in arms}
        amounts = {
            arm: [run[key] for run in each] for arm, each in runs.items() if each and all(key in r for r in each)
        }
        if len({tuple(each) for each in amounts.values()}) > 1:
            ranked = sorted(amounts, key=lambda arm: fmean(amounts[arm]))
            least, most = (f"{arm}: {fmean(amounts[arm]):,.0f}" for arm in (ranked[0], ranked[-1]))
            parts.append(f"{name} ({least}; {most})")
    return f"The arms were not trained on equal amounts: they differ in {', '.join(parts)}." if parts else ""


def _clipping(results: Results) -> str:
    """A sentence on arms whose gradients were clipped in very different shares of their steps; empty without such."""
    found = {arm.name: clipped(results.figures(arm, "trained")) for arm in results.ranked}
    ranked = sorted((fmean(shares), arm) for arm, shares in found.items() if shares)
    if not ranked or ranked[-1][0] - ranked[0][0] <= CLIPPED_APART:
        return ""
    (least, one), (most, other) = ranked[0], ranked[-1]
    return (
        f"The arms also differ in how often their gradient was clipped ({one}: {100 * least:.0f}% of the steps;"
        f" {other}: {100 * most:.0f}%), which changes what an arm learns: raise trainer.gradient_clip_val to compare"
        " objectives."
    )


def _weighting(results: Results) -> str:
    """A sentence on arms in which the classes pull with different balance; empty without such."""
    ranked = sorted((geometric_mean(each), arm) for arm, each in _balances(results).items())
    if not ranked or ranked[-1][0] / ranked[0][0] <= BALANCES_APART:
        return ""
    (least, one), (most, other) = ranked[0], ranked[-1]
    return (
        f"The arms also differ in ρ, how hard desirable rows pull compared with undesirable ones ({one}: {least:.2f};"
        f" {other}: {most:.2f}): differences between arms may come from this alone, whatever else their losses do."
    )


def _balances(results: Results) -> dict[str, list[float]]:
    """The runs' balances of the classes, of arms that have any."""
    found = {arm.name: map(balance, results.figures(arm, RHO)) for arm in results.ranked}
    return {arm: known for arm, each in found.items() if (known := [one for one in each if one is not None])}


def balance(curve: Mapping[str, float]) -> float | None:
    """The geometric mean of a run's ρ over the steps after the first that have one; None if none has.

    Args:
        curve: ρ by step. In the first step, the policy is its reference.
    """
    later = [rho for step, rho in curve.items() if int(step) and 0 < rho < math.inf]
    return geometric_mean(later) if later else None


def _mean_text(runs: Sequence[float]) -> str:
    return f"{geometric_mean(runs):.2f}" if runs else "–"


def clipped(runs: Sequence[Mapping[str, float]]) -> list[float]:
    """The share of clipped steps of each of the runs that have recorded it; ``runs`` are their figures ``trained``."""
    return [run[CLIPPED] for run in runs if CLIPPED in run]


def _percent(shares: Sequence[float]) -> str:
    """The mean of some shares."""
    return f"{100 * fmean(shares):.0f}%" if shares else "–"


def _range(amounts: Sequence[float]) -> str:
    """An amount, or the range over seeds."""
    if not amounts:
        return "–"
    low, high = f"{amounts[0]:,.0f}", f"{amounts[-1]:,.0f}"
    return low if low == high else f"{low} to {high}"
