"""Escapes foreign text, so that Markdown shows it unchanged."""

from __future__ import annotations

import re
from typing import Any

from halos_pl.common.messages import plain

# Markup, only where Markdown would read it as such: "beta * margin" and "[0.1, 0.2]" stay unchanged.
_MARKUP = re.compile(r"[\\`|$]|[*~](?=\S)|(?<=\S)[*~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|^(?:[#=]|[+-](?!\d))|#$")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}
# Renderers turn bare addresses into links.
_LINK = re.compile(r"(?<=\w):(?=//)|(?<=www)\.", re.IGNORECASE)


def markdown(text: str) -> str:
    """A text escaped for a paragraph, a heading or a table cell, in one line."""
    line = " ".join(plain(text).split())
    line = re.sub("[&<>@]", lambda match: _HTML[match[0]], _NUMBERED.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", line)))
    return _LINK.sub(lambda match: f"&#{ord(match[0])};", line)


def escaped(content: Any) -> Any:
    """A report's content with all texts escaped."""
    if isinstance(content, str):
        return markdown(content)
    if isinstance(content, dict):
        return {key: escaped(value) for key, value in content.items()}
    return [escaped(value) for value in content] if isinstance(content, (list, tuple)) else content


def fence(commands: str) -> str:
    """A code fence, longer than any run of backticks inside it."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", commands)), default=0))
