"""A report's summary of its primary metric: every decision, and the effects that could have been detected."""

from __future__ import annotations

from collections import defaultdict

from halos_pl.common.messages import counted
from halos_pl.evaluation.metrics import metric_of
from halos_pl.study import tables
from halos_pl.study.comparison import Comparison, ratio
from halos_pl.study.digits import of_comparison, of_estimate
from halos_pl.study.results import Results


def headline(results: Results) -> list[str]:
    """The decisions on the primary metric, one sentence each; with a detectable size for arms that have one."""
    metric, study = results.primary, results.study
    base = results.estimates.get((metric, results.baseline.name))
    alone = len(study.arms) == 1
    against = results.learned(metric) if alone else results.comparisons(metric)
    lines = []
    if base is not None and (against or alone):
        n = f"{counted(base.seeds, 'seed')} and {counted(base.examples, 'prompt')}"
        role = "" if alone else " (baseline)"
        lines.append(f"{results.baseline.name}{role}: {metric} {of_estimate(base)} over {n}.")
        groups: dict[str, list[Comparison]] = defaultdict(list)
        for c in sorted(against.values(), key=lambda c: not c.significant):
            groups[_group(c)].append(c)
        for why, some in groups.items():
            each = [f"{c.arm} {of_comparison(c)}, p = {c.adjusted:.2g}" if c.significant else c.arm for c in some]
            lines.append(f"{why[0].upper()}{why[1:]}: {'; '.join(each)}{_besides(some)}.")
    if results.control is not None and results.control.holds:
        lines.append(f"Positive control: {results.control.why}.")
    if study.equivalence is not None and results.claims and any(c.margin is None for c in against.values()):
        lines.append(
            f"Equivalence was not tested: its margin is a factor of {study.equivalence:g}, but there are no ratios, as"
            f" the mean {metric} of a run is not above 0."
        )
    if (planned := results.record.get("primary")) not in (None, metric):
        lines.append(
            f"The primary metric was changed from {planned} to {metric} after the study began: if it was chosen for its"
            " results, more than 5% of such claims are false."
        )
    lines += [*tables.notes(results), *tables.unequal(results)]
    if weak := results.record.get("anyway"):
        lines.append(f"Before the first run, {weak}; it was run with --anyway.")
    if missing := len(results.runs) - len(results.done):
        lines.append(f"Missing: {missing} of {len(results.runs)} runs.")
    return lines


def _group(c: Comparison) -> str:
    """The decision on this comparison, and on others like it."""
    if not c.significant:
        return c.decision if c.decision == "not significant" else c.verdict
    more = metric_of(c.metric)[2]
    how = "different from" if more is None else "better than" if (c.effect > c.null) == more else "worse than"
    return f"{c.verdict}, {how} {c.reference}"


def _besides(some: list[Comparison]) -> str:
    """The effect that these comparisons could have detected, and the arms for which there is none."""
    if some[0].decision != "not significant":
        return ""
    sizes = {c.arm: c.detectable for c in some}
    detected = [size for size in sizes.values() if size is not None]
    none = [arm for arm, size in sizes.items() if size is None]
    parts = []
    if detected:
        of = "" if not none else f" of {'; '.join(arm for arm in sizes if arm not in none)}"
        most = max(detected)
        size = f"a factor of {ratio(most)}" if some[0].scale == "ratio" else f"a difference of {most:.2g}"
        parts.append(f"80% power{of} for {size}")
    if none:
        of = "" if not detected else f" of {'; '.join(none)}"
        parts.append(f"too few values{of} for 80% power at any difference")
    return f" ({', '.join(parts)})"
