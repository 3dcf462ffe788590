"""How a plain-text prompt is encoded: one setting for training, generation and evaluation.

As in TRL, a message list goes through the chat template and plain text does not. With ``chat``, plain text becomes a
user message and goes through the template as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from halos_pl.data.example import Prompt

#: ``plain``: a text prompt is encoded unchanged. ``chat``: it becomes a user message in the chat template.
TextPrompts = Literal["plain", "chat"]

#: Settings of ``data:`` that decide how text becomes tokens, with their defaults. Commands that read text for a run's
#: model (evaluate, sample) take them from the run's config.
TEXT_SETTINGS: dict[str, Any] = {"special_tokens_in_text": "refuse", "text_prompts": "plain", "loss_on": "last"}


def asked(prompt: Prompt, text_prompts: TextPrompts) -> Prompt:
    """The prompt to encode: under ``chat``, text becomes a user message; anything else is unchanged.

    Raises:
        ValueError: ``text_prompts`` is unknown.
    """
    if text_prompts not in get_args(TextPrompts):
        raise ValueError(f"text_prompts is {text_prompts!r}; it must be plain or chat")
    return [{"role": "user", "content": prompt}] if text_prompts == "chat" and isinstance(prompt, str) else prompt


def convention(number: int, text_prompts: TextPrompts, has_template: bool) -> str | None:
    """A line for the log on how ``number`` text prompts are encoded; None if there are none.

    Args:
        number: number of plain-text prompts.
        text_prompts: the setting.
        has_template: whether the tokenizer has a chat template.
    """
    if not number:
        return None
    many = f"{number} text prompt{'s' * (number > 1)}"
    if text_prompts == "chat":
        return f"{many} put into the chat template as user messages (text_prompts: chat)"
    other = "; text_prompts: chat would put them into the chat template" if has_template else ""
    return f"{many} encoded as plain text, without a chat template (text_prompts: plain{other})"


def counted(notes: Mapping[str, int]) -> list[str]:
    """The notes as lines, each with its number of examples."""
    return [f"{number} example{'s' * (number > 1)}: {note}" for note, number in notes.items()]


def text_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``TEXT_SETTINGS`` in the ``data:`` part of a run's config."""
    return {name: data.get(name, default) for name, default in TEXT_SETTINGS.items()}
