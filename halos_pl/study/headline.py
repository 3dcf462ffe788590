"""What a report says of its primary metric in a few sentences: every decision, and what could have been found."""

from __future__ import annotations

from collections import defaultdict

from halos_pl.study.comparison import Comparison, ratio
from halos_pl.study.digits import of_comparison, of_estimate
from halos_pl.study.evaluate import METRICS
from halos_pl.study.results import Results


def headline(results: Results) -> str:
    """The decisions on the primary metric. A detectable size is stated only of arms that have one."""
    metric = results.primary
    base = results.estimates.get((metric, results.baseline.name))
    against = results.comparisons(metric)
    said = []
    if base is not None and (against or len(results.study.arms) == 1):
        n = f"{base.seeds} seed{'s' * (base.seeds > 1)} and {base.examples} prompts"
        said.append(f"{metric} ({METRICS[metric][1]}): {results.baseline.name} {of_estimate(base)}, over {n}.")
        found = sorted((c for c in against.values() if c.significant), key=lambda c: c.adjusted or 0)
        said += [_significant(c) for c in found]
        rest: dict[str, list[Comparison]] = defaultdict(list)
        for c in against.values():
            if not c.significant:
                rest[c.said.partition(";")[0]].append(c)
        said += [f"{', '.join(c.arm for c in some)}: {why}{_besides(some)}." for why, some in rest.items()]
    missing = len(results.runs) - len(results.done)
    if missing:
        said.append(f"Unfinished: {missing} of {len(results.runs)} runs are missing.")
    return " ".join(said)


def _significant(c: Comparison) -> str:
    more = METRICS[c.metric][2]
    better = "" if more is None else " (better)" if (c.effect > c.null) == more else " (worse)"
    kind = "ratio" if c.scale == "ratio" else "difference"
    return f"{c.arm}: {c.said}, {kind} to {c.reference} {of_comparison(c)}{better}, corrected p = {c.adjusted:.2g}."


def _besides(some: list[Comparison]) -> str:
    """What these comparisons could have found; of each one that could find nothing that is said."""
    if some[0].decision != "not significant":
        return ""
    sizes = {c.arm: c.detectable for c in some}
    known = [size for size in sizes.values() if size is not None]
    none = [arm for arm, size in sizes.items() if size is None]
    said = ""
    if known:
        of = "" if not none else f" ({', '.join(arm for arm in sizes if arm not in none)})"
        most = f"a factor of {ratio(max(known))}" if some[0].scale == "ratio" else f"one of {max(known):.2g}"
        said = f"; {most} is found 4 times in 5{of}"
    if none:
        of = "" if not known else f" of {', '.join(none)}"
        said += f"; too few values{of} to find any difference 4 times in 5"
    return said
