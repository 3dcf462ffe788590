"""Changes to the training data for studies, each drawn from the seed and counted.

A transform is a class with one method; the DataModule applies a list of them in order:

    data:
      transforms:
        - {class_path: KeepFraction, init_args: {desirable: 0.1}}
        - {class_path: FlipLabels, init_args: {share: 0.2}}

All but those that say what a row *is* (``ThresholdScores``, ``Pair``, ``Unpair``) leave held-out data alone. A
transform that works on scores comes before ``ThresholdScores``, one that works on labels behind it; where the list has
none, scores become labels just before the first transform that wants them, or at the end.
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
    """A share of ``population``, rounded to whole ones, ascending."""
    number = round(share * len(population))
    return population[np.array(sorted(draw.sample(range(len(population)), number)), dtype=np.int64)]


class Transform(ABC):
    """Makes a table from a table.

    Attributes:
        held_out: whether it is applied to validation, test and prediction data as well.
        before_labels: whether it can work on rows that have scores and no labels yet.
    """

    held_out: bool = False
    before_labels: bool = False

    @abstractmethod
    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        """The new table, and how many rows or pairs were treated how.

        Args:
            table: left as it is.
            draw: the source of randomness, a function of the seed and of the transform's place in the list.
        """


class KeepFraction(Transform):
    """Keeps a random share of the desirable and of the undesirable rows.

    For studies of imbalance (Ethayarajh et al., ICML 2024, section 4.3). The other row of a pair stays, without a
    paired completion.

    Args:
        desirable, undesirable: shares to keep, in [0, 1].

    Raises:
        ValueError: for another share.
    """

    def __init__(self, *, desirable: float = 1.0, undesirable: float = 1.0) -> None:
        self.shares = {1: _share(self, "desirable", desirable), 0: _share(self, "undesirable", undesirable)}

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        kept, counts = [(table.label < 0).nonzero()[0]], {}
        for label, share in self.shares.items():
            own = (table.label == label).nonzero()[0]
            kept.append(_draw(own, share, draw))
            counts[f"dropped_{'desirable' if label else 'undesirable'}"] = len(own) - len(kept[-1])
        return table.select(np.sort(np.concatenate(kept))), counts


class OnePerPrompt(Transform):
    """Keeps one random row of each distinct prompt: one y per x.

    So no prompt is seen with both its good and its bad answer (Ethayarajh et al., ICML 2024, section 4.3). A pair
    loses one of its rows.
    """

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        kept = np.array([draw.choice(rows) for rows in groups(table.prompt)], dtype=np.int64)
        return table.select(np.sort(kept)), {"dropped": len(table) - len(kept)}


class FlipLabels(Transform):
    """Turns round the labels of a random share of the rows; of pairs, which row is preferred.

    Args:
        share: of single rows and pairs together, in [0, 1].

    Raises:
        ValueError: for another share.
    """

    def __init__(self, *, share: float) -> None:
        self.share = _share(self, "share", share)

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        units = table.units
        judged = units[table.label[units] >= 0]
        flipped = _draw(judged, self.share, draw)
        return _opposed(table, table.with_pairs(flipped)), {"flipped": len(flipped)}


class Contradict(Transform):
    """Adds, for a random share of the rows, the same row with the opposite label; of pairs, the opposite preference.

    For studies of contradictory feedback (Ethayarajh et al., ICML 2024, Thm. 4.3). The names of added rows end in
    ``#contradicted``.

    Args:
        share: of single rows and pairs together, in [0, 1].

    Raises:
        ValueError: for another share.
    """

    def __init__(self, *, share: float) -> None:
        self.share = _share(self, "share", share)

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        units = table.units
        drawn = _draw(units[table.label[units] >= 0], self.share, draw)
        index = table.with_pairs(drawn)
        opposed = _opposed(table, index).select(index)
        return table.join(replace(opposed, added=np.ones(len(opposed), bool))), {"added": len(opposed)}


def _opposed(table: Table, index: NDArray[np.int64]) -> Table:
    """The table with the judgement of the rows ``index`` turned round.

    Labels become the opposite; scores are mirrored within the range of their prompt's scores, so that they stay in the
    source's unit.
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
    """Scores to thumbs: desirable above the threshold, undesirable below it.

    Args:
        at: a number, which itself counts as desirable; or ``prompt_mean`` or ``prompt_median``, the mean or median of
            the prompt's rows, where a row exactly at it (one alone with its prompt, say) has no label and is dropped.
        relabel: decide anew for rows that have a label as well as a score; False leaves them alone. A pair whose rows
            are then both desirable, or both not, is one no longer: its rows go their own ways.
        drop_ties: drop rows exactly at their prompt's mean or median; False counts them as undesirable (for losses that
            look at the scores themselves, as GRPO).

    Raises:
        ValueError: for another word.
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
                own = np.array(rows)
                if scored[own[0]]:
                    score = table.score[own]
                    bound = middle(score)
                    # The mean of equal numbers is rounded, and would lie above or below all of them.
                    tied[own] = np.isclose(score, bound, rtol=1e-9, atol=0) | (score.min() == score.max())
                    label[own] = (score > bound) & ~tied[own]
        else:
            label[scored] = table.score[scored] >= self.at
        tied &= self.drop_ties
        alike = (table.pair >= 0) & (label == label[table.pair])
        made = replace(table, label=label, pair=np.where(alike, -1, table.pair)).select(~tied)
        decided = label[scored & ~tied]
        counts = {"desirable": int((decided == 1).sum()), "undesirable": int((decided == 0).sum())}
        counts |= {"dropped_at_threshold": int(tied.sum())}
        return made, counts | ({"unpaired": int(alike.sum()) // 2} if alike.any() else {})


class Unpair(Transform):
    """The two rows of each pair go their own ways, as feedback on one completion each."""

    held_out = before_labels = True

    def __call__(self, table: Table, draw: Random) -> tuple[Table, Counts]:
        pairs = int((table.pair >= 0).sum()) // 2
        return replace(table, pair=np.full(len(table), -1)), {"unpaired": pairs}


class Pair(Transform):
    """Makes pairs of the rows of each prompt: of a higher and a lower score, or of a desirable and an undesirable row.

    Scores count where all rows of the prompt have one, labels elsewhere. Rows that are paired already stay so. A row
    may be part of several pairs, but never of one with the same completion. Rows without a partner are dropped, as are
    those with a score alone among rows without.

    Args:
        which: ``best_worst``, one pair a prompt of its highest and its lowest row; ``all`` pairs with a difference.
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
            own = table.label[rows] if np.isnan(score).any() else score  # never one against the other
            worth = dict(zip(rows, own.tolist(), strict=True))
            # A row with a score alone has no label to be compared by. Stable: of equals the first of the data.
            known = [row for row in rows if np.isfinite(score).all() or table.label[row] >= 0]
            ranked = sorted(known, key=lambda row: -worth[row])
            pairs = _pairs(ranked, worth, text, worst_first=self.which == "best_worst")
            index += [row for pair in islice(pairs, 1 if self.which == "best_worst" else None) for row in pair]
        made = replace(table, pair=np.full(len(table), -1)).select(np.array(index, dtype=np.int64))
        places = np.arange(len(made))
        made = replace(
            made, pair=np.where(places % 2, places - 1, places + 1), label=np.where(places % 2, 0, 1).astype(np.int8)
        )
        used = len(set(index))
        counts = {"pairs": len(made) // 2, "dropped_without_partner": int(single.sum()) - used}
        return table.select(~single).join(made), counts


def _pairs(
    ranked: list[int], worth: dict[int, float], text: NDArray[Any], *, worst_first: bool
) -> Iterator[tuple[int, int]]:
    """Every pair of a better and a worse row with different completions, of rows from the best to the worst."""
    below = len(ranked)  # where the rows begin that are worse than this one
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


# Lists of transforms -------------------------------------------------------------------------------------


def in_order(transforms: Sequence[Transform], one_per_prompt: bool) -> list[Transform]:
    """The transforms, with ``OnePerPrompt``, where wanted, before the first that needs labels.

    Raises:
        ValueError: ``ThresholdScores`` would make labels only after a transform has used them.
    """
    place = _first_on_labels(transforms)
    if any(isinstance(t, ThresholdScores) and not t.relabel for t in transforms[place:]):
        name = type(transforms[place]).__name__
        raise ValueError(f"data.transforms: ThresholdScores comes after {name}, which needs labels; put it before")
    return [*transforms[:place], *([OnePerPrompt()] if one_per_prompt else []), *transforms[place:]]


def plan(transforms: Sequence[Transform], *, train: bool, drop_ties: bool) -> list[Transform]:
    """The transforms that a split goes through, the one that turns scores into labels among them.

    Args:
        transforms: in order.
        train: whether the split is trained on; else only transforms with ``held_out`` apply.
        drop_ties: of the ``ThresholdScores`` that is added where the list has none.
    """
    chosen = [t for t in transforms if train or t.held_out]
    if any(isinstance(t, ThresholdScores) for t in chosen):
        return chosen
    place = _first_on_labels(chosen)
    return [*chosen[:place], ThresholdScores(drop_ties=drop_ties), *chosen[place:]]


def _first_on_labels(transforms: Sequence[Transform]) -> int:
    return next((i for i, t in enumerate(transforms) if not t.before_labels), len(transforms))


def groups(numbers: Sequence[int] | NDArray[Any]) -> list[list[int]]:
    """Places of equal numbers, in the order in which the numbers first occur."""
    found: dict[int, list[int]] = {}
    for place, number in enumerate(np.asarray(numbers).tolist()):
        found.setdefault(number, []).append(place)
    return list(found.values())
