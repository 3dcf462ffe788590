"""From rows to examples: one schema for each set of columns in which people publish feedback.

A new schema is one function and one entry of ``SCHEMAS``. What a published data set is known to hold and what no loss
can use (a tie, an answer of a model that is empty) is skipped and counted; what someone must have meant otherwise is a
fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from halos_pl.data.example import Skipped, short
from halos_pl.data.published import Trees, pandalm, shp, ultrafeedback
from halos_pl.data.values import (
    EMPTY,
    NO_SCORE,
    PARTED,
    SAME,
    TIE,
    BadRow,
    Items,
    Messages,
    agreed_label,
    both_of,
    completion_of,
    first_of,
    flag_of,
    group,
    is_blank,
    label_of,
    list_of,
    message_of,
    messages_of,
    not_blank,
    one,
    pair,
    pair_scores,
    prompt_like,
    prompt_of,
    score_of,
)

#: A row and its place (``SOURCE:LINE``) to what it says. Raises BadRow.
Parse = Callable[[dict[str, Any], str], Items]


# TRL ---------------------------------------------------------------------------------------------------


def _unpaired(row: dict[str, Any], place: str) -> Items:
    label, score = agreed_label(row, ("label", "kto_tag")), None
    with suppress(BadRow):  # the schema does not ask for it: a column of that name may hold anything
        score = score_of(row.get("score"), "score")
    both = completion_of(prompt_of(row), row["completion"], "completion")
    return one(*both, place, label, score, _finished(row))


def _finished(row: dict[str, Any]) -> bool:
    return flag_of(row.get("finished"), "finished")


def _both_finished(row: dict[str, Any]) -> tuple[bool, bool]:
    """Whether chosen and rejected are finished: a column for each, or one with a list of the two."""
    given = row.get("finished")
    if given is not None and not (isinstance(given, list) and len(given) == 2):
        raise BadRow(f"is {short(given)}; of a pair it must be [chosen, rejected], each true or false", "finished")
    chosen, rejected = given or (None, None)
    return (
        flag_of(row.get("chosen_finished", chosen), "chosen_finished"),
        flag_of(row.get("rejected_finished", rejected), "rejected_finished"),
    )


def _paired(row: dict[str, Any], place: str) -> Items:
    prompt, chosen, rejected = both_of(prompt_of(row), row, "chosen", "rejected")
    return pair(prompt, chosen, rejected, place, _scores(row), _both_finished(row))


# The names under which published pairs have the scores of their completions.
_OF = ("score_{}", "{}_score", "rating_{}", "{}_rating", "{}-score", "{}-rating", "{}_avg_rating")
_PAIRS_OF_SCORES = [(name.format("chosen"), name.format("rejected")) for name in _OF]


def _scores(row: dict[str, Any]) -> tuple[float | None, ...]:
    """The scores of chosen and rejected by the first names under which both are there: others may be in other units."""
    found = ([row.get(name) is not None for name in names] for names in _PAIRS_OF_SCORES)
    count = [sum(there) for there in found]
    return pair_scores(row, *_PAIRS_OF_SCORES[count.index(max(count))])


_OWN_COLUMN = "give the prompt in a column 'prompt' of its own"


def _implicit(row: dict[str, Any], place: str) -> Items:
    """The prompt is what both begin with."""
    chosen, rejected = (not_blank(prompt_like(row[c], c), c) for c in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if _is_hh(chosen) or _is_hh(rejected):
            return _hh(chosen, rejected, place, _scores(row))
        if chosen == rejected:
            return [Skipped(place, SAME)]
        end = _shared_text(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        if chosen == rejected:
            return [Skipped(place, SAME)]
        parted = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        end = next(parted, min(len(chosen), len(rejected)))
        for column, messages in (("chosen", chosen), ("rejected", rejected)):
            if end < len(messages) and messages[end]["role"] != "assistant":
                raise BadRow(
                    f"differs from the other before the assistant's turn (the role there is "
                    f"{short(messages[end]['role'])}); both must answer the same prompt",
                    column,
                    f", message {end + 1}",
                )
    else:
        raise BadRow("is text and the other is a message list, or the other way round; give both alike", "rejected")
    if is_blank(chosen[:end]):
        raise BadRow(f"and 'chosen' share no prompt at their start; {_OWN_COLUMN}", "rejected")
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if is_blank(value[end:]):
            raise BadRow(f"holds nothing but what both begin with; {_OWN_COLUMN}", column)
    return pair(chosen[:end], chosen[end:], rejected[end:], place, _scores(row), _both_finished(row))


def _shared_text(a: str, b: str) -> int:
    """Length of what two texts both begin with, cut back to the end of a word, as in TRL's ``extract_prompt``.

    A space before the first other word belongs to the completions. Scripts that put no blanks between words are cut
    where the texts part.
    """
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared in C, characters one by one are not
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
    """Dialogues as Anthropic's HH-RLHF writes them; the last turn of the assistant is what was judged."""
    dialogues = []
    for column, text in (("chosen", chosen), ("rejected", rejected)):
        before, *parts = _TURN.split(text.lstrip())
        roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
        if before or not roles or roles[-1] != "assistant":
            raise BadRow("must be a dialogue of Human: and Assistant: that ends with the assistant's answer", column)
        dialogue = [{"role": r, "content": t.strip()} for r, t in zip(roles, parts[1::2], strict=True)]
        dialogues.append(dialogue)
    first, second = dialogues
    both = zip(first[:-1], second[:-1], strict=False)
    end = next((i for i, (a, b) in enumerate(both) if a != b), min(len(first), len(second)) - 1)
    if first[end]["role"] != "assistant" or second[end]["role"] != "assistant":
        return [Skipped(place, PARTED)]  # the user has asked something else
    if is_blank(first[:end]):
        raise BadRow("has an empty prompt; remove the row", "chosen")
    if is_blank(first[-1:]) or is_blank(second[-1:]):
        return [Skipped(place, EMPTY)]
    return pair(first[:end], first[end:], second[end:], place, scores)


# HALOs (train/label.py writes them) --------------------------------------------------------------------


def _halos_binary(row: dict[str, Any], place: str) -> Items:
    label = label_of(row, "label")
    prompt, completion = completion_of(prompt_of(row), row["output"], "output")
    return one(prompt, completion, place, label, score_of(row.get("reward"), "reward"))


def _halos_pairwise(row: dict[str, Any], place: str) -> Items:
    """``label`` is 1 where ``output_A`` has the higher reward; of equal rewards it says 0, which is no preference."""
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


def _judged_conversation(column: str, labels: tuple[str, ...]) -> Parse:
    """The last message is the assistant's and was judged."""

    def parse(row: dict[str, Any], place: str) -> Items:
        label = agreed_label(row, labels)
        messages = _conversation(row, column)
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow("does not end with a message of the assistant, which is what was judged", column)
        if is_blank(messages[:-1]):
            raise BadRow("has no prompt before the assistant's message; give it some text or remove the row", column)
        said = not_blank(messages[-1:], column, ", last message")
        return one(messages[:-1], said, place, label, finished=_finished(row))

    return parse


def _conversation_pair(column: str) -> Parse:
    """Two answers to a conversation. A single message may stand without a list."""

    def parse(row: dict[str, Any], place: str) -> Items:
        values = {c: [message_of(row[c], c)] if isinstance(row[c], dict) else row[c] for c in ("chosen", "rejected")}
        said = [value[:1] for value in (row[column], *values.values()) if isinstance(value, list)]
        if len(said) == 3 and said[0] == said[1] == said[2]:  # both repeat it from its start, up to their answers
            return _implicit(row, place)
        prompt = not_blank(_conversation(row, column), column)
        prompt, chosen, rejected = both_of(prompt, values, "chosen", "rejected")
        return pair(prompt, chosen, rejected, place, _scores(row), _both_finished(row))

    return parse


# Scores ------------------------------------------------------------------------------------------------


def _scored(row: dict[str, Any], place: str) -> Items:
    prompt, completion = completion_of(prompt_of(row), row["completion"], "completion")
    # The first column that is there, whatever it holds: a rank in place of a missing score would be in another unit.
    column = next(name for name in ("score", "rating", "rank") if name in row)
    score = score_of(row[column], column)
    if score is None:
        return [Skipped(place, NO_SCORE)]
    finished = _finished(row)
    if column == "rank":
        score = 0.0 - score  # 0 is the best; and 0, not -0
    return one(prompt, completion, place, None, score, finished)


def _scored_lists(row: dict[str, Any], place: str) -> Items:
    completions, scores = list_of(row, "completions"), list_of(row, "scores")
    if len(completions) != len(scores):
        raise BadRow(f"has {len(scores)} values for {len(completions)} completions; give one for each", "scores")
    given = prompt_of(row)
    both = [completion_of(given, value, "completions", f", item {i}") for i, value in enumerate(completions, start=1)]
    for i, (prompt, _) in enumerate(both, start=1):
        if prompt != both[0][0]:
            raise BadRow("repeats another prompt than item 1; all must answer the same", "completions", f", item {i}")
    values = [score_of(score, "scores", f", item {i}") for i, score in enumerate(scores, start=1)]
    judged = zip((completion for _, completion in both), values, strict=True)
    flags = row.get("finished")
    if flags is not None and not (isinstance(flags, list) and len(flags) == len(completions)):
        raise BadRow(f"must be a list with true or false for each of the {len(completions)} completions", "finished")
    finished = [flag_of(flag, "finished", f", item {i}") for i, flag in enumerate(flags or (), start=1)]
    return group(both[0][0] if both else given, judged, place, finished)


# The table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schema:
    """A set of columns, and what a row that has them says.

    Attributes:
        name: as in ``Source.schema``.
        columns: that a row needs; ``a|b`` is one of two.
        also: that it reads where they are there: a regular expression.
        parse: of one row; None where ``prepare`` gives it.
        without: columns that tell that a row is something else.
        prepare: where a row can only be read with the whole source at hand: from all rows to the parse function.
        reads: with ``prepare``: the columns that it wants, so that no others are kept.
        conversation: what is judged is a conversation as a whole, not the answer to a prompt.
    """

    name: str
    columns: tuple[str, ...]
    parse: Parse | None = None
    also: str = ""
    without: tuple[str, ...] = ()
    prepare: Callable[[Iterable[dict[str, Any]]], Parse] | None = None
    reads: tuple[str, ...] = ()
    conversation: bool = False

    def lacks(self, columns: Iterable[str]) -> list[str]:
        """Which of the needed columns are not among ``columns``."""
        there = set(columns)
        return [column for column in self.columns if there.isdisjoint(column.split("|"))]


# Where a prompt may hide under a name that is not ours, "what both begin with" would be a guess.
_PROMPTS = ("instruction", "question", "query", "input", "history", "context", "context_messages")
_JUDGED = "label|kto_tag|finished"
_PAIR = "|".join(name for names in _PAIRS_OF_SCORES for name in names) + "|(chosen_|rejected_)?finished"

SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("unpaired", ("prompt", "completion", "label"), _unpaired, "score|kto_tag|finished"),
        Schema("paired", ("prompt", "chosen", "rejected"), _paired, _PAIR),
        Schema("implicit", ("chosen", "rejected"), _implicit, _PAIR, _PROMPTS),
        Schema("halos_binary", ("prompt", "output", "label"), _halos_binary, "reward"),
        Schema("halos_pairwise", ("prompt", "output_A", "output_B", "label"), _halos_pairwise, "reward_[AB]"),
        Schema(
            "messages",
            ("messages", "kto_tag|label"),
            _judged_conversation("messages", ("kto_tag", "label")),
            _JUDGED,
            conversation=True,
        ),
        Schema("messages_pair", ("messages", "chosen", "rejected"), _conversation_pair("messages"), _PAIR, ("prompt",)),
        Schema("sharegpt_pair", ("conversations", "chosen", "rejected"), _conversation_pair("conversations"), _PAIR),
        Schema(
            "sharegpt",
            ("conversations", "kto_tag|label"),
            _judged_conversation("conversations", ("kto_tag", "label")),
            _JUDGED,
            conversation=True,
        ),
        Schema("scored", ("prompt", "completion", "score|rating|rank"), _scored, "finished", without=("label",)),
        Schema("scored_lists", ("prompt", "completions", "scores"), _scored_lists, "finished"),
        Schema("ultrafeedback", ("instruction", "completions"), ultrafeedback),
        Schema("shp", ("history", "human_ref_A", "human_ref_B", "labels"), shp, "score_[AB]"),
        Schema("pandalm", ("instruction", "response1", "response2", "annotator1"), pandalm, r"input|annotator\d+"),
        Schema("oasst", ("message_id", "text", "role"), None, "parent_id|rank|deleted", (), Trees, Trees.reads),
    )
}


@lru_cache(maxsize=1024)
def _fitting(columns: frozenset[str]) -> tuple[Schema, ...]:
    small = {column.lower() for column in columns}
    fitting = [s for s in SCHEMAS.values() if not s.lacks(columns) and small.isdisjoint(s.without)]
    # chosen + rejected are also part of prompt + chosen + rejected: the larger set has it.
    return tuple(s for s in fitting if not any(set(s.columns) < set(other.columns) for other in fitting))


def _filled(row: dict[str, Any]) -> frozenset[str]:
    return frozenset(column for column, value in row.items() if value is not None)


def _lack(schema: Schema, row: dict[str, Any], renamed: Mapping[str, str]) -> BadRow:
    missing = ", ".join(
        " or ".join(f"'{renamed.get(name, name)}'" for name in column.split("|")) for column in schema.lacks(row)
    )
    has = ", ".join(short(column) for column in list(row)[:8]) or "none"
    if {"prompt", "completions"} <= set(row) and "scores" not in row:
        return BadRow(
            f"the row has completions, but no scores, one for each (this one has: {has}). A row takes a label where it"
            " has one completion, as those of halos generate --one_per_row true"
        )
    return BadRow(
        f"the row lacks {missing} of the schema '{schema.name}' (this one has: {has}); map other names by 'columns', "
        f"or name the 'schema': {', '.join(SCHEMAS)}"
    )


def find(row: dict[str, Any], renamed: Mapping[str, str]) -> Schema:
    """The one schema whose columns a row has. A null counts only where nothing else fits.

    Raises:
        BadRow: none fits, or several do.
    """
    for columns in (_filled(row), frozenset(row)):
        fitting = _fitting(columns)
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            both = " and ".join(f"'{schema.name}' ({'+'.join(schema.columns)})" for schema in fitting)
            raise BadRow(f"the row fits {both}; name one of them as 'schema', or keep the columns of one")
    raise _lack(max(SCHEMAS.values(), key=lambda s: len(s.columns) - len(s.lacks(row))), row, renamed)


def check(row: dict[str, Any], schema: Schema, first: int | None, renamed: Mapping[str, str]) -> None:
    """Whether a row is one of ``schema``, as the row at line ``first`` was; None where the schema was given.

    Raises:
        BadRow: columns are missing, or they are those of another schema.
    """
    filled = _filled(row)
    fitting = _fitting(filled)
    if schema in fitting:
        return
    lacks = schema.lacks(row)
    # One null is a hole in a row of this schema; more, or none, and other columns filled: a file of two kinds of rows.
    if first is not None and fitting and (lacks or len(schema.lacks(filled)) != 1):
        raise BadRow(
            f"a row of '{fitting[0].name}' ({'+'.join(fitting[0].columns)}), but line {first} is a row of "
            f"'{schema.name}' ({'+'.join(schema.columns)}); put the two kinds into two files"
        )
    if lacks:
        raise _lack(schema, row, renamed)
