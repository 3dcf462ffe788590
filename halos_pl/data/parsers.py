"""Turns rows into examples: one function for each set of columns in which people publish feedback.

Rows that published data sets contain but no loss can use (a tie, an empty answer) are skipped and counted; obvious
mistakes are faults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from halos_pl.data.example import Skipped, short
from halos_pl.data.items import EMPTY, NO_SCORE, PARTED, SAME, TIE, Items, group, one, pair
from halos_pl.data.messages import (
    Messages,
    answered,
    both_of,
    completion_of,
    is_blank,
    message_of,
    messages_of,
    not_blank,
    prompt_like,
    prompt_of,
)
from halos_pl.data.values import BadRow, agreed_label, first_of, flag_of, label_of, list_of, pair_scores, score_of

#: Turns a row and its place (``SOURCE:LINE``) into examples. Raises BadRow.
Parse = Callable[[dict[str, Any], str], Items]


# TRL ---------------------------------------------------------------------------------------------------


def unpaired(row: dict[str, Any], place: str) -> Items:
    """A completion with a label."""
    label, score = agreed_label(row, ("label", "kto_tag")), None
    with suppress(BadRow):  # optional: a column of this name may contain anything
        score = score_of(row.get("score"), "score")
    both = completion_of(prompt_of(row), row["completion"], "completion")
    return one(*both, place, label, score, _finished(row))


def _finished(row: dict[str, Any]) -> bool:
    return flag_of(row.get("finished"), "finished")


def _both_finished(row: dict[str, Any]) -> tuple[bool, bool]:
    """Whether chosen and rejected are finished: from a column each, or from one that lists both."""
    flags = row.get("finished")
    if flags is not None and not (isinstance(flags, list) and len(flags) == 2):
        raise BadRow(f"is {short(flags)}; for a pair it must be [chosen, rejected], each true or false", "finished")
    chosen, rejected = flags or (None, None)
    return (
        flag_of(row.get("chosen_finished", chosen), "chosen_finished"),
        flag_of(row.get("rejected_finished", rejected), "rejected_finished"),
    )


def paired(row: dict[str, Any], place: str) -> Items:
    """A prompt with a chosen and a rejected completion."""
    prompt, chosen, rejected = both_of(prompt_of(row), row, "chosen", "rejected")
    return pair(prompt, chosen, rejected, place, _scores(row), _both_finished(row))


#: Columns with a gold answer, which is neither chosen nor rejected.
GOLD = ("reference", "gold")


def triple(row: dict[str, Any], place: str) -> Items:
    """A prompt with a chosen and a rejected completion and a gold answer, as for TRL's TPO."""
    column, *others = (name for name in GOLD if name in row)
    if others and row[others[0]] is not None:
        raise BadRow(f"and '{others[0]}' are both gold answers of the row; keep one of them", column)
    prompt, chosen, rejected = both_of(prompt_of(row), row, "chosen", "rejected")
    own, gold = completion_of(prompt_of(row), row[column], column)
    if own != prompt:
        raise BadRow("repeats a different prompt than 'chosen'; both must answer the same messages", column)
    if not answered(gold):
        raise BadRow("must end with a message of the assistant, which is the gold answer", column)
    return pair(prompt, chosen, rejected, place, _scores(row), _both_finished(row), gold)


# Column names under which published pairs score their completions.
_OF = ("score_{}", "{}_score", "rating_{}", "{}_rating", "{}-score", "{}-rating", "{}_avg_rating")
PAIRS_OF_SCORES = [(name.format("chosen"), name.format("rejected")) for name in _OF]


_SCORES = {name for names in PAIRS_OF_SCORES for name in names} | {"margin"}


def _score_columns(row: dict[str, Any]) -> tuple[str, ...]:
    """The first names that score both completions: other names may use other units. ``margin`` if none score any."""
    filled = [sum(row.get(name) is not None for name in names) for names in PAIRS_OF_SCORES]
    if not max(filled) and row.get("margin") is not None:
        return ("margin",)
    return PAIRS_OF_SCORES[filled.index(max(filled))]


def idle_scores(row: dict[str, Any], columns: Iterable[str]) -> set[str]:
    """Those of the columns that score a pair but give way to others."""
    names = _SCORES.intersection(columns)
    return names.difference(_score_columns(row)) if len(names) > 2 else set()


def _scores(row: dict[str, Any]) -> tuple[float | None, ...]:
    """The scores of chosen and rejected.

    Without scores, a ``margin`` (as for TRL) is the score of the chosen completion, and that of the rejected one is 0.
    """
    columns = _score_columns(row)
    if len(columns) == 1:
        return score_of(row["margin"], "margin"), 0.0
    return pair_scores(row, *columns)


_OWN_COLUMN = "put the prompt into a column 'prompt'"


def implicit(row: dict[str, Any], place: str) -> Items:
    """A chosen and a rejected text, or conversation; the prompt is their common start."""
    chosen, rejected = (not_blank(prompt_like(row[c], c), c) for c in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if _is_hh(chosen) or _is_hh(rejected):
            return _hh(chosen, rejected, place, _scores(row))
        if chosen == rejected:
            return [Skipped(place, SAME)]
        end = shared_text(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        if chosen == rejected:
            return [Skipped(place, SAME)]
        parted = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        end = next(parted, min(len(chosen), len(rejected)))
        for column, messages in (("chosen", chosen), ("rejected", rejected)):
            if end < len(messages) and messages[end]["role"] != "assistant":
                raise BadRow(
                    f"differs from the other column before the assistant's turn (its role is "
                    f"{short(messages[end]['role'])}); both must answer the same prompt",
                    column,
                    f", message {end + 1}",
                )
    else:
        raise BadRow("and 'chosen' must both be text, or both message lists", "rejected")
    if is_blank(chosen[:end]):
        raise BadRow(f"and 'chosen' do not begin with the same prompt; {_OWN_COLUMN}", "rejected")
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if is_blank(value[end:]):
            raise BadRow(f"has nothing after the prompt that both begin with; {_OWN_COLUMN}", column)
    return pair(chosen[:end], chosen[end:], rejected[end:], place, _scores(row), _both_finished(row))


def shared_text(a: str, b: str) -> int:
    """Length of the common start of two texts, cut back to the end of a word, as in TRL's ``extract_prompt``.

    The space before the first differing word belongs to the completions. Scripts without spaces between words are cut
    where the texts differ.
    """
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared in C
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    end = low
    inside = end == min(len(a), len(b)) or _in_word(a[end]) or _in_word(b[end])
    while inside and end and _in_word(a[end - 1]):
        end -= 1
    return end - 1 if end and a[end - 1] == " " else end


def _in_word(character: str) -> bool:
    return character.isalnum() and character < "\u2e80"  # from there on: Chinese, Japanese ...


_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def _is_hh(text: str) -> bool:
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _hh(chosen: str, rejected: str, place: str, scores: tuple[float | None, ...]) -> Items:
    """Dialogues as in Anthropic's HH-RLHF; the assistant's last turn was judged."""
    dialogues = []
    for column, text in (("chosen", chosen), ("rejected", rejected)):
        before, *parts = _TURN.split(text.lstrip())
        roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
        if before or not roles or roles[-1] != "assistant":
            raise BadRow("must be a dialogue of Human: and Assistant: that ends with the assistant", column)
        dialogue = [{"role": r, "content": t.strip()} for r, t in zip(roles, parts[1::2], strict=True)]
        dialogues.append(dialogue)
    first, second = dialogues
    both = zip(first[:-1], second[:-1], strict=False)
    end = next((i for i, (a, b) in enumerate(both) if a != b), min(len(first), len(second)) - 1)
    if first[end]["role"] != "assistant" or second[end]["role"] != "assistant":
        return [Skipped(place, PARTED)]  # the user asked something else
    if is_blank(first[:end]):
        raise BadRow("has an empty prompt; remove the row", "chosen")
    if is_blank(first[-1:]) or is_blank(second[-1:]):
        return [Skipped(place, EMPTY)]
    return pair(first[:end], first[end:], second[end:], place, scores)


# HALOs (train/label.py writes them) --------------------------------------------------------------------


def halos_binary(row: dict[str, Any], place: str) -> Items:
    """A labelled output."""
    label = label_of(row, "label")
    prompt, completion = completion_of(prompt_of(row), row["output"], "output")
    return one(prompt, completion, place, label, score_of(row.get("reward"), "reward"))


def halos_pairwise(row: dict[str, Any], place: str) -> Items:
    """Two outputs. ``label`` is 1 if ``output_A`` has the higher reward, and 0 also for a tie."""
    first = first_of(row, "label")
    prompt, a, b = both_of(prompt_of(row), row, "output_A", "output_B")
    rewards = pair_scores(row, "reward_A", "reward_B")
    if rewards[0] is not None and rewards[0] == rewards[1]:
        return [Skipped(place, TIE)]
    return pair(prompt, a, b, place, rewards) if first else pair(prompt, b, a, place, rewards[::-1])


# Conversations -----------------------------------------------------------------------------------------


def _conversation(row: dict[str, Any], column: str) -> Messages:
    value = row[column]
    if not isinstance(value, list):
        raise BadRow(f"is {short(value)}; it must be a list of messages", column)
    return messages_of(value, column)


def judged_conversation(column: str, labels: tuple[str, ...]) -> Parse:
    """A labelled conversation that ends with the assistant."""

    def parse(row: dict[str, Any], place: str) -> Items:
        label = agreed_label(row, labels)
        messages = _conversation(row, column)
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow("must end with a message of the assistant, which the label judges", column)
        if is_blank(messages[:-1]):
            raise BadRow("has no prompt before the assistant's message; add one, or remove the row", column)
        answer = not_blank(messages[-1:], column, ", last message")
        return one(messages[:-1], answer, place, label, finished=_finished(row))

    return parse


def conversation_pair(column: str) -> Parse:
    """Two answers to a conversation, each a list of messages or a single message."""

    def parse(row: dict[str, Any], place: str) -> Items:
        values = {c: [message_of(row[c], c)] if isinstance(row[c], dict) else row[c] for c in ("chosen", "rejected")}
        first = [value[:1] for value in (row[column], *values.values()) if isinstance(value, list)]
        if len(first) == 3 and first[0] == first[1] == first[2]:  # both answers repeat the conversation
            return implicit(row, place)
        prompt = not_blank(_conversation(row, column), column)
        prompt, chosen, rejected = both_of(prompt, values, "chosen", "rejected")
        return pair(prompt, chosen, rejected, place, _scores(row), _both_finished(row))

    return parse


# Scores ------------------------------------------------------------------------------------------------


def scored(row: dict[str, Any], place: str) -> Items:
    """A completion with a score."""
    prompt, completion = completion_of(prompt_of(row), row["completion"], "completion")
    # The first column that exists, even if empty: a rank in place of a missing score would have another unit.
    column = next(name for name in ("score", "rating", "rank") if name in row)
    score = score_of(row[column], column)
    if score is None:
        return [Skipped(place, NO_SCORE)]
    finished = _finished(row)
    if column == "rank":
        score = 0.0 - score  # rank 0 is best; 0, not -0
    return one(prompt, completion, place, None, score, finished)


def scored_lists(row: dict[str, Any], place: str) -> Items:
    """Several completions of a prompt, each with a score."""
    completions, scores = list_of(row, "completions"), list_of(row, "scores")
    if len(completions) != len(scores):
        raise BadRow(f"has {len(scores)} values for {len(completions)} completions; give one each", "scores")
    row_prompt = prompt_of(row)
    both = [
        completion_of(row_prompt, value, "completions", f", item {i}") for i, value in enumerate(completions, start=1)
    ]
    for i, (prompt, _) in enumerate(both, start=1):
        if prompt != both[0][0]:
            raise BadRow("answers another prompt than item 1; all must answer the same", "completions", f", item {i}")
    values = [score_of(score, "scores", f", item {i}") for i, score in enumerate(scores, start=1)]
    judged = zip((completion for _, completion in both), values, strict=True)
    flags = row.get("finished")
    if flags is not None and not (isinstance(flags, list) and len(flags) == len(completions)):
        raise BadRow(f"must list true or false for each of the {len(completions)} completions", "finished")
    finished = [flag_of(flag, "finished", f", item {i}") for i, flag in enumerate(flags or (), start=1)]
    return group(both[0][0] if both else row_prompt, judged, place, finished)
