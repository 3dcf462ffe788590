"""The positive control of a study: without it, a report claims nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from run_halos import ROOT, pair_data

from halos_pl.cli.ablate import Parsers
from halos_pl.evaluation.arguments import digest_of, measuring
from halos_pl.study import report
from halos_pl.study.control import measured_on
from halos_pl.study.first_line import first_line
from halos_pl.study.headline import headline
from halos_pl.study.preflight import check
from halos_pl.study.read import load_study
from halos_pl.study.recorded import Recorded, write_recorded
from halos_pl.study.report import write_report
from halos_pl.study.results import Results
from halos_pl.study.spec import BEFORE, StudyError

METRIC = "reward_accuracy"
#: Words of a claim.
CLAIMS = re.compile(r"\bwon\b|significant|believe|differs? in|equivalent|\bp [=<]")


def recorded(folder: Path, shares: dict[str, float], seeds: int = 3, **more: Any) -> Path:
    """A folder with the results of a study: each arm's accuracy on 200 pairs; ``done`` seeds of them."""
    done, before = more.pop("done", seeds), more.pop("before", 0.5)
    measured = more.pop("measured", {"held_out": {"pairs.jsonl": "abc"}, "prompts": {}})
    folder.mkdir(parents=True)
    content = {
        "arms": {arm: {} for arm in shares},
        "seeds": list(range(seeds)),
        "evaluate": {"held_out": ["pairs.jsonl"]},
        "metrics": [METRIC],
        **more,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    draw, names = np.random.default_rng(0), [f"pairs.jsonl:{i:03}" for i in range(200)]
    values: dict[Any, Any] = {
        (arm, seed): {METRIC: {name: float(draw.random() < share) for name in names}}
        for arm, share in shares.items()
        for seed in range(done)
    }
    if before is not None:
        values[BEFORE, None] = {METRIC: dict.fromkeys(names, before)}
    record = {"study": str(folder / "study.yaml"), "out": str(folder), "measured": measured}
    write_recorded(Recorded(values, record), load_study(folder / "study.yaml"), folder)
    return folder


def study_with(folder: Path, control: Path, measured: Any = None, **changed: Any) -> Results:
    """A study whose second arm is far better than its first, with a control."""
    wanted = {"study": str(control), "arm": "dpo", "metric": METRIC, "at_least": 0.6, **changed}
    more = {} if measured is None else {"measured": measured}
    place = recorded(folder, {"kto": 0.5, "other": 0.9}, equivalence=0.05, control=wanted, **more)
    return Results(load_study(place / "study.yaml"), place)


#: Controls that do not hold, by what the report says of them.
LACKING: dict[str, dict[str, Any]] = {
    "1 of 3 runs": {"shares": {"dpo": 0.7}, "done": 1},
    "0 of 3 runs": {"shares": {"dpo": 0.7}, "done": 0},
    "below 0.6": {"shares": {"dpo": 0.55}},
    "not significantly more": {"shares": {"dpo": 0.65}, "before": 0.62},
    "was not measured": {"shares": {"dpo": 0.7}, "before": None},
    "no record of the data": {"shares": {"dpo": 0.7}, "measured": None},
}


@pytest.mark.parametrize("why", [*LACKING, "values.csv.gz"])
def test_without_its_positive_control_a_study_claims_nothing(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PICTURES", {})
    control = tmp_path / "control"
    if why in LACKING:
        recorded(control, **LACKING[why])
    results = study_with(tmp_path / "study", control)
    line = first_line(results)
    assert line.startswith("No positive control: ")
    assert why in line
    assert "\n" not in line
    for c in (*results.comparisons(METRIC).values(), *results.learned(METRIC).values()):
        assert c.exploratory
        assert c.decision == "exploratory"
    write_report(results)
    for name in ("report.md", "report.html"):
        page = (results.out / name).read_text().partition("<body")[2 if name.endswith("html") else 0]
        page = page.replace(line, "")
        assert not CLAIMS.search(page), CLAIMS.search(page)
        assert "+0.4" in page  # the difference, as an estimate
    # The same without a control claims the difference.
    text = (results.out / "study.yaml").read_text()
    (results.out / "study.yaml").write_text(text[: text.index("control:")])
    freed = Results(load_study(results.out / "study.yaml"), results.out)
    assert freed.comparisons(METRIC)["other"].significant
    assert "won" in first_line(freed)


@pytest.mark.parametrize("seeds", [3, 1])
def test_a_control_that_holds_is_stated_and_changes_nothing_else(seeds: int, tmp_path: Path) -> None:
    """A control with one planned seed is tested over its examples, as any study with one."""
    results = study_with(tmp_path / "study", recorded(tmp_path / "control", {"sft": 0.3, "dpo": 0.7}, seeds))
    assert results.control is not None
    assert results.control.holds
    [stated] = [line for line in headline(results) if line.startswith("Positive control: ")]
    mean = Results(load_study(tmp_path / "control/study.yaml"), tmp_path / "control").estimates[METRIC, "dpo"]
    assert f"{METRIC} {mean.value:.2f}"[:-1] in stated
    text = (results.out / "study.yaml").read_text()
    (results.out / "study.yaml").write_text(text[: text.index("control:")])
    freed = Results(load_study(results.out / "study.yaml"), results.out)
    assert first_line(results) == first_line(freed)
    assert results.comparisons(METRIC) == freed.comparisons(METRIC)
    assert [line for line in headline(results) if line != stated] == headline(freed)


def test_a_control_may_have_a_control_but_no_study_is_its_own(tmp_path: Path) -> None:
    own = {"study": str(tmp_path / "study"), "arm": "dpo", "metric": METRIC, "at_least": 0.6}
    recorded(tmp_path / "first", {"dpo": 0.8})
    recorded(tmp_path / "control", {"dpo": 0.7}, control={**own, "study": str(tmp_path / "first")})
    assert study_with(tmp_path / "other", tmp_path / "control").claims
    for name in ("study", "copy"):
        place = recorded(tmp_path / name, {"dpo": 0.7, "kto": 0.5}, control=own)
        with pytest.raises(StudyError, match="the arms of this study itself"):
            first_line(Results(load_study(place / "study.yaml"), place))


@pytest.mark.parametrize("file", ["study.yaml", "record.json", "values.csv.gz"])
def test_a_damaged_control_is_none(file: str, tmp_path: Path) -> None:
    control = recorded(tmp_path / "control", {"dpo": 0.9})
    (control / file).write_text("[")
    found = study_with(tmp_path / "study", control)
    assert not found.claims
    assert "claims nothing" in first_line(found)


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown key": ({"least": 1}, "least: 1", "'least'"),
    "no folder": ({"study": None}, "study:", "control.study"),
    "no arm": ({"arm": 3}, "arm: 3", "control.arm"),
    "an unknown metric": ({"metric": ["kl"]}, "metric:", "control.metric"),
    "a metric without a direction": ({"metric": "kl"}, "metric: kl", "more is better"),
    "a metric of which less is better": ({"metric": "brier"}, "metric: brier", "more is better"),
    "no number": ({"at_least": "much"}, "at_least", "'much'"),
    "a percentage": ({"at_least": 60}, "at_least", "60 % is 0.6"),
    "a number that is none": ({"at_least": float("nan")}, "at_least", "nan"),
    "an arm that it lacks": ({"arm": "kto"}, "arm: kto", "its arms are dpo"),
    "a metric that it lacks": ({"metric": "rule"}, "metric: rule", "it has reward_accuracy"),
}


def line_of(path: Path, text: str, after: str = "control:") -> int:
    lines = path.read_text().splitlines()
    start = lines.index(after)
    return next(i for i, line in enumerate(lines, start=1) if i > start + 1 and text in line)


@pytest.mark.parametrize("name", FAULTS)
def test_a_control_that_cannot_be_is_refused_by_its_line(name: str, tmp_path: Path) -> None:
    changed, text, message = FAULTS[name]
    recorded(tmp_path / "control", {"dpo": 0.7})
    path = tmp_path / "study/study.yaml"
    with pytest.raises(StudyError) as error:
        first_line(study_with(tmp_path / "study", tmp_path / "control", **changed))
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}:{line_of(path, text)}: ")
    assert "\n" not in str(error.value)


def test_a_control_on_other_data_is_refused(tmp_path: Path) -> None:
    """Files are compared by content, wherever they lie; data from the hub by name."""
    recorded(tmp_path / "control", {"dpo": 0.7})
    same = {"held_out": {"elsewhere/pairs.jsonl": "abc"}, "prompts": {"p.txt": "of no concern"}}
    assert study_with(tmp_path / "same", tmp_path / "control", same).claims
    for number, files in enumerate(({"pairs.jsonl": "abd"}, {}, {"pairs.jsonl": "abc", "more.jsonl": "abd"})):
        other = study_with(tmp_path / f"other{number}", tmp_path / "control", {"held_out": files})
        with pytest.raises(StudyError, match="other data") as error:
            first_line(other)
        path = other.out / "study.yaml"
        assert str(error.value).startswith(f"{path}:{line_of(path, 'study:')}: control.study: ")
        assert "\n" not in str(error.value)
    # The digests are those of the evaluation.
    file = tmp_path / "pairs.jsonl"
    file.write_text("{}\n")
    rule = tmp_path / "rule.py"
    rule.write_text("")
    arguments = {"held_out": [str(file), "of/the-hub"], "prompts": None, "rule": f"{rule}:f"}
    how = measuring(arguments)
    found = measured_on(how)
    assert found["held_out"] == {str(file): how["files"][str(file)], "of/the-hub": "of/the-hub"}
    # Other rows are other data, wherever the file is; another rule is another metric.
    for settings in ({"rows": 1}, {"rows": 1, "skip": 1}, {"columns": {"prompt": "question"}}):
        other = measured_on(measuring({**arguments, "held_out": [{"path": str(file), **settings}, "of/the-hub"]}))
        assert {*other["held_out"].values()} != {*found["held_out"].values()}
    weighted = measured_on(measuring({**arguments, "held_out": [{"path": str(file), "weight": 2.0}, "of/the-hub"]}))
    assert weighted == found
    splits = [{"path": "of/the-hub", "split": split} for split in ("train", "test")]
    one, two = (measured_on(measuring({**arguments, "held_out": [split]}))["held_out"] for split in splits)
    assert {*one.values()} != {*two.values()}
    assert measured_on(measuring({**arguments, "rule": f"{rule}:g"}))["rule"].values() != found["rule"].values()
    (tmp_path / "copy.py").write_text("")
    assert [*measured_on(measuring({**arguments, "rule": f"{tmp_path / 'copy.py'}:f"}))["rule"].values()] == [
        *found["rule"].values()
    ]


@pytest.mark.parametrize("form", ["{}", "{}/part-*.jsonl"])
def test_several_files_are_the_same_data_wherever_they_lie(form: str, tmp_path: Path) -> None:
    def measured(folder: str, **files: str) -> set[str]:
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / f"part-{name}.jsonl").write_text(text)
        data = {"path": form.format(tmp_path / folder), "columns": {"prompt": "question"}}
        return {*measured_on(measuring({"held_out": [data]}))["held_out"].values()}

    one = measured("one", a="1\n", b="2\n")
    assert measured("two", a="1\n", b="2\n") == one
    for number, files in enumerate(({"a": "2\n", "b": "1\n"}, {"a": "1\n", "c": "2\n"}, {"a": "1\n"})):
        assert measured(f"other{number}", **files) != one


def test_a_second_file_may_do_without_the_control(tmp_path: Path) -> None:
    study = study_with(tmp_path / "study", tmp_path / "absent").study
    assert study.control is not None
    (tmp_path / "over.yaml").write_text("control: null\n")
    assert load_study(study.path, tmp_path / "over.yaml").control is None


@pytest.mark.filterwarnings("ignore")
def test_a_control_is_looked_at_before_the_first_run(tiny_folder: Path, tmp_path: Path) -> None:
    held_out, control = pair_data(tmp_path / "held_out.jsonl", 4), tmp_path / "control"
    content: dict[str, Any] = {
        "configs": [f"{ROOT}/experiments/base.yaml"],
        "options": {"model.policy.path": str(tiny_folder), "data.train": str(held_out), "trainer.max_steps": 1},
        "arms": {"kto": {"objective": f"{ROOT}/experiments/objectives/kto.yaml"}},
        "evaluate": {"held_out": [str(held_out)]},
        "metrics": [METRIC],
        "control": {"study": str(control), "arm": "dpo", "metric": METRIC, "at_least": 0.6},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    study = load_study(path)
    assert "no values.csv.gz" in (check(study, Parsers()).uncontrolled or "")
    measured = {"held_out": {"elsewhere.jsonl": digest_of(str(held_out))}}
    for share in (0.7, 0.55):
        control = recorded(tmp_path / f"control {share}", {"dpo": share}, measured=measured)
        (tmp_path / "over.yaml").write_text(yaml.safe_dump({"control": {**content["control"], "study": str(control)}}))
        lacking = check(load_study(path, tmp_path / "over.yaml"), Parsers()).uncontrolled
        assert (lacking is None) == (share > 0.6)
    recorded(tmp_path / "control", {"dpo": 0.7})
    with pytest.raises(StudyError, match="other data") as error:
        check(study, Parsers())
    assert str(error.value).startswith(f"{path}:{line_of(path, 'study:')}: control.study: ")
