"""Measures a model and, for a run, the model before training: held-out rows, answers, rules and judges."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from halos_pl.common import spent
from halos_pl.common.files import check_target, whole, write
from halos_pl.common.messages import plain
from halos_pl.common.progress import counted
from halos_pl.data import FeedbackDataModule
from halos_pl.data.prompt_files import PromptRow
from halos_pl.endpoint.client import Endpoint
from halos_pl.evaluation.answers import answers
from halos_pl.evaluation.files import ANSWERS, FILE, ROWS, refuse_loss
from halos_pl.evaluation.held_out import Evaluation, figures_of, mean_by_example, of_reference, prepared, records_of
from halos_pl.evaluation.judging import Judged, Row
from halos_pl.evaluation.win_rates import Conversations, WinRates, column_answers
from halos_pl.policy.sampling import Sample, kl_of_samples
from halos_pl.training.named_model import NamedModel

#: Values by metric and example.
Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Task:
    """An evaluation task.

    Attributes:
        data: arguments of the held-out DataModule; None without held-out feedback.
        beta: beta of the Brier score, 1 / nats.
        rows: prompts to answer.
        judging: the rule and the judge, if any.
        sampling: sampling settings, see :func:`halos_pl.evaluation.answers.answers`.
        win_rates: the judge at an endpoint, if any.
        endpoint: the endpoint of that judge.
        against: the model whose answers that judge compares with; None for a column, or for the reference.
    """

    data: Mapping[str, Any] | None
    beta: float
    rows: Sequence[PromptRow]
    judging: Mapping[str, Judged]
    sampling: Mapping[str, Any]
    win_rates: WinRates | None = None
    endpoint: Endpoint | None = None
    against: NamedModel | None = None


@dataclass(frozen=True)
class Measured:
    """The measurements of one model.

    Attributes:
        records: records of the held-out rows.
        samples: its answers.
        kl: KL divergence of each answer, nats; empty without a reference.
        later: its answers to the second questions of conversations; empty without conversations.
    """

    records: list[dict[str, Any]]
    samples: list[Sample]
    kl: list[float]
    later: Sequence[Sample] = ()

    @property
    def texts(self) -> Conversations:
        """The answers by turn."""
        return [[sample.text for sample in turn] for turn in (self.samples, self.later) if turn]


def output_folder(model: NamedModel, out: str | None, inputs: Iterable[str], win_rates: WinRates | None) -> Path:
    """The folder that an evaluation writes to: ``out``, a run's own, or one named after the model.

    Args:
        model: the model.
        out: the folder that the user names.
        inputs: files, folders and patterns that are read.
        win_rates: the judge at an endpoint, if any; its replies are added to a file.

    Raises:
        OSError: if it cannot be created or written.
        DataError: if files that are read, or that no evaluation wrote, would be lost.
    """
    folder = Path(out) if out else model.run
    folder = folder or Path("runs/evaluated") / re.sub(r"[^\w.=-]+", "-", model.name).strip("-.")
    refuse_loss(folder, inputs, win_rates.transcripts(folder) if win_rates else None)
    if folder == model.run:
        return folder
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    check_target(folder / FILE)
    return folder


def with_chat_template(reference: NamedModel, model: NamedModel) -> NamedModel:
    """The reference, with the model's chat template if it has none, so that a base model answers the same messages."""
    if reference.tokenizer().chat_template:
        return reference
    print(f"halos: {reference.name} has no chat template; using that of {model.name}")
    template = model.tokenizer().chat_template
    return replace(reference, chat_template=template if isinstance(template, str) else None)


def measure(model: NamedModel, compared: NamedModel | None, task: Task, folder: Path) -> tuple[Values, Values, bool]:
    """Measures a model and writes held-out rows and answers to a folder; answers are written before they are judged.

    Args:
        model: the policy.
        compared: the reference; None for a run's model before training.
        task: the evaluation task.
        folder: folder to write ``held_out.jsonl`` and ``answers.jsonl`` to.

    Returns:
        the values of the model, those of a run before training (otherwise empty), and whether there was a reference.

    Raises:
        ValueError: naming prompts, rows or answers that cannot be used.
    """
    other = compared.load() if compared else None
    compare = compared is not None or bool(model.run)
    if compared is not None and compared.tokenizer().get_vocab() != model.tokenizer().get_vocab():
        both = f"{plain(model.name)} and {plain(compared.name)}"
        print(f"halos: {both} have different vocabularies, so their log-probs cannot be compared")
        compare = False
    module = prepared(model, other, compare=compare)
    mine = _measured(module, model.name, task)
    start: Measured | None = None
    if model.run and other is None:
        assert module.reference is not None
        with module.reference.scoring() as first:
            before = "the model before training"
            samples, later = _turns(first.model, module.tokenizer, task, before, start=True)
        start = Measured(of_reference(mine.records), samples, [0.0] * len(samples), later)
    elif model.run:
        del module
        start = _measured(prepared(model, other, compare=compare, trained=False), f"{model.name} before training", task)
    reference = start
    if compared is not None and other is not None and ("judge" in task.judging or task.win_rates):
        reference = _answering(other, compared, task)
    others = reference.samples if reference is not None and "judge" in task.judging else None
    baseline = _baseline(task, reference)
    (folder / FILE).unlink(missing_ok=True)  # the values of an earlier evaluation do not belong to these rows
    if task.data is not None:
        write(folder / ROWS, "".join(json.dumps(record) + "\n" for record in mine.records))
    lines = _lines(task.rows, mine, start, others)
    values: list[Values] = []
    if task.rows:
        _write(folder / ANSWERS, lines)
    for each in (mine, start) if start else (mine,):
        metrics = figures_of(each.records, task.beta)
        if task.rows:
            columns = _columns(each, task, others)
            for name in task.judging:
                for line, value in zip(lines, columns[name], strict=True):
                    (line if each is mine else line["before"])[name] = value
            _write(folder / ANSWERS, lines)
            metrics |= _by_prompt(columns, task.rows)
        values.append({name: figures for name, figures in metrics.items() if figures})
    if task.win_rates is not None:
        models = {"model": mine.texts} | ({"before training": start.texts} if start else {})
        assert task.endpoint is not None
        rates = task.win_rates.measure(task.endpoint, task.rows, models, baseline, _examples(task.rows), folder)
        for metrics, rate in zip(values, rates, strict=True):
            metrics.update({name: preferences for name, preferences in rate.items() if preferences})
    return values[0], values[1] if start else {}, compare


def _measured(module: Evaluation, name: str, task: Task) -> Measured:
    spent.started()
    records = []
    if task.data is not None:
        with spent.part(spent.SCORING):
            records = records_of(module, FeedbackDataModule(**task.data), name)
    if not task.rows:
        return Measured(records, [], [])
    module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    samples, later = _turns(module.scorer.model, module.tokenizer, task, name)
    if module.reference is None:
        return Measured(records, samples, [], later)
    with spent.part(spent.SCORING):
        kl = list(kl_of_samples(module.scorer, module.reference, samples, task.sampling["batch_size"]))
    return Measured(records, samples, kl, later)


def _turns(model: Any, tokenizer: Any, task: Task, name: str, start: bool = False) -> tuple[list[Sample], list[Sample]]:
    """The answers to the prompts, and to the second questions of conversations."""
    if not task.rows:
        return [], []
    with spent.part(spent.SAMPLING):
        samples, path = answers(model, tokenizer, task.rows, start=start, **task.sampling)
    if path is not None:
        print(f"halos: the answers of {plain(name)} are cached from an earlier evaluation: {path}")
    second = task.win_rates.second_turns(task.rows, [s.text for s in samples]) if task.win_rates else []
    with spent.part(spent.SAMPLING):
        later = answers(model, tokenizer, second, start=start, **task.sampling)[0] if second else []
    return samples, later


def _answering(model: Any, named: NamedModel, task: Task) -> Measured:
    """Another model's answers."""
    samples, later = _turns(model, named.tokenizer(), task, named.name)
    return Measured([], samples, [], later)


def _baseline(task: Task, reference: Measured | None) -> Conversations | None:
    """The answers that the judge at the endpoint compares with, by turn; None for a judge of single answers."""
    how = task.win_rates
    if how is None or not how.compares:
        return None
    if task.against is not None:
        return _answering(task.against.load(), task.against, task).texts
    if how.against is not None:
        return [column_answers(task.rows, how.against)]
    assert reference is not None
    return reference.texts


def _lines(
    rows: Sequence[PromptRow], mine: Measured, start: Measured | None, others: list[Sample] | None
) -> list[dict[str, Any]]:
    """For each row: its columns, the answer, and those of the model before training and of the judge's reference."""
    lines = []
    for i, row in enumerate(rows if mine.samples else ()):
        extra = {k: v for k, v in row.columns.items() if k != "prompt"}
        line = (
            {"row": row.name, "prompt": row.prompt} | ({"columns": extra} if extra else {}) | _answer(mine.samples[i])
        )
        if start:
            line["before"] = _answer(start.samples[i])
        if others:
            line["other"] = _answer(others[i])
        lines.append(line)
    return lines


def _answer(sample: Sample) -> dict[str, Any]:
    return {"answer": sample.text, "finished": sample.finished, "tokens": len(sample.completion_ids)}


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    with whole(path) as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _columns(measured: Measured, task: Task, others: list[Sample] | None) -> dict[str, list[float]]:
    """Metrics of the answers by row."""
    columns = {"kl": measured.kl} if measured.kl else {}
    columns["length"] = [float(len(s.completion_ids)) for s in measured.samples]
    columns["finished"] = [float(s.finished) for s in measured.samples]
    if rule := task.judging.get("rule"):
        judged = counted(list(zip(task.rows, measured.samples, strict=True)), "applying the rule")
        columns["rule"] = [rule(_row(row, s), s.text) for row, s in judged]
    if judge := task.judging.get("judge"):
        assert others is not None
        if others is measured.samples:  # a model against itself
            columns["judge"] = [0.5] * len(others)
            return columns
        compared = counted(list(zip(task.rows, measured.samples, others, strict=True)), "judging answers")
        verdicts = [(judge(_row(row, s, o), s.text, o.text), s.text == o.text) for row, s, o in compared]
        # Equal answers are a tie: a verdict could only depend on their order.
        columns["judge"] = [0.5 if equal else verdict for verdict, equal in verdicts]
    return columns


def _row(row: PromptRow, sample: Sample, other: Sample | None = None) -> Row:
    return Row(row.columns, row.prompt, row.place, sample.finished, other.finished if other else None)


def _by_prompt(columns: Mapping[str, list[float]], rows: Sequence[PromptRow]) -> Values:
    """Metrics by example; a prompt that occurs twice is one example with two answers."""
    example = _examples(rows)
    return {name: mean_by_example(dict(zip(example, column, strict=True)), example) for name, column in columns.items()}


def _examples(rows: Sequence[PromptRow]) -> dict[str, str]:
    """The example of each row, by its name: the first row with the same prompt."""
    first: dict[str, str] = {}
    return {row.name: first.setdefault(json.dumps(row.prompt), row.name) for row in rows}
