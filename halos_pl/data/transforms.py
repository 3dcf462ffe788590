"""Changes to the training data for studies, each drawn from the seed and counted.

A transform is a class with one method; the DataModule applies a list of them in order:

    data:
      transforms:
        - {class_path: KeepFraction, init_args: {desirable: 0.1}}
        - {class_path: FlipLabels, init_args: {share: 0.2}}

Only transforms that define what a row is (``ThresholdScores``, ``Pair``, ``Unpair``, ``Agreement``) apply to held-out
data. A transform of scores comes before ``ThresholdScores``, one of labels after it. A list without it turns scores
into labels just before the first transform that needs labels, or at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from halos_pl.data.table import Table

Counts = dict[str, int]


def _share(transform: object, name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{type(transform).__name__}: {name} is {value}; it must be in [0, 1]")
    return float(value)


def _draw(population: NDArray[np.int64], share: float, draw: Random) -> NDArray[np.int64]:
    """A random share of ``population``, rounded, in ascending order."""
    number = round(share * len(population))
    return population[np.array(sorted(draw.sample(range(len(population)), number)), dtype=np.int64)]


class Transform(ABC):
    """Makes a table from a table.

    Attributes:
        held_out: whether it also applies to validation, test and prediction data.
        before_labels: whether it accepts rows with scores and no labels yet.
        reads_votes: whether it reads how many people agree and disagree with the labels.
    """

    held_out: bool = False
    before_labels: bool = False
    reads_votes: bool = False

    @abstractmethod
    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        """The new table, and counts of the changes by name.

        Args:
            table: the rows; left unchanged.
            draw: random generator, a function of the seed and the transform's place in the list.
        """


class KeepFraction(Transform):
    """Keeps a random share of the desirable and of the undesirable rows.

    For studies of imbalance (Ethayarajh et al., ICML 2024, section 4.3). The other row of a pair stays as a single row.

    Args:
        desirable, undesirable: shares to keep, in [0, 1].

    Raises:
        ValueError: a share is outside [0, 1].
    """

    def __init__(self, *, desirable: float = 1.0, undesirable: float = 1.0) -> None:
        self.shares = {1: _share(self, "desirable", desirable), 0: _share(self, "undesirable", undesirable)}

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        kept, counts = [(table.label < 0).nonzero()[0]], {}
        for label, share in self.shares.items():
            rows = (table.label == label).nonzero()[0]
            kept.append(_draw(rows, share, draw))
            counts[f"dropped_{'desirable' if label else 'undesirable'}"] = len(rows) - len(kept[-1])
        return table.select(np.sort(np.concatenate(kept))), counts


class OnePerPrompt(Transform):
    """Keeps one random row per distinct prompt: one y per x; a pair loses a row.

    No prompt is then seen with both its good and its bad answer (Ethayarajh et al., ICML 2024, section 4.3).
    """

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        kept = np.array([draw.choice(rows) for rows in groups(table.prompt)], dtype=np.int64)
        return table.select(np.sort(kept)), {"dropped": len(table) - len(kept)}


class FlipLabels(Transform):
    """Flips the labels of a random share of the rows, and the preference of pairs.

    Args:
        share: share of single rows and pairs together, in [0, 1].

    Raises:
        ValueError: a share is outside [0, 1].
    """

    def __init__(self, *, share: float) -> None:
        self.share = _share(self, "share", share)

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        units = table.units
        judged = units[table.label[units] >= 0]
        flipped = _draw(judged, self.share, draw)
        return _opposed(table, table.with_pairs(flipped)), {"flipped": len(flipped)}


class Contradict(Transform):
    """Repeats a random share of the rows with the opposite label, and of pairs with the opposite preference.

    For studies of contradictory feedback (Ethayarajh et al., ICML 2024, Thm. 4.3). The names of added rows end in
    ``#contradicted``.

    Args:
        share: share of single rows and pairs together, in [0, 1].

    Raises:
        ValueError: a share is outside [0, 1].
    """

    def __init__(self, *, share: float) -> None:
        self.share = _share(self, "share", share)

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        units = table.units
        drawn = _draw(units[table.label[units] >= 0], self.share, draw)
        index = table.with_pairs(drawn)
        copies = _opposed(table, index).select(index)
        return table.join(replace(copies, added=np.ones(len(copies), bool))), {"added": len(copies)}


def _opposed(table: Table, index: NDArray[np.int64]) -> Table:
    """The table with the judgement of the rows ``index`` reversed.

    Labels are flipped, and scores are mirrored within the range of their prompt's scores, to keep their unit.
    """
    label, score = table.label.copy(), table.score.copy()
    label[index] = np.where(label[index] < 0, label[index], 1 - label[index])
    low, high = (np.full(len(table.prompt_places), bound) for bound in (np.inf, -np.inf))
    scored = ~np.isnan(score)
    np.minimum.at(low, table.prompt[scored], score[scored])
    np.maximum.at(high, table.prompt[scored], score[scored])
    mirrored = index[scored[index]]
    prompt = table.prompt[mirrored]
    score[mirrored] = low[prompt] + high[prompt] - score[mirrored]
    return replace(table, label=label, score=score)


class ThresholdScores(Transform):
    """Turns scores into labels: desirable above the threshold, undesirable below it.

    Args:
        at: threshold: a number, at which a score is still desirable; or ``prompt_mean`` or ``prompt_median``, the mean
            or median of the prompt's rows, at which a score (such as that of a single row) gives no label and the row
            is dropped.
        relabel: whether to relabel rows that have both a label and a score. A pair whose rows get the same label
            becomes two single rows.
        drop_ties: whether to drop rows exactly at their prompt's mean or median; False makes them undesirable (for
            losses that use the scores themselves, such as GRPO).

    Raises:
        ValueError: ``at`` is an unknown word.
    """

    held_out = before_labels = True

    def __init__(
        self,
        *,
        at: float | Literal["prompt_mean", "prompt_median"] = "prompt_mean",
        relabel: bool = False,
        drop_ties: bool = True,
    ) -> None:
        if isinstance(at, str) and at not in ("prompt_mean", "prompt_median"):
            raise ValueError(f"ThresholdScores: at is {at!r}; give a number, prompt_mean or prompt_median")
        self.at = at
        self.relabel = relabel
        self.drop_ties = drop_ties

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        scored = ~np.isnan(table.score) & (self.relabel | (table.label < 0))
        label, tied = table.label.copy(), np.zeros(len(table), bool)
        if isinstance(self.at, str):
            middle: Any = np.mean if self.at == "prompt_mean" else np.median
            for rows in groups(np.where(scored, table.prompt, -1)):
                here = np.array(rows)
                if scored[here[0]]:
                    score = table.score[here]
                    bound = middle(score)
                    # The rounded mean of equal numbers may lie above or below all of them.
                    tied[here] = np.isclose(score, bound, rtol=1e-9, atol=0) | (score.min() == score.max())
                    label[here] = (score > bound) & ~tied[here]
        else:
            label[scored] = table.score[scored] >= self.at
        tied &= self.drop_ties
        alike = (table.pair >= 0) & (label == label[table.pair])
        turned = (table.label >= 0) & (label != table.label)  # whoever agreed with the old label disagrees with the new
        votes: dict[str, Any] = {
            name: np.where(turned, getattr(table, other), getattr(table, name))
            for name, other in (("agree", "disagree"), ("disagree", "agree"))
        }
        labelled = replace(table, label=label, pair=np.where(alike, -1, table.pair), **votes).select(~tied)
        decided = label[scored & ~tied]
        counts = {"desirable": int((decided == 1).sum()), "undesirable": int((decided == 0).sum())}
        counts |= {"dropped_at_threshold": int(tied.sum())}
        return labelled, counts | ({"unpaired": int(alike.sum()) // 2} if alike.any() else {})


class Unpair(Transform):
    """Splits each pair into two single rows."""

    held_out = before_labels = True

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        pairs = int((table.pair >= 0).sum()) // 2
        return replace(table, pair=np.full(len(table), -1)), {"unpaired": pairs}


class Pair(Transform):
    """Makes pairs of the rows of a prompt: a higher and a lower score, or a desirable and an undesirable row.

    Scores count if all rows of the prompt have one, else labels. Existing pairs are kept. A row may be part of several
    pairs, but not of one with an equal completion. Rows without a partner are dropped. The weight of a pair is the
    product of its rows' weights, so that rows that count twice and three times make a pair that counts six times; rows
    that come from one row of the source have one weight, which is that of the pair.

    Args:
        which: ``best_worst``, one pair per prompt of its highest and lowest row; or ``all`` pairs that differ.

    Raises:
        ValueError: ``which`` is unknown.
    """

    held_out = before_labels = True

    def __init__(self, *, which: Literal["best_worst", "all"] = "best_worst") -> None:
        if which not in ("best_worst", "all"):
            raise ValueError(f"Pair: which is {which!r}; choose best_worst or all")
        self.which = which

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        single = table.pair < 0
        text = table.of_rows("text")
        index: list[int] = []
        for rows in groups(np.where(single, table.prompt, -1)):
            if not single[rows[0]]:
                continue
            score = table.score[rows]
            values = table.label[rows] if np.isnan(score).any() else score  # never a label against a score
            worth = dict(zip(rows, values.tolist(), strict=True))
            # Where labels count, rows with only a score are left out. The sort is stable: the first of equals wins.
            comparable = [row for row in rows if np.isfinite(score).all() or table.label[row] >= 0]
            ranked = sorted(comparable, key=lambda row: -worth[row])
            pairs = _pairs(ranked, worth, text, worst_first=self.which == "best_worst")
            index += [row for pair in islice(pairs, 1 if self.which == "best_worst" else None) for row in pair]
        paired = replace(table, pair=np.full(len(table), -1)).select(np.array(index, dtype=np.int64))
        places = np.arange(len(paired))
        other = np.where(places % 2, places - 1, places + 1)
        line = paired.of_rows("line")
        together = (line == line[other]) & (paired.source == paired.source[other])
        paired = replace(
            paired,
            pair=other,
            label=np.where(places % 2, 0, 1).astype(np.int8),
            weight=np.where(together, 1.0, paired.weight[other]) * paired.weight,
            agree=np.zeros(len(paired)),
            disagree=np.zeros(len(paired)),
        )
        used = len(set(index))
        counts = {"pairs": len(paired) // 2, "dropped_without_partner": int(single.sum()) - used}
        return table.select(~single).join(paired), counts


def _pairs(
    ranked: list[int], worth: dict[int, float], text: NDArray[Any], *, worst_first: bool
) -> Iterator[tuple[int, int]]:
    """Every pair of a better and a worse row with different completions; ``ranked`` is sorted, best first."""
    below = len(ranked)  # index of the first row that is worse
    starts: dict[int, int] = {}
    for k in reversed(range(len(ranked))):
        if k + 1 < len(ranked) and worth[ranked[k]] > worth[ranked[k + 1]]:
            below = k + 1
        starts[k] = below
    for k, high in enumerate(ranked):
        lows = range(starts[k], len(ranked))
        for low in reversed(lows) if worst_first else lows:
            if text[high] != text[ranked[low]]:
                yield high, ranked[low]


class Agreement(Transform):
    """Gives each completion, or pair, the verdict of most of its judges, and the share of these judges as weight.

    Rows with the same prompt and completion, or with the same pair of completions in either order, are judgements of
    the same thing: they become one row. Each counts as one vote, or as the votes of its column ``votes`` (a list with a
    label of each judge) or of ``votes_for`` and ``votes_against`` (numbers). So if two of three judges agree, the
    weight is 2/3. A row that already has a weight w gives each of its votes the weight w. Where the votes are equal,
    there is no verdict, and the row is dropped.
    """

    held_out = reads_votes = True

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        units = table.units[table.label[table.units] >= 0]
        text, other = table.of_rows("text"), table.pair[units]
        partner = np.where(other >= 0, text[other], text[units])
        low, high = np.minimum(text[units], partner), np.maximum(text[units], partner)
        # Whether the row's label prefers the completion that comes first, whichever way round it has been written.
        first = np.where(other >= 0, text[units] == low, True) == (table.label[units] == 1)
        recorded = table.agree[units] + table.disagree[units]
        agree = np.where(recorded > 0, table.agree[units], 1.0)
        disagree = np.where(recorded > 0, table.disagree[units], 0.0)
        keys = np.stack([table.prompt[units].astype(np.uint64), low, high, (other >= 0).astype(np.uint64)])
        same = np.unique(keys, axis=1, return_inverse=True)[1].ravel()
        yes, no, votes = np.zeros((3, len(units)))
        np.add.at(yes, same, table.weight[units] * np.where(first, agree, disagree))
        np.add.at(no, same, table.weight[units] * np.where(first, disagree, agree))
        np.add.at(votes, same, agree + disagree)
        weight, kept, turned, tied = table.weight.copy(), [], [], 0
        for rows in groups(same):
            number = same[rows[0]]
            if yes[number] == no[number]:
                tied += 1
                continue
            # The first row with the verdict; if all have been labelled against their own votes, the first is turned.
            right = [row for row in rows if first[row] == (yes[number] > no[number])]
            chosen = units[(right or rows)[0]]
            kept.append(chosen)
            turned += [] if right else [chosen]
            weight[table.with_pairs(np.array([chosen]))] = max(yes[number], no[number]) / votes[number]
        alone = (table.label < 0).nonzero()[0]
        result = _opposed(table, table.with_pairs(np.array(turned, dtype=np.int64)))
        result = replace(result, weight=weight, agree=np.zeros(len(table)), disagree=np.zeros(len(table)))
        index = np.unique(np.concatenate([table.with_pairs(np.array(kept, dtype=np.int64)), alone]))
        counts = {"judged": len(kept), "merged": len(units) - len(kept) - tied, "dropped_ties": tied}
        return result.select(index), counts | {"against_their_label": len(turned)}


def groups(numbers: Sequence[int] | NDArray[Any]) -> list[list[int]]:
    """The indices of equal numbers, ordered by first occurrence."""
    indices: dict[int, list[int]] = {}
    for place, number in enumerate(np.asarray(numbers).tolist()):
        indices.setdefault(number, []).append(place)
    return list(indices.values())
