"""The report of online training, on finished rounds whose scores are written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from run_halos import write_jsonl

from halos_pl.data.prompt_files import ANSWERS
from halos_pl.labelling.groups import read_groups
from halos_pl.rounds.execute import write_compared
from halos_pl.rounds.read import load_rounds
from halos_pl.rounds.report import data, text
from halos_pl.rounds.results import Results
from halos_pl.rounds.spec import FIRST, OFFLINE, rounds_of

#: A score of the first model's answer and one of the round's, by held-out prompt.
Scores = Sequence[tuple[float, float]]
VOTES: dict[str, Scores] = {
    "round 1": [(0.0, 1.0), (0.5, 0.5), (0.25, 0.75), (1.0, 0.0)],
    "round 2": [(0.75, 0.25), (0.5, 0.5), (0.5, 0.5), (0.25, 0.75)],
    OFFLINE: [(1.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.5, 0.5)],
}
GRADES: dict[str, Scores] = {
    "round 1": [(1.0, 2.0), (3.0, 3.5), (0.0, 4.0), (2.0, 1.0)],
    "round 2": [(1.0, 5.0), (3.0, 3.0), (0.0, 1.0), (2.0, 2.5)],
    OFFLINE: [(1.0, 0.5), (3.0, 4.0), (0.0, 0.0), (2.0, 3.0)],
}


def finished_rounds(
    folder: Path, by: Any, scores: Mapping[str, Scores], columns: Mapping[str, Any] | None = None
) -> Results:
    """Two rounds and an offline run with these scores, all of whose stages are finished.

    Args:
        folder: Folder of all rounds.
        by: The labellers.
        scores: Scores by round.
        columns: Further columns of the held-out prompts.
    """
    Path("data.jsonl").write_text("{}\n")
    study = {"model": "m", "prompts": "p", "held_out_prompts": "h", "rounds": 2, "window": 1, "label": {"by": by}}
    Path("study.yaml").write_text(yaml.safe_dump({**study, "fit": {"objective": "kto"}, "offline": "data.jsonl"}))
    results = Results(load_rounds("study.yaml"), folder)
    for each in rounds_of(results.study, folder):
        each.run.mkdir(parents=True)
        (each.folder / "stages.json").write_text(json.dumps({stage: {"seconds": 1} for stage in each.stages}))
        (each.run / "summary.json").write_text('{"steps": 1}')
        names = [f"h:{i}" for i in range(len(scores[each.name]))]
        for file in ("evaluation.json", "before.json"):
            metrics = {"length": 2.0, "win_rate": 0.5, "gsm8k": 1.0}
            (each.run / file).write_text(json.dumps({metric: dict.fromkeys(names, v) for metric, v in metrics.items()}))
        mine, first = ({"answer": text, "finished": True} for text in ("a", "b"))
        answers = [{"row": name, "prompt": name, "columns": columns or {}, **mine, "before": first} for name in names]
        write_jsonl(each.run / "answers.jsonl", answers)
        rows = [{"held_out_row": name, "scores": both} for name, both in zip(names, scores[each.name], strict=True)]
        write_jsonl(each.scores, rows)
    return results


def lead(scores: Scores) -> float:
    return fmean(this - first for first, this in scores)


@pytest.mark.parametrize(
    ("by", "scores"),
    [(["rule: a.py:f", "rule: b.py:f"], VOTES), ("judge: kto", VOTES), ("reward: model", GRADES)],
    ids=["votes", "comparisons", "rewards"],
)
def test_each_round_is_compared_with_the_scores_beside_its_own(
    by: Any, scores: Mapping[str, Scores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: the differences fit each other, and a model has a score of its own only if no other answer matters."""
    monkeypatch.chdir(tmp_path)
    results = finished_rounds(tmp_path / "out", by, scores)
    report = data(results)
    effects = {name: c["effect"] for name, c in report["against_first"]["score"].items()}
    assert effects == pytest.approx({name: lead(each) for name, each in scores.items()})
    assert report["against_offline"]["score"]["effect"] == pytest.approx(effects["round 2"] - effects[OFFLINE])
    means = {name: each["score"]["value"] for name, each in report["means"].items() if "score" in each}
    assert means.pop(FIRST, None) == (1.5 if scores is GRADES else None)
    assert means == pytest.approx({name: fmean(this for _, this in each) for name, each in scores.items()})
    assert "over 4 held-out prompts" in text(results)
    assert {"length", "win_rate", "gsm8k"} <= report["means"]["round 1"].keys()  # whatever evaluate measures

    other = finished_rounds(tmp_path / "other", by, {**scores, "round 1": [(0.5, 0.5)] * 4})
    assert data(other)["against_first"]["score"]["round 2"]["effect"] == pytest.approx(effects["round 2"])


def test_held_out_prompts_may_have_columns_of_other_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = dict.fromkeys([*ANSWERS, "instruction", "messages", "answer"], 1)
    each = finished_rounds(tmp_path / "out", "reward: model", GRADES, other).rounds[0]
    write_compared(each)
    groups = read_groups(each.compared)
    assert [[completion.text for completion in group.completions] for group in groups] == [["b", "a"]] * 4
    assert all(group.columns == {"answer": 1, "held_out_row": group.prompt} for group in groups)
