"""Reports of studies: computed from recorded values alone, with baselines, units, and figures of what is tested."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from run_halos import ROOT

from halos_pl.cli.main import main
from halos_pl.study import drawing, figures, report
from halos_pl.study.comparison import ratio
from halos_pl.study.digits import decimals, number, of_comparison
from halos_pl.study.first_line import first_line
from halos_pl.study.gather import _training
from halos_pl.study.headline import headline
from halos_pl.study.planned_power import power_lines
from halos_pl.study.read import load_study
from halos_pl.study.recorded import VALUES, Recorded, read_recorded, write_recorded
from halos_pl.study.report import write_report
from halos_pl.study.results import Results
from halos_pl.study.spec import BEFORE, SHORTER, Study, StudyError
from halos_pl.study.trivial import by_length
from value_functions import Logistic

LONG = "an arm with a name that is much longer than a figure is wide, of sixty words or so, for whatever reason"


def study_of(folder: Path, arms: list[str], metrics: list[str], seeds: int = 3, **more: Any) -> Study:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "arms": None if "axes" in more else {arm: {} for arm in arms},
        "seeds": list(range(seeds)),
        "evaluate": {"held_out": ["x.jsonl"], "prompts": "y.txt", "rule": "z.py:rule"},
        "metrics": metrics,
        **more,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump({k: v for k, v in content.items() if v}, sort_keys=False))
    return load_study(folder / "study.yaml")


def results_of(
    folder: Path,
    shift: dict[str, float],
    before: float | None = 0.0,
    metrics: tuple[str, ...] = ("reward_margin",),
    examples: int = 24,
    **more: Any,
) -> Results:
    """A study of arms whose values differ by a shift, with curves, outcomes and a value function."""
    study = study_of(folder, list(shift), list(metrics), **more)
    assert [arm.name for arm in study.arms] == list(shift)
    draw = np.random.default_rng(0)
    names = [f"x.jsonl:{i}" for i in range(examples)]
    values: dict[Any, Any] = {}
    for arm, size in shift.items():
        for seed in study.seeds:
            own = {m: {n: float(size + 0.1 * draw.normal()) for n in names} for m in metrics}
            for curve in figures.CURVES:
                own[curve] = {str(step): float(size * step + draw.normal()) for step in (1, 2, 10)}
            own["outcome/desirable"] = {str(i): float(draw.normal()) for i in range(8)}
            own["outcome/undesirable"] = {str(i): float(draw.normal()) for i in range(8)}
            own["value_function"] = {repr(u): math.tanh(u) for u in np.linspace(-2, 2, 9).tolist()} if not seed else {}
            values[arm, seed] = own
    if before is not None:
        values[BEFORE, None] = {m: {n: before + 0.1 * float(draw.normal()) for n in names} for m in metrics}
    record = {"study": str(folder / "study.yaml"), "overrides": None, "out": str(folder), "missing": [], "made": []}
    write_recorded(Recorded(values, record), study, folder)
    return Results(study, folder)


# -- values.csv.gz ------------------------------------------------------------------------------------------

floats = st.floats(allow_nan=False, allow_infinity=False)


@given(values=st.dictionaries(st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs", "Cc"])), floats))
def test_values_are_read_back_exactly_and_make_the_same_bytes(values: dict[str, float], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("values")
    study = study_of(folder, ["one"], ["kl"], 1)
    own = {("one", 0): {"kl": values}, (BEFORE, None): {"kl": values}}
    written = []
    for _ in range(2):
        write_recorded(Recorded({key: dict(f) for key, f in own.items()}), study, folder)
        written.append((folder / VALUES).read_bytes())
    assert written[0] == written[1]
    assert written[0][4:8] == bytes(4)  # gzip's time of writing
    found = read_recorded(study, folder).values
    if values:
        assert {key: dict(f["kl"]) for key, f in found.items()} == {key: values for key in own}
        assert [list(f["kl"]) for f in found.values()] == [list(values)] * 2


def _change(folder: Path, change: Any) -> None:
    with gzip.open(folder / VALUES, "rt", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    change(rows)
    with gzip.open(folder / VALUES, "wt", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


BROKEN = {
    "an unknown arm": (lambda rows: rows[1].__setitem__(1, "other"), ":2"),
    "an unknown seed": (lambda rows: rows[1].__setitem__(2, "9"), ":2"),
    "a seed that is none": (lambda rows: rows[1].__setitem__(2, "x"), VALUES),
    "a value that is none": (lambda rows: rows[3].__setitem__(5, "many"), VALUES),
    "a value that is not finite": (lambda rows: rows[3].__setitem__(5, "nan"), ":4"),
    "a line twice": (lambda rows: rows.insert(2, rows[1]), ":3"),
    "a line missing": (lambda rows: rows.pop(1), "x.jsonl:0"),
    "a column missing": (lambda rows: rows[0].__setitem__(4, "row"), "example"),
    "another value": (lambda rows: rows[3].__setitem__(5, "77.0"), "record.json"),
    "a line cut": (lambda rows: rows.__setitem__(2, rows[2][:4]), VALUES),
}


@pytest.mark.parametrize("name", BROKEN)
def test_values_that_do_not_belong_to_the_study_are_refused(name: str, tmp_path: Path) -> None:
    results_of(tmp_path, {"a": 0.0, "b": 1.0})
    change, place = BROKEN[name]
    _change(tmp_path, change)
    with pytest.raises(StudyError) as error:
        Results(load_study(tmp_path / "study.yaml"), tmp_path)
    assert str(tmp_path / VALUES) in str(error.value)
    assert place in str(error.value)


def test_a_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    results_of(tmp_path, {"a": 0.0, "b": 1.0})
    whole = (tmp_path / VALUES).read_bytes()
    for content in (whole[: len(whole) // 2], b"run,arm\n", b""):
        (tmp_path / VALUES).write_bytes(content)
        with pytest.raises(StudyError, match=VALUES):
            Results(load_study(tmp_path / "study.yaml"), tmp_path)


@pytest.mark.parametrize("drawn", [["forest.png"], pytest.param([*figures.PICTURES], marks=pytest.mark.slow)])
def test_a_report_is_computed_from_values_and_the_study_alone(
    drawn: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved elsewhere, without any run, it is the same report, byte by byte, figures included."""
    monkeypatch.setattr(report, "PICTURES", {name: figures.PICTURES[name] for name in drawn})
    write_report(results_of(tmp_path / "one", {"a": 0.0, "b": 1.0, "c": -1.0}, examples=12))
    (tmp_path / "two").mkdir()
    for name in ("study.yaml", VALUES, "record.json"):
        shutil.copy(tmp_path / "one" / name, tmp_path / "two")
    main(["ablate", "report", str(tmp_path / "two")])
    written = {path.name for path in (tmp_path / "one").iterdir()}
    # The study has no metric of KL to plot against, and too few arms for a map.
    assert written >= {"report.md", "report.html", *drawn} - {"heat_map.png", "frontier.png"}
    for name in written:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    (tmp_path / "two" / "record.json").unlink()  # the words of it are then missing, no number is
    main(["ablate", "report", str(tmp_path / "two")])
    assert (tmp_path / "one" / "forest.png").read_bytes() == (tmp_path / "two" / "forest.png").read_bytes()
    pages = [(tmp_path / name / "report.md").read_text().partition("## Arms")[0] for name in ("one", "two")]
    tables = [[line for line in page.splitlines() if line.startswith("| ")] for page in pages]
    assert tables[0] == tables[1] != []


def test_recorded_runs_whose_folders_are_gone_are_kept_aside(tmp_path: Path, text_only: None, capsys: Any) -> None:
    """The folder of one run is all that is left: what was recorded of the others is not written over."""
    results = results_of(tmp_path, {"a": 0.0, "b": 1.0})
    before = {name: (tmp_path / name).read_bytes() for name in (VALUES, "record.json")}
    (tmp_path / "a" / "seed-0").mkdir(parents=True)
    for _ in range(2):
        write_report(Results(results.study, tmp_path))
    assert "6 runs" in capsys.readouterr().out
    assert before == {
        VALUES: (tmp_path / "values.1.csv.gz").read_bytes(),
        "record.json": (tmp_path / "record.1.json").read_bytes(),
    }
    assert not (tmp_path / "values.2.csv.gz").exists()


def test_a_record_that_is_none_is_refused(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"a": 0.0, "b": 1.0})
    (tmp_path / "record.json").write_text("[]")
    with pytest.raises(StudyError, match=r"record\.json is not the record"):
        Results(results.study, tmp_path)


def test_a_folder_without_runs_and_values_has_no_report(tmp_path: Path, capsys: Any) -> None:
    study_of(tmp_path, ["a", "b"], ["kl"])
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SystemExit):
            main(["ablate", "report", str(folder)])
        assert str(folder) in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


@pytest.mark.slow
def test_make_results_recomputes_what_has_values_and_names_what_has_none(tmp_path: Path) -> None:
    write_report(results_of(tmp_path / "kept", {"a": 0.0, "b": 1.0}))
    (tmp_path / "lost").mkdir()
    before = (tmp_path / "kept" / "report.md").read_bytes()
    (tmp_path / "kept" / "report.md").unlink()
    words = ["make", "-o", ".venv/installed", "results", f"RESULTS={tmp_path}", f"BIN={Path(sys.executable).parent}"]
    said = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert f"{tmp_path}/lost: skipped" in said
    assert (tmp_path / "kept" / "report.md").read_bytes() == before


# -- what a report says -------------------------------------------------------------------------------------


def test_margins_are_in_nats_whatever_beta_is(tmp_path: Path) -> None:
    """metrics.csv shows beta times the reward."""
    (tmp_path / "metrics.csv").write_text("step,rewards/margins,outcome/z0\n1,3.0,0.5\n2,,0.7\n3,5.0,\n")
    run: Any = SimpleNamespace(folder=tmp_path)
    for beta in (0.1, 2.0):
        module: Any = SimpleNamespace(
            objective=SimpleNamespace(halo=SimpleNamespace(value_function=Logistic(beta=beta)))
        )
        found = _training(run, module)
        assert found["training/margin"] == {"1": 3.0 / beta, "3": 5.0 / beta}
        assert found["training/z0"] == {"1": 0.5, "2": 0.7}
    assert _training(run, None)["training/margin"] == {"1": 3.0, "3": 5.0}


@pytest.mark.parametrize(
    ("trainer", "share"),
    [
        ({"gradient_clip_val": 2.0}, 0.25),
        ({"gradient_clip_val": 2.0, "gradient_clip_algorithm": "norm"}, 0.25),
        ({"gradient_clip_val": None}, 0.0),
        ({}, 0.0),
        ({"gradient_clip_val": 2.0, "gradient_clip_algorithm": "value"}, None),
    ],
)
def test_the_share_of_clipped_steps(trainer: dict[str, Any], share: float | None, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,grad_norm\n0,2.0\n1,2.5\n2,\n3,0.1\n4,1.0\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    run: Any = SimpleNamespace(folder=tmp_path)
    assert _training(run, None).get("trained", {}).get("clipped") == share


@pytest.fixture
def text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are written without figures, which take most of the time."""
    monkeypatch.setattr(report, "PICTURES", {})


def test_baselines_have_a_row_in_every_table(tmp_path: Path, text_only: None) -> None:
    metrics = ("reward_accuracy", "kl_held_out")
    results = results_of(tmp_path, {"a": 0.5, "b": 0.9}, before=0.5, metrics=metrics)
    values = {
        key: {m: dict(v) for m, v in f.items()} for key, f in read_recorded(results.study, tmp_path).values.items()
    }
    names = list(values["a", 0]["reward_accuracy"])
    values[SHORTER, None] = {"reward_accuracy": {name: float(i % 4 > 0) for i, name in enumerate(names)}}
    for strata, some in (("chosen_shorter", names[:16]), ("chosen_longer", names[16:])):
        for key in values:
            values[key][f"reward_accuracy/{strata}"] = dict.fromkeys(some, 1.0 if strata == "chosen_shorter" else 0.25)
    write_recorded(Recorded(values), results.study, tmp_path)
    write_report(Results(results.study, tmp_path))
    page = (tmp_path / "report.md").read_text()
    tables = page.split("\n## ")
    for table in (tables[0], *(t for t in tables if t.startswith(metrics))):
        rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
        assert rows[-2:] == [BEFORE, SHORTER], table
    assert float(row_of(tables[0], SHORTER)[1]) == 0.75
    assert row_of(tables[0], SHORTER)[2] == "–"  # it has no KL
    lengths = next(t for t in tables if t.startswith("reward_accuracy by length"))
    for name in ("a", "b", BEFORE, SHORTER):
        assert row_of(lengths, name)[1].startswith("1")
        assert row_of(lengths, name)[-1] == "0.62"  # the mean of 1 and 0.25, whatever the numbers of pairs


def row_of(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_accuracy_by_length_counts_words_of_pairs() -> None:
    records = [
        {"row": f"{i}{side}", "pair": f"{i}", "prompt": i, "desirable": side == "c", "tokens": 1, "words": words}
        | {"policy_logp": float(reward), "reference_logp": 0.0, "kl": 0.0}
        for i, (chosen, rejected) in enumerate([((3, 1), (5, 0)), ((3, 0), (9, 2)), ((4, 1), (4, 1)), ((7, 2), (2, 1))])
        for side, (words, reward) in (("c", chosen), ("r", rejected))
    ]
    assert {name: list(found.values()) for name, found in by_length(records).items()} == {
        "reward_accuracy/chosen_shorter": [1.0, 0.0],
        "reward_accuracy/same_length": [0.5],
        "reward_accuracy/chosen_longer": [1.0],
    }
    assert by_length([{k: v for k, v in r.items() if k != "words"} for r in records]) == {}


def test_the_first_line_says_who_won_and_whether_to_believe_it(tmp_path: Path, text_only: None) -> None:
    shift = {"base": 0.0, "worst": -3.0, "best": 3.0}
    results = results_of(tmp_path / "clear", shift, before=0.0)
    assert [arm.name for arm in results.ranked] == ["best", "base", "worst"]
    line = first_line(results)
    assert line.startswith("best won on reward_margin")
    assert "; believe it" in line
    assert "\n" not in line
    write_report(results)
    page = (tmp_path / "clear" / "report.md").read_text()
    first = next(text for text in page.splitlines() if text and not text.startswith("#"))
    assert first.startswith("**best won on reward")
    # The baseline itself wins: what is said is of the next arm, against it.
    line = first_line(results_of(tmp_path / "base", {"base": 3.0, "worst": -3.0, "next": 0.0}, before=0.0))
    assert line.startswith("base won")
    assert "next" in line
    assert "worst" not in line
    # Where less is better.
    lower = results_of(tmp_path / "less", {"base": 0.5, "better": 0.1}, before=0.6, metrics=("brier",))
    assert first_line(lower).startswith("better won on brier")
    # Nothing that differs.
    alike = results_of(tmp_path / "alike", {"base": 1.0, "other": 1.001}, before=0.0)
    assert "believe it" not in first_line(alike).replace("do not believe it", "")


def test_the_first_line_says_where_nothing_was_learned(tmp_path: Path) -> None:
    for name, shift, metric in (
        ("worse than before", {"base": 0.0, "other": -1.0}, "reward_margin"),
        ("as before", {"base": 2.0, "other": 2.0}, "reward_margin"),
        ("higher where less is better", {"base": 3.0, "other": 4.0}, "brier"),
    ):
        results = results_of(tmp_path / name, shift, before=2.0, metrics=(metric,))
        assert results.nothing_learned, name
        assert "untrained" in first_line(results), name
    unknown = results_of(tmp_path / "unknown", {"base": 0.0, "other": -1.0}, before=None)
    assert not unknown.nothing_learned
    assert "untrained" not in first_line(unknown)


def _recorded(folder: Path, arms: list[str], found: dict[tuple[str, int], list[float]], **more: Any) -> Results:
    """A study with those values of its metric, by arm and seed."""
    study = study_of(folder, arms, **{"metrics": ["rule"]} | more)
    metric = study.primary
    values = {key: {metric: {str(i): v for i, v in enumerate(own)}} for key, own in found.items()}
    write_recorded(Recorded(values, {}), study, folder)
    return Results(study, folder)


def test_the_first_line_names_ties_and_what_is_missing(tmp_path: Path) -> None:
    good, bad = [1.0, 1.0, 0.0, 1.0] * 5, [0.0, 1.0, 0.0, 0.0] * 5
    runs = {(arm, seed): good if arm != "a" else bad for arm in "abc" for seed in range(3)}
    tie = first_line(_recorded(tmp_path / "tie", ["a", "b", "c"], runs))
    assert tie.startswith("b and c ")
    assert " won " not in tie
    assert "000000" not in tie  # digits of a difference that no run varies
    part = {key: own for key, own in runs.items() if key[0] != "c"}
    line = first_line(_recorded(tmp_path / "part", ["a", "b", "c"], part))
    assert line.startswith("So far (6 of 9 runs, 2 of 3 arms): b won")
    # Two arms without a seed in common cannot be compared, but both are there.
    apart = {("a", 0): bad, ("a", 1): bad, ("b", 2): good}
    line = first_line(_recorded(tmp_path / "apart", ["a", "b"], apart))
    assert "no other arm shares a seed" in line
    assert "there is no other arm" not in line


def test_the_first_line_does_not_call_runs_equal_that_were_not_tested_for_it(tmp_path: Path) -> None:
    alike = {(arm, seed): [1.0, 0.0, 1.0] for arm in "ab" for seed in range(2)}
    line = first_line(_recorded(tmp_path, ["a", "b"], alike, seeds=2))
    assert "equivalent" in line
    assert "treat them as equal" not in line


@pytest.mark.parametrize("base", ["a", "b"])
def test_the_first_line_is_not_at_odds_with_the_paired_difference(base: str, tmp_path: Path) -> None:
    """One arm has the higher mean by a seed that the other lacks, and is worse in all that both have."""
    draw = np.random.default_rng(0)
    prompts = draw.normal(size=60)
    found = {
        (arm, seed): (prompts + mean + 0.01 * draw.normal(size=60)).tolist()
        for arm, means in {"a": [1.0, 1.0, 1.0], "b": [0.8, 0.8, 0.8, 3.0]}.items()
        for seed, mean in enumerate(means)
    }
    results = _recorded(tmp_path, ["a", "b"], found, metrics=["reward_margin"], seeds=4, baseline=base)
    [c] = results.comparisons("reward_margin").values()
    assert (c.effect < 0) == (c.arm == "b")
    line = first_line(results)
    assert line.startswith("So far (7 of 8 runs, 2 of 2 arms): b won")
    assert "; but over 3 seeds that both have, " in line
    assert "believe it:" not in line


def test_nothing_is_said_to_be_unlearned_by_an_arm_that_cannot_be_tested_yet(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    found: dict[Any, list[float]] = {("a", s): draw.normal(size=30).tolist() for s in range(3)}
    found |= {("b", 0): (5 + draw.normal(size=30)).tolist(), (BEFORE, None): draw.normal(size=30).tolist()}
    line = first_line(_recorded(tmp_path, ["a", "b"], found, metrics=["reward_margin"]))
    assert line.startswith("So far (4 of 6 runs, 2 of 2 arms): b won")
    assert "too early to say" in line


def test_a_primary_metric_chosen_after_the_runs_is_said(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"a": 0.0, "b": 1.0}, metrics=("reward_margin", "kl"))
    assert not any("kl" in line for line in headline(results))
    write_recorded(Recorded(read_recorded(results.study, tmp_path).values, {"primary": "kl"}), results.study, tmp_path)
    assert any("kl to reward_margin" in line for line in headline(Results(results.study, tmp_path)))


def test_lengths_that_differ_between_runs_leave_the_examples_that_all_have(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"a": 0.5, "b": 0.9}, metrics=("reward_accuracy",))
    values = {key: dict(found) for key, found in read_recorded(results.study, tmp_path).values.items()}
    for (arm, seed), found in values.items():
        found["reward_accuracy/chosen_shorter"] = {"x": 1.0} if (arm, seed) == ("a", 1) else {"x": 0.0, "y": 0.0}
    write_recorded(Recorded(values), results.study, tmp_path)
    stratum = Results(results.study, tmp_path).stratum("a", "reward_accuracy/chosen_shorter")
    assert stratum is not None
    assert stratum.tolist() == [[0.0], [1.0], [0.0]]


def test_a_primary_metric_that_no_run_has_is_named(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"a": 0.0, "b": 1.0}, metrics=("reward_margin",))
    again = study_of(tmp_path, ["a", "b"], ["reward_margin", "kl"], primary="kl")
    line = first_line(Results(again, results.out))
    assert line.startswith("Nothing to compare")
    assert "6 finished runs" in line
    assert "kl" in line


def test_ratios_beyond_all_measure_are_not_written_out(tmp_path: Path) -> None:
    """Runs whose KL differs by powers of ten leave an interval that no number is needed for."""
    wild = {("a", 0): 1e-9, ("a", 1): 50.0, ("b", 0): 0.5, ("b", 1): 1e-7}
    draw = np.random.default_rng(0)
    found = {key: (size * (0.5 + draw.random(20))).tolist() for key, size in wild.items()}
    results = _recorded(tmp_path / "wild", ["a", "b"], found, metrics=["kl"], seeds=2)
    line = first_line(results)
    assert "[< 0.001, > 1000]" in line
    assert "e+" not in line
    assert results.comparisons("kl")["b"].detectable is None


def test_a_detectable_ratio_near_one_is_not_said_to_be_one() -> None:
    for size, wanted in ((1.0042, "1.004"), (1.031, "1.03"), (1.57, "1.6"), (3.61, "3.6"), (140.0, "1.4e+02")):
        assert ratio(size) == wanted


def test_labels_of_a_ratio_do_not_overlap(tmp_path: Path) -> None:
    """Those of intervals that span far less than a decade, too."""
    for size, far in ((0.01, 0.0), (0.1, 0.4), (0.1, 30.0)):
        folder = tmp_path / f"{size} {far}"
        draw = np.random.default_rng(0)
        found = {
            (arm, seed): (5 + far * (arm == "b") + size * draw.normal(size=20)).tolist()
            for arm in "ab"
            for seed in (0, 1)
        }
        figure = figures.forest(_recorded(folder, ["a", "b"], found, metrics=["length"], seeds=2))
        assert figure is not None
        FigureCanvasAgg(figure).draw()
        axis = figure.axes[0]
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = sorted((tick.label1.get_window_extent().extents for tick in ticks), key=lambda box: box[0])
        assert len(boxes) > 1
        assert all(left[2] < right[0] for left, right in itertools.pairwise(boxes))
        assert not [text for text in axis.get_xticklabels(minor=True) if text.get_text()]


@pytest.mark.parametrize("name", [BEFORE, SHORTER, f"{BEFORE} (a model)"])
def test_no_arm_has_the_name_of_a_baseline(name: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"study.yaml:3: arm "):
        study_of(tmp_path, ["a", name], ["kl"])


def test_one_arm_alone_is_compared_with_the_model_before_training(tmp_path: Path, text_only: None) -> None:
    results = results_of(tmp_path / "learned", {"kto": 3.0}, metrics=("reward_margin", "brier"))
    c = results.learned("reward_margin")["kto"]
    assert c.significant
    assert results.learned("brier")["kto"].exploratory
    line = first_line(results)
    assert line.startswith("kto")
    assert f"{of_comparison(c)} against the untrained model; believe it" in line
    write_report(results)
    table = (tmp_path / "learned" / "report.md").read_text().partition("## reward_margin")[2]
    assert row_of(table, "kto")[-3:] == ["< 0.001".replace("<", "&lt;"), "significant over seeds", of_comparison(c)]
    assert results_of(tmp_path / "not", {"kto": 0.0}).nothing_learned
    alone = first_line(results_of(tmp_path / "alone", {"kto": 0.0}, before=None))
    assert "nothing to compare it with" in alone


def test_a_margin_that_cannot_be_used_is_said(tmp_path: Path, text_only: None) -> None:
    """Equivalence is of ratios where the metric is positive, and a KL of 0 has none."""
    draw = np.random.default_rng(0)
    found = {(arm, seed): draw.random(20).tolist() for arm in "ab" for seed in range(3)}
    sound = _recorded(tmp_path / "sound", ["a", "b"], found, metrics=["kl"], equivalence=1.1)
    assert not any("quivalence" in line for line in headline(sound))
    assert "(Bonferroni" in report.content(sound)["methods"]
    zero = _recorded(tmp_path / "zero", ["a", "b"], found | {("b", 1): [0.0] * 20}, metrics=["kl"], equivalence=1.1)
    assert zero.comparisons("kl")["b"].scale == "difference"
    assert "(Holm" in report.content(zero)["methods"]
    write_report(zero)
    page = (tmp_path / "zero" / "report.md").read_text()
    [line] = [line for line in page.splitlines() if line.startswith("- Equivalence was not tested")]
    assert "1.1" in line


def test_one_is_singular(tmp_path: Path, text_only: None) -> None:
    results = _recorded(tmp_path, ["a", "b"], {("a", 0): [1.0], ("b", 0): [0.0]}, seeds=1)
    said = [first_line(results), *headline(results), *power_lines(results.study, 1)]
    assert "1 seed and 1 prompt." in said[1]
    assert not [line for line in said if re.search(r"\b1 (seeds|prompts|runs|arms)", line)]


def test_differences_of_shares_stay_between_minus_one_and_one(tmp_path: Path) -> None:
    bad, good = [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]
    found = {("a", 0): bad, ("a", 1): good, ("b", 0): good, ("b", 1): bad}
    c = _recorded(tmp_path, ["a", "b"], found, seeds=2).comparisons("rule")["b"]
    assert (c.low, c.high) == (-1, 1)


def test_a_small_kl_beside_large_ones_is_neither_0_nor_may_be_negative(tmp_path: Path, text_only: None) -> None:
    sizes = {"a": 0.4, "b": 30.0, "c": 40.0}
    draw = np.random.default_rng(0)
    found = {(arm, s): (size * (0.5 + draw.random(20))).tolist() for arm, size in sizes.items() for s in range(3)}
    results = _recorded(tmp_path, list(sizes), found, metrics=["reward_margin", "kl"], seeds=3)
    values = {
        key: dict.fromkeys(results.study.metrics, each["reward_margin"])
        for key, each in read_recorded(results.study, tmp_path).values.items()
    }
    values[BEFORE, None] = {"kl": dict.fromkeys(values["a", 0]["kl"], 0.0)}
    write_recorded(Recorded(values), results.study, tmp_path)
    results = Results(results.study, tmp_path)
    write_report(results)
    table = (tmp_path / "report.md").read_text().split("\n## ")[0]
    assert 0.3 < float(row_of(table, "a")[2]) < 0.5
    assert float(row_of(table, BEFORE)[2]) == 0
    for arm, c in results.learned("kl").items():
        e = results.estimates["kl", arm]
        assert (c.effect, c.low, c.high) == (e.value, e.low, e.high)
        assert c.low > 0


@given(value=st.floats(-1e6, 1e6), half=st.floats(1e-6, 1e6))
def test_numbers_have_as_many_digits_as_their_interval_leaves(value: float, half: float) -> None:
    places = decimals(value, value - half, value + half)
    shown = float(number(value, places))
    assert abs(shown - value) <= half  # never less than the interval says
    assert places == 0 or 10**-places * 100.1 > half / 1.0001  # and two digits of it at most


def test_numbers_have_no_false_signs_or_digits() -> None:
    assert number(-0.0001, 2, "+") == "+0.00"
    assert number(0.5833333, decimals(0.583, 0.3, 0.85)) == "0.58"
    assert number(0.0005, decimals(0.0005, 0.0004, 0.0006)) == "0.00050"


# -- figures ------------------------------------------------------------------------------------------------


def test_no_two_arms_look_alike() -> None:
    looks = [drawing.look(i) for i in range(252)]
    assert len({tuple(look.values()) for look in looks}) == 252
    assert len({look["color"] for look in looks[:7]}) == 7


# Linear RGB of what a viewer without L or M cones sees (Viénot et al. 1999).
BLIND = {
    "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
}


@pytest.mark.parametrize("kind", [None, *BLIND])
def test_colours_differ_with_any_vision(kind: str | None) -> None:
    def lab(colour: str) -> Any:
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        linear = np.clip(np.array(BLIND[kind]) @ linear, 0, 1) if kind else linear
        xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
        f = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 0.008856))
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    for one, other in itertools.combinations((*drawing.COLOURS, "#FFFFFF"), 2):
        assert np.linalg.norm(lab(one) - lab(other)) > 12, (one, other)


def test_saved_figures_keep_the_colours_of_arms(tmp_path: Path) -> None:
    results = results_of(tmp_path, {f"arm {i}": float(i) for i in range(7)})
    drawn = figures.curves(results)
    assert drawn is not None
    pixels = np.asarray(Image.open(io.BytesIO(drawing.png(drawn))).convert("RGB")).reshape(-1, 3)
    seen = {f"#{r:02X}{g:02X}{b:02X}" for r, g, b in np.unique(pixels, axis=0)}
    assert {look["color"] for look in drawing.looks(results).values()} <= seen


@pytest.mark.parametrize("width", [pytest.param(drawing.WIDTH, marks=pytest.mark.slow), drawing.NARROW])
def test_nothing_is_cut_off_and_every_axis_is_labelled(width: float, tmp_path: Path) -> None:
    both = ("reward_margin", "kl")
    long = results_of(tmp_path / "arms", {f"{LONG} {i}": float(i) for i in range(9)}, metrics=both, examples=4)
    axes = {"model.value_function.init_args.beta": [0.1, 0.2], "data.batch_size": [2, 4, 8]}
    names = {f"beta={b} batch_size={n}": b * n for b in (0.1, 0.2) for n in (2, 4, 8)}
    grid = results_of(tmp_path / "grid", names, axes=axes, examples=4)
    of = {"heat_map.png": grid, "value_functions.png": grid}
    drawn = {name: draw(of.get(name, long), width) for name, (_, _, draw) in figures.PICTURES.items()}
    for name, figure in drawn.items():
        assert figure is not None
        figure.draw_without_rendering()
        whole = figure.bbox
        assert figure.get_figwidth() <= width
        for part in (figure, *figure.subfigs):
            for legend in part.legends:
                box = legend.get_window_extent()
                assert box.x0 >= whole.x0, name
                assert box.x1 <= whole.x1, name
                assert box.y0 >= whole.y0, name
                assert len(legend.get_texts()) == 9
        for axis in figure.get_axes():
            if not axis.axison:
                continue
            box = axis.get_tightbbox()
            assert box is not None
            assert whole.x0 - 1 <= box.x0 < box.x1 <= whole.x1 + 1, (name, axis.get_title())
            assert whole.y0 - 1 <= box.y0 < box.y1 <= whole.y1 + 1, (name, axis.get_title())
            shared = [other for other in axis.get_shared_y_axes().get_siblings(axis) if other.get_ylabel()]
            assert axis.get_ylabel() or shared, (name, axis.get_title())
            for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
                boxes = [tick.get_window_extent() for tick in ticks if tick.get_text() and tick.get_visible()]
                boxes = [each for each in boxes if whole.overlaps(each)]
                for one, two in itertools.combinations(boxes, 2):
                    assert not one.overlaps(two), (name, axis.get_title())


def test_the_forest_shows_the_differences_that_are_tested(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"base": 0.0, "one": 1.0, "two": 2.0}, before=-1.0)
    figure = figures.forest(results)
    assert figure is not None
    panels = [axis for part in figure.subfigs for axis in part.get_axes()]
    for axis, found in zip(
        panels, (results.comparisons("reward_margin"), results.learned("reward_margin")), strict=True
    ):
        drawn = {tuple(line.get_xdata()) for line in axis.get_lines()}
        for c in found.values():
            assert (c.low, c.high) in drawn
        assert next(iter(found.values())).reference in axis.get_xlabel().replace("\n", " ")
        assert "nats" in axis.get_xlabel()
    assert set(results.comparisons("reward_margin")) == {"one", "two"}
    assert set(results.learned("reward_margin")) == {"base", "one", "two"}


def test_the_frontier_shows_the_primary_metric_over_kl(tmp_path: Path) -> None:
    """On answers rather than on held-out text; of a study that decides by KL, or has none, there is no frontier."""
    shift = {"base": 1.0, "one": 2.0, "two": 3.0}
    metrics = ("reward_margin", "kl_held_out", "kl")
    results = results_of(tmp_path / "both", shift, before=0.5, metrics=metrics)
    figure = figures.frontier(results)
    assert figure is not None
    [axis] = figure.get_axes()
    assert (axis.get_xlabel(), axis.get_xscale()) == ("kl, nats", "log")
    assert axis.get_ylabel().startswith("reward_margin")
    points, spans = [], []
    for container in axis.containers:
        point, _, (across, up) = container
        points.append((float(point.get_xdata()[0]), float(point.get_ydata()[0])))
        spans.append((*across.get_segments()[0][:, 0].tolist(), *up.get_segments()[0][:, 1].tolist()))
    wanted = [[results.estimates[metric, arm.name] for metric in ("kl", "reward_margin")] for arm in results.ranked]
    assert np.array(points) == pytest.approx(np.array([(x.value, y.value) for x, y in wanted]))
    assert np.array(spans) == pytest.approx(np.array([(x.low, x.high, y.low, y.high) for x, y in wanted]))
    before = results.of_baseline("reward_margin", BEFORE)
    assert before is not None
    assert any(np.allclose(line.get_ydata(), before.mean()) for line in axis.get_lines())
    for other in (("kl", "reward_margin"), ("reward_margin", "brier")):
        assert figures.frontier(results_of(tmp_path / "-".join(other), shift, metrics=other)) is None
    # What is not above 0 has no logarithm.
    below = figures.frontier(results_of(tmp_path / "below", {"base": -1.0, "one": 1.0}, metrics=metrics))
    assert below is not None
    assert below.get_axes()[0].get_xscale() == "linear"


def test_a_report_states_what_each_arm_was_trained_on_and_whether_arms_differ(tmp_path: Path, text_only: None) -> None:
    """Seeds shuffle the rows, so tokens differ between seeds; arms differ where those of a seed do."""

    def page(
        name: str,
        amounts: dict[tuple[str, int], dict[str, float]],
        balances: dict[tuple[str, int], dict[str, float]] | None = None,
    ) -> tuple[str, list[str]]:
        results = results_of(tmp_path / name, {"a": 0.0, "b": 1.0}, seeds=2)
        recorded = read_recorded(results.study, tmp_path / name)
        values = {key: {**f, "training/rho": (balances or {}).get(key, {})} for key, f in recorded.values.items()}
        values = {key: {**f, "trained": amounts[key]} if key in amounts else f for key, f in values.items()}
        write_recorded(Recorded(values, recorded.record), results.study, tmp_path / name)
        results = Results(results.study, tmp_path / name)
        write_report(results)
        text = (tmp_path / name / "report.md").read_text()
        return text.partition("## Trained on")[2].partition("\n## ")[0], headline(results)

    same = {(arm, seed): {"rows": 128.0, "tokens": 9000.0 + seed, "steps": 16.0} for arm in "ab" for seed in (0, 1)}
    table, lines = page("same", same)
    assert row_of(table, "a")[1:] == row_of(table, "b")[1:] == ["128", "9,000 to 9,001", "16", "–", "–"]
    assert not [line for line in lines if "differ in" in line]
    fewer = same | {("b", seed): {"rows": 64.0, "tokens": 9000.0 + seed, "steps": 16.0} for seed in (0, 1)}
    _, lines = page("fewer", fewer)
    [line] = [line for line in lines if "differ in" in line]
    assert "rows (b: 64; a: 128)" in line
    assert "tokens" not in line
    assert "steps" not in line
    # Runs of an older version have not recorded it.
    table, lines = page("older", {key: each for key, each in same.items() if key[0] == "a"})
    assert row_of(table, "b")[1:] == ["–"] * 5
    assert not [line for line in lines if "differ in" in line]
    assert page("none", {})[0] == ""
    shares = {("a", 0): 0.25, ("a", 1): 0.0, ("b", 0): 1.0, ("b", 1): 0.5}
    table, lines = page("clipped", {key: each | {"clipped": shares[key]} for key, each in same.items()})
    assert [row_of(table, arm)[-2] for arm in "ab"] == ["12%", "75%"]
    assert "a: 12% of the steps; b: 75%" in table
    assert "a: 12% of the steps; b: 75%" in "".join(lines)
    table, lines = page("alike", {key: each | {"clipped": 1.0} for key, each in same.items()})
    assert [row_of(table, arm)[-2] for arm in "ab"] == ["100%", "100%"]
    assert "gradient_clip_val" not in table + "".join(lines)
    # rho: the geometric mean over the steps after the first, and over seeds.
    steady = {("a", 0): {"0": 9.0, "1": 1.0, "2": 1.0}, ("a", 1): {"3": 1.0}}
    for of_b, mean, said in (({"1": 0.5, "2": 2.0}, "1.00", False), ({"0": 1.0, "1": 1.0, "2": 4.0}, "2.00", True)):
        table, lines = page(mean, same, steady | {("b", seed): of_b for seed in (0, 1)})
        assert [row_of(table, arm)[-1] for arm in "ab"] == ["1.00", mean]
        assert ("a: 1.00; b: 2.00" in table) == ("a: 1.00; b: 2.00" in "".join(lines)) == said


def test_ratios_are_drawn_along_a_logarithm(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"base": 1.0, "one": 2.0}, before=None)
    told = replace(results.comparisons("reward_margin")["one"], scale="ratio", effect=2.0, low=1.5, high=2.7)
    results.comparisons = lambda metric: {"one": told}  # type: ignore[method-assign]
    figure = figures.forest(results)
    assert figure is not None
    [axis] = [axis for part in figure.subfigs for axis in part.get_axes()]
    assert axis.get_xscale() == "log"
    assert "ratio" in axis.get_xlabel()
    assert of_comparison(told).startswith("x 2")
