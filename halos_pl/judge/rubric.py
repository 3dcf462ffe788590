"""Judges from YAML files: a prompt, and the choices or the scale of its verdict."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from halos_pl.common.yaml_files import Lines, read_yaml
from halos_pl.endpoint.exchange import Choice
from halos_pl.judge.base import Answer, Judge, JudgeError, Messages, Pair, filled, named_in, places, values_of

_KEYS = ("prompt", "system", "choices", "scale", "verdict", "max_tokens", "temperature", "note")
_CHOICES = ("first", "second", "tie")
_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|(?<!\.)\.\d+)"
#: Signs of numbers, and dashes that may stand for one.
_SIGN = "[-+\u2010-\u2015\u2212\ufe63\uff0b\uff0d]"


@dataclass
class Rubric(Judge):
    """A judge from a YAML file.

    Attributes:
        name: the file's name without its suffix.
        prompt: the user message. ``{question}``, ``{answer_a}`` and ``{answer_b}``, or ``{answer}``, and the columns of
            the prompts' rows are replaced.
        choices: the words of a comparison's verdict by their meaning: first, second and, optionally, tie.
        scale: the lowest and the highest grade.
        pattern: regular expression whose first group that matches is the verdict.
        place: the file.
        system: the system message; None for none.
    """

    name: str  # type: ignore[misc]
    prompt: str
    pattern: re.Pattern[str]
    place: str
    choices: dict[str, str] | None = None
    scale: tuple[float, float] | None = None
    system: str | None = None
    max_tokens: int = 1024
    temperature: float = 0.0

    @property
    def compares(self) -> Literal["pair", "single"]:  # type: ignore[override]
        """``pair`` with choices, ``single`` with a scale."""
        return "pair" if self.choices else "single"

    def messages(self, item: Pair | Answer, swapped: bool = False) -> Messages:
        values = values_of(item, swapped)
        templates = {"system": self.system, "user": self.prompt}
        return [
            {"role": role, "content": filled(text, values, item.name, self.place)}
            for role, text in templates.items()
            if text
        ]

    def verdict(self, choice: Choice) -> float | None:
        word = named_in(choice.text, self.pattern)
        if word is None:
            return None
        if self.choices is not None:
            meaning = next((meaning for meaning, each in self.choices.items() if each == word), None)
            return None if meaning is None else {"first": 1.0, "second": 0.0, "tie": 0.5}[meaning]
        return grade_in(word, self.scale)


def grade_in(word: str, scale: tuple[float, float] | None) -> float | None:
    """The number that a word writes; None if it is no number or off the scale."""
    try:
        grade = float(word)
    except ValueError:
        return None
    on_scale = scale is None or scale[0] <= grade <= scale[1]
    return grade if math.isfinite(grade) and on_scale else None


def read_rubric(path: Path) -> Rubric:
    """The judge in a YAML file.

    Raises:
        JudgeError: naming file and line.
        OSError: if the file cannot be read.
        YAMLFileError: if it is not YAML.
    """
    content, lines = read_yaml(path)
    return _Reader(path, content, lines).rubric()


class _Reader:
    def __init__(self, path: Path, content: dict[str, Any], lines: Lines) -> None:
        self.path, self.content, self.lines = path, content, lines

    def fault(self, message: str, *place: str) -> JudgeError:
        return JudgeError(f"{self.path}:{self.lines.get(place, 1)}: {message}")

    def rubric(self) -> Rubric:
        for key in self.content:
            if key not in _KEYS:
                raise self.fault(f"unknown key {key!r}; a rubric has {', '.join(_KEYS)}", str(key))
        prompt, system = self._text("prompt"), self._text("system", required=False)
        if ("choices" in self.content) == ("scale" in self.content):
            raise self.fault("a rubric has either choices, to compare two answers, or a scale, to grade one")
        choices = self._choices() if "choices" in self.content else None
        scale = None if choices else self._scale()
        needed = {"answer_a", "answer_b"} if choices else {"answer"}
        if missing := sorted(needed - places(prompt)):
            raise self.fault(f"the prompt lacks {{{missing[0]}}}", "prompt")
        if wrong := sorted(({"answer", "answer_a", "answer_b"} - needed) & places(prompt)):
            why = "choices compare {answer_a} and {answer_b}" if choices else "a scale grades {answer}"
            raise self.fault(f"the prompt has {{{wrong[0]}}}, but {why}", "prompt")
        return Rubric(
            name=self.path.stem,
            prompt=prompt,
            system=system or None,
            choices=choices,
            scale=scale,
            pattern=self._pattern(choices),
            place=str(self.path),
            max_tokens=int(self._number("max_tokens", 1024, least=1)),
            temperature=self._number("temperature", 0.0, least=0),
        )

    def _text(self, key: str, required: bool = True) -> str:
        value = self.content.get(key, None if required else "")
        if not isinstance(value, str) or (required and not value.strip()):
            raise self.fault(f"{key} is {value!r:.60}; it must be a text", key)
        return value

    def _choices(self) -> dict[str, str]:
        choices = self.content["choices"]
        words = isinstance(choices, dict) and [*choices.values()]
        if (
            not words
            or not {"first", "second"} <= {*choices} <= {*_CHOICES}
            or len({*words}) < len(words)
            or not all(isinstance(word, str) and word for word in words)
        ):
            why = "it takes a different word for first, second and, optionally, tie, such as {first: A, second: B}"
            raise self.fault(f"choices is {choices!r:.80}; {why}", "choices")
        return dict(choices)

    def _scale(self) -> tuple[float, float]:
        scale = self.content["scale"]
        numbers = isinstance(scale, list) and all(isinstance(s, int | float) and not isinstance(s, bool) for s in scale)
        if not numbers or len(scale) != 2 or not scale[0] < scale[1] or not all(map(math.isfinite, scale)):
            raise self.fault(f"scale is {scale!r:.80}; it takes the lowest and the highest grade: [1, 10]", "scale")
        return float(scale[0]), float(scale[1])

    def _pattern(self, choices: dict[str, str] | None) -> re.Pattern[str]:
        """The pattern of the verdict; by default the word in double square brackets, or as the whole reply.

        Punctuation around a whole reply is skipped, but not the sign or the decimal point of a number, nor any that the
        choices contain: with choices 1 and -1, the reply -1 is not the word 1.
        """
        words = "|".join(map(re.escape, choices.values())) if choices else _NUMBER
        own = "".join(sorted({*re.sub(r"[\w\s]", "", "".join(choices.values()))})) if choices else ""
        kept = [rf"{_SIGN}\s*[\d.]", r"\.\d"]
        kept += [f"[{re.escape(own)}]"] * bool(own) + [_SIGN] * bool(re.search(_SIGN, own))
        around = rf"(?:(?!{'|'.join(kept)})\W)*"
        text = self.content.get("verdict", rf"\[\[\s*({words})\s*\]\]|\A{around}({words}){around}\Z")
        try:
            pattern = re.compile(text)
        except (re.error, TypeError) as error:
            raise self.fault(f"verdict is not a regular expression: {error}", "verdict") from error
        if not pattern.groups:
            raise self.fault("verdict has no group; put the choice into parentheses", "verdict")
        return pattern

    def _number(self, key: str, default: float, least: float) -> float:
        value = self.content.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise self.fault(f"{key} is {value!r:.40}; it must be a number of at least {least:g}", key)
        return float(value)
