"""How far labellers agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from statsmodels.stats.inter_rater import cohens_kappa

from halos_pl.labelling.output import Scores


def orders(groups: Sequence[Scores]) -> list[int]:
    """For every two completions of a prompt: 1 if the first is better, -1 if the second is, 0 otherwise."""
    signs = []
    for scores in groups:
        for a, b in combinations(scores, 2):
            signs.append(0 if a is None or b is None else (a > b) - (a < b))
    return signs


def agreement_lines(names: Sequence[str], by_labeller: Sequence[Sequence[Scores]]) -> list[str]:
    """A line for every two labellers: on how many comparisons of two completions they agree.

    Args:
        names: Names of the labellers.
        by_labeller: Scores of the completions of each prompt, by labeller.
    """
    signs = [orders(groups) for groups in by_labeller]
    lines = []
    for i, j in combinations(range(len(names)), 2):
        both = [(a, b) for a, b in zip(signs[i], signs[j], strict=True) if a and b]
        if not both:
            lines.append(f"{names[i]} and {names[j]}: no comparison on which both decide")
            continue
        table = np.array([[sum((a, b) == (x, y) for a, b in both) for y in (-1, 1)] for x in (-1, 1)])
        agreed = np.trace(table)
        line = f"{names[i]} and {names[j]} agree on {agreed} of {len(both)} comparisons ({agreed / len(both):.0%})"
        if (table.sum(0) > 0).all() and (table.sum(1) > 0).all():
            line += f", Cohen's kappa {cohens_kappa(table).kappa:.2f}"
        lines.append(line)
    return lines
