"""The base of judges: prompts that ask a model to compare or grade answers, and the reading of its replies."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from halos_pl.data.example import DataError, Prompt, listed
from halos_pl.endpoint.exchange import Choice
from halos_pl.judge.estimates import Estimate

#: Messages of a request, ``[{"role": ..., "content": ...}]``.
Messages = list[dict[str, Any]]


class JudgeError(ValueError):
    """A judge that does not exist, lacks its files, or does not fit the data."""


@dataclass(frozen=True)
class Pair:
    """A question and two answers to compare.

    Attributes:
        name: name of the example.
        prompt: the question: text or messages.
        answer: the answer whose win rate is measured.
        other: the answer that it is compared with.
        columns: further values of the row, such as a reference answer, for the judge's prompt.
        example: name of the example, which pairs of the same prompt share; default: ``name``.
    """

    name: str
    prompt: Prompt
    answer: str
    other: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    example: str = ""


@dataclass(frozen=True)
class Answer:
    """A question and one answer to grade; the attributes are those of :class:`Pair`."""

    name: str
    prompt: Prompt
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    example: str = ""


@dataclass(frozen=True)
class Question:
    """A question that belongs to a judge's benchmark.

    Attributes:
        name: name of the example.
        turns: the user's messages: one, or two for a conversation.
        columns: further values, such as a reference answer.
    """

    name: str
    turns: tuple[str, ...]
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class BenchmarkFiles:
    """Folders with the files of published benchmarks; None for those that were not named.

    Attributes:
        alpaca_data: folder with AlpacaEval's files from the hub's data set tatsu-lab/alpaca_eval.
        mt_bench: folder with the files of MT-bench.
    """

    alpaca_data: Path | None = None
    mt_bench: Path | None = None


class Judge(ABC):
    """A way of asking a model about answers, and of reading its reply.

    Attributes:
        name: the judge's name on the command line.
        compares: ``pair`` if it is shown two answers, ``single`` if it grades one.
        max_tokens: maximum tokens of a reply.
        temperature: sampling temperature of the judge.
        top_logprobs: number of most likely tokens whose log-probs the verdict needs; 0 for a verdict in the text.
        scale: the lowest and the highest grade; None for comparisons.
        baseline: the column of its questions with the answers to compare with; None if they have none.
        reads: the attributes of :class:`BenchmarkFiles` that it reads.
    """

    name: ClassVar[str]
    compares: Literal["pair", "single"]
    max_tokens: int = 1024
    temperature: float = 0.0
    top_logprobs: int = 0
    baseline: str | None = None
    scale: tuple[float, float] | None = None
    reads: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def messages(self, item: Pair | Answer, swapped: bool = False) -> Messages:
        """The request for an item; ``swapped`` shows the other answer first.

        Raises:
            DataError: naming the example, if it lacks a column that the prompt needs.
        """

    @abstractmethod
    def verdict(self, choice: Choice) -> float | None:
        """The preference for the answer shown first, from 0 to 1, or the grade; None if the reply has no verdict."""

    def length_controlled(
        self, preferences: Mapping[int, float], answers: Sequence[str], baseline: Sequence[str]
    ) -> Estimate | None:
        """The win rate on the judge's questions without the effect of length; None for a judge that has no such figure.

        Args:
            preferences: preference for the answer, by number of the question.
            answers, baseline: the compared answers to each question.
        """
        return None

    def questions(self) -> Sequence[Question]:
        """The questions of the judge's benchmark; none if it has none."""
        return ()


_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


def filled(template: str, values: Mapping[str, Any], name: str, place: str) -> str:
    """The template with each ``{key}`` replaced by its value; text in the values is not replaced again.

    Args:
        template: a prompt of the judge.
        values: the values by key.
        name: name of the example, for errors.
        place: file of the template, for errors.

    Raises:
        DataError: naming the example, the file and the key, if a value is missing.
    """

    def value(match: re.Match[str]) -> str:
        if values.get(match[1]) is None:
            why = "is null" if match[1] in values else f"is not there (there are {listed(values)})"
            raise DataError(
                f"{name}: the prompt in {place} needs the column '{match[1]}', which {why}; add it or change the prompt"
            )
        return str(values[match[1]])

    return _PLACE.sub(value, template)


def places(template: str) -> set[str]:
    """The keys in a template."""
    return set(_PLACE.findall(template))


def text_of(prompt: Prompt) -> str:
    """A prompt as text: one user message is its content; of a conversation, each message follows its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role'].capitalize()}: {message.get('content') or ''}" for message in prompt)


def answer_of(value: Any) -> Any:
    """The answer in a column: of a conversation that ends with one, its content; any other value as it is."""
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        return value[-1].get("content")
    return value


def values_of(item: Pair | Answer, swapped: bool) -> dict[str, Any]:
    """The values for a prompt: the row's columns, ``question``, and ``answer_a`` and ``answer_b``, or ``answer``."""
    values = {**item.columns, "question": text_of(item.prompt)}
    if isinstance(item, Answer):
        return values | {"answer": item.answer}
    first, second = (item.other, item.answer) if swapped else (item.answer, item.other)
    return values | {"answer_a": first, "answer_b": second}


def named_in(text: str, pattern: re.Pattern[str]) -> str | None:
    """The one text that the groups of a pattern find; None if they find none, or different ones."""
    names = {next((g for g in match.groups() if g is not None), None) for match in pattern.finditer(text)}
    return names.pop() if len(names) == 1 else None
