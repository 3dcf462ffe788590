"""Feedback once it has been read, independent of file and columns."""

from __future__ import annotations

import reprlib
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
        scores: for each completion, higher is better, in the source's unit; None for none.
        paired: there are two completions, and the first is preferred.
        row_id: ``SOURCE:LINE``, lines or rows counted from 1.
        text_prompt: the source has the prompt as plain text, even if it has become messages.
        tools: JSON schemas of what the model may call, for the chat template; None for none.
        finished: for each completion, whether it is complete and gets an end token; default: all are.
    """

    prompt: Prompt
    completions: tuple[Prompt, ...]
    labels: tuple[bool | None, ...]
    row_id: str
    scores: tuple[float | None, ...] = ()
    paired: bool = False
    text_prompt: bool = field(default=False, compare=False)
    tools: list[dict[str, Any]] | None = None
    finished: tuple[bool, ...] = ()

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
    """What is wrong with a row, or with a whole source.

    Attributes:
        place: ``SOURCE:LINE``, or ``SOURCE`` for the source as a whole.
        reason: what is wrong, and what to do.
        column: of the row; None if no single column is at fault.
        fatal: nothing more of the source can be read.
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
        reason: a few words, by which rows are counted: ``tie``.
    """

    place: str
    reason: str
