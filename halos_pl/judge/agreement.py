"""Agreement of a judge with people, and of people with each other.

A label is a winner: 1 for the first answer, -1 for the second, 0 for a tie.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halos_pl.judge.estimates import Estimate, linear, mean_of
from halos_pl.judge.win_rates import JudgedPair, means_of, winner

Labels = Sequence[int]


def _summed(values: NDArray[np.float64], examples: Sequence[str]) -> NDArray[np.float64]:
    """Sums of values [n] or [n, k] by example."""
    kinds, place = np.unique(np.array(examples), return_inverse=True)
    sums = np.zeros((len(kinds), *values.shape[1:]))
    np.add.at(sums, place, values)
    return sums


def cohens_kappa(first: Labels, second: Labels, examples: Sequence[str] | None = None) -> Estimate:
    """Cohen's kappa of two raters: their agreement beyond that of independent raters with the same label frequencies.

    The standard error is that of Fleiss, Cohen and Everitt (1969), with deviations summed by example. Kappa is NaN if a
    rater uses a single label.

    Args:
        first, second: [items] the labels.
        examples: [items] the example of each item; items of an example are not independent. Default: all are.

    Raises:
        ValueError: if the raters did not label the same items.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} labels; both raters must label the same items")
    n, examples = len(first), examples or [str(i) for i in range(len(first))]
    number = len({*examples})
    if number < 2 or len({*first}) < 2 or len({*second}) < 2:
        return Estimate(math.nan, math.nan, -1.0, 1.0, number)
    a, b = np.array(first), np.array(second)
    kinds = np.unique([a, b])
    # By item, the share of each rater's labels that equal the label of the other one.
    of_first = np.array([(a == kind).mean() for kind in kinds])[np.searchsorted(kinds, b)]
    of_second = np.array([(b == kind).mean() for kind in kinds])[np.searchsorted(kinds, a)]
    equal = (a == b).astype(np.float64)
    agreed, expected = float(equal.mean()), float(of_first.mean())
    kappa = (agreed - expected) / (1 - expected)
    influence = (equal - agreed - (1 - kappa) * (of_first + of_second - 2 * expected)) / (1 - expected)
    error = math.sqrt(float((_summed(influence, examples) ** 2).sum())) / n
    return Estimate(kappa, error, max(kappa - 1.96 * error, -1.0), min(kappa + 1.96 * error, 1.0), number)


def fleiss_kappa(ratings: Sequence[Labels], examples: Sequence[str] | None = None) -> Estimate:
    """Fleiss' kappa of several raters (1971), with a jackknife interval over examples.

    Args:
        ratings: [items, raters] the labels of each item, from the same number of raters each.
        examples: as for :func:`cohens_kappa`.

    Raises:
        ValueError: if the items have different numbers of labels, or fewer than two.
    """
    sizes = {len(labels) for labels in ratings}
    if len(sizes) > 1 or min(sizes, default=2) < 2:
        raise ValueError(f"items with {sorted(sizes)} labels; each item needs the same number, at least 2")
    kinds = sorted({label for labels in ratings for label in labels})
    n, examples = len(ratings), examples or [str(i) for i in range(len(ratings))]
    number = len({*examples})
    if number < 3 or len(kinds) < 2:
        return Estimate(math.nan, math.nan, -1.0, 1.0, number)
    raters = sizes.pop()
    counts = np.array([[labels.count(kind) for kind in kinds] for labels in map(list, ratings)], dtype=np.float64)
    agreed = (counts * (counts - 1)).sum(axis=1) / (raters * (raters - 1))

    def kappa(total_agreed: Any, totals: NDArray[np.float64], items: Any) -> NDArray[np.float64]:
        expected = ((totals / (np.asarray(items)[..., None] * raters)) ** 2).sum(axis=-1)
        value: NDArray[np.float64] = (total_agreed / items - expected) / (1 - expected)
        return value

    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(kappa(agreed.sum(), counts.sum(axis=0), n))
        without = kappa(
            agreed.sum() - _summed(agreed, examples),
            counts.sum(axis=0) - _summed(counts, examples),
            n - _summed(np.ones(n), examples),
        )
    return linear(value, (number - 1) * (without.mean() - without), -1.0, 1.0)


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

    Pairs of the same example are not independent: shares are means over examples, and kappa's error is one over them.

    Pairs of equal answers are left out, as the judge is not asked about them.
    """
    asked = [pair for pair in pairs if not pair.identical]
    judged = [pair for pair in asked if pair.preference is not None and pair.name in labels]
    decided = [pair for pair in judged if labels[pair.name]]
    combined = [winner(pair.preference) for pair in judged if pair.preference is not None]
    given = [labels[pair.name] for pair in judged]
    return Agreement(
        by=by,
        accuracy=_mean((pair, _agreed(pair, labels)) for pair in decided),
        without_position=_without_position(decided, labels),
        same_label=_mean((pair, float(a == b)) for pair, a, b in zip(judged, combined, given, strict=True)),
        kappa=cohens_kappa(combined, given, _examples(judged)),
    )


def _mean(values: Iterable[tuple[JudgedPair, float]]) -> Estimate:
    """The mean over examples."""
    return mean_of(list(means_of(values).values()))


def _examples(pairs: Sequence[JudgedPair]) -> list[str]:
    return [pair.example or pair.name for pair in pairs]


def _agreed(pair: JudgedPair, labels: Mapping[str, int]) -> float:
    """Mean probability, over both orders, that the verdict is the label."""
    assert pair.preference is not None
    return pair.preference if labels[pair.name] > 0 else 1 - pair.preference


def _without_position(pairs: Sequence[JudgedPair], labels: Mapping[str, int]) -> Estimate:
    """Accuracy of the verdicts that do not follow the position: 1/2 + (accuracy - 1/2) / (1 - |bias|)."""
    agreed = np.array([_agreed(pair, labels) for pair in pairs])
    both = [(p.shown_first, p.shown_second) for p in pairs]
    biases = np.array([first - second for first, second in both if first is not None and second is not None])
    examples = _examples(pairs)
    number = len({*examples})
    if number < 2:
        return Estimate(math.nan, math.nan, 0.0, 1.0, number)
    bias, above = float(biases.mean()), float(agreed.mean()) - 0.5
    rest = 1 - abs(bias)
    if rest < 1e-9:  # every verdict follows the position
        return Estimate(math.nan, math.nan, 0.0, 1.0, number)
    influence = (agreed - agreed.mean()) / rest + above * np.sign(bias) * (biases - bias) / rest**2
    effect = _summed(influence, examples) * number / len(pairs)
    return linear(0.5 + above / rest, effect, 0.0, 1.0, informative=rest * number)
