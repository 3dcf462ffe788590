"""AlpacaEval 2 (Dubois et al. 2024): the probability that GPT-4 Turbo prefers an answer to that of GPT-4 Turbo.

The prompt is that of the alpaca-eval package. Questions and baseline answers are files of the hub's data set
tatsu-lab/alpaca_eval.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from halos_pl.endpoint.exchange import Choice
from halos_pl.judge.base import (
    Answer,
    BenchmarkFiles,
    Judge,
    JudgeError,
    Messages,
    Pair,
    Question,
    filled,
    named_in,
    values_of,
)
from halos_pl.judge.estimates import Estimate
from halos_pl.judge.length_control import check_files, length_controlled

BASELINE = "alpaca_eval_gpt4_baseline.json"
#: The prompt, below the package.
PROMPT = Path("evaluators_configs", "alpaca_eval_clf_gpt4_turbo", "alpaca_eval_clf.txt")
_MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)\n<\|im_end\|>", re.DOTALL)


def package_file(path: Path) -> Path:
    """A file of the alpaca-eval package, which is not imported.

    Raises:
        JudgeError: if the package is not installed.
    """
    spec = find_spec("alpaca_eval")
    places = list(spec.submodule_search_locations or ()) if spec else []
    file = Path(places[0]) / path if places else path
    if not file.is_file():
        raise JudgeError("alpaca_eval2 needs the prompt of the alpaca-eval package: pip install 'halos_pl[alpaca]'")
    return file


class AlpacaEval2(Judge):
    """AlpacaEval 2's judge.

    With an endpoint that gives log-probs, the preference is the probability of the first answer's name among the two
    names; otherwise it is the name in the reply.

    Args:
        files: where AlpacaEval's data are.

    Raises:
        JudgeError: if the package is not installed, or the folder lacks a file.
    """

    name = "alpaca_eval2"
    compares: Literal["pair", "single"] = "pair"
    max_tokens = 1
    temperature = 1.0
    top_logprobs = 5
    baseline = "output"
    reads = ("alpaca_data",)
    #: Names of the first and the second answer in the prompt.
    names = ("m", "M")

    def __init__(self, files: BenchmarkFiles) -> None:
        self.folder = files.alpaca_data
        if self.folder is not None:
            check_files(self.folder)
        template = package_file(PROMPT).read_text(encoding="utf-8")
        self.template = [{"role": role, "content": content} for role, content in _MESSAGE.findall(template)]

    def questions(self) -> Sequence[Question]:
        """The 805 questions with the baseline's answers in the column ``output``; none without the folder.

        Raises:
            JudgeError: if the file is missing, or is no list of questions.
        """
        if self.folder is None:
            return ()
        path = self.folder / BASELINE
        if not path.is_file():
            raise JudgeError(f"{path}: no such file; download it from the hub's data set tatsu-lab/alpaca_eval")
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            return [
                Question(f"{BASELINE}:{i}", (row["instruction"],), {"output": row["output"], "index": i})
                for i, row in enumerate(rows)
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise JudgeError(f"{path}: not a JSON list of objects with 'instruction' and 'output'") from error

    def length_controlled(
        self, preferences: Mapping[int, float], answers: Sequence[str], baseline: Sequence[str]
    ) -> Estimate | None:
        return None if self.folder is None else length_controlled(preferences, answers, baseline, self.folder)

    def messages(self, item: Pair | Answer, swapped: bool = False) -> Messages:
        shown = values_of(item, swapped)
        values = {"instruction": shown["question"], "output_1": shown["answer_a"], "output_2": shown["answer_b"]}
        return [
            {**message, "content": filled(message["content"], values, item.name, PROMPT.name)}
            for message in self.template
        ]

    def verdict(self, choice: Choice) -> float | None:
        top = choice.top_logprobs[0] if choice.top_logprobs else None
        if top is None:
            word = named_in(choice.text, re.compile(r"\A\W*([mM])\W*\Z"))
            return None if word is None else float(word == self.names[0])
        first, second = (math.exp(top[name]) if name in top else 0.0 for name in self.names)
        return first / (first + second) if first + second else None
