"""Checks the options of ``halos label``: thresholds for each labeller, and no option without an effect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from halos_pl.labelling.labellers import Labeller


def refuse_unused(options: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses options that the form and the labellers do not use.

    Args:
        options: The arguments of :func:`halos_pl.labelling.label.label` by name; None for those that are not given.
        names: The labellers, as ``KIND: NAME``.

    Raises:
        ValueError: Names the option, and what uses it.
    """
    kinds = {name.partition(":")[0].strip() for name in names}
    form, pairs = options["form"], options["pairs"]
    uses = {
        "threshold": (form == "binary", "form binary"),
        "pairs": (form == "pairs", "form pairs"),
        "min_gap": (form == "pairs", "form pairs"),
        "seed": (form == "pairs" and pairs == "random", "pairs random"),
        "batch_size": ("reward" in kinds, "a reward model"),
        "text_prompts": ("reward" in kinds, "a reward model"),
        "endpoint": ("judge" in kinds, "a judge"),
        "skip_failed": ("judge" in kinds, "a judge"),
    }
    for name, (used, by) in uses.items():
        if options[name] is not None and options[name] is not False and not used:
            raise ValueError(f"{name} is set, but only {by} uses it; remove it")


def thresholds_of(
    names: Sequence[str], labellers: Sequence[Labeller], threshold: float | Sequence[float] | None
) -> list[float]:
    """The score from which a completion is desirable, for each labeller.

    Args:
        names: Names of the labellers.
        labellers: The labellers.
        threshold: That of the labellers whose scores have no natural zero, one each; if there are none, that of all.

    Raises:
        ValueError: A labeller has no threshold, or one beyond its scores.
    """
    unbounded = [name for name, each in zip(names, labellers, strict=True) if each.threshold is None]
    given = threshold if isinstance(threshold, Sequence) else [] if threshold is None else [threshold]
    if unbounded and not given:
        raise ValueError(
            f"--by {unbounded[0]!r}: its scores have no natural zero; set --threshold, or use --form pairs"
        )
    if given and len(given) != max(len(unbounded), 1):
        takers = ", ".join(map(repr, unbounded))
        wanted = f"a list with one for each of {takers}, in this order" if len(unbounded) > 1 else "one number"
        raise ValueError(f"--threshold {threshold}: it must be {wanted}")
    rest, thresholds = list(given), list[float]()
    for name, each in zip(names, labellers, strict=True):
        natural = given[0] if given and not unbounded else each.threshold
        value = rest.pop(0) if natural is None else natural
        low, high = each.scale or (-math.inf, math.inf)
        if not low < value <= high or math.isinf(value):
            bounds = f"above {low:g} and at most {high:g}, as its scores are from {low:g} to {high:g}"
            raise ValueError(f"--threshold {value:g} for {name!r}: it must be {bounds if each.scale else 'finite'}")
        thresholds.append(value)
    return thresholds
