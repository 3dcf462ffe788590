"""Feedback after reading, independent of file format and columns."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from halos_pl.data.calls import all_texts, texts_of

#: Plain text, or a conversation: a list of ``{"role": ..., "content": ...}``, with empty content if there is none, and
#: with the keys of :data:`halos_pl.data.calls.CARRIED` for the chat template.
Prompt = str | list[dict[str, Any]]


_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 57
_shorten.maxlevel = 3


def short(value: Any) -> str:
    """A value for a message, in at most 60 printable characters."""
    text = _shorten.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def listed(columns: Iterable[str]) -> str:
    """Names of columns for a message; of more than eight, the first."""
    names = [*columns]
    return ", ".join(map(short, names[:8])) + ", …" * (len(names) > 8)


class DataError(ValueError):
    """Faults in the data, as ``FILE:LINE: what is wrong; what to do`` lines."""


@dataclass(frozen=True)
class Example:
    """Completions of one prompt that were judged together: the content of one row.

    Attributes:
        prompt: text or messages.
        completions: one or more.
        labels: for each completion True (desirable), False (undesirable) or None (only a score); (True, False) for a
            pair.
        scores: for each completion, higher is better, in the source's unit; None if missing.
        paired: whether the first of two completions is preferred.
        gold: whether a third completion, beside those of a pair, is the gold answer; its label is True.
        row_id: ``SOURCE:LINE``, lines or rows counted from 1.
        text_prompt: whether the source has the prompt as plain text, even if it became a message.
        tools: JSON schemas of the tools that the model may call, for the chat template; None if there are none.
        finished: for each completion, whether it is complete and gets an end token; default: all are.
        weight: factor of the loss of each completion, at least 0.
        weighted_by: the source's column with the weight; None without one.
        votes: how many people find a single completion desirable, or prefer the first of a pair, and how many the
            opposite; None if there is no record of them.
    """

    prompt: Prompt
    completions: tuple[Prompt, ...]
    labels: tuple[bool | None, ...]
    row_id: str
    scores: tuple[float | None, ...] = ()
    paired: bool = False
    gold: bool = False
    text_prompt: bool = field(default=False, compare=False)
    tools: list[dict[str, Any]] | None = None
    finished: tuple[bool, ...] = ()
    weight: float = 1.0
    weighted_by: str | None = None
    votes: tuple[float, float] | None = None

    @property
    def size(self) -> int:
        """Characters of the prompt, the tools and all completions."""
        texts = (text for part in (self.prompt, *self.completions) for text in all_texts(part))
        return sum(map(len, texts)) + sum(map(len, texts_of(self.tools)))

    def __post_init__(self) -> None:
        if not self.scores:
            object.__setattr__(self, "scores", (None,) * len(self.completions))
        if not self.finished:
            object.__setattr__(self, "finished", (True,) * len(self.completions))


@dataclass(frozen=True)
class Fault:
    """A fault of a row or of a whole source.

    Attributes:
        place: ``SOURCE:LINE``, or ``SOURCE`` for the source as a whole.
        reason: the fault, and how to fix it.
        column: the column at fault; None if no single column is.
        fatal: whether the rest of the source cannot be read.
    """

    place: str
    reason: str
    column: str | None = None
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True)
class Skipped:
    """A valid row that no loss can use, such as a tie.

    Attributes:
        place: ``SOURCE:LINE``.
        reason: short reason, by which skipped rows are counted, such as ``tie``.
    """

    place: str
    reason: str
