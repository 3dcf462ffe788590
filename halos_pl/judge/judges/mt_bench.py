"""MT-bench (Zheng et al. 2023): GPT-4 compares two answers or grades one, with reference answers for maths and code.

Prompts, questions and reference answers are FastChat's files; they are read from a folder and not shipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

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
from halos_pl.judge.rubric import grade_in

PROMPTS, QUESTIONS, REFERENCES = (f"mt_bench_{name}.jsonl" for name in ("judge_prompts", "question", "reference_gpt4"))
#: Ending of the names of prompts for the second turn.
MULTI = "-multi-turn"
#: Categories whose answers are judged beside a reference answer.
WITH_REFERENCE = ("math", "reasoning", "coding")


def read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines.

    Raises:
        JudgeError: naming the file, or file and line.
    """
    if not path.is_file():
        raise JudgeError(
            f"{path}: no such file; --mt_bench takes a folder with {PROMPTS}, {QUESTIONS} and {REFERENCES}"
        )
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):  # the text may contain U+2028
        try:
            row = json.loads(line)
            row[key]
        except (ValueError, KeyError, TypeError) as error:
            raise JudgeError(f"{path}:{number}: not a JSON object with '{key}'") from error
        rows.append(row)
    return rows


class MTBench(Judge):
    """The part that both ways of judging share.

    Args:
        files: where the folder of MT-bench is.

    Raises:
        JudgeError: naming a missing file or line.
    """

    #: Names of the first turn's prompt without and with a reference answer.
    plain: str
    with_reference: str
    max_tokens = 2048
    reads = ("mt_bench",)

    def __init__(self, files: BenchmarkFiles) -> None:
        if files.mt_bench is None:
            raise JudgeError(f"the judge {self.name} needs the files of MT-bench; name their folder with --mt_bench")
        self.folder = files.mt_bench
        self.prompts = {row["name"]: row for row in read_lines(self.folder / PROMPTS, "prompt_template")}
        for name in (f"{kind}{turn}" for kind in (self.plain, self.with_reference) for turn in ("", MULTI)):
            if name not in self.prompts:
                raise JudgeError(f"{self.folder / PROMPTS}: no prompt is named {name}")

    def questions(self) -> Sequence[Question]:
        rows = read_lines(self.folder / QUESTIONS, "turns")
        references = {
            row["question_id"]: row["choices"][0]["turns"] for row in read_lines(self.folder / REFERENCES, "choices")
        }
        questions = []
        for row in rows:
            columns = {"category": row["category"]}
            if row["category"] in WITH_REFERENCE:
                if row["question_id"] not in references:
                    raise JudgeError(
                        f"{self.folder / REFERENCES}: no reference answer to question {row['question_id']}"
                    )
                columns |= {f"ref_answer_{i}": turn for i, turn in enumerate(references[row["question_id"]], start=1)}
            questions.append(Question(f"{QUESTIONS}:{row['question_id']}", tuple(row["turns"]), columns))
        return questions

    def messages(self, item: Pair | Answer, swapped: bool = False) -> Messages:
        """The request for the first turn, or for the second one if the item has ``earlier`` turns.

        ``earlier`` is a list of (question, answer), or of (question, answer, other answer) for a pair.
        """
        values = values_of(item, swapped)
        prompt = self.with_reference if "ref_answer_1" in values else self.plain
        if earlier := item.columns.get("earlier"):
            prompt += MULTI
            (question, *answers) = earlier[0]
            answers = answers[::-1] if swapped else answers
            values |= {"question_1": question, "question_2": values["question"]}
            letters = ["_a", "_b"] if isinstance(item, Pair) else [""]
            for letter, first in zip(letters, answers, strict=True):
                values |= {f"answer{letter}_1": first, f"answer{letter}_2": values[f"answer{letter}"]}
        template = self.prompts[prompt]
        return [
            {"role": "system", "content": template["system_prompt"]},
            {
                "role": "user",
                "content": filled(template["prompt_template"], values, item.name, str(self.folder / PROMPTS)),
            },
        ]


class MTBenchPair(MTBench):
    """MT-bench's comparison of two answers."""

    name = "mt_bench_pair"
    compares: Literal["pair", "single"] = "pair"
    plain, with_reference = "pair-v2", "pair-math-v1"

    def verdict(self, choice: Choice) -> float | None:
        word = named_in(choice.text, re.compile(r"\[\[([ABC])\]\]"))
        return None if word is None else {"A": 1.0, "B": 0.0, "C": 0.5}[word]


class MTBenchSingle(MTBench):
    """MT-bench's grade of one answer, from 1 to 10."""

    name = "mt_bench_single"
    compares: Literal["pair", "single"] = "single"
    plain, with_reference = "single-v1", "single-math-v1"
    scale = (1.0, 10.0)

    def verdict(self, choice: Choice) -> float | None:
        word = named_in(choice.text, re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]"))
        return None if word is None else grade_in(word, self.scale)
