"""Texts of others as Markdown that shows them as they are."""

from __future__ import annotations

import re
from typing import Any

from halos_pl.common.messages import plain

# What Markdown would read as more than text, and only there: "beta * margin" and "[0.1, 0.2]" are none of it.
_MARKUP = re.compile(r"[\\`|$]|[*~](?=\S)|(?<=\S)[*~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|^(?:[#=]|[+-](?!\d))|#$")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}
# Renderers make links of them without any brackets.
_LINK = re.compile(r"(?<=\w):(?=//)|(?<=www)\.", re.IGNORECASE)


def markdown(text: str) -> str:
    """A text as Markdown that shows it as it is, in one line: in a paragraph, a heading or the cell of a table."""
    line = " ".join(plain(text).split())
    line = re.sub("[&<>@]", lambda found: _HTML[found[0]], _NUMBERED.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", line)))
    return _LINK.sub(lambda found: f"&#{ord(found[0])};", line)


def escaped(said: Any) -> Any:
    """All texts of a report's content as Markdown."""
    if isinstance(said, str):
        return markdown(said)
    if isinstance(said, dict):
        return {key: escaped(value) for key, value in said.items()}
    return [escaped(value) for value in said] if isinstance(said, (list, tuple)) else said


def fence(commands: str) -> str:
    """Longer than any run of backticks in what it encloses."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", commands)), default=0))
