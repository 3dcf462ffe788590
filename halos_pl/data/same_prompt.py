"""Tells whether prompts are the same, however they are written."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from halos_pl.data.example import Prompt

#: How chat templates and transcripts mark the speakers.
_MARKS = re.compile(
    r"<\|im_start\|>\w+|<\|start_header_id\|>\w+|<start_of_turn>\w+|<\|?(user|assistant|system)\|?>"
    r"|<\|[^|<>\n]*\|>|</?s>|<(end_of_turn|bos|eos)>|\[/?(INST|SYS)\]|<</?SYS>>|^(human|user|assistant|system):",
    re.IGNORECASE | re.MULTILINE,
)


def words_of(prompt: Prompt) -> str:
    """The words of a prompt, which are equal for equal prompts: as a conversation, or as a text with the marks of a
    chat template or of a transcript.

    It does not tell speakers apart: prompts that differ in nothing else count as equal.
    """
    turns = [prompt] if isinstance(prompt, str) else [_text(turn.get("content")) for turn in prompt]
    words = unicodedata.normalize("NFKC", _MARKS.sub(" ", "\n\n".join(turns))).casefold().split()
    return " ".join(words)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, sort_keys=True)
