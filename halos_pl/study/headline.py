"""What a report says of its primary metric in a few sentences: every decision, and what could have been found."""

from __future__ import annotations

from collections import defaultdict

from halos_pl.common.messages import counted
from halos_pl.evaluation.metrics import METRICS
from halos_pl.study.comparison import Comparison, ratio
from halos_pl.study.digits import of_comparison, of_estimate
from halos_pl.study.results import Results


def headline(results: Results) -> list[str]:
    """The decisions on the primary metric. A detectable size is stated only of arms that have one."""
    metric, study = results.primary, results.study
    base = results.estimates.get((metric, results.baseline.name))
    alone = len(study.arms) == 1
    against = results.learned(metric) if alone else results.comparisons(metric)
    said = []
    if base is not None and (against or alone):
        n = f"{counted(base.seeds, 'seed')} and {counted(base.examples, 'prompt')}"
        role = "" if alone else " (baseline)"
        said.append(f"{results.baseline.name}{role}: {metric} {of_estimate(base)} over {n}.")
        groups: dict[str, list[Comparison]] = defaultdict(list)
        for c in sorted(against.values(), key=lambda c: not c.significant):
            groups[_group(c)].append(c)
        for why, some in groups.items():
            each = [f"{c.arm} {of_comparison(c)}, p = {c.adjusted:.2g}" if c.significant else c.arm for c in some]
            said.append(f"{why[0].upper()}{why[1:]}: {'; '.join(each)}{_besides(some)}.")
    if study.equivalence is not None and any(c.margin is None for c in against.values()):
        said.append(
            f"Equivalence was not tested: its margin, a factor of {study.equivalence:g}, needs ratios, and the mean"
            f" {metric} of a run is not above 0."
        )
    if (planned := results.record.get("primary")) not in (None, metric):
        said.append(
            f"The primary metric was {planned} when the study began, and is {metric} now: a metric"
            " chosen after the runs may be the one that came out best, and claims about it be wrong in more than 5 % of"
            " studies."
        )
    if missing := len(results.runs) - len(results.done):
        said.append(f"Missing: {missing} of {len(results.runs)} runs.")
    return said


def _group(c: Comparison) -> str:
    """What is said of this comparison, and of others like it."""
    if not c.significant:
        return c.decision if c.decision == "not significant" else c.said
    more = METRICS[c.metric][2]
    how = "different from" if more is None else "better than" if (c.effect > c.null) == more else "worse than"
    return f"{c.said}, {how} {c.reference}"


def _besides(some: list[Comparison]) -> str:
    """What these comparisons could have found; of each one that could find nothing that is said."""
    if some[0].decision != "not significant":
        return ""
    sizes = {c.arm: c.detectable for c in some}
    known = [size for size in sizes.values() if size is not None]
    none = [arm for arm, size in sizes.items() if size is None]
    said = []
    if known:
        of = "" if not none else f" of {'; '.join(arm for arm in sizes if arm not in none)}"
        most = f"a factor of {ratio(max(known))}" if some[0].scale == "ratio" else f"a difference of {max(known):.2g}"
        said.append(f"80 % power{of} for {most}")
    if none:
        of = "" if not known else f" of {'; '.join(none)}"
        said.append(f"too few values{of} for 80 % power at any difference")
    return f" ({', '.join(said)})"
