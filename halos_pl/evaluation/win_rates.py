"""Win rates and grades by a judge at an endpoint, as part of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halos_pl.common.files import write
from halos_pl.data.example import DataError
from halos_pl.data.prompt_files import PromptRow, prompt_row
from halos_pl.data.prompts import TextPrompts
from halos_pl.endpoint.client import Endpoint
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.evaluation.files import TRANSCRIPTS, VERDICTS, WIN_RATE
from halos_pl.judge.base import Answer, BenchmarkFiles, Judge, Pair, answer_of
from halos_pl.judge.named import named_judge
from halos_pl.judge.panel import Panel
from halos_pl.judge.report import figures, grade_figures, grade_line, grades_by_example, win_rate_lines
from halos_pl.judge.settings import JudgeSettings
from halos_pl.judge.win_rates import win_rate as win_rate_of

#: Answers of a model by turn and row.
Conversations = list[list[str]]
#: Values by metric and example.
Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Judged:
    """A model's answers after judgement.

    Attributes:
        values: ``win_rate`` or ``grade`` by example.
        record: the report for JSON.
        lines: the report for the terminal.
        verdicts: the judge's replies.
    """

    values: Values
    record: dict[str, Any]
    lines: list[str]
    verdicts: list[dict[str, Any]]


@dataclass(frozen=True)
class WinRates:
    """How win rates are measured.

    Attributes:
        judge: the judge.
        endpoint: settings of its endpoint.
        settings: how it is asked.
        against: a column with the answers to compare with, or the name of a model; None for the evaluation's reference.
        own_questions: whether the prompts are the questions of the judge's benchmark.
        second: the second question of each conversation, by name of the row.
    """

    judge: Judge
    endpoint: EndpointSettings
    settings: JudgeSettings
    against: str | None
    own_questions: bool
    second: Mapping[str, str]

    @property
    def compares(self) -> bool:
        """Whether the judge compares two answers, rather than grading one."""
        return self.judge.compares == "pair"

    def rows(self, text_prompts: TextPrompts) -> list[PromptRow]:
        """The questions of the judge's benchmark, as prompts.

        Raises:
            DataError: if conversations would be encoded as plain text.
        """
        if text_prompts == "plain" and self.second:
            raise DataError(f"the questions of {self.judge.name} are conversations; set --text_prompts chat")
        questions = self.judge.questions()
        return [prompt_row({**q.columns, "prompt": q.turns[0]}, q.name, text_prompts) for q in questions]

    def is_column(self, rows: Sequence[PromptRow]) -> bool:
        """Whether ``against`` is a column of the rows, rather than a model.

        Raises:
            DataError: naming a row without the column, if others have it, or without an answer in it.
        """
        have = [self.against in row.columns for row in rows]
        if any(have) and not all(have):
            row = rows[have.index(False)]
            raise DataError(f"{row.place}: no column '{self.against}', which --against names; add it to each row")
        if any(have) and self.against is not None:
            column_answers(rows, self.against)
            if self.second:
                raise DataError(f"--against {self.against} has no answers to the second questions; name a model")
        return any(have)

    def check(self, rows: Sequence[PromptRow]) -> None:
        """Refuses rows without a column that the judge's prompt needs.

        Raises:
            DataError: naming the row and the column.
        """
        for row in rows:
            name, prompt, columns = self._question(row, 0)
            item = Pair(name, prompt, "", "", columns) if self.compares else Answer(name, prompt, "", columns)
            self.judge.messages(item)

    def second_turns(self, rows: Sequence[PromptRow], answers: Sequence[str]) -> list[PromptRow]:
        """The second turns of conversations, after a model's answers to the first ones."""
        return [
            replace(row, prompt=[*row.prompt, _message("assistant", answer), _message("user", self.second[row.name])])
            for row, answer in zip(rows, answers, strict=True)
            if row.name in self.second and not isinstance(row.prompt, str)
        ]

    def transcripts(self, folder: Path) -> Path:
        """The file for the judge's replies: in a folder, unless the settings name one."""
        return Path(self.settings.transcripts) if self.settings.transcripts else folder / TRANSCRIPTS

    def connect(self, folder: Path) -> Endpoint:
        """The endpoint, with transcripts in a folder unless the settings name a file.

        Raises:
            EndpointError: if it cannot be used. A server that is down is an error only without transcripts, which may
                hold all replies.
            ValueError: if the API key or the transcripts are invalid.
        """
        path = self.transcripts(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        endpoint = Endpoint(self.endpoint, path)
        if not endpoint.recorded:
            endpoint.check_reachable()
        return endpoint

    def measure(
        self,
        endpoint: Endpoint,
        rows: Sequence[PromptRow],
        models: Mapping[str, Conversations],
        baseline: Conversations | None,
        examples: Mapping[str, str],
        folder: Path,
    ) -> list[Values]:
        """Judges the answers of models, prints the report and writes ``win_rate.json`` and ``verdicts.jsonl``.

        Args:
            endpoint: the judge's endpoint.
            rows: the prompts.
            models: the answers of each model to them and, for conversations, to the second questions.
            baseline: the answers to compare with, alike; None for a judge of single answers.
            examples: the example of each row, by its name.
            folder: the folder to write to.

        Returns:
            ``win_rate`` or ``grade`` by example, for each model.

        Raises:
            EndpointError: if the endpoint cannot be used; replies so far are in the transcripts.
        """
        panel, judgements = Panel(self.judge, endpoint, self.settings), {}
        if baseline is not None:
            pairs = {name: self._pairs(rows, turns, baseline, examples) for name, turns in models.items()}
            panel.announce(*pairs.values())
            for name, turns in models.items():
                judgements[name] = self._compared(panel, pairs[name], turns, baseline, name)
        else:
            answers = {name: self._answers(rows, turns, examples) for name, turns in models.items()}
            panel.announce(*answers.values())
            judgements = {name: self._graded(panel, each, name) for name, each in answers.items()}
        print(f"halos: {endpoint.usage.line(self.endpoint)}")
        self._write(judgements, asdict(endpoint.usage), folder)
        return [each.values for each in judgements.values()]

    def _pairs(
        self,
        rows: Sequence[PromptRow],
        turns: Conversations,
        baseline: Conversations,
        examples: Mapping[str, str],
    ) -> list[Pair]:
        pairs = []
        for turn, (mine, others) in enumerate(zip(turns, baseline, strict=True)):
            for i, row in enumerate(rows):
                name, prompt, columns = self._question(row, turn, turns[0][i], baseline[0][i])
                pairs.append(Pair(name, prompt, mine[i], others[i], columns, examples[row.name]))
        return pairs

    def _answers(self, rows: Sequence[PromptRow], turns: Conversations, examples: Mapping[str, str]) -> list[Answer]:
        answers = []
        for turn, mine in enumerate(turns):
            for i, row in enumerate(rows):
                name, prompt, columns = self._question(row, turn, turns[0][i])
                answers.append(Answer(name, prompt, mine[i], columns, examples[row.name]))
        return answers

    def _compared(
        self, panel: Panel, pairs: list[Pair], turns: Conversations, baseline: Conversations, model: str
    ) -> Judged:
        verdicts = panel.compare(pairs)
        report = win_rate_of(verdicts.pairs)
        record, lines = figures(report), win_rate_lines(report, model)
        if self.own_questions:
            first = enumerate(verdicts.pairs[: len(turns[0])])
            preferences = {i: pair.preference for i, pair in first if pair.preference is not None}
            controlled = self.judge.length_controlled(preferences, turns[0], baseline[0])
            if controlled is not None:
                record["length_controlled"] = figures(controlled)
                lines.append(f"{model}: length-controlled win rate {controlled.text()}")
        return Judged({"win_rate": report.preferences}, record, lines, verdicts.records)

    def _graded(self, panel: Panel, answers: list[Answer], model: str) -> Judged:
        grades, names = panel.grade(answers), [answer.example for answer in answers]
        assert self.judge.scale is not None
        record = grade_figures(grades, names, self.judge.scale)
        return Judged({"grade": grades_by_example(grades, names)}, record, [grade_line(record, model)], grades.records)

    def _question(self, row: PromptRow, turn: int, *first: str) -> tuple[str, Any, dict[str, Any]]:
        """Name, prompt and columns of a turn; ``first`` are the answers to the first one."""
        columns = {key: value for key, value in row.columns.items() if key != "prompt"}
        if not turn:
            return row.name, row.prompt, columns
        question = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
        return f"{row.name} turn 2", self.second[row.name], {**columns, "earlier": [(question, *first)]}

    def _write(self, judgements: Mapping[str, Judged], usage: dict[str, int], folder: Path) -> None:
        against = (self.against or "the reference") if self.compares else None
        settings = {"judge": self.judge.name, "by": self.endpoint.model, "against": against, "usage": usage}
        record = settings | {name: each.record for name, each in judgements.items()}
        write(folder / WIN_RATE, json.dumps(record, indent=2) + "\n")
        lines = [{"of": name} | verdict for name, each in judgements.items() for verdict in each.verdicts]
        write(folder / VERDICTS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        print(f"halos: {self.judge.name}, by {self.endpoint.model}{f', against {against}' if against else ''}:")
        for each in judgements.values():
            for line in each.lines:
                print(f"halos:   {line}")


def win_rates_of(
    *,
    win_rate: str | None,
    against: str | None,
    endpoint: EndpointSettings | None,
    judging: JudgeSettings,
    alpaca_data: str | None,
    mt_bench: str | None,
    prompts: str | None,
    **_: Any,
) -> WinRates | None:
    """How to measure win rates, from the arguments of ``halos evaluate``; None without ``--win_rate``.

    Raises:
        DataError: naming an argument that is missing or has no effect.
        JudgeError: if there is no such judge, or it lacks its files.
    """
    dependent = {"against": against, "endpoint": endpoint, "alpaca_data": alpaca_data, "mt_bench": mt_bench}
    if win_rate is None:
        if unused := [name for name, value in dependent.items() if value is not None]:
            raise DataError(f"--{unused[0]} needs --win_rate, which names the judge")
        return None
    if endpoint is None or not endpoint.model:
        raise DataError("--win_rate needs a server: --endpoint.url http://HOST:PORT/v1 and --endpoint.model NAME")
    judge = named_judge(win_rate, BenchmarkFiles(*(Path(f) if f else None for f in (alpaca_data, mt_bench))))
    if prompts and alpaca_data:
        raise DataError("--alpaca_data has no effect with --prompts, which replaces its questions; omit one of them")
    if against and judge.compares == "single":
        raise DataError(f"--against has no effect, as the judge {win_rate} grades single answers; omit it")
    questions = [] if prompts else judge.questions()
    if not prompts and not questions:
        raise DataError(f"--win_rate {win_rate} needs answers to judge: name --prompts as well")
    second = {question.name: question.turns[1] for question in questions if len(question.turns) > 1}
    against = against or (None if prompts else judge.baseline)
    return WinRates(judge, endpoint, judging, against, not prompts, second)


def column_answers(rows: Sequence[PromptRow], column: str) -> list[str]:
    """The answers in a column: texts, or conversations that end with one.

    Raises:
        DataError: naming the row.
    """
    answers = []
    for row in rows:
        value = answer_of(row.columns[column])
        if not isinstance(value, str):
            raise DataError(f"{row.place}: column '{column}' contains no answer; it takes a text or messages")
        answers.append(value)
    return answers


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
