"""``halos judge agreement``: how far a judge agrees with people."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halos_pl.common.files import write
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.judge.settings import JudgeSettings

if TYPE_CHECKING:
    from halos_pl.judge.agreement import Agreement
    from halos_pl.judge.estimates import Estimate
    from halos_pl.judge.human_labels import HumanLabels
    from halos_pl.judge.panel import Verdicts

#: Files of the output folder.
REPORT, VERDICTS, TRANSCRIPTS = "agreement.json", "verdicts.jsonl", "transcripts.jsonl"


def agreement(
    data: str,
    *,
    judge: str,
    endpoint: EndpointSettings,
    prompt: str = "prompt",
    answers: str = "chosen,rejected",
    annotators: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    judging: JudgeSettings = JudgeSettings(),  # noqa: B008
    mt_bench: str | None = None,
    out: str | None = None,
) -> None:
    """Measure how far a judge agrees with people, and how far it follows the position of an answer.

    Each pair is judged in both orders. A repeated command reuses the replies that it has and asks for the others.

    Args:
        data: pairs of answers that people have compared, in any format of training data.
        judge: a judge that compares two answers: alpaca_eval2, mt_bench_pair, kto, accurate, or a YAML file.
        endpoint: server of the judge, with OpenAI's API.
        prompt: columns of the prompt, separated by commas.
        answers: columns of the two answers, separated by a comma.
        annotators: columns with people's labels (1 or 2 for the better answer, 0 for a tie), separated by commas;
            default: the first answer is the better one.
        limit: number of pairs to draw, with seed; default: all.
        seed: seed of the draw.
        judging: how the judge is asked.
        mt_bench: folder with MT-bench's files.
        out: folder for agreement.json, verdicts.jsonl and transcripts.jsonl; default: below runs/judged, named after
            the data and the judge.
    """
    from halos_pl.data.example import DataError
    from halos_pl.endpoint.client import Endpoint
    from halos_pl.judge.base import BenchmarkFiles
    from halos_pl.judge.human_labels import read_labels
    from halos_pl.judge.named import named_judge
    from halos_pl.judge.panel import Panel

    if not endpoint.model:
        raise DataError("endpoint.model is empty; set it to the name of a model at the server")
    asked = named_judge(judge, BenchmarkFiles(mt_bench=Path(mt_bench) if mt_bench else None))
    people = [] if annotators is None else _columns(annotators)
    labels = read_labels(data, _columns(prompt), _columns(answers), people, limit, seed)
    folder = Path(out) if out else Path("runs/judged") / f"{Path(data).name.partition('.')[0]}-{asked.name}"
    _check_outputs(folder, Path(data))
    folder.mkdir(parents=True, exist_ok=True)
    transcripts = Path(judging.transcripts) if judging.transcripts else folder / TRANSCRIPTS
    transcripts.parent.mkdir(parents=True, exist_ok=True)
    panel = Panel(asked, Endpoint(endpoint, transcripts), judging)
    drawn = f", drawn with seed {seed}" if len(labels.pairs) < labels.rows else ""
    print(f"halos: {len(labels.pairs)} of {labels.rows} pairs of {data}{drawn}")
    panel.announce(labels.pairs)
    verdicts = panel.compare(labels.pairs)
    print(f"halos: {panel.endpoint.usage.line(endpoint)}")
    record = _report(labels, verdicts, f"{asked.name} by {endpoint.model}")
    settings = {"data": data, "judge": asked.name, "by": endpoint.model, "rows": labels.rows, "seed": seed}
    settings |= {"usage": asdict(panel.endpoint.usage)}
    write(folder / REPORT, json.dumps(settings | record, indent=2) + "\n")
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in verdicts.records)
    write(folder / VERDICTS, "".join(lines))
    print(f"halos: written to {folder / REPORT}")


def _check_outputs(folder: Path, data: Path) -> None:
    """Refuses to replace the data, or files that no earlier call wrote.

    Raises:
        DataError: Names the file.
    """
    from halos_pl.data.example import DataError
    from halos_pl.evaluation.files import read_object

    outputs = [each for each in (folder / REPORT, folder / VERDICTS) if each.exists()]
    for path in outputs:
        if data.exists() and path.samefile(data):
            raise DataError(f"{path} contains the data and would be replaced; name another folder with --out")
    if outputs and not (outputs[0].name == REPORT and "agreement" in read_object(outputs[0])):
        raise DataError(
            f"{outputs[0]} would be replaced, but is from no earlier call; move it, or name another folder with --out"
        )


def _columns(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def _report(labels: HumanLabels, verdicts: Verdicts, name: str) -> dict[str, Any]:
    """The figures of a judge beside people, printed and for JSON."""
    from halos_pl.common.messages import counted
    from halos_pl.judge.agreement import agreement, fleiss_kappa, majority
    from halos_pl.judge.report import figures, judge_lines
    from halos_pl.judge.win_rates import win_rate

    by, names = dict(labels.labels), [pair.name for pair in labels.pairs]
    people = [[each[name] for each in labels.labels.values()] for name in names]
    if len(by) > 1:
        votes = {name: majority(row) for name, row in zip(names, people, strict=True)}
        by["majority"] = {name: vote for name, vote in votes.items() if vote is not None}
    compared = [agreement(verdicts.pairs, each, annotator) for annotator, each in by.items()]
    report = win_rate(verdicts.pairs)
    for line in judge_lines(report, name):
        print(f"halos: {line}")
    if report.identical:
        equal = counted(report.identical, "pair")
        print(f"halos: {name}: {equal} with equal answers, about which no judge is asked: left out below")
    for row in _table(compared):
        print(f"halos: {row}")
    record = {"judge": figures(report), "agreement": [figures(each) for each in compared]}
    if len(labels.labels) > 1:
        kappa = fleiss_kappa(people, [pair.example for pair in labels.pairs])
        print(f"halos: people among themselves: Fleiss' kappa {kappa.text(2)} (n = {kappa.n})")
        record["people"] = {"fleiss_kappa": figures(kappa), "without_majority": len(names) - len(by["majority"])}
    return record


def _table(compared: list[Agreement]) -> list[str]:
    """Agreement with each person, one line each; guessing gives an accuracy of 0.5 and a kappa of 0."""

    def shown(e: Estimate) -> str:
        return e.text(2) if e.n and e.value == e.value else "unknown"

    head = ("people", "prompts", "accuracy (chance 0.5)", "without position", "same label", "Cohen's kappa (chance 0)")
    rows = [
        (a.by, f"{a.same_label.n}", shown(a.accuracy), shown(a.without_position), shown(a.same_label), shown(a.kappa))
        for a in compared
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
