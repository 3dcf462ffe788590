"""Checks the values of a row (texts, messages, labels, scores) and makes examples from them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from halos_pl.data.calls import CALLS, CARRIED, THOUGHTS, objects_of
from halos_pl.data.example import Example, Fault, Prompt, Skipped, short
from halos_pl.data.meanings import KEYS, reason

Messages = list[dict[str, Any]]
Items = list[Example | Skipped]

NO_SCORE, TIE, EMPTY, SAME = "no score", "tie", "empty response", "both completions are the same"
PARTED = "dialogues differ before the last turn"
LATER = "another than the assistant speaks in a completion"
UNANSWERED = "a completion does not end with the assistant"


class BadRow(Exception):
    """What is wrong with a row.

    Args:
        reason: what is wrong and what to do; with a column, it continues "column 'x'".
        column: the schema's name of the column.
        within: the part of the column, such as ``, message 2``.
        ignorable: what the source may list in ``ignore`` to accept the row.
    """

    def __init__(self, reason: str, column: str | None = None, within: str = "", ignorable: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.column, self.within, self.ignorable = reason, column, within, ignorable

    def fault(self, place: str, renamed: Mapping[str, str]) -> Fault:
        """The fault of the row at ``place``, with the column's name in the file.

        Args:
            place: of the row.
            renamed: ``Source.columns``.
        """
        if self.column is None:
            return Fault(place, self.reason)
        name = renamed.get(self.column, self.column)
        # ``ignore`` takes the names in the file, not those of the schema.
        ignorable = name if self.ignorable == self.column else self.ignorable
        anyway = f"; to train without it, add 'ignore: [\"{ignorable}\"]' to the source" if ignorable else ""
        return Fault(place, f"column '{name}'{self.within} {self.reason}{anyway}", name)


def checked_text(value: str, column: str, within: str = "") -> str:
    """The text.

    Raises:
        BadRow: UTF-8 cannot encode it.
    """
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(
                "holds half a surrogate pair, which is not text; remove or repair the \\ud8xx escape", column, within
            ) from None
    return value


def plain_text(row: dict[str, Any], column: str) -> str:
    """A column that must be text and may be empty."""
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f"is {short(value)}; it must be text", column)
    return checked_text(value, column)


def has_value(value: Any, depth: int = 4) -> bool:
    """Whether a value is not null, NaN, a blank text, or a container of only these."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, list | dict) and depth:
        return any(has_value(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
    return value is not None and value == value  # NaN is not equal to itself


# Lower-case names of roles in published formats, and the chat template's names.
ROLES = {name: name for name in ("user", "assistant", "system", "developer", "tool", "function", "ipython")}
ROLES |= dict.fromkeys(("human", "prompter"), "user")
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "ai", "model", "function_call", "tool_call"), "assistant")
ROLES |= dict.fromkeys(("observation", "tool_response", "function_response"), "tool")


@lru_cache(maxsize=1024)
def _role(name: str) -> tuple[str, str | None]:
    """The template's name of a role in any case; for an unknown one, the role that it resembles."""
    lower = name.strip().lower()
    if lower in ROLES:
        return ROLES[lower], None
    return name, next(iter(difflib.get_close_matches(lower, ROLES, n=1, cutoff=0.8)), None)


def _joined(parts: list[Any], column: str, within: str) -> str:
    """The text of a content given as parts ``{"type": "text", "text": ...}``."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"the part {short(part)}" if kind in (None, "text") else f"a part of the type {short(kind)}"
            raise BadRow(
                f"has {what}; the model reads text only, as text or as {{'type': 'text', 'text': ...}}", column, within
            )
        for key in part.keys() - {"type", "text"}:
            if (why := reason(KEYS, key)) and has_value(part[key]):
                raise BadRow(f"has a part with {key}, which {why}", column, within, key)
        texts.append(part["text"])
    return "".join(texts)


_STYLES = (("role", "content"), ("from", "value"))


def _carried(value: dict[str, Any], column: str, within: str) -> dict[str, Any]:
    """The keys of a message for the chat template besides role and content."""
    carried: dict[str, Any] = {}
    for key in CARRIED:
        if not has_value(value.get(key)):
            continue
        if key == CALLS:
            try:
                carried[key] = objects_of(value[key], "call")
            except ValueError as error:
                raise BadRow(f"has {key} that {error}", column, within, key) from error
        elif isinstance(value[key], str):
            carried[key] = checked_text(value[key], column, within)
        else:
            raise BadRow(f"has the {key} {short(value[key])}; it must be text", column, within, key)
    return carried


def message_of(value: Any, column: str, within: str = "") -> dict[str, Any]:
    """A message from ``role`` and ``content``, or ShareGPT's ``from`` and ``value``, with the template's other keys.

    Beside tool calls or thoughts the content may be null or missing; it is then empty.
    """
    if not isinstance(value, dict):
        raise BadRow(f"is {short(value)}; it must be an object with 'role' and 'content'", column, within)
    keys, others = _STYLES if value.get("role") is not None or "from" not in value else _STYLES[::-1]
    fields: dict[str, Any] = {key: value.get(key) for key in keys}
    carried = _carried(value, column, within)
    if isinstance(fields[keys[1]], list):
        fields[keys[1]] = _joined(fields[keys[1]], column, within)
    if fields[keys[1]] is None and carried.keys() & {CALLS, *THOUGHTS}:
        fields[keys[1]] = ""
    for key, text in fields.items():
        if not isinstance(text, str):
            what = f"has the {key} {short(text)}" if key in value else f"has no '{key}'"
            raise BadRow(f"{what}; every message needs a '{keys[0]}' and a '{keys[1]}', both text", column, within)
        checked_text(text, column, within)
    role, content = (fields[key] for key in keys)
    if is_blank(role):
        raise BadRow(f"has an empty {keys[0]}; name one, such as 'user' or 'assistant'", column, within)
    name, near = _role(role)
    if near:
        raise BadRow(f"has the {keys[0]} {short(role)}; did you mean {short(near)}?", column, within)
    for key, other in zip(keys, others, strict=True):
        twice = value.get(other)
        same = twice == fields[key] or (key == keys[0] and isinstance(twice, str) and _role(twice)[0] == name)
        if has_value(twice) and not same:
            raise BadRow(f"has '{key}' and '{other}', which differ; keep one of them", column, within)
    return {"role": name, "content": content, **carried}


def messages_of(value: list[Any], column: str) -> Messages:
    """A list of messages."""
    return [message_of(message, column, f", message {i}") for i, message in enumerate(value, start=1)]


# All but whitespace, control characters and invisible ones: zero-width, direction marks, fillers, selectors, tags.
_VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u2028-\u202f\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


def is_blank(value: Prompt) -> bool:
    """Whether a prompt or completion has no visible character and no tool call."""
    if isinstance(value, str):
        return not _VISIBLE.search(value)
    texts = (message.get(key, "") for message in value for key in ("content", *THOUGHTS))
    return not any(map(_VISIBLE.search, texts)) and not any(CALLS in message for message in value)


def not_blank(value: Prompt, column: str, within: str = "") -> Prompt:
    """The text or messages.

    Raises:
        BadRow: nothing in them is visible.
    """
    if is_blank(value):
        what = "some text" if isinstance(value, str) else "a message with some text"
        raise BadRow(f"is empty; give it {what} or remove the row", column, within)
    return value


def prompt_like(value: Any, column: str, within: str = "") -> Prompt:
    """Text or messages."""
    if isinstance(value, str):
        return checked_text(value, column, within)
    if isinstance(value, list):
        return messages_of(value, column)
    raise BadRow(
        f'is {short(value)}; it must be text or a list of messages {{"role": ..., "content": ...}}', column, within
    )


def prompt_of(row: dict[str, Any], column: str = "prompt") -> Prompt:
    """A column of text or messages that is not blank."""
    return not_blank(prompt_like(row[column], column), column)


def continued(prompt: Prompt, value: Any, column: str, within: str = "") -> tuple[Prompt, Prompt]:
    """Prompt and completion, where ``value`` may repeat the prompt's messages.

    If the completion is a conversation whose last user message is the text prompt, as in the binarised UltraFeedback,
    the messages up to it become the prompt.
    """
    completion = prompt_like(value, column, within)
    if isinstance(completion, list):
        if isinstance(prompt, str):
            asked = max((i for i, m in enumerate(completion) if m["role"] == "user"), default=-1)
            if asked < 0 or completion[asked]["content"].strip() != prompt.strip():
                raise BadRow(
                    "is a message list but 'prompt' is plain text; give both as messages or both as text",
                    column,
                    within,
                )
            prompt = completion[: asked + 1]
        if completion[: len(prompt)] == prompt:  # the conversation repeated from its start
            if completion and len(completion) == len(prompt):
                raise BadRow("only repeats the prompt; add the assistant's message", column, within)
            completion = completion[len(prompt) :]
        # Messages before the assistant's first belong to the prompt.
        first = next((i for i, m in enumerate(completion) if m["role"] == "assistant"), 0)
        if first and isinstance(prompt, list):
            before, completion = completion[:first], completion[first:]
            prompt = prompt if prompt[-first:] == before else prompt + before
    return prompt, completion


def completion_of(prompt: Prompt, value: Any, column: str, within: str = "") -> tuple[Prompt, Prompt]:
    """As :func:`continued`, with a completion that is not blank."""
    prompt, completion = continued(prompt, value, column, within)
    return prompt, not_blank(completion, column, within)


def both_of(question: Prompt, row: dict[str, Any], first: str, second: str) -> tuple[Prompt, Prompt, Prompt]:
    """The prompt and both completions of a pair."""
    prompt, one = completion_of(question, row[first], first)
    other, two = completion_of(question, row[second], second)
    if other != prompt:
        raise BadRow(f"repeats another prompt than '{first}'; both must answer the same messages", second)
    return prompt, one, two


TRUE_FALSE = ({"true", "1", "1.0"}, {"false", "0", "0.0"})
# Common names of the two kinds of feedback, as text or as names of a ClassLabel.
_GOOD = TRUE_FALSE[0] | {"good", "desirable", "chosen", "preferred", "accepted", "accept", "positive", "correct"}
_GOOD |= {"helpful", "safe", "like", "liked", "up", "upvote", "thumbs_up", "thumbsup", "win"}
_BAD = TRUE_FALSE[1] | {"bad", "undesirable", "rejected", "reject", "dispreferred", "negative", "incorrect", "wrong"}
_BAD |= {"unhelpful", "unsafe", "dislike", "disliked", "down", "downvote", "thumbs_down", "thumbsdown", "lose"}
_FIRST, _SECOND = (
    yes | {f"{of}{a}" for of in ("", "output_", "human_ref_")} for yes, a in zip(TRUE_FALSE, "ab", strict=True)
)


def label_of(
    row: dict[str, Any],
    column: str,
    true: str = "desirable",
    false: str = "undesirable",
    words: tuple[set[str], set[str]] = (_GOOD, _BAD),
) -> bool:
    """A label: true or 1, false or 0, or one of ``words``, as in CSV files and the names of a ClassLabel.

    Args:
        row: by column.
        column: of the label.
        true, false: meaning of the two, for messages.
        words: lower-case texts for the two.
    """
    value = row[column]
    if isinstance(value, str):
        word = re.sub(r"[\s-]+", "_", value.strip().lower())
        if word in words[0] or word in words[1]:
            return word in words[0]
    elif isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise BadRow(f"is {short(value)}; it must be true or 1 ({true}), or false or 0 ({false})", column)


def first_of(row: dict[str, Any], column: str) -> bool:
    """Whether A is preferred to B."""
    return label_of(row, column, "A is preferred", "B is preferred", (_FIRST, _SECOND))


def agreed_label(row: dict[str, Any], columns: tuple[str, ...]) -> bool:
    """The label from the first of ``columns`` that has one; others must agree."""
    present = [name for name in columns if name in row]
    filled = [name for name in present if row[name] is not None] or present[:1]
    labels = [label_of(row, name) for name in filled]
    if len(set(labels)) > 1:
        raise BadRow(f"is {short(row[filled[0]])}, but '{filled[1]}' says the opposite; keep one of them", filled[0])
    return labels[0]


def score_of(value: Any, column: str, within: str = "") -> float | None:
    """A finite number, or None for null."""
    if value is None:
        return None
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise BadRow(f"is {short(value)}; a score must be a finite number, or null", column, within)


def answered(completion: Prompt) -> bool:
    """Whether the assistant speaks last."""
    return not isinstance(completion, list) or (bool(completion) and completion[-1]["role"] == "assistant")


def flag_of(value: Any, column: str, within: str = "") -> bool:
    """Whether a completion is finished; null means yes."""
    if value is None:
        return True
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):  # CSV has only text
        return value.strip().lower() == "true"
    if value in (0, 1):
        return bool(value)
    raise BadRow(
        f"is {short(value)}; it must be true, or false for a completion that was cut and gets no EOS", column, within
    )


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
) -> Items:
    """An example of a pair; skipped if its completions are equal or the assistant does not speak last."""
    if chosen == rejected:
        return [Skipped(place, SAME)]
    if not (answered(chosen) and answered(rejected)):
        return [Skipped(place, UNANSWERED)]
    return [Example(prompt, (chosen, rejected), (True, False), place, scores, paired=True, finished=finished)]


def pair_scores(row: dict[str, Any], first: str, second: str) -> tuple[float | None, ...]:
    """The scores in two optional columns."""
    return score_of(row.get(first), first), score_of(row.get(second), second)


def list_of(row: dict[str, Any], column: str) -> list[Any]:
    """A column that must be a list."""
    value = row[column]
    if not isinstance(value, list):
        raise BadRow(f"is {short(value)}; it must be a list", column)
    return value


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
