"""Tools, tool calls and thoughts: the parts of a message, besides role and content, that the chat template gets.

Data sets store the same thing in several forms: tools as JSON text, the arguments of a call as text or as an object,
the ``content`` beside a call as null, as an empty text, or not at all. Templates accept some of these forms and fail on
others, or print Python's ``None``. So a call is tried as the data have it, and then in the other forms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

CALLS = "tool_calls"
#: Keys of the model's thoughts in messages. transformers maps them to the one that a template reads.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
#: Message keys, besides role and content, that are passed to the template.
CARRIED = (CALLS, "tool_call_id", "name", *THOUGHTS)


def _parsed(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value


def objects_of(value: Any, what: str, filled: bool = False) -> list[dict[str, Any]]:
    """Tools or tool calls: a list of objects, where the list or each object may be JSON text.

    Args:
        value: value of a column or key.
        what: ``tool`` or ``call``, for the error.
        filled: whether to drop nulls, with which columnar files fill missing keys.

    Raises:
        ValueError: ``value`` is not such a list.
    """
    listed = _parsed(value)
    objects = [_parsed(item) for item in listed] if isinstance(listed, list) else None
    if not objects or not all(isinstance(item, dict) and _name(item) for item in objects):
        form = '{"type": "function", "function": {"name": ..., ' + {"tool": '"parameters"', "call": '"arguments"'}[what]
        raise ValueError(f"must be a list of {what}s, each an object such as {form}: ...}}}}, or the same as JSON text")
    objects = [_without_null(item) for item in objects] if filled else objects
    return [_with_arguments(item) for item in objects] if what == "call" else objects


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The call with its arguments under ``arguments``; Llama's and Anthropic's formats use other names."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    other = next((key for key in ("parameters", "input") if key in call), None)
    if other is None or "arguments" in call:
        return call
    return {"arguments" if key == other else key: value for key, value in call.items()}


def _name(item: dict[str, Any]) -> Any:
    inner = item.get("function")
    return inner.get("name") if isinstance(inner, dict) else item.get("name") or item.get("type")


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def unfilled(value: Any) -> Any:
    """Messages, or lists of them, without the nulls that columnar files put into tool calls."""
    if isinstance(value, list):
        return [unfilled(item) for item in value]
    if isinstance(value, dict) and value.get(CALLS):
        return {**value, CALLS: _without_null(value[CALLS])}
    return value


def texts_of(value: Any) -> Iterator[str]:
    """All texts in a value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_of(key)
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def message_texts(messages: Iterable[dict[str, Any]]) -> Iterator[str]:
    """All texts in messages, except roles."""
    for message in messages:
        for key, value in message.items():
            if key != "role":
                yield from texts_of(value)


def all_texts(prompt: str | list[dict[str, Any]]) -> list[str]:
    """The texts of a prompt or completion: itself, or those of its messages."""
    return [prompt] if isinstance(prompt, str) else list(message_texts(prompt))


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with ``change`` applied to each of its texts, except keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: with_texts(item, change) for key, item in value.items()}
    return [with_texts(item, change) for item in value] if isinstance(value, list) else value


# Forms -------------------------------------------------------------------------------------------------


def _arguments(call: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _arguments(inner, change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _whole(call: dict[str, Any]) -> dict[str, Any]:
    """The call in OpenAI's full format."""
    if isinstance(call.get("function"), dict):
        return {"type": "function", **call}
    return {"type": "function", "function": call}


def tool_forms(tools: list[dict[str, Any]] | None) -> Iterator[list[dict[str, Any]] | None]:
    """The tools as the data have them, then in OpenAI's full format, which some templates require."""
    yield tools
    if tools and not all(isinstance(tool.get("function"), dict) for tool in tools):
        yield [_whole(tool) for tool in tools]


def _as_object(value: Any) -> Any:
    return parsed if isinstance(parsed := _parsed(value), dict) else value


def _as_text(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _same(value: Any) -> Any:
    return value


def forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages in each form that a template may require for tool calls, the original first."""
    if not any(CALLS in message for message in messages):
        yield messages
        return
    # Null content comes first: some templates treat an empty content as an answer and omit the call.
    for empty in (None, ""):
        for complete in (_same, _whole):
            for change in (_same, _as_object, _as_text):
                yield [
                    {
                        **message,
                        "content": message["content"] or empty,
                        CALLS: [complete(_arguments(call, change)) for call in message[CALLS]],
                    }
                    if CALLS in message
                    else message
                    for message in messages
                ]


def printed_wrong(messages: list[dict[str, Any]], text: str) -> bool:
    """Whether a rendering contains a call as Python's repr, or its JSON quoted within JSON."""
    for message in messages:
        for call in message.get(CALLS, ()):
            arguments = (call.get("function") or call).get("arguments")
            if isinstance(arguments, dict) and arguments:
                printed = str(arguments)
                if printed in text and printed != _as_text(arguments):
                    return True
            quoted = json.dumps(arguments, ensure_ascii=False)
            if isinstance(arguments, str) and _as_object(arguments) is not arguments and quoted in text:
                return True
    return False


def says_none(messages: list[dict[str, Any]], text: str) -> bool:
    """Whether a rendering prints a null content as ``None``."""
    if all(message["content"] is not None for message in messages):
        return False
    return text.count("None") > sum(part.count("None") for part in message_texts(messages))
