"""Baselines that are not arms: the model before training, and the rule that fewer words win."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from halos_pl.evaluation.files import BEFORE as BEFORE_FILE
from halos_pl.evaluation.files import FILE, ROWS, measured_how
from halos_pl.evaluation.held_out import of_pairs, of_rows
from halos_pl.study.earlier import Earlier
from halos_pl.study.finished import METRICS, config_of
from halos_pl.study.recorded import Figures, Key
from halos_pl.study.spec import BEFORE, SHORTER, Run
from halos_pl.study.state import read_part

#: Key of ``record.json``: the path of the model that each arm started from.
STARTS = "models"
#: Accuracy on pairs whose chosen completion has fewer, as many, or more words than the rejected one.
STRATA = {
    "reward_accuracy/chosen_shorter": -1,
    "reward_accuracy/same_length": 0,
    "reward_accuracy/chosen_longer": 1,
}
Record = dict[str, Any]


def held_out_records(run: Run) -> list[Record]:
    """The record of each held-out row of a run; empty without held-out rows."""
    path = run.folder / ROWS
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_length(records: list[Record]) -> dict[str, dict[str, float]]:
    """Reward accuracy by the lengths of the two completions in words; empty if words were not counted.

    The mean of the first and the last is 0.5 for a reward that only prefers short completions.
    """
    longer: dict[str, int] = {}
    for record in records:
        if record["pair"] is not None and "words" in record:
            sign = 1 if record["desirable"] else -1
            longer[record["pair"]] = longer.get(record["pair"], 0) + sign * record["words"]
    accuracies = {}
    for name, side in STRATA.items():
        some = [r for r in records if r["pair"] in longer and (longer[r["pair"]] > 0) - (longer[r["pair"]] < 0) == side]
        if some:
            accuracies[name] = of_pairs(some, 1.0)["reward_accuracy"]
    return accuracies


def baselines(done: list[Run], earlier: Earlier) -> dict[Key, Figures]:
    """The metrics of both baselines, on the examples of the finished runs.

    Args:
        done: the runs that are read from their folders.
        earlier: the recorded runs; empty if none is used. Recorded values win.
    """
    figures: dict[Key, Figures] = {}
    starts = starts_of(done, earlier)
    recorded = {earlier.record[STARTS][arm]: name for arm, name in earlier.record.get("starts", {}).items()}
    for start in dict.fromkeys(starts.values()):
        run = next((run for run in done if starts[run.arm.name] == start), None)
        known = earlier.baselines.get(recorded.get(start, ""), {})
        figures[_name(start, starts), None] = {**(_before(run) if run else {}), **known}
    if done:
        words = [
            {**r, "policy_logp": -r["words"], "reference_logp": 0.0} for r in held_out_records(done[0]) if "words" in r
        ]
        shorter = of_pairs(words, 1.0) | of_rows(words) | by_length(words) if words else {}
        names = ("reward_accuracy", "policy_accuracy", "reward_auroc", *STRATA)
        kept = {name: shorter[name] for name in names if shorter.get(name)}
        if kept:
            figures[SHORTER, None] = kept
    if rule := earlier.baselines.get(SHORTER):
        figures[SHORTER, None] = {**figures.get((SHORTER, None), {}), **rule}
    return figures


def _name(start: str, starts: Mapping[str, str]) -> str:
    """The baseline that is a model before training; named if the arms start from several models."""
    return f"{BEFORE} ({start})" if len(set(starts.values())) > 1 else BEFORE


def names_of(starts: Mapping[str, str]) -> dict[str, str]:
    """The baseline that each arm started from, by arm; ``starts`` as of :func:`starts_of`."""
    return {arm: _name(start, starts) for arm, start in starts.items()}


def starts_of(done: list[Run], earlier: Earlier) -> dict[str, str]:
    """The path of the model that each arm started from, by arm; that of the record if the arm has recorded runs."""
    recorded: dict[str, str] = earlier.record.get(STARTS, {})
    now = {run.arm.name: start_of(run) for run in done}
    moved = {now[arm]: recorded[arm] for arm in now.keys() & recorded.keys()}  # the same model at another path
    arms = [*dict.fromkeys([*(run.arm.name for run in earlier.used(earlier.study.runs(earlier.out))), *now])]
    return {arm: recorded[arm] if arm in recorded else moved.get(now[arm], now[arm]) for arm in arms}


def start_of(run: Run) -> str:
    """The path of the model that a run started from."""
    policy = (config_of(run).get("model") or {}).get("policy") or {}
    return str(policy.get("path", ""))


def _before(run: Run) -> Figures:
    """The metrics of the model that a run started from; as its own reference, it ties on every pair."""
    path = run.folder / BEFORE_FILE
    cure = f"remove {FILE} beside it and repeat halos ablate, which writes both anew"
    metrics: dict[str, Mapping[str, float]] = read_part(path, METRICS, cure=cure) if path.is_file() else {}
    if measured_how(run.folder).get("evaluate", {}).get("reference") is None:
        metrics |= by_length([{**r, "policy_logp": r["reference_logp"]} for r in held_out_records(run)])
    return {name: values for name, values in metrics.items() if values}
