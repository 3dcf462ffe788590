"""Checks the messages, prompts and completions of a row."""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from typing import Any

from halos_pl.data.calls import CALLS, CARRIED, THOUGHTS, objects_of
from halos_pl.data.example import Prompt, short
from halos_pl.data.meanings import KEYS, reason
from halos_pl.data.values import BadRow, checked_text, has_value

Messages = list[dict[str, Any]]

# Lower-case names of roles in published formats, and the chat template's names.
ROLES = {name: name for name in ("user", "assistant", "system", "developer", "tool", "function", "ipython")}
ROLES |= dict.fromkeys(("human", "prompter"), "user")
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "ai", "model", "function_call", "tool_call"), "assistant")
ROLES |= dict.fromkeys(("observation", "tool_response", "function_response"), "tool")


@lru_cache(maxsize=1024)
def _role(name: str) -> tuple[str, str | None]:
    """The template's name of a role; for an unknown role, its name and the role that it resembles, if any."""
    lower = name.strip().lower()
    if lower in ROLES:
        return ROLES[lower], None
    return name, next(iter(difflib.get_close_matches(lower, ROLES, n=1, cutoff=0.8)), None)


def _joined(parts: list[Any], column: str, within: str) -> str:
    """The text of content in parts ``{"type": "text", "text": ...}``."""
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
    """The keys of a message, besides role and content, that the chat template gets."""
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

    With tool calls or thoughts, the content may be null or missing; it is then empty.
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
    """``value``, unchanged.

    Raises:
        BadRow: it has no visible text.
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
    """Prompt and completion; ``value`` may repeat the prompt's messages.

    If the completion is a conversation whose last user message is the text prompt, as in the binarised UltraFeedback,
    the messages up to it become the prompt.
    """
    completion = prompt_like(value, column, within)
    if isinstance(completion, list):
        if isinstance(prompt, str):
            last_user = max((i for i, m in enumerate(completion) if m["role"] == "user"), default=-1)
            if last_user < 0 or completion[last_user]["content"].strip() != prompt.strip():
                raise BadRow(
                    "is a message list but 'prompt' is plain text; give both as messages or both as text",
                    column,
                    within,
                )
            prompt = completion[: last_user + 1]
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
        raise BadRow(f"repeats a different prompt than '{first}'; both must answer the same messages", second)
    return prompt, one, two


def answered(completion: Prompt) -> bool:
    """Whether the assistant speaks last."""
    return not isinstance(completion, list) or (bool(completion) and completion[-1]["role"] == "assistant")
