"""The completion of each mismatched row."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def mismatches(prompts: Sequence[int], draw: Random) -> list[int | None]:
    """For each row i the index j of a row with another prompt; no j is used twice.

    The result is a permutation unless one prompt has more than half of the rows. Then the other rows are matched with
    rows of that prompt, in both directions, and the remaining entries are None.

    Args:
        prompts: prompt number of each row.
        draw: random generator.
    """
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    order = list(groups.values())
    draw.shuffle(order)
    for group in order:
        draw.shuffle(group)
    n, largest = len(prompts), max(map(len, order), default=0)
    partner: list[int | None] = [None] * n
    if 2 * largest <= n:
        # With rows sorted by prompt, a shift by at least the largest group, and at most the rest, takes every row out
        # of its group.
        rows = [row for group in order for row in group]
        shift = draw.randint(largest, n - largest) if n else 0
        for place, row in enumerate(rows):
            partner[row] = rows[(place + shift) % n]
    else:
        most = max(order, key=len)
        others = [row for group in order if group is not most for row in group]
        for row, other in zip(most, others, strict=False):
            partner[row] = other
        draw.shuffle(most)
        for row, other in zip(most, others, strict=False):
            partner[other] = row
    return partner
