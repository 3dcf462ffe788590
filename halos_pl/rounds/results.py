"""The results of online training: metrics by model and prompt, and their comparisons."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from halos_pl.evaluation.files import BEFORE, FILE
from halos_pl.evaluation.held_out import mean_by_example
from halos_pl.evaluation.metrics import RATIOS, Metric, is_share, metric_of
from halos_pl.judge.named import named_judge
from halos_pl.rounds.diversity import distinct
from halos_pl.rounds.execute import steps_of
from halos_pl.rounds.spec import FIRST, OFFLINE, Round, Rounds, rounds_of
from halos_pl.rounds.state import ROW, answers_of, finished
from halos_pl.study.comparison import Comparison
from halos_pl.study.decisions import compare
from halos_pl.study.run_variance import Runs
from halos_pl.study.statistics import Estimate, estimate

#: Metrics of answers that ``halos evaluate`` does not have.
MORE = {
    "score": Metric("prompts", "mean score of answers by the labellers", True),
    "distinct_2": Metric("prompts", "share of distinct bigrams of words in the answers to a prompt", None),
}
#: Order of the metrics in the report; the primary one comes first, and those of judges and benchmarks last.
ORDER = ("rule", "score", "judge", "kl", "length", "finished", "distinct_2")

#: Values by metric and example.
Values = dict[str, dict[str, float]]


def meaning_of(metric: str) -> Metric:
    """Unit, meaning and direction of a metric."""
    return MORE[metric] if metric in MORE else metric_of(metric)


@dataclass(frozen=True)
class Results:
    """The results of finished rounds.

    Attributes:
        study: The settings.
        out: Folder of all rounds.
    """

    study: Rounds
    out: Path

    @cached_property
    def rounds(self) -> list[Round]:
        """The rounds whose stages are all finished, and the offline run if it is."""
        return [each for each in rounds_of(self.study, self.out) if set(each.stages) <= finished(each).keys()]

    @cached_property
    def relative(self) -> bool:
        """Whether the score of an answer depends on the answer beside it: it is a vote, or a judge compares the two."""
        kind, _, name = (part.strip() for part in self.study.labellers[0].partition(":"))
        return len(self.study.labellers) > 1 or (kind == "judge" and named_judge(name).compares == "pair")

    @cached_property
    def _measured(self) -> dict[str, tuple[Values, Values]]:
        """The values of each model, and those of the first model beside it."""
        return {each.name: _measured(each) for each in self.rounds}

    @cached_property
    def values(self) -> dict[str, Values]:
        """Values by model, metric and example.

        The first model, before the first round, has its mean over all rounds, in which it is measured anew. It has no
        score if that depends on the answer beside it.
        """
        firsts = [first for _, first in self._measured.values()]
        mean = {metric: _mean([first.get(metric, {}) for first in firsts]) for metric in dict.fromkeys(chain(*firsts))}
        if self.relative:
            mean.pop("score", None)
        return ({FIRST: mean} if firsts else {}) | {name: mine for name, (mine, _) in self._measured.items()}

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics of the report, the primary one first."""
        measured = {metric for values in self.values.values() for metric in values}
        ordered = [*(metric for metric in ORDER if metric in measured), *sorted(measured - {*ORDER})]
        return sorted(ordered, key=lambda metric: metric != self.study.primary)

    def share(self, metric: str) -> bool:
        """Whether a metric lies between 0 and 1."""
        return self.relative if metric == "score" else is_share(metric)

    def estimate(self, model: str, metric: str) -> Estimate | None:
        """The mean of a metric with its interval over prompts; None if it was not measured."""
        by_prompt = self.values[model].get(metric)
        return estimate(list(by_prompt.values()), share=self.share(metric)) if by_prompt else None

    def _compared(
        self, metric: str, arms: Mapping[str, Mapping[str, float]], reference: str | Mapping[str, str], *, share: bool
    ) -> dict[str, Comparison]:
        """Arms against their references, paired by prompt; only the primary metric gets a decision.

        Args:
            metric: Name of the metric.
            arms: Values by arm and example, references included.
            reference, share: See :func:`halos_pl.study.decisions.compare`.
        """
        common = set.intersection(*(set(each) for each in arms.values())) if arms else set()
        if not common:
            return {}
        examples = [example for example in next(iter(arms.values())) if example in common]
        # No model has several seeds, so that every test is one over prompts, for these runs.
        runs = {name: Runs(np.array([[each[e] for e in examples]]), ()) for name, each in arms.items()}
        ratios = metric in RATIOS and all(np.mean(each.values) > 0 for each in runs.values())
        comparisons = compare(
            metric,
            runs,
            reference,
            planned=1,
            primary=metric == self.study.primary,
            scale="ratio" if ratios else "difference",
            share=share,
        )
        return {each.arm: each for each in comparisons}

    @cached_property
    def online(self) -> list[str]:
        """Names of the finished rounds."""
        return [each.name for each in self.rounds if each.number]

    def against_first(self, metric: str) -> dict[str, Comparison]:
        """Each round, and the offline run, against the first model as measured beside it."""
        arms: dict[str, Mapping[str, float]] = {}
        beside = {}
        for name, both in self._measured.items():
            if all(metric in values for values in both):
                beside[name] = f"{FIRST}, beside {name}"
                arms[name], arms[beside[name]] = (values[metric] for values in both)
        return self._compared(metric, arms, beside, share=self.share(metric))

    def against_offline(self, metric: str) -> Comparison | None:
        """The last round against the offline run; by their leads on the first model if the score depends on it."""
        last = self.online[-1] if len(self.online) == self.study.rounds else ""
        arms = {name: self.values[name][metric] for name in (last, OFFLINE) if metric in self.values.get(name, {})}
        if len(arms) < 2:
            return None
        if leads := metric == "score" and self.relative:
            for name in arms:
                mine, first = (values[metric] for values in self._measured[name])
                arms[name] = {example: value - first[example] for example, value in mine.items()}
        return self._compared(metric, arms, OFFLINE, share=self.share(metric) and not leads).get(last)

    def facts(self, each: Round) -> dict[str, Any]:
        """How a round was trained: counts of its feedback, optimizer steps, and seconds by stage."""
        facts: dict[str, Any] = {"steps": steps_of(each), "seed": each.seed}
        settings = each.labels.with_name(f"{each.labels.name}.settings.json")
        if settings.is_file():
            counts = json.loads(settings.read_text(encoding="utf-8")).get("counts", {})
            facts["feedback"] = {name: number for name, number in counts.items() if number}
        return facts | {"seconds": {stage: recorded["seconds"] for stage, recorded in finished(each).items()}}


def _mean(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each example over the measurements that have it."""
    examples = dict.fromkeys(chain(*values))
    return {name: fmean(each[name] for each in values if name in each) for name in examples}


def _measured(each: Round) -> tuple[Values, Values]:
    """The values of a round's model and of the first model."""
    folder = each.run
    mine, first = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (FILE, BEFORE))
    answers = answers_of(each)
    texts: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    example: dict[str, str] = {}
    first_of: dict[str, str] = {}
    for answer in answers:
        name = first_of.setdefault(json.dumps(answer["prompt"]), answer["row"])
        example[answer["row"]] = name
        texts[name][0].append(answer["answer"])
        texts[name][1].append(answer["before"]["answer"])
    mine["distinct_2"] = {name: distinct(both[0]) for name, both in texts.items()}
    first["distinct_2"] = {name: distinct(both[1]) for name, both in texts.items()}
    if each.scores.is_file():
        before, after = _scores(each)
        mine["score"], first["score"] = mean_by_example(after, example), mean_by_example(before, example)
    return mine, first


def _scores(each: Round) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of the first model's and the round's answers by row, of rows where both have one."""
    before, after = {}, {}
    with each.scores.open(encoding="utf-8") as file:
        rows: Iterable[Mapping[str, Any]] = map(json.loads, file)
        for row in rows:
            if len(row["scores"]) == 2:
                before[row[ROW]], after[row[ROW]] = row["scores"]
    return before, after
