"""A study resumes from the values that another machine recorded as if it had trained their runs itself."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_halos import ROOT, pair_data, write_jsonl
from tuned_studies import LR, OBJECTIVE, Fakes, faked, maker, pairs

from halos_pl.cli.ablate import Parsers
from halos_pl.cli.main import main
from halos_pl.data.source import Source
from halos_pl.study import gather, processes, report
from halos_pl.study.preflight import check
from halos_pl.study.read import load_study
from halos_pl.study.record_shape import misshapen
from halos_pl.study.recorded import RECORD, VALUES

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return faked(monkeypatch)


@pytest.fixture
def machine(tiny_folder: Path, tmp_path: Path) -> Callable[..., Callable[..., Path]]:
    """Machines by name: each writes studies whose files are in a folder of its own."""

    def one(name: str) -> Callable[..., Path]:
        (tmp_path / name).mkdir(exist_ok=True)
        return maker(tiny_folder, tmp_path / name)

    return one


def commit(out: Path, to: Path) -> Path:
    """Copies what is committed of a study."""
    to.mkdir(parents=True)
    for name in (VALUES, RECORD):
        shutil.copy(out / name, to)
    return to


def trained(fakes: Fakes) -> list[str]:
    return [each.removeprefix("fit ") for each in fakes.called if each.startswith("fit")]


def lines(out: Path) -> list[dict[str, str]]:
    with gzip.open(out / VALUES, "rt", newline="") as file:
        return list(csv.DictReader(file))


def stopped(fakes: Fakes, study: Path, out: Path, after: int) -> None:
    """Runs a study until so many commands have ended, and writes its report."""
    fakes.called, fakes.stops_after = [], after
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["ablate", str(study), f"--out={out}"])
    main(["ablate", "report", str(out)])
    fakes.called, fakes.stops_after = [], None


@pytest.mark.parametrize("stop", [4, 11, 15])
def test_a_study_that_moves_between_machines_has_the_values_of_one_that_did_not(
    stop: int, machine: Any, tmp_path: Path, fakes: Fakes, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data have other paths, and one arm's tuning run has diverged."""
    monkeypatch.setenv("COLUMNS", "200")
    fakes.fails = {("kto", 1e-4): "NonFiniteLossError: nan"}
    first, second = machine("first"), machine("second")
    whole, out, there = tmp_path / "whole", tmp_path / "out", tmp_path / "there"
    main(["ablate", str(first()), f"--out={whole}"])
    every = set(trained(fakes))
    stopped(fakes, first(), out, stop)
    committed = commit(out, tmp_path / "committed")
    had = {line["run"] for line in lines(committed) if line["seed"]}
    assert had
    fakes.machine = "two"
    main(["ablate", str(second()), f"--out={there}", f"--resume_from={committed}", "--jobs=2"])
    assert set(trained(fakes)) == every - had
    assert (there / VALUES).read_bytes() == (whole / VALUES).read_bytes()
    made = {by["machine"]: by["names"] for by in json.loads((there / RECORD).read_text())["made"] if "machine" in by}
    assert set(made["one"]) <= had
    assert set(made["two"]) == every - had
    assert made["two"][0] in (there / "report.md").read_text()
    # From now on without the option.
    fakes.called = []
    capsys.readouterr()
    main(["ablate", "status", str(there)])
    said = capsys.readouterr().out
    assert "9 of 9 runs done" in said
    assert said.count("│ recorded") == len(had)
    before = {name: (there / name).read_bytes() for name in (VALUES, RECORD, "report.md")}
    main(["ablate", str(second()), f"--out={there}"])
    main(["ablate", "report", str(there)])
    assert {name: (there / name).read_bytes() for name in before} == before
    # And from there to a third machine, where nothing is left to do.
    again = commit(there, tmp_path / "again")
    main(["ablate", str(machine("third")()), f"--out={tmp_path / 'third' / 'out'}", f"--resume_from={again}"])
    assert not fakes.called
    for name, of in ((VALUES, "values"), (RECORD, "made"), (RECORD, "data")):
        one, two = (folder / name for folder in (there, tmp_path / "third" / "out"))
        assert one.read_bytes() == two.read_bytes() if of == "values" else same(one, two, of)


def same(one: Path, two: Path, key: str) -> bool:
    return bool(json.loads(one.read_text())[key] == json.loads(two.read_text())[key])


@pytest.fixture
def recorded(machine: Any, tmp_path: Path, fakes: Fakes) -> Path:
    """The committed values of a whole study."""
    main(["ablate", str(machine("first")()), f"--out={tmp_path / 'first' / 'out'}"])
    fakes.called = []
    return commit(tmp_path / "first" / "out", tmp_path / "committed")


def test_records_name_files_by_the_variable_of_the_study(
    machine: Any, tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"evaluate": {"held_out": ["${FEEDBACK}/held_out.jsonl"], "max_length": 64}}
    tune = {"held_out": ["$FEEDBACK/validation.jsonl"]}
    studies = {name: machine(name)(**data, tune=tune) for name in ("first", "second")}
    out = {name: tmp_path / name / "out" for name in studies}
    monkeypatch.setenv("FEEDBACK", str(tmp_path / "first"))
    stopped(fakes, studies["first"], out["first"], 15)
    committed = commit(out["first"], tmp_path / "committed")
    record = (committed / RECORD).read_text()
    assert str(tmp_path) not in json.dumps([json.loads(record)[key] for key in ("by_content", "measured")])
    rows = {line["example"] for line in lines(committed) if line["metric"] == "reward_accuracy"}
    assert rows == {f"$FEEDBACK/held_out.jsonl:{i}" for i in range(6)}
    monkeypatch.setenv("FEEDBACK", str(tmp_path / "second"))
    main(["ablate", str(studies["second"]), f"--out={out['second']}", f"--resume_from={committed}"])
    assert {line["example"] for line in lines(out["second"]) if line["metric"] == "reward_accuracy"} == rows
    assert not json.loads((out["second"] / RECORD).read_text())["missing"]


def arms_of(study: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(study.read_text())["arms"])


def test_what_a_study_adds_is_trained_and_what_it_lost_is_no_obstacle(
    machine: Any, tmp_path: Path, fakes: Fakes, recorded: Path
) -> None:
    make = machine("second")
    arms = arms_of(make())
    wider = {"values": [1e-4, 1e-3, 1e-2, 1e-1]}
    arms["new"] = {"objective": f"{OBJECTIVE}/dpo.yaml", "tune": [0.1, 0.2]}
    fakes.right["kto"][1e-1] = 0
    fakes.right["new"] = {0.1: 1, 0.2: 2}
    study = make(arms=arms, tune=wider, seeds=[0, 1, 2]).rename(tmp_path / "second" / "renamed.yaml")
    out = tmp_path / "out"
    main(["ablate", str(study), f"--out={out}", f"--resume_from={recorded}"])
    new = {f"new/lr={rate}/seed-100" for rate in (0.1, 0.2)} | {f"new/lr=0.2/seed-{seed}" for seed in (0, 1, 2)}
    assert set(trained(fakes)) == new | {"kto/lr=0.1/seed-100", "kto/lr=0.001/seed-2", "other/lr=0.2/seed-2"}
    found = lines(out)
    assert [line for line in lines(recorded) if line not in found] == []
    fakes.called = []
    fewer = make(arms={"kto": arms["kto"], "new": arms["new"]}, tune=wider, seeds=[1, 2])
    main(["ablate", str(fewer), f"--out={tmp_path / 'fewer'}", f"--resume_from={commit(out, tmp_path / 'more')}"])
    assert not fakes.called
    assert {line["arm"] for line in lines(tmp_path / "fewer")} == {"kto", "new", "before training"}


def test_runs_of_a_value_that_is_no_longer_chosen_are_not_used(
    machine: Any, tmp_path: Path, fakes: Fakes, recorded: Path, capsys: Any
) -> None:
    make = machine("second")
    arms = arms_of(make())
    arms["other"]["tune"] = [0.1, 0.2, 0.4]
    main(["ablate", str(make(arms=arms)), f"--out={tmp_path / 'out'}", f"--resume_from={recorded}"])
    assert set(trained(fakes)) == {f"other/lr=0.4/seed-{seed}" for seed in (100, 0, 1)}
    assert "2 recorded runs of other with lr=0.2 are not used, as lr=0.4 is chosen now" in capsys.readouterr().out
    runs = {line["run"] for line in lines(tmp_path / "out") if line["arm"] == "other" and line["seed"] != "100"}
    assert runs == {"other/lr=0.4/seed-0", "other/lr=0.4/seed-1"}


def test_a_run_with_a_folder_takes_precedence(
    machine: Any, tmp_path: Path, fakes: Fakes, recorded: Path, capsys: Any
) -> None:
    make, out = machine("second"), tmp_path / "out"
    fakes.right["kto"][1e-4] = 1
    stopped(fakes, make(), out, 2)  # trains and measures one tuning run, with another result
    capsys.readouterr()
    main(["ablate", str(make()), f"--out={out}", f"--resume_from={recorded}"])
    said = capsys.readouterr().out
    assert "1 run with a folder" in said
    assert not fakes.called
    rates = {line["run"]: line["value"] for line in lines(out) if line["seed"] == "100"}
    before = {line["run"]: line["value"] for line in lines(recorded) if line["seed"] == "100"}
    assert rates == {**before, "kto/lr=0.0001/seed-100": "0.2"}
    main(["ablate", str(make()), f"--out={out}"])
    assert "with a folder" not in capsys.readouterr().out
    # Other values do not replace those that only the study's folder has.
    part = tmp_path / "part"
    stopped(fakes, machine("third")(), part, 4)
    with pytest.raises(SystemExit):
        main(["ablate", str(make()), f"--out={out}", f"--resume_from={part}"])
    assert f"lacks 7 runs of {out}/earlier" in capsys.readouterr().err


def test_runs_without_a_metric_of_the_study_are_trained_again(
    machine: Any, tmp_path: Path, fakes: Fakes, capsys: Any
) -> None:
    out = tmp_path / "out"
    fakes.lacks = {"kl_held_out"}
    main(["ablate", str(machine("first")(metrics=["reward_accuracy"])), f"--out={out}"])
    fakes.called, fakes.lacks = [], set()
    main(["ablate", str(machine("second")()), f"--out={tmp_path / 'new'}", f"--resume_from={out}"])
    assert set(trained(fakes)) == {f"{arm}/seed-{seed}" for arm in ("kto/lr=0.001", "other/lr=0.2") for seed in (0, 1)}
    assert "4 recorded runs without kl_held_out are not used" in capsys.readouterr().out
    assert "The primary metric was changed" not in (tmp_path / "new" / "report.md").read_text()
    fakes.called = []
    study = machine("second")(primary="kl_held_out")
    committed = commit(tmp_path / "new", tmp_path / "committed")
    main(["ablate", str(study), f"--out={tmp_path / 'third'}", f"--resume_from={committed}"])
    assert not fakes.called
    assert "The primary metric was changed from reward_accuracy" in (tmp_path / "third" / "report.md").read_text()


def _change(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def _other_value(folder: Path) -> None:
    text = gzip.decompress((folder / VALUES).read_bytes()).replace(b",0.25\n", b",0.26\n", 1)
    (folder / VALUES).write_bytes(gzip.compress(text))


REFUSED: dict[str, tuple[Callable[[Path], Any], Callable[[Any, Path], Path], tuple[str, ...]]] = {
    "no values": (lambda f: (f / VALUES).unlink(), lambda make, _: make(), (f"has no {VALUES}",)),
    "no record": (lambda f: (f / RECORD).unlink(), lambda make, _: make(), (f"has no {RECORD}",)),
    "another value": (_other_value, lambda make, _: make(), ("SHA-256 differs",)),
    "an older record": (
        lambda f: _change(f / RECORD, lambda record: record.pop("by_content")),
        lambda make, _: make(),
        (RECORD, "older version"),
    ),
    "a record without the digest": (
        lambda f: _change(f / RECORD, lambda record: record.pop("values_sha256")),
        lambda make, _: make(),
        (RECORD, "older version"),
    ),
    "a damaged record": (
        lambda f: _change(f / RECORD, lambda record: record.update(made=None)),
        lambda make, _: make(),
        (RECORD, "made is None, not a list"),
    ),
    "another study": (
        lambda f: None,
        lambda make, _: make(arms={"a": {"objective": f"{OBJECTIVE}/kto.yaml"}}),
        ("another study", "first/study.yaml"),
    ),
    "another config": (
        lambda f: None,
        lambda make, _: make(arms={"kto": {"objective": f"{OBJECTIVE}/kto.yaml", "trainer.max_steps": 3}}),
        ("arm 'kto lr=0.0001'", "study.yaml:"),
    ),
    "other data": (
        lambda f: None,
        lambda make, here: (make(), write_jsonl(here / "train.jsonl", pairs("x", 8)))[0],
        ("arm 'kto lr=0.0001'", "other data"),
    ),
    "other held-out data": (
        lambda f: None,
        lambda make, here: (make(), write_jsonl(here / "held_out.jsonl", pairs("x", 6)))[0],
        ("kto/lr=0.001/seed-0", "held_out"),
    ),
    "other validation data": (
        lambda f: None,
        lambda make, here: (make(), write_jsonl(here / "validation.jsonl", pairs("x", 5)))[0],
        ("kto/lr=0.0001/seed-100", "held_out"),
    ),
    "another setting of the evaluation": (
        lambda f: None,
        lambda make, here: make(evaluate={"held_out": [str(here / "held_out.jsonl")], "max_length": 65}),
        ("kto/lr=0.001/seed-0", "max_length"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_of_other_runs_are_refused_before_any_work(
    name: str, machine: Any, tmp_path: Path, fakes: Fakes, recorded: Path, capsys: Any
) -> None:
    damage, study, said = REFUSED[name]
    damage(recorded)
    path, out = study(machine("second"), tmp_path / "second"), tmp_path / "out"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["ablate", str(path), f"--out={out}", f"--resume_from={recorded}"])
    error = capsys.readouterr().err.strip()
    for text in said:
        assert text in error
    assert "\n" not in error
    assert not fakes.called
    assert not out.exists()


def test_what_an_arm_is_trained_from_is_known_by_content_wherever_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    """Data and model at another path are the same; another row, weight or setting is not."""
    alone = {"arms": {"kto": {"objective": f"{OBJECTIVE}/kto.yaml", LR: 1.0}}, "tune": None, "seeds": [0]}

    def content(name: str, **more: Any) -> str:
        path = maker(tmp_path / name / "model", tmp_path / name)(**alone | more)
        if name == "row":
            rows = (tmp_path / name / "train.jsonl").read_text()
            (tmp_path / name / "train.jsonl").write_text(rows.replace("answer 3", "answer 4"))
        return check(load_study(path), Parsers()).arms["kto"].content

    for name in ("one", "moved", "row", "weight", "setting"):
        shutil.copytree(tiny_folder, tmp_path / name / "model")
    (tmp_path / "weight" / "model" / "note.txt").write_text("another file\n")
    one = content("one")
    assert content("moved") == one
    assert len({one, content("row"), content("weight")}) == 3
    arms = {"kto": {"objective": f"{OBJECTIVE}/kto.yaml", LR: 1.0, "trainer.gradient_clip_val": 3.0}}
    assert content("setting", arms=arms) != one


@pytest.mark.parametrize("settings", [{}, {"split": "test"}])
def test_rows_have_the_names_of_the_first_machine(settings: dict[str, Any]) -> None:
    """Those of a file or a saved data set, of a split of one, and of a file of prompts."""

    def rows(folder: str) -> dict[str, dict[str, float]]:
        source = Source(f"{folder}/data", **settings)
        names = [f"{source.label}{source.before_line}{line}#chosen" for line in (1, 12)]
        return {"reward_accuracy": dict.fromkeys(names, 1.0), "rule": {f"{folder}.txt:3": 0.5}}

    moved = {"there/data": "here/data", "elsewhere/there.txt": "here.txt"}
    assert gather._renamed(rows("there"), moved) == rows("here")


@pytest.mark.slow
def test_real_runs_of_two_machines_are_those_of_one(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, prompts and the rule are named by their content, and examples as on the first machine."""

    def here(words: list[str], log: Path, env: Any, lock: Any = None) -> int:
        main(words)
        return 0

    monkeypatch.setattr(processes, "run_command", here)
    monkeypatch.setattr(report, "PICTURES", {})

    def study(name: str, seeds: list[int]) -> Path:
        here = tmp_path / name
        (here / "data").mkdir(parents=True, exist_ok=True)
        pair_data(here / "data/train.jsonl", 8, seed=0)
        pair_data(here / f"data/held_out_{name}.jsonl", 6, seed=1)
        (here / f"prompts_{name}.txt").write_text("one\ntwo why\nthree so\n")
        (here / "rule.py").write_text("def even(answer, finished):\n    return len(answer) % 2 == 0\n")
        content = {
            "configs": [f"{ROOT}/experiments/base.yaml"],
            "options": {
                "model.policy.path": str(shutil.copytree(tiny_folder, here / "model", dirs_exist_ok=True)),
                "data.train": str(here / "data/train.jsonl"),
                "data.batch_size": 4,
                "data.cache_dir": str(here / "cache"),
                "trainer.accelerator": "cpu",
                "trainer.max_steps": 2,
                LR: 0.01,
            },
            "arms": {name: {"objective": f"{OBJECTIVE}/{name}.yaml"} for name in ("dpo", "kto")},
            "seeds": seeds,
            "evaluate": {
                "held_out": [{"path": str(here / f"data/held_out_{name}.jsonl"), "rows": 5}],
                "prompts": str(here / f"prompts_{name}.txt"),
                "rule": f"{here}/rule.py:even",
                "max_new_tokens": 4,
            },
            "metrics": ["reward_accuracy", "kl_held_out", "kl", "rule"],
        }
        (here / "study.yaml").write_text(yaml.safe_dump(content))
        return here / "study.yaml"

    def values(out: Path) -> list[dict[str, str]]:
        # v is drawn over the outcomes of the runs that were there.
        return [line for line in lines(out) if line["metric"] != "value_function"]

    main(["ablate", str(study("one", [0, 1])), f"--out={tmp_path / 'whole'}"])
    main(["ablate", str(study("one", [0])), f"--out={tmp_path / 'part'}"])
    committed = commit(tmp_path / "part", tmp_path / "committed")
    (tmp_path / "one").rename(tmp_path / "gone")
    out = tmp_path / "out"
    main(["ablate", str(study("two", [0, 1])), f"--out={out}", f"--resume_from={committed}"])
    assert not (out / "kto" / "seed-0").exists()
    assert values(out) == values(tmp_path / "whole")
    assert {line["arm"] for line in lines(out)} == {"dpo", "kto", "before training", "fewer words wins"}
    whole, record = (json.loads((folder / RECORD).read_text()) for folder in (tmp_path / "whole", out))
    assert (record["verdicts"], record["missing"]) == (whole["verdicts"], [])
    assert [made["names"] for made in record["made"]] == [["dpo/seed-0", "kto/seed-0", "dpo/seed-1", "kto/seed-1"]]


WRONG: list[tuple[str, Any]] = [
    *(("by_content", value) for value in ([], {}, "x", None, {"arms": {}, "measured": None, "tuning": None})),
    *(("made", value) for value in (None, "x", [1], [{"names": 3}])),
    *(("data", value) for value in (None, [], {"a": "b"})),
    *(("models", value) for value in (None, [], {"a": 1})),
    *(("measured", value) for value in ([1], "x", {"held_out": ["a"]}, {"held_out": {"a": 1}})),
    *(("verdicts", value) for value in (None, {"a": []})),
    ("tuning", {"examples": "many"}),
    ("missing", [[]]),
]


def test_a_record_of_another_shape_is_damaged(recorded: Path) -> None:
    record = json.loads((recorded / RECORD).read_text())
    assert misshapen(record) == ""
    for key, value in WRONG:
        assert key in misshapen({**record, key: value}), (key, value)
