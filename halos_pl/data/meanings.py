"""Names of columns and message keys that have a meaning in some published format.

Spelling does not matter: ``toolCalls``, ``Tool Calls`` and ``tool_calls`` are the same name.
"""

from __future__ import annotations

import re
from functools import lru_cache

MEDIA = "contains pictures or sound, but the model reads only text"
TEMPLATE = "is for the chat template"
UNREAD = "is for the chat template, which gets only messages and 'tools'; write it into the messages"
ANSWER = "would be lost; write it into the completion"
MARGIN = "is a margin between two answers, but this row is not a chosen and a rejected one"
WEIGHT = "is a weight of the row under another name; map it to the name that is read (columns: {weight: NAME})"

SYSTEM = r"(custom_)?sys(tem)?(_?(prompt|message|msg|instructions?|text|content))?|preamble"
_MEDIA = (
    r"((prompt|input|query)_)?(image|img|picture|photo|video|audio)s?(_?\d+)?"
    r"(_(path|file|url|uri|byte|base64|b64|data|list|tensor|embed|embedding|feature|token)s?)?"
    r"|media|pixel_values|multi_?modal_(data|inputs?)"
)
_TOOLS = (
    r"((available|xlam)_)?(tools|functions|apis)(_(json|schemas?))?"
    r"|(tool|function|api)_(definitions?|specs?|schemas?|list|declarations?)"
)
_THOUGHTS = r"(tool|function)_calls?|reasoning(_(content|details|text))?|thinking(_content)?|thoughts?"
COLUMNS = {
    _MEDIA: MEDIA,
    _TOOLS: f"{TEMPLATE}, which gets tools from a column 'tools'; rename it (columns: {{tools: NAME}})",
    r"documents|tool_choice|chat_template_kwargs": UNREAD,
    _THOUGHTS: ANSWER,
    "margin": MARGIN,
    r"((row|pair|sample|example|loss|importance)_)?weights?|confidences?": WEIGHT,
}
#: Parts of a prompt in some format; redundant beside a prompt that contains their text.
PARTS = (
    r"(user_)?(prompt|input|query|question|request|instruction)|user_message|prompts|inputs|problem|post|article"
    r"|contexts?|context_messages|background|passages?|ctxs|docs|document|demonstrations|few_shot(_examples|_prompt)?"
    r"|((chat|conversation|dialog|dialogue|message)_)?history|(previous|past|earlier)_turns|initial_reason_steps"
    r"|developer(_(prompt|message))?|prefill|(assistant|response)_prefix"
)
DIALOGUES = r"messages|conversations?|dialog(ue)?|turns|trajectory"
_LOST = "would be lost; write it into content"
_RENAMED = "would be lost; rename the key to tool_calls or reasoning_content, which the chat template gets"
#: Keys of messages.
KEYS = {
    _MEDIA: MEDIA,
    _THOUGHTS: _RENAMED,
    _TOOLS + r"|documents?|tool_call_id|tool_responses?": _LOST,
    r"name|refusal|files?|attachments?|context|channel|recipient": _LOST,
}
#: Keys that select or weight the messages that carry the loss.
FLAGS = r"((loss|sample)_)?weight|train|training|trainable|learn|loss|(loss_)?mask|masked|train(ing)?_detail"
_EDGES = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@lru_cache(maxsize=4096)
def plain(name: str) -> str:
    """The name in snake case: ``systemPrompt`` and ``System-Prompt`` are ``system_prompt``."""
    return re.sub(r"[\s.-]+", "_", _EDGES.sub("_", name.strip())).lower()


@lru_cache(maxsize=4096)
def means(pattern: str, name: str) -> bool:
    """Whether the name matches ``pattern`` in any spelling."""
    return re.fullmatch(pattern, plain(name)) is not None


def reason(table: dict[str, str], name: str) -> str | None:
    """The entry of ``table`` for the name; None if there is none."""
    return next((why for pattern, why in table.items() if means(pattern, name)), None)


PLACEHOLDER = re.compile(
    r"<\|?(?P<what>image|video|audio)"
    r"(?:_?(?:pad|token|soft_token|placeholder|here|start|end|bos|eos|url|context))?(?:[ _:-]*\d+)?\|?>"
    r"|<img_(?:context|start|end|pad)>|<\|(?:vision|media)_(?:start|end|pad|begin)\|>|<start_of_(?:image|audio|video)>"
    r"|<__(?:media|image|audio|video)__>|<im_patch>|\[IMG(?:_BREAK|_END)?\]|\[(?:BEGIN_)?AUDIO\]",
    re.IGNORECASE,
)


def is_markup(match: re.Match[str], text: str) -> bool:
    """Whether a placeholder is the opening tag of an element with content."""
    rest = text[match.end() :].lower()
    name = match[0][1:-1].lower()
    opened, closed = match[0][0], "</" if match[0][0] == "<" else "[/"
    end = rest.find(f"{closed}{name}{'>' if opened == '<' else ']'}")
    return end >= 0 and rest[:end].strip() not in ("", "./")  # (<image>./</image>) is MiniCPM's placeholder
