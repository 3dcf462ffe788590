"""Agreement of a judge with people, and of people with each other.

A label is a winner: 1 for the first answer, -1 for the second, 0 for a tie.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halos_pl.judge.estimates import Estimate, linear, mean_of
from halos_pl.judge.win_rates import JudgedPair, winner

Labels = Sequence[int]


def cohens_kappa(first: Labels, second: Labels) -> Estimate:
    """Cohen's kappa of two raters: their agreement beyond that of independent raters with the same label frequencies.

    The standard error is that of Fleiss, Cohen and Everitt (1969). Kappa is NaN if a rater uses a single label.

    Raises:
        ValueError: if the raters did not label the same items.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} labels; both raters must label the same items")
    n = len(first)
    kinds = sorted({*first, *second})
    if n < 2 or len({*first}) < 2 or len({*second}) < 2:
        return Estimate(math.nan, math.nan, -1.0, 1.0, n)
    index = {kind: i for i, kind in enumerate(kinds)}
    shares: NDArray[np.float64] = np.zeros((len(kinds), len(kinds)))
    for a, b in zip(first, second, strict=True):
        shares[index[a], index[b]] += 1 / n
    rows, columns = shares.sum(axis=1), shares.sum(axis=0)
    agreed, expected = float(np.trace(shares)), float(rows @ columns)
    kappa = (agreed - expected) / (1 - expected)
    diagonal = np.diag(shares) * (1 - (rows + columns) * (1 - kappa)) ** 2
    crossed = shares * (columns[:, None] + rows[None, :]) ** 2
    others = (1 - kappa) ** 2 * (crossed.sum() - np.trace(crossed))
    variance = diagonal.sum() + others - (kappa - expected * (1 - kappa)) ** 2
    error = math.sqrt(max(float(variance), 0.0) / n) / (1 - expected)
    return Estimate(kappa, error, max(kappa - 1.96 * error, -1.0), min(kappa + 1.96 * error, 1.0), n)


def fleiss_kappa(ratings: Sequence[Labels]) -> Estimate:
    """Fleiss' kappa of several raters (1971), with a jackknife interval over items.

    Args:
        ratings: [items, raters] the labels of each item, from the same number of raters each.

    Raises:
        ValueError: if the items have different numbers of labels, or fewer than two.
    """
    sizes = {len(labels) for labels in ratings}
    if len(sizes) > 1 or min(sizes, default=2) < 2:
        raise ValueError(f"items with {sorted(sizes)} labels; each item needs the same number, at least 2")
    kinds = sorted({label for labels in ratings for label in labels})
    n = len(ratings)
    if n < 3 or len(kinds) < 2:
        return Estimate(math.nan, math.nan, -1.0, 1.0, n)
    raters = sizes.pop()
    counts = np.array([[labels.count(kind) for kind in kinds] for labels in map(list, ratings)], dtype=np.float64)
    agreed = (counts * (counts - 1)).sum(axis=1) / (raters * (raters - 1))

    def kappa(total_agreed: NDArray[np.float64], totals: NDArray[np.float64], items: int) -> NDArray[np.float64]:
        expected = ((totals / (items * raters)) ** 2).sum(axis=-1)
        value: NDArray[np.float64] = (total_agreed / items - expected) / (1 - expected)
        return value

    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(kappa(agreed.sum(), counts.sum(axis=0), n))
        without = kappa(agreed.sum() - agreed, counts.sum(axis=0) - counts, n - 1)
    return linear(value, (n - 1) * (without.mean() - without), -1.0, 1.0)


def majority(labels: Labels) -> int | None:
    """The most frequent label; None if two are equally frequent."""
    ranked = Counter(labels).most_common(2)
    return ranked[0][0] if len(ranked) == 1 or ranked[0][1] > ranked[1][1] else None


@dataclass(frozen=True)
class Agreement:
    """A judge compared with one person, or with the majority of several.

    Attributes:
        by: name of the annotator, or ``majority``.
        accuracy: mean agreement of the single verdicts with the person's winner, over pairs for which the person has
            one; a verdict of a tie counts half. A judge that guesses, or follows the position only, has 0.5.
        without_position: the same once the share of verdicts that follow the position is removed: an estimate under
            the model of :class:`halos_pl.judge.simulated.SimulatedJudge`.
        same_label: share of pairs where the combined verdict of both orders is the person's label, ties included.
        kappa: Cohen's kappa of these labels.
    """

    by: str
    accuracy: Estimate
    without_position: Estimate
    same_label: Estimate
    kappa: Estimate


def agreement(pairs: Sequence[JudgedPair], labels: Mapping[str, int], by: str) -> Agreement:
    """A judge's agreement with a person's labels, over the pairs with verdicts in both orders and a label.

    Pairs of equal answers are left out, as the judge is not asked about them.
    """
    asked = [pair for pair in pairs if not pair.identical]
    judged = [pair for pair in asked if pair.preference is not None and pair.name in labels]
    decided = [pair for pair in judged if labels[pair.name]]
    combined = [winner(pair.preference) for pair in judged if pair.preference is not None]
    given = [labels[pair.name] for pair in judged]
    return Agreement(
        by=by,
        accuracy=mean_of([_agreed(pair, labels) for pair in decided]),
        without_position=_without_position(decided, labels),
        same_label=mean_of([float(a == b) for a, b in zip(combined, given, strict=True)]),
        kappa=cohens_kappa(combined, given),
    )


def _agreed(pair: JudgedPair, labels: Mapping[str, int]) -> float:
    """Mean probability, over both orders, that the verdict is the label."""
    assert pair.preference is not None
    return pair.preference if labels[pair.name] > 0 else 1 - pair.preference


def _without_position(pairs: Sequence[JudgedPair], labels: Mapping[str, int]) -> Estimate:
    """Accuracy of the verdicts that do not follow the position: 1/2 + (accuracy - 1/2) / (1 - |bias|)."""
    agreed = np.array([_agreed(pair, labels) for pair in pairs])
    both = [(p.shown_first, p.shown_second) for p in pairs]
    biases = np.array([first - second for first, second in both if first is not None and second is not None])
    if len(agreed) < 2:
        return Estimate(math.nan, math.nan, 0.0, 1.0, len(agreed))
    bias, above = float(biases.mean()), float(agreed.mean()) - 0.5
    rest = 1 - abs(bias)
    if rest < 1e-9:  # every verdict follows the position
        return Estimate(math.nan, math.nan, 0.0, 1.0, len(agreed))
    influence = (agreed - agreed.mean()) / rest + above * np.sign(bias) * (biases - bias) / rest**2
    return linear(0.5 + above / rest, influence, 0.0, 1.0)
