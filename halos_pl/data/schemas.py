"""From rows to examples: one schema for each set of columns in which people publish feedback.

A new schema is one function and one entry of ``SCHEMAS``. What a published data set is known to hold and what no loss
can use (a tie, an answer of a model that is empty) is skipped and counted; what someone must have meant otherwise is a
fault.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from halos_pl.data.example import Example, Fault, Prompt, Skipped
from halos_pl.data.formats import short

Messages = list[dict[str, str]]
Items = list[Example | Skipped]
#: A row and its place (``SOURCE:LINE``) to what it says. Raises BadRow.
Parse = Callable[[dict[str, Any], str], Items]

NO_SCORE, TIE, EMPTY, SAME = "no score", "tie", "empty response", "both completions are the same"
PARTED = "dialogues differ before the last turn"
LATER = "another than the assistant speaks in a completion"  # what was said then would carry the loss


class BadRow(Exception):
    """What is wrong with a row.

    Args:
        reason: what is wrong and what to do; continues "column 'x'" where there is a column.
        column: by the name that the schema has for it.
        within: which part of the column, such as ``, message 2``.
    """

    def __init__(self, reason: str, column: str | None = None, within: str = "") -> None:
        super().__init__(reason)
        self.reason, self.column, self.within = reason, column, within

    def fault(self, place: str, renamed: Mapping[str, str]) -> Fault:
        """It as a fault of the row at ``place``, with the column by its name in the file."""
        if self.column is None:
            return Fault(place, self.reason)
        name = renamed.get(self.column, self.column)
        return Fault(place, f"column '{name}'{self.within} {self.reason}", name)


# Values ------------------------------------------------------------------------------------------------


def _text(value: str, column: str, within: str = "") -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(
                "holds half of a surrogate pair, which is not text; remove or repair the \\ud8xx escape", column, within
            ) from None
    return value


def _plain(row: dict[str, Any], column: str) -> str:
    """A column that must be text, but may be empty."""
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f"is {short(value)}; it must be text", column)
    return _text(value, column)


_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_ROLES |= {"observation": "tool", "function_call": "assistant"}


def _message(value: Any, column: str, within: str = "") -> dict[str, str]:
    """An object with ``role`` and ``content``, or ShareGPT's ``from`` and ``value``."""
    if not isinstance(value, dict):
        raise BadRow(f"is {short(value)}; it must be an object with 'role' and 'content'", column, within)
    keys = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    for key in keys:
        if not isinstance(value.get(key), str):
            found = f"has the {key} {short(value[key])}" if key in value else f"has no '{key}'"
            raise BadRow(f"{found}; every message needs a '{keys[0]}' and a '{keys[1]}', both text", column, within)
        _text(value[key], column, within)
    for key in ("tool_calls", "function_call", "reasoning_content", "thinking"):
        if value.get(key):
            raise BadRow(f"has {key}, which would be lost; write it into its content or remove the row", column, within)
    role = value[keys[0]]
    if not role.strip():
        raise BadRow(f"has an empty {keys[0]}; name one, such as 'user' or 'assistant'", column, within)
    return {"role": _ROLES.get(role, role) if keys[0] == "from" else role, "content": value[keys[1]]}


def _messages(value: list[Any], column: str) -> Messages:
    return [_message(message, column, f", message {i}") for i, message in enumerate(value, start=1)]


def _is_blank(value: Prompt) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return not any(message["content"].strip() for message in value)


def _not_blank(value: Prompt, column: str, within: str = "") -> Prompt:
    if _is_blank(value):
        what = "some text" if isinstance(value, str) else "a message with some text"
        raise BadRow(f"is empty; give it {what} or remove the row", column, within)
    return value


def _prompt_like(value: Any, column: str, within: str = "") -> Prompt:
    """Text or messages."""
    if isinstance(value, str):
        return _text(value, column, within)
    if isinstance(value, list):
        return _messages(value, column)
    raise BadRow(
        f'is {short(value)}; it must be text or a list of messages {{"role": ..., "content": ...}}', column, within
    )


def _prompt(row: dict[str, Any], column: str = "prompt") -> Prompt:
    return _not_blank(_prompt_like(row[column], column), column)


def _continued(prompt: Prompt, value: Any, column: str, within: str = "") -> tuple[Prompt, Prompt]:
    """Prompt and completion, where ``value`` may repeat the prompt's messages.

    A prompt of text becomes the messages up to its own, if the completion is a conversation that holds it as the
    last of the user's: so are UltraFeedback's binarised forms.
    """
    completion = _prompt_like(value, column, within)
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
        # What is said before the assistant speaks is asked, wherever it stands.
        first = next((i for i, m in enumerate(completion) if m["role"] == "assistant"), 0)
        if first and isinstance(prompt, list):
            before, completion = completion[:first], completion[first:]
            prompt = prompt if prompt[-first:] == before else prompt + before  # repeated but for what came before it
    return prompt, completion


def _completion(prompt: Prompt, value: Any, column: str, within: str = "") -> tuple[Prompt, Prompt]:
    prompt, completion = _continued(prompt, value, column, within)
    return prompt, _not_blank(completion, column, within)


def _both(given: Prompt, row: dict[str, Any], first: str, second: str) -> tuple[Prompt, Prompt, Prompt]:
    """The prompt and both completions of a pair."""
    prompt, one = _completion(given, row[first], first)
    other, two = _completion(given, row[second], second)
    if other != prompt:
        raise BadRow(
            f"does not repeat the same prompt as '{first}', so that it does not answer the same messages", second
        )
    return prompt, one, two


def _label(row: dict[str, Any], column: str, true: str = "desirable", false: str = "undesirable") -> bool:
    """True or 1 and false or 0; as text too, for in CSV all is text."""
    value = row[column]
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if isinstance(value, str) and value.lower() in known:
        return known[value.lower()]
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise BadRow(f"is {short(value)}; it must be true or 1 ({true}), or false or 0 ({false})", column)
    return bool(value)


def _score(value: Any, column: str, within: str = "") -> float | None:
    """A finite number, or None for null."""
    if value is None:
        return None
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise BadRow(f"is {short(value)}; a score must be a finite number, or null where there is none", column, within)


def _others(completion: Prompt) -> bool:
    """Whether it holds a message of another than the assistant: the user, a tool."""
    return isinstance(completion, list) and any(message["role"] != "assistant" for message in completion)


def _one(prompt: Prompt, completion: Prompt, place: str, label: bool | None, score: float | None = None) -> Items:
    if _others(completion):
        return [Skipped(place, LATER)]
    return [Example(prompt, (completion,), (label,), place, (score,))]


def _pair(
    prompt: Prompt,
    chosen: Prompt,
    rejected: Prompt,
    place: str,
    scores: tuple[float | None, ...] = (),
) -> Items:
    if chosen == rejected:
        return [Skipped(place, SAME)]
    if _others(chosen) or _others(rejected):
        return [Skipped(place, LATER)]
    return [Example(prompt, (chosen, rejected), (True, False), place, scores, paired=True)]


# TRL ---------------------------------------------------------------------------------------------------


def _unpaired(row: dict[str, Any], place: str) -> Items:
    label, score = _label(row, "label"), None
    with suppress(BadRow):  # the schema does not ask for it: a column of that name may hold anything
        score = _score(row.get("score"), "score")
    return _one(*_completion(_prompt(row), row["completion"], "completion"), place, label, score)


def _pair_scores(row: dict[str, Any], first: str, second: str) -> tuple[float | None, ...]:
    return _score(row.get(first), first), _score(row.get(second), second)


def _paired(row: dict[str, Any], place: str) -> Items:
    prompt, chosen, rejected = _both(_prompt(row), row, "chosen", "rejected")
    return _pair(prompt, chosen, rejected, place, _pair_scores(row, "score_chosen", "score_rejected"))


_OWN_COLUMN = "give the prompt in a column 'prompt' of its own"


def _implicit(row: dict[str, Any], place: str) -> Items:
    """The prompt is what both begin with."""
    chosen, rejected = (_not_blank(_prompt_like(row[c], c), c) for c in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if _is_hh(chosen) or _is_hh(rejected):
            return _hh(chosen, rejected, place)
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
    if isinstance(chosen, list) and any(m["role"] == "user" for m in (*chosen[end:], *rejected[end:])):
        return [Skipped(place, PARTED)]  # what the user said then would carry the loss
    if _is_blank(chosen[:end]):
        raise BadRow(f"and 'chosen' share no prompt at their start; {_OWN_COLUMN}", "rejected")
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if _is_blank(value[end:]):
            raise BadRow(f"holds nothing but what both begin with; {_OWN_COLUMN}", column)
    return _pair(chosen[:end], chosen[end:], rejected[end:], place)


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


def _hh(chosen: str, rejected: str, place: str) -> Items:
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
    if first[:-1] != second[:-1]:
        return [Skipped(place, PARTED)]
    if _is_blank(first[:-1]):
        raise BadRow("has an empty prompt; remove the row", "chosen")
    if _is_blank(first[-1:]) or _is_blank(second[-1:]):
        return [Skipped(place, EMPTY)]
    return _pair(first[:-1], first[-1:], second[-1:], place)


# HALOs (train/label.py writes them) --------------------------------------------------------------------


def _halos_binary(row: dict[str, Any], place: str) -> Items:
    label = _label(row, "label")
    prompt, completion = _completion(_prompt(row), row["output"], "output")
    return _one(prompt, completion, place, label, _score(row.get("reward"), "reward"))


def _halos_pairwise(row: dict[str, Any], place: str) -> Items:
    """``label`` is 1 where ``output_A`` has the higher reward; of equal rewards it says 0, which is no preference."""
    first = _label(row, "label", "A is preferred", "B is preferred")
    prompt, a, b = _both(_prompt(row), row, "output_A", "output_B")
    rewards = _pair_scores(row, "reward_A", "reward_B")
    if rewards[0] is not None and rewards[0] == rewards[1]:
        return [Skipped(place, TIE)]
    return _pair(prompt, a, b, place, rewards) if first else _pair(prompt, b, a, place, rewards[::-1])


# Conversations -----------------------------------------------------------------------------------------


def _conversation(row: dict[str, Any], column: str) -> Messages:
    value = row[column]
    if not isinstance(value, list):
        raise BadRow(f"is {short(value)}; it must be a list of messages", column)
    messages = _messages(value, column)
    system = row.get("system")  # LLaMA-Factory keeps it in a column of its own
    if isinstance(system, str) and system.strip():
        if messages and messages[0]["role"] == "system":
            raise BadRow(f"stands there, and '{column}' has a system message too; keep one of them", "system")
        messages.insert(0, {"role": "system", "content": _text(system, "system")})
    return messages


def _judged_conversation(column: str, labels: tuple[str, ...]) -> Parse:
    """The last message is the assistant's and was judged."""

    def parse(row: dict[str, Any], place: str) -> Items:
        there = [name for name in labels if name in row]
        label = _label(row, next((name for name in there if row[name] is not None), there[0]))
        messages = _conversation(row, column)
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow("does not end with a message of the assistant, which is what was judged", column)
        if _is_blank(messages[:-1]):
            raise BadRow("has no prompt before the assistant's message; give it some text or remove the row", column)
        return _one(messages[:-1], _not_blank(messages[-1:], column, ", last message"), place, label)

    return parse


def _sharegpt_pair(row: dict[str, Any], place: str) -> Items:
    prompt = _not_blank(_conversation(row, "conversations"), "conversations")
    # A single message may stand without a list.
    values = {c: [_message(row[c], c)] if isinstance(row[c], dict) else row[c] for c in ("chosen", "rejected")}
    prompt, chosen, rejected = _both(prompt, values, "chosen", "rejected")
    return _pair(prompt, chosen, rejected, place)


# Scores ------------------------------------------------------------------------------------------------


def _scored(row: dict[str, Any], place: str) -> Items:
    prompt, completion = _completion(_prompt(row), row["completion"], "completion")
    # The first column that is there, whatever it holds: a rank in place of a missing score would be in another unit.
    column = next(name for name in ("score", "rating", "rank") if name in row)
    score = _score(row[column], column)
    if score is None:
        return [Skipped(place, NO_SCORE)]
    if column == "rank":
        score = 0.0 - score  # 0 is the best; and 0, not -0
    return _one(prompt, completion, place, None, score)


def _list(row: dict[str, Any], column: str) -> list[Any]:
    value = row[column]
    if not isinstance(value, list):
        raise BadRow(f"is {short(value)}; it must be a list", column)
    return value


def _group(prompt: Prompt, judged: Iterable[tuple[Prompt, float | None]], place: str) -> Items:
    """One example of all that have a score; the others are skipped one by one."""
    items: Items = []
    kept: list[tuple[Prompt, float]] = []
    for number, (completion, score) in enumerate(judged, start=1):
        if score is None or _is_blank(completion) or _others(completion):
            why = NO_SCORE if score is None else EMPTY if _is_blank(completion) else LATER
            items.append(Skipped(f"{place}#{number}", why))
        else:
            kept.append((completion, score))
    if kept:
        completions, scores = zip(*kept, strict=True)
        items.insert(0, Example(prompt, completions, (None,) * len(kept), place, scores))
    return items or [Skipped(place, "no completions")]


def _scored_lists(row: dict[str, Any], place: str) -> Items:
    completions, scores = _list(row, "completions"), _list(row, "scores")
    if len(completions) != len(scores):
        raise BadRow(f"has {len(scores)} values for {len(completions)} completions; give one for each", "scores")
    given = _prompt(row)
    both = [_completion(given, value, "completions", f", item {i}") for i, value in enumerate(completions, start=1)]
    for i, (prompt, _) in enumerate(both, start=1):
        if prompt != both[0][0]:
            raise BadRow("repeats another prompt than item 1; all must answer the same", "completions", f", item {i}")
    values = [_score(score, "scores", f", item {i}") for i, score in enumerate(scores, start=1)]
    judged = zip((completion for _, completion in both), values, strict=True)
    return _group(both[0][0] if both else given, judged, place)


def _ultrafeedback(row: dict[str, Any], place: str) -> Items:
    prompt = _prompt(row, "instruction")
    judged: list[tuple[Prompt, float | None]] = []
    for i, item in enumerate(_list(row, "completions"), start=1):
        within = f", item {i}"
        if not isinstance(item, dict) or not isinstance(item.get("response"), str):
            raise BadRow(
                f"is {short(item)}; it must be an object with a 'response' of text and an 'overall_score'",
                "completions",
                within,
            )
        score = _score(item.get("overall_score"), "completions", f"{within}, 'overall_score'")
        judged.append((_text(item["response"], "completions", within), score))
    return _group(prompt, judged, place)


# Published sets of human verdicts ----------------------------------------------------------------------


def _shp(row: dict[str, Any], place: str) -> Items:
    """Two answers to a post; ``labels`` is 1 where A is preferred."""
    first = _label(row, "labels", "A is preferred", "B is preferred")
    prompt = _not_blank(_plain(row, "history"), "history")
    a, b = _plain(row, "human_ref_A"), _plain(row, "human_ref_B")
    scores = _pair_scores(row, "score_A", "score_B")
    if _is_blank(a) or _is_blank(b):
        return [Skipped(place, EMPTY)]
    return _pair(prompt, a, b, place, scores) if first else _pair(prompt, b, a, place, scores[::-1])


_ANNOTATOR = re.compile(r"annotator\d+")


def _pandalm(row: dict[str, Any], place: str) -> Items:
    """A pair for each annotator's verdict, 1 or 2 for the better response; annotators that disagree both count."""
    parts = [_plain(row, "instruction"), _plain(row, "input") if row.get("input") is not None else ""]
    prompt = _not_blank("\n".join(part for part in parts if part.strip()), "instruction")
    verdicts = {}
    for column in sorted(filter(_ANNOTATOR.fullmatch, row), key=lambda name: (len(name), name)):
        verdict = _score(row[column], column)
        if verdict not in (None, 0, 1, 2):
            raise BadRow(f"is {short(row[column])}; a verdict is 0 (tie), 1 or 2, or null where there is none", column)
        verdicts[column] = verdict
    responses = []
    for column in ("response1", "response2"):
        if isinstance(row[column], bool | int | float):
            # The published file has JSON's true for a model's "True", or its "true": no one can tell.
            return [Skipped(place, "response is not text")]
        responses.append(_plain(row, column))
    if any(map(_is_blank, responses)):
        return [Skipped(place, EMPTY)]
    items: Items = []
    for column, verdict in verdicts.items():
        own = f"{place}#{column}"
        if not verdict:
            items.append(Skipped(own, "no verdict" if verdict is None else TIE))
        else:
            better = 0 if verdict == 1 else 1
            items += _pair(prompt, responses[better], responses[1 - better], own)
    return items


class _Trees:
    """OASST's messages: each assistant's message with a rank is an example, its prompt the way from the root to it."""

    reads = ("message_id", "parent_id", "text", "role", "rank", "deleted")

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.messages: dict[str, dict[str, Any]] = {}
        for row in rows:
            if isinstance(row["message_id"], str):
                self.messages.setdefault(row["message_id"], row)

    def __call__(self, row: dict[str, Any], place: str) -> Items:
        name = row["message_id"]
        if not isinstance(name, str):
            raise BadRow(f"is {short(name)}; it must be text", "message_id")
        if self.messages[name] is not row:
            raise BadRow(f"is {short(name)}, as in a row before; each message needs its own", "message_id")
        message = self._turn(row)
        if self._deleted(row):
            return [Skipped(place, "deleted message")]
        if message["role"] != "assistant":
            return [Skipped(place, "prompter's message")]
        if row.get("rank") is None:
            return [Skipped(place, "no rank")]
        rank = _score(row["rank"], "rank")
        prompt: Messages = []
        above, seen = row, {name}
        while (parent := above.get("parent_id")) is not None:
            if not isinstance(parent, str) or parent not in self.messages:
                what = "is" if above is row else "of a message above is"
                raise BadRow(f"{what} {short(parent)}, which is no message_id of this source", "parent_id")
            if parent in seen:
                raise BadRow("leads back to the message itself; a tree has no circles", "parent_id")
            seen.add(parent)
            above = self.messages[parent]
            if self._deleted(above):
                return [Skipped(place, "deleted message in the prompt")]
            prompt.insert(0, self._turn(above))
        if _is_blank(prompt):
            raise BadRow("is null or leads to no text, so that there is no prompt; rank answers only", "parent_id")
        _not_blank([message], "text")
        return _one(prompt, [message], place, None, 0.0 - (rank or 0.0))

    @staticmethod
    def _deleted(row: dict[str, Any]) -> bool:
        value = row.get("deleted")
        return value is not None and _label(row, "deleted", "deleted", "not")

    @staticmethod
    def _turn(row: dict[str, Any]) -> dict[str, str]:
        roles = {"prompter": "user", "assistant": "assistant"}
        role = row["role"]
        if not isinstance(role, str) or role not in roles:
            raise BadRow(f"is {short(role)}; it must be 'prompter' or 'assistant'", "role")
        return {"role": roles[role], "content": _plain(row, "text")}


# The table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schema:
    """A set of columns, and what a row that has them says.

    Attributes:
        name: as in ``Source.schema``.
        columns: that a row needs; ``a|b`` is one of two.
        parse: of one row; None where ``prepare`` gives it.
        without: columns that tell that a row is something else.
        prepare: where a row can only be read with the whole source at hand: from all rows to the parse function.
        reads: with ``prepare``: the columns that it wants, so that no others are kept.
    """

    name: str
    columns: tuple[str, ...]
    parse: Parse | None = None
    without: tuple[str, ...] = ()
    prepare: Callable[[Iterable[dict[str, Any]]], Parse] | None = None
    reads: tuple[str, ...] = ()

    def lacks(self, columns: Iterable[str]) -> list[str]:
        """Which of the needed columns are not among ``columns``."""
        there = set(columns)
        return [column for column in self.columns if there.isdisjoint(column.split("|"))]


# Where a prompt may hide under a name that is not ours, "what both begin with" would be a guess.
_PROMPTS = ("instruction", "question", "query", "input", "history", "context")

SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("unpaired", ("prompt", "completion", "label"), _unpaired),
        Schema("paired", ("prompt", "chosen", "rejected"), _paired),
        Schema("implicit", ("chosen", "rejected"), _implicit, _PROMPTS),
        Schema("halos_binary", ("prompt", "output", "label"), _halos_binary),
        Schema("halos_pairwise", ("prompt", "output_A", "output_B", "label"), _halos_pairwise),
        Schema("messages", ("messages", "label"), _judged_conversation("messages", ("label",))),
        Schema("sharegpt_pair", ("conversations", "chosen", "rejected"), _sharegpt_pair),
        Schema(
            "sharegpt",
            ("conversations", "kto_tag|label"),
            _judged_conversation("conversations", ("kto_tag", "label")),
        ),
        Schema("scored", ("prompt", "completion", "score|rating|rank"), _scored, ("label",)),
        Schema("scored_lists", ("prompt", "completions", "scores"), _scored_lists),
        Schema("ultrafeedback", ("instruction", "completions"), _ultrafeedback),
        Schema("shp", ("history", "human_ref_A", "human_ref_B", "labels"), _shp),
        Schema("pandalm", ("instruction", "response1", "response2", "annotator1"), _pandalm),
        Schema("oasst", ("message_id", "text", "role"), prepare=_Trees, reads=_Trees.reads),
    )
}


@lru_cache(maxsize=1024)
def _fitting(columns: frozenset[str]) -> tuple[Schema, ...]:
    fitting = [s for s in SCHEMAS.values() if not s.lacks(columns) and columns.isdisjoint(s.without)]
    # chosen + rejected are also part of prompt + chosen + rejected: the larger set has it.
    return tuple(s for s in fitting if not any(set(s.columns) < set(other.columns) for other in fitting))


def _filled(row: dict[str, Any]) -> frozenset[str]:
    return frozenset(column for column, value in row.items() if value is not None)


def _lack(schema: Schema, row: dict[str, Any], renamed: Mapping[str, str]) -> BadRow:
    missing = ", ".join(
        " or ".join(f"'{renamed.get(name, name)}'" for name in column.split("|")) for column in schema.lacks(row)
    )
    has = ", ".join(short(column) for column in list(row)[:8]) or "none"
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


def refuse_lost(row: dict[str, Any]) -> None:
    """Refuses what is meant for the chat template, which is not given it; of texts there is no template that would be.

    Raises:
        BadRow: for tools and the like beside messages.
    """
    for column in ("tools", "chat_template_kwargs"):
        given = row.get(column)
        if given not in (None, "", "[]", "{}", [], {}) and any(
            isinstance(v, list) and v and isinstance(v[0], dict) for name, v in row.items() if name != column
        ):
            raise BadRow("is for the chat template, which is not given it; write it into the messages", column)


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
