"""The interface to whatever answers: a model in this process, or a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Messages = list[dict[str, Any]]


class EngineError(ValueError):
    """The model gave no answer that can be judged; one line that tells the reason."""


@dataclass(frozen=True)
class Answer:
    """An answer of the model.

    Attributes:
        text: the text that is shown and recorded.
        finished: whether the model ended it, rather than the limit of tokens.
        same_tokens: whether training on the text gives the sampled tokens; None if the engine cannot tell.
    """

    text: str
    finished: bool
    same_tokens: bool | None = None


class Engine(Protocol):
    """A source of answers.

    Attributes:
        model: identity of the model, recorded with each answer.
        sampling: settings of the sampling, recorded with each answer.
        workers: number of threads that may call :meth:`answer` at the same time.
        seeded: whether answers are drawn with the seeds given.
    """

    model: dict[str, Any]
    sampling: dict[str, Any]
    workers: int
    seeded: bool

    def refuse(self, messages: Messages) -> None:
        """Checks a conversation before the model is asked.

        Raises:
            ValueError: the model cannot answer it.
        """

    def answer(self, messages: Messages, seeds: Sequence[int], show: Callable[[list[str]], None]) -> list[Answer]:
        """Samples answers to a conversation that ends with the user.

        Args:
            messages: the conversation.
            seeds: seed of each answer; the same arguments give the same answers.
            show: called with the texts so far, if the engine has them. An error that it raises ends the sampling.

        Raises:
            ValueError: the model gave no answer; one line that tells the reason.
        """
