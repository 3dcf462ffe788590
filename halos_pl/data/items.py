"""Makes examples of checked completions, and skips those that no loss can use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from halos_pl.data.example import Example, Prompt, Skipped
from halos_pl.data.messages import answered, is_blank

Items = list[Example | Skipped]

NO_SCORE, TIE, EMPTY, SAME = "no score", "tie", "empty response", "both completions are the same"
PARTED = "dialogues differ before the last turn"
LATER = "a completion contains a user message"
UNANSWERED = "a completion does not end with the assistant"


def one(
    prompt: Prompt,
    completion: Prompt,
    place: str,
    label: bool | None,
    score: float | None = None,
    finished: bool = True,
) -> Items:
    """An example of one completion; skipped if the assistant does not speak last."""
    if not answered(completion):
        return [Skipped(place, UNANSWERED)]
    return [Example(prompt, (completion,), (label,), place, (score,), finished=(finished,))]


def pair(
    prompt: Prompt,
    chosen: Prompt,
    rejected: Prompt,
    place: str,
    scores: tuple[float | None, ...] = (),
    finished: tuple[bool, ...] = (),
    gold: Prompt | None = None,
) -> Items:
    """An example of a pair, with a gold answer if there is one.

    Skipped if the completions of the pair are equal or the assistant does not speak last.
    """
    if chosen == rejected:
        return [Skipped(place, SAME)]
    if not (answered(chosen) and answered(rejected)):
        return [Skipped(place, UNANSWERED)]
    example = Example(prompt, (chosen, rejected), (True, False), place, scores, paired=True, finished=finished)
    if gold is None:
        return [example]
    return [
        replace(
            example,
            completions=(chosen, rejected, gold),
            labels=(True, False, True),
            scores=(*example.scores, None),
            finished=(*example.finished, True),
            gold=True,
        )
    ]


def group(
    prompt: Prompt, judged: Iterable[tuple[Prompt, float | None]], place: str, finished: Sequence[bool] = ()
) -> Items:
    """One example of all completions with a score; the others are skipped."""
    items: Items = []
    kept: list[tuple[Prompt, float, bool]] = []
    for number, (completion, score) in enumerate(judged, start=1):
        if score is None or is_blank(completion) or not answered(completion):
            why = NO_SCORE if score is None else EMPTY if is_blank(completion) else UNANSWERED
            items.append(Skipped(f"{place}#{number}", why))
        else:
            kept.append((completion, score, finished[number - 1] if finished else True))
    if kept:
        completions, scores, whole = zip(*kept, strict=True)
        items.insert(0, Example(prompt, completions, (None,) * len(kept), place, scores, finished=whole))
    return items or [Skipped(place, "no completions")]
