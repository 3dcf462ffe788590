"""Turns scores into rows that ``halos fit`` reads."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, zip_longest
from typing import Any, Literal

from halos_pl.data.parsers import PAIRS_OF_SCORES
from halos_pl.data.prompt_files import ANSWERS, PROMPT_ROW
from halos_pl.labelling.groups import PER_COMPLETION, Group

#: Rounding error of the difference of two scores, relative to the larger one: 0.3 - 0.2 is a gap of 0.1.
_ROUNDING = 1e-12

#: The scores of a group by one labeller.
Scores = Sequence[float | None]

#: Columns of earlier labels, which rows with new ones leave out.
_EARLIER = (ANSWERS - {*PER_COMPLETION, PROMPT_ROW}) | {
    *("margin", "chosen_finished", "rejected_finished"),
    *(name for names in PAIRS_OF_SCORES for name in names),
}


@dataclass(frozen=True)
class OutputSettings:
    """The rows to write.

    Args:
        form: ``scored``, ``binary`` or ``pairs``.
        threshold: Score from which a completion is desirable, for ``binary``.
        pairs: ``best_worst`` pairs the best completion of a prompt with the worst; ``random`` draws two.
        min_gap: Smallest difference of scores within a pair.
        seed: Seed of the draws.
    """

    form: Literal["scored", "binary", "pairs"]
    threshold: float
    pairs: Literal["best_worst", "random"]
    min_gap: float
    seed: int


def share_of_votes(by_labeller: Sequence[Scores], thresholds: Sequence[float]) -> list[float | None]:
    """The scores of several labellers as one, from 0 to 1.

    With thresholds, for binary labels, it is the share of labellers for which a completion is desirable; otherwise, the
    share of comparisons with the prompt's other completions that it wins, over all labellers; a tie is half a win.

    Args:
        by_labeller: Scores of a prompt's completions, by labeller.
        thresholds: The score from which a completion is desirable, by labeller; empty to compare completions.
    """
    number = len(by_labeller[0])
    votes: list[list[float]] = [[] for _ in range(number)]
    for scores, threshold in zip_longest(by_labeller, thresholds):
        if threshold is not None:
            for i, score in enumerate(scores):
                votes[i] += [] if score is None else [float(score >= threshold)]
            continue
        for i, j in combinations(range(number), 2):
            first, second = scores[i], scores[j]
            if first is not None and second is not None:
                win = 0.5 if first == second else float(first > second)
                votes[i].append(win)
                votes[j].append(1 - win)
    return [sum(each) / len(each) if each else None for each in votes]


def rows_of(group: Group, scores: Scores, settings: OutputSettings, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows of a prompt.

    Args:
        group: The prompt and its completions.
        scores: The score of each; None for one without a verdict.
        settings: The rows to write.
        counts: Counts of rows by kind, which are added to.
    """
    group = _without_earlier(group, counts)
    valid = [(each, score) for each, score in zip(group.completions, scores, strict=True) if score is not None]
    shared = group.columns | {"prompt": group.prompt}
    if settings.form == "pairs":
        pair = _pair(group, [(i, score) for i, score in enumerate(scores) if score is not None], settings)
        if isinstance(pair, str):
            counts[f"prompts skipped: {pair}"] += 1
            return
        (first, high), (second, low) = pair
        chosen, rejected = group.completions[first], group.completions[second]
        counts["pairs"] += 1
        for name in sorted({*chosen.columns, *rejected.columns} - {*PER_COMPLETION}):
            counts[f"pairs without column {name}, in which the rows of the prompt differ"] += 1
        yield shared | {
            "chosen": chosen.text,
            "rejected": rejected.text,
            "chosen_score": high,
            "rejected_score": low,
            "chosen_finished": chosen.finished,
            "rejected_finished": rejected.finished,
        }
    elif settings.form == "binary":
        for each, score in valid:
            label = score >= settings.threshold
            counts["desirable" if label else "undesirable"] += 1
            yield shared | each.columns | {"completion": each.text, "label": label, "score": score}
    elif group.in_one_row:
        counts["scores"] += len(valid)
        names = valid[0][0].columns if valid else {}
        lists = {name: [each.columns[name] for each, _ in valid] for name in names}
        if valid:
            completions = {"completions": [each.text for each, _ in valid], "scores": [score for _, score in valid]}
            yield shared | lists | completions
    else:
        counts["scores"] += len(valid)
        for each, score in valid:
            yield shared | each.columns | {"completion": each.text, "score": score}


def _without_earlier(group: Group, counts: Counter[str]) -> Group:
    """The group without the columns of earlier labels, which are counted."""
    columns = [group.columns, *(each.columns for each in group.completions)]
    for name in sorted(_EARLIER.intersection(chain.from_iterable(columns))):
        counts[f"prompts whose earlier column {name} is left out"] += 1
    kept = [{name: value for name, value in some.items() if name not in _EARLIER} for some in columns]
    completions = [replace(each, columns=own) for each, own in zip(group.completions, kept[1:], strict=True)]
    return replace(group, columns=kept[0], completions=completions)


def _pair(
    group: Group, scored: list[tuple[int, float]], settings: OutputSettings
) -> tuple[tuple[int, float], tuple[int, float]] | str:
    """The better and the worse completion, each its index and score; or the reason why there is no pair."""
    if len(scored) < 2:
        return "fewer than two completions"
    if settings.pairs == "best_worst":
        candidates = [(max(scored, key=lambda each: each[1]), min(scored, key=lambda each: each[1]))]
    else:
        candidates = [(b, a) if b[1] > a[1] else (a, b) for a, b in combinations(scored, 2)]
    texts = [each.text for each in group.completions]
    candidates = [(a, b) for a, b in candidates if a[1] > b[1] and texts[a[0]] != texts[b[0]]]
    if not candidates:
        return "equal scores"
    candidates = [
        ((i, high), (j, low))
        for (i, high), (j, low) in candidates
        if high - low >= settings.min_gap - _ROUNDING * max(abs(high), abs(low))
    ]
    if not candidates:
        return f"a gap below {settings.min_gap:g}"
    return random.Random(f"{settings.seed} {group.number}").choice(candidates)
