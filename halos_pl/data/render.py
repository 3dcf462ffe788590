"""What a chat template writes for messages, and what it ignores."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from halos_pl.data.calls import CALLS, THOUGHTS, forms, printed_wrong, says_none, tool_forms

#: A message, and tools as JSON schemas.
Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
#: Content of test dialogues, which no template writes by itself.
WORD = "zqword{}qz"
_LONGEST_SPAN = 40  # characters of an empty span and the blanks after it
_TELLING = 12  # characters; a shorter text may also stand in the template's own words
NO_TEMPLATE = (
    "The data are message lists, but the tokenizer has no chat template: name one with chat_template (a .jinja file,"
    " or chatml), use an instruct model's tokenizer, or give prompt and completion as plain text."
)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    prompt: bool,
    tools: Tools = None,
    begun: bool = False,
) -> str:
    """The dialogue as the chat template writes it.

    Args:
        tokenizer: with a chat template.
        messages: the dialogue.
        prompt: whether to end with the head of an answer.
        tools: tools that the model may call.
        begun: whether to end with the content of the last message; see :func:`render_begun`.

    Raises:
        ValueError: there is no chat template, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(NO_TEMPLATE)
    how: dict[str, Any] = {"add_generation_prompt": prompt and not begun, "continue_final_message": begun}
    refused: Exception | None = None
    for tool_form, form in product(tool_forms(tools), forms(messages)):
        try:
            text = str(tokenizer.apply_chat_template(form, tools=tool_form, tokenize=False, **how))
        except Exception as error:  # templates raise jinja2.TemplateError, TypeError, ...
            # The template's own message (raise_exception) is more helpful than an error in it.
            refused = refused if refused and type(error) is not TemplateError else error
            continue
        if not printed_wrong(form, text) and not says_none(form, text):
            return text
    roles = [message.get("role") for message in messages]
    why = str(refused or "it does not write the arguments of a call as JSON").partition("\n")[0]
    raise ValueError(f"The chat template refuses messages with the roles {roles}: {why}") from refused


#: A span opened at the end of a text: ``<think>\n``.
OPENED = re.compile(r"<(\w+)>\s*$")
#: An empty span followed by another of the same name: ``<think>\n\n</think>\n\n<think>``.
DOUBLED_SPAN = re.compile(r"<(\w+)>\s*</\1>\s*<\1>")


def without_opening(head: str, content: str) -> str:
    """The content without the tag at its start (``<think>``) with which ``head`` already ends."""
    opened = OPENED.search(head)
    tag = f"<{opened[1]}>" if opened else ""
    return content.lstrip().removeprefix(tag).lstrip() if tag and content.lstrip().startswith(tag) else content


def render_begun(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools = None) -> str:
    """The dialogue up to the end of the last message, which the assistant is to continue.

    Templates rewrite an answer with thoughts as if it were complete: they cut the thoughts, or write an empty span
    before them. In that case the content follows the head of an answer unchanged.

    Raises:
        ValueError: there is no chat template, or it refuses the messages.
    """
    *before, last = messages
    try:
        text = render(tokenizer, messages, prompt=False, tools=tools, begun=True)
    except ValueError:
        if not before or "</" not in last["content"] or last.keys() - {"role", "content"}:
            raise
    else:
        if not DOUBLED_SPAN.search(text, max(0, len(text) - len(last["content"]) - _LONGEST_SPAN)):
            return text
    head = render(tokenizer, before, prompt=True, tools=tools)
    return head + without_opening(head, last["content"])


def refuse_ignored(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools) -> None:
    """Refuses tools, tool calls, thoughts and names that the template ignores, as the model would never see them.

    The name of an answering tool and the id of a call may be ignored, as the call has them. Thoughts may be cut from
    earlier turns.

    Raises:
        ValueError: names the column or the key.
    """

    def ignored(what: str, key: str) -> ValueError:
        return ValueError(
            f"The chat template ignores {what}, so the model would never see it; use a template that writes it"
            f" (chat_template), or remove it ('ignore: [\"{key}\"]' drops it from a source of training data)."
        )

    def differs(others: list[Message], other_tools: Tools) -> bool:
        try:
            return render(tokenizer, others, prompt=False, tools=other_tools) != text
        except ValueError:
            return True  # it reads what is missing

    extra = [message.keys() - {"role", "content"} for message in messages]
    if not tools and not any(extra):
        return
    text = render(tokenizer, messages, prompt=False, tools=tools)
    if tools and not differs(messages, None):
        raise ignored("the column 'tools'", "tools")
    for i, keys in enumerate(extra):
        role = messages[i]["role"]
        for key in sorted(keys - {"tool_call_id"} - ({"name"} if role in ("tool", "function", "ipython") else set())):
            left = {k: v for k, v in messages[i].items() if k != key}
            without = [*messages[:i], left, *messages[i + 1 :]]
            if not differs(without, tools) and not (key in THOUGHTS and _writes_thoughts(tokenizer, key)):
                raise ignored(f"the {key} of message {i + 1} (role {role!r})", key)


def _writes_thoughts(tokenizer: PreTrainedTokenizerBase, key: str) -> bool:
    """Whether the template writes the thoughts of the last turn, even if it cuts those of earlier turns."""
    last = {"role": "assistant", "content": WORD.format(1), key: WORD.format(2)}
    try:
        text = render(tokenizer, [{"role": "user", "content": WORD.format(0)}, last], prompt=False)
    except ValueError:
        return False
    return WORD.format(2) in text


def refuse_dropped(tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str, tools: Tools = None) -> None:
    """Refuses messages whose content is missing from ``text`` because the template ignores it.

    A template may change a content, for instance cut earlier thoughts. One that ignores it also ignores a single word
    in its place.

    Raises:
        ValueError: names the message.
    """
    word = WORD.format(0)
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if not content or (len(content) >= _TELLING and content in text):
            continue
        try:
            replaced = render(
                tokenizer, [*messages[:i], message | {"content": word}, *messages[i + 1 :]], prompt=False, tools=tools
            )
        except ValueError:
            continue  # it reads the content
        if word not in replaced:
            cure = "remove the content beside its calls" if CALLS in message else "remove such messages"
            raise ValueError(
                f"The chat template ignores the content of message {i + 1} (role {message['role']!r}), so the model"
                f" would never see it; use a template that writes text of this role, or {cure}."
            )


def around_content(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], place: int, tools: Tools = None
) -> tuple[str, str] | None:
    """What the template writes before and after the content of a message, in the rendering of all of them.

    The message is rendered without its calls and thoughts; None if the template refuses that.
    """
    word = WORD.format(0)
    kept = {key: value for key, value in messages[place].items() if key != CALLS and key not in THOUGHTS}
    try:
        changed = [*messages[:place], kept | {"content": word}, *messages[place + 1 :]]
        text = render(tokenizer, changed, prompt=False, tools=tools)
    except ValueError:
        return None
    before, match, after = text.partition(word)
    return (before, after) if match else None


def before_content(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], place: int, tools: Tools = None
) -> str | None:
    """The first part of :func:`around_content`."""
    around = around_content(tokenizer, messages, place, tools)
    return around and around[0]
