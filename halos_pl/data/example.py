"""What a row of feedback is once it has been read, whatever file and columns it came from."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from typing import Any

from halos_pl.data.calls import all_texts, texts_of

#: Plain text, or a conversation: a list of ``{"role": ..., "content": ...}``, where the content is empty if there is
#: none; the further keys of :data:`halos_pl.data.calls.CARRIED` are the chat template's.
Prompt = str | list[dict[str, Any]]


_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 57
_shorten.maxlevel = 3


def short(value: Any) -> str:
    """A value as it is shown in a message: at most 60 printable characters, however large or deep it is."""
    text = _shorten.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class DataError(ValueError):
    """Faults in the data, as ``FILE:LINE: what is wrong; what to do`` lines."""


@dataclass(frozen=True)
class Example:
    """Completions of one prompt that were judged together: what one row of a source says.

    Attributes:
        prompt: text or messages.
        completions: one or more.
        labels: one for each completion: True for desirable, False for undesirable, None where only a score is known.
            Of a pair (True, False).
        scores: one for each completion, higher is better, in the source's own unit; None where there is none.
        paired: there are two completions, and the first is preferred to the second.
        row_id: ``SOURCE:LINE``, with the source as it was given and lines (or rows) counted from 1.
        text_prompt: the source has the prompt as plain text, whatever it has become since.
        tools: JSON schemas of what the model may call, for the chat template; None where there are none.
        finished: for each completion, whether it has an end; one that was cut gets none. Left out, all have.
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
        """Characters of its prompt and of all its completions."""
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
        place: ``SOURCE:LINE``, or ``SOURCE`` for what concerns all of it.
        column: of the row; None where no one column is at fault.
        reason: what is wrong, with the value where that helps, and what to do.
        fatal: nothing of the source can be used, so that there is nothing to skip.
    """

    place: str
    reason: str
    column: str | None = None
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True)
class Skipped:
    """A row that is sound but says nothing that a loss could use, such as a tie between two responses.

    Attributes:
        place: ``SOURCE:LINE``.
        reason: in a few words, the same for all rows of a kind, so that they can be counted: ``tie``.
    """

    place: str
    reason: str
