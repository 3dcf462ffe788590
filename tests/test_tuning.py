"""Tuning in a study: the choice is defined, is made on data of its own, and never reaches the report's figures."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from run_halos import line_of, write_jsonl
from tuned_studies import LR, OBJECTIVE, Fakes, faked, maker, pairs

from halos_pl.cli.ablate import Parsers
from halos_pl.cli.main import main
from halos_pl.study.choice import at_edge, choose
from halos_pl.study.preflight import check
from halos_pl.study.read import load_study
from halos_pl.study.recorded import VALUES, Recorded, read_recorded, write_recorded
from halos_pl.study.report import write_report
from halos_pl.study.results import Results
from halos_pl.study.spec import StudyError
from halos_pl.study.tune import Tune


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    return maker(tiny_folder, tmp_path)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return faked(monkeypatch)


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown key": ({"tune": {"heldout": []}}, "heldout", "'heldout'"),
    "no option": ({"tune": {"option": None}}, "tune:", "tune.option"),
    "one value": ({"tune": {"values": [1e-3]}}, "values:", "nothing to choose"),
    "one value of an arm": ({"arms": {"a": {"tune": [1]}}, "tune": {"values": None}}, "tune:", "nothing to choose"),
    "a value twice": ({"tune": {"values": [1e-3, "1e-3"]}}, "values:", "twice"),
    "a value that is infinite": ({"tune": {"values": [1e-3, "inf"]}}, "values:", "finite"),
    "no values": ({"tune": {"values": None}}, "tune:", "'kto'"),
    "no seeds": ({"tune": {"seeds": None}}, "tune:", "tune.seeds"),
    "a seed of the report": ({"tune": {"seeds": [100, 1]}}, "seeds:", "1"),
    "no data": ({"tune": {"held_out": None}}, "tune:", "tune.held_out"),
    "data of another metric": ({"tune": {"prompts": "x.txt"}}, "prompts: x.txt", "no effect"),
    "a metric that is none": ({"tune": {"metric": "accuracy"}}, "metric: accuracy", "'accuracy'"),
    "a metric without a direction": ({"tune": {"metric": "kl_held_out"}}, "metric: kl_held_out", "neither"),
    "a rule that is not named": ({"tune": {"metric": "rule"}}, "metric: rule", "no rule"),
    "an arm's own value": ({"arms": {"a": {LR: 1.0}}}, f"{LR}: 1.0", "arm 'a'"),
    "an axis": ({"axes": {LR: [1.0, 2.0]}}, f"{LR}:", "axes sets it too"),
    "values without tune": ({"tune": None}, "tune:", "'other'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_tuning_that_cannot_be_read_is_refused_by_its_line(name: str, make: Any) -> None:
    given, text, message = FAULTS[name]
    path = make(**given)
    with pytest.raises(StudyError) as error:
        load_study(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}:")
    assert "\n" not in str(error.value)
    lines = [i for i, line in enumerate(path.read_text().splitlines(), start=1) if text in line]
    assert int(str(error.value).split(":")[1]) in lines


def test_an_option_of_all_arms_is_not_tuned_as_well(make: Any, tmp_path: Path) -> None:
    (tmp_path / "over.yaml").write_text(yaml.safe_dump({"options": {LR: 1.0}}))
    with pytest.raises(StudyError, match=r"over\.yaml:2: .*sets it too"):
        load_study(make(), tmp_path / "over.yaml")


# -- the choice ---------------------------------------------------------------------------------------------

_means = st.one_of(st.integers(0, 4).map(lambda k: k / 4), st.just(math.nan))


@given(data=st.data(), values=st.lists(st.integers(1, 99), min_size=2, max_size=5, unique=True))
def test_the_choice_is_the_best_finite_mean_and_the_smallest_of_equals(data: Any, values: list[int]) -> None:
    tune = Tune(LR, {"a": tuple(sorted(values))}, (7, 8), {}, "reward_accuracy")
    trials = {("a", seed): {str(value): data.draw(_means) for value in values} for seed in tune.seeds}
    choice = choose(tune, "a", trials)
    means = {value: (trials["a", 7][str(value)] + trials["a", 8][str(value)]) / 2 for value in values}
    finite = {value: mean for value, mean in means.items() if not math.isnan(mean)}
    if not finite:
        assert choice.value is None
        assert "diverged" in choice.why_not
        assert not choice.edge
        return
    best = [value for value, mean in finite.items() if mean == max(finite.values())]
    assert choice.value == min(best)
    assert choice.best == tuple(sorted(best))
    # At the edge of all that was tried: a larger value that diverged bounds the grid too. One of several equals may be.
    ends = [name for name, end in (("smallest", min(values)), ("largest", max(values))) if end in best]
    assert choice.edge == (ends or [""])[0]
    assert ("grid" in choice.summary) == bool(ends)
    assert bool(at_edge([choice])) == bool(ends)
    # Of less than all seeds there is no choice.
    del trials["a", 8][str(values[0])]
    part = choose(tune, "a", trials)
    assert part.value is None
    assert f"1 of {2 * len(values)}" in part.why_not


def test_where_less_is_better_and_where_means_differ_by_rounding() -> None:
    tune = Tune(LR, {"a": (1, 2, 3)}, (7, 8, 9), {}, "brier")
    means = {1: (0.3, 0.3, 0.3), 2: (0.1, 0.2, 0.3), 3: (0.2, 0.2, 0.2)}
    trials = {("a", s): {str(v): means[v][i] for v in means} for i, s in enumerate(tune.seeds)}
    assert sum(means[2]) / 3 != 0.2
    assert choose(tune, "a", trials).value == 2
    texts = Tune("model.reference_point", {"a": ("Zero", "Own")}, (7,), {}, "brier")
    choice = choose(texts, "a", {("a", 7): {"Zero": 0.2, "Own": 0.2}})
    assert (choice.value, choice.edge) == ("Zero", "")  # texts have no edge


# -- runs ---------------------------------------------------------------------------------------------------


FILES = (VALUES, "record.json", "report.md", "report.html")


@pytest.mark.filterwarnings("ignore")
def test_arms_are_tuned_first_and_run_with_their_best(
    make: Any, tmp_path: Path, fakes: Fakes, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    main(["ablate", str(make()), f"--out={out}"])
    said = capsys.readouterr().out
    assert "5 tuning runs" in said
    assert "9 runs, 0 already done" in said  # three and two values, and two arms with two seeds
    trials = {f"kto/lr={lr}/seed-100" for lr in ("0.0001", "0.001", "0.01")}
    trials |= {f"other/lr={lr}/seed-100" for lr in (0.1, 0.2)}
    final = {f"{arm}/seed-{seed}" for arm in ("kto/lr=0.001", "other/lr=0.2") for seed in (0, 1)}
    trained = [each.removeprefix("fit ") for each in fakes.called if each.startswith("fit")]
    assert (set(trained[:5]), set(trained[5:])) == (trials, final)
    # Each is measured on its own data.
    for place, files in (*((t, "validation.jsonl") for t in trials), *((f, "held_out.jsonl") for f in final)):
        how = json.loads((out / place / "measured.json").read_text())
        assert [Path(each).name for each in how["files"]] == [files]
        assert how["evaluate"]["max_length"] == 64  # settings of the report that are no data hold for both
    page = (out / "report.md").read_text()
    assert "lr is the largest of the grid for other (0.2): widen" in page
    assert "lr of kto" not in page  # its best lies within
    table = page.partition("## Tuning")[2].partition("##")[0]
    assert re.search(r"\| kto \| 0\.4 \| \*\*0\.8\*\* \| 0\.6 \| not tried \| not tried \|", table)
    assert re.search(r"\| other \| not tried \| not tried \| not tried \| 0\.2 \| \*\*0\.6\*\* \|", table)
    record = json.loads((out / "record.json").read_text())
    assert record["tuning"] == {"option": LR, "examples": 5, "chosen": {"kto": 0.001, "other": 0.2}}
    with gzip.open(out / VALUES, "rt", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["metric"].startswith("tune/")]
    found = {(line["run"], line["arm"], line["seed"], line["example"]): float(line["value"]) for line in lines}
    rates = {"kto": ("0.0001", "0.001", "0.01"), "other": ("0.1", "0.2")}
    assert found == {
        (f"{arm}/lr={lr}/seed-100", arm, "100", lr): fakes.right[arm][float(lr)] / 5
        for arm, some in rates.items()
        for lr in some
    }
    # Nothing is left to do, and the report is the same.
    before, called = {name: (out / name).read_bytes() for name in FILES}, len(fakes.called)
    main(["ablate", str(make()), f"--out={out}"])
    assert len(fakes.called) == called
    assert {name: (out / name).read_bytes() for name in FILES} == before
    # From the committed files alone too.
    (tmp_path / "moved").mkdir()
    for name in ("study.yaml", VALUES, "record.json"):
        shutil.copy(out / name, tmp_path / "moved")
    main(["ablate", "report", str(tmp_path / "moved")])
    assert {name: (tmp_path / "moved" / name).read_bytes() for name in FILES} == before
    capsys.readouterr()
    main(["ablate", "status", str(out)])
    assert "9 of 9 runs done" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [3, 9, 13])
def test_an_interrupted_tuning_goes_on_to_the_same_choice(make: Any, tmp_path: Path, fakes: Fakes, stop: int) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    main(["ablate", str(make()), f"--out={whole}"])
    called, fakes.called = sorted(fakes.called), []
    fakes.stops_after = stop
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["ablate", str(make()), f"--out={out}"])
    fakes.stops_after = None
    main(["ablate", str(make()), f"--out={out}"])
    # A run that was trained and then stopped is not trained again, except that its weights are gone here.
    assert set(fakes.called) == set(called)
    assert (out / VALUES).read_bytes() == (whole / VALUES).read_bytes()
    assert (out / "report.md").read_text() == (whole / "report.md").read_text().replace(str(whole), str(out))


@pytest.mark.filterwarnings("ignore")
def test_a_wider_grid_with_another_best_does_not_mix_with_earlier_runs(make: Any, tmp_path: Path, fakes: Fakes) -> None:
    out = tmp_path / "out"
    main(["ablate", str(make()), f"--out={out}"])
    arms = yaml.safe_load(make().read_text())["arms"]
    arms["other"]["tune"] = [0.1, 0.2, 0.4]
    fakes.called = []
    main(["ablate", str(make(arms=arms)), f"--out={out}"])
    new = {f"other/lr=0.4/seed-{seed}" for seed in (100, 0, 1)}
    assert {each.partition(" ")[2] for each in fakes.called} == new
    results = Results(load_study(out / "study.yaml"), out)
    assert [arm.candidate for arm in results.study.arms] == ["lr=0.001", "lr=0.4"]
    assert results.estimates["kl_held_out", "other"].value == pytest.approx(0.5 + 0.4 + 0.25)
    assert [choice.edge for choice in results.choices] == ["", "largest"]


@pytest.mark.filterwarnings("ignore")
def test_what_diverges_is_not_chosen_and_what_fails_is_tried_again(
    make: Any, tmp_path: Path, fakes: Fakes, capsys: Any
) -> None:
    out = tmp_path / "out"
    fakes.fails = {("kto", 1e-3): "NonFiniteLossError: the loss is nan", ("other", 0.1): "RuntimeError: out of memory"}
    with pytest.raises(SystemExit):
        main(["ablate", str(make()), f"--out={out}"])
    assert "no value is chosen for other" in capsys.readouterr().err
    trained = [each for each in fakes.called if "seed-0" in each]
    assert trained == ["fit kto/lr=0.01/seed-0", "evaluate kto/lr=0.01/seed-0"]  # the best that is finite
    page = (out / "report.md").read_text()
    table = page.partition("## Tuning")[2].partition("##")[0]
    assert re.search(r"\| kto \| 0\.4 \| diverged \| \*\*0\.6\*\* \|", table)
    assert "| other | not tried | not tried | not tried | missing | 0.6 |" in table
    assert "out of memory" in page.partition("## Missing")[2]
    # A failure is tried again; what has diverged would only do so once more.
    fakes.called, fakes.fails = [], {("kto", 1e-3): "is not called"}
    main(["ablate", str(make()), f"--out={out}"])
    assert [each for each in fakes.called if each.startswith("fit")] == [
        "fit other/lr=0.1/seed-100",
        "fit other/lr=0.2/seed-0",
        "fit other/lr=0.2/seed-1",
    ]
    # Where all diverge, there is nothing to run, and that is no success.
    fakes.fails = {("kto", rate): "NonFiniteWeightsError: nan" for rate in fakes.right["kto"]}
    with pytest.raises(SystemExit):
        main(["ablate", str(make()), f"--out={tmp_path / 'all'}"])
    assert "no value is chosen for kto" in capsys.readouterr().err
    assert "diverged" in (tmp_path / "all" / "report.md").read_text().partition("## Missing")[2]


@pytest.mark.filterwarnings("ignore")
def test_no_figure_of_the_report_is_of_a_tuning_run(make: Any, tmp_path: Path, fakes: Fakes) -> None:
    """Other tuning values that lead to the same choice change the page's section on tuning alone."""
    out = tmp_path / "out"
    main(["ablate", str(make()), f"--out={out}"])
    study = load_study(out / "study.yaml")
    recorded = read_recorded(study, out)
    pages = []
    for number, scale in enumerate((1.0, 0.5)):
        folder = tmp_path / str(number)
        folder.mkdir()
        trials = {key: {value: scale * mean for value, mean in means.items()} for key, means in recorded.trials.items()}
        again = Results(study, folder, Recorded(recorded.values, recorded.record, trials))
        write_recorded(Recorded(recorded.values, recorded.record, trials), again.study, folder)
        pages.append(write_report(Results(study, folder)).with_name("report.md").read_text())
    one, two = (re.sub(r"## Tuning.*?(?=\n## )", "", page, flags=re.DOTALL) for page in pages)
    assert one == two
    assert pages[0] != pages[1]
    assert not {seed for _, seed in recorded.values} & {100}


BROKEN: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "a value that is not tried": (lambda line: line.update(example="0.5"), "0.5"),
    "another metric": (lambda line: line.update(metric="reward_accuracy"), "reward_accuracy"),
    "a text for a number": (lambda line: line.update(value="many"), "many"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BROKEN)
def test_recorded_tuning_that_is_not_the_studys_is_refused(name: str, make: Any, tmp_path: Path, fakes: Fakes) -> None:
    out = tmp_path / "out"
    main(["ablate", str(make()), f"--out={out}"])
    study = load_study(out / "study.yaml")
    with gzip.open(out / VALUES, "rt", newline="") as file:
        lines = list(csv.DictReader(file))
    change, said = BROKEN[name]
    change(next(line for line in lines if line["seed"] == "100"))
    with gzip.open(out / VALUES, "wt", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    with pytest.raises(StudyError, match=re.escape(said)):
        read_recorded(study, out)


# -- data ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_validation_split_shares_no_prompt_with_other_data(make: Any, tmp_path: Path) -> None:
    """A prompt is the same whatever its completions, and as a conversation of one message."""
    alone = {"arms": {"kto": {"objective": f"{OBJECTIVE}/kto.yaml"}}, "tune": {"values": [1e-3, 1e-4]}}
    path = make(**alone)
    assert check(load_study(path), Parsers()).validating is not None
    validation = tmp_path / "validation.jsonl"
    extra = [{"prompt": "report 3", "chosen": "other", "rejected": "words"}]
    write_jsonl(validation, pairs("validation", 5) + extra)
    _refused(path, f"{validation}:6 (there {tmp_path}/held_out.jsonl:4)")
    write_jsonl(validation, pairs("validation", 5) + pairs("train", 7))
    _refused(path, f"{validation}:6 (there {tmp_path}/train.jsonl:1)", "7 prompts", "'kto'", "4 more")
    rendered = "<|im_start|>user\nreport 2<|im_end|>\n<|im_start|>assistant\n"
    for same in (rendered, "\n\nHuman: report 2\n\nAssistant:", "report  2 ", "<s>[INST] report 2 [/INST]"):
        write_jsonl(validation, [{"prompt": same, "chosen": "a b", "rejected": "c"}])
        _refused(path, f"{validation}:1 (there {tmp_path}/held_out.jsonl:3)")
    turns = [{"role": "user", "content": "ask two"}]
    write_jsonl(validation, [{"prompt": turns, "chosen": "a b", "rejected": "c"}])
    evaluate = {"held_out": [str(tmp_path / "held_out.jsonl")], "prompts": str(tmp_path / "prompts.txt")}
    _refused(make(**alone, evaluate=evaluate), f"{validation}:1 (there {tmp_path}/prompts.txt:2)", "1 prompt ")


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_are_not_chosen_by_the_data_of_the_report(make: Any, tmp_path: Path) -> None:
    monitored = tmp_path / "monitored.jsonl"
    write_jsonl(monitored, pairs("monitored", 3))
    arms = {"kto": {"objective": f"{OBJECTIVE}/kto.yaml", "data.validation": str(monitored)}}
    check(load_study(make(arms=arms, tune=None)), Parsers())
    write_jsonl(monitored, [*pairs("monitored", 3), {"prompt": "report  2 ", "chosen": "a", "rejected": "b"}])
    _refused(make(arms=arms, tune=None), "data.validation: 1 prompt of its validation data is also", "held_out.jsonl:3")


def _refused(path: Path, *said: str) -> None:
    with pytest.raises(StudyError) as error:
        check(load_study(path), Parsers())
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}:")
    for text in said:
        assert text in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_a_tuning_that_cannot_work_is_refused_before_the_first_run(make: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "single.jsonl", [{"prompt": "q", "completion": "a", "label": True}])
    path = make(tune={"held_out": [str(tmp_path / "single.jsonl")]})
    with pytest.raises(StudyError, match="reward_accuracy needs pairs") as error:
        check(load_study(path), Parsers())
    assert str(error.value).startswith(f"{path}:{line_of(path, 'option:') - 1}: tune: ")
    path = make(tune={"option": "model.optimizer.init_args.rate"})
    _refused(path, "arm 'kto'", "rate")
    arms = {"a": {"objective": f"{OBJECTIVE}/kto.yaml"}, "b": {"objective": f"{OBJECTIVE}/kto.yaml", "tune": [1e-3, 1]}}
    _refused(make(arms=arms), "'b lr=0.001'", "'a lr=0.001'")  # both may choose the same


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("values", "said"), [([-1e-3, 1e-3], "-0.001"), ([0, 1e-3], "lr=0"), (["0.0", 1e-3], "lr=0.0")]
)
def test_a_rate_that_cannot_train_is_refused_before_the_first_run(make: Any, values: list[Any], said: str) -> None:
    _refused(make(arms={"kto": {"objective": f"{OBJECTIVE}/kto.yaml"}}, tune={"values": values}), "'kto'", said)


@pytest.mark.filterwarnings("ignore")
def test_what_a_fit_refuses_before_it_reads_data_is_refused_for_each_arm(make: Any) -> None:
    for option, value, said in ((LR, -1.0, "-1"), ("model.optimizer.init_args.betas", [2.0, 0.9], "beta")):
        arms = {
            "kto": {"objective": f"{OBJECTIVE}/kto.yaml"},
            "bad": {"objective": f"{OBJECTIVE}/kto.yaml", option: value},
        }
        _refused(make(arms=arms, tune=None), "'bad'", said)
