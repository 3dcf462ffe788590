"""Studies: what is wrong with one is said beforehand; runs go on where they were; every figure is of its examples."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from filelock import FileLock, Timeout
from hypothesis import given
from hypothesis import strategies as st
from run_halos import ROOT, binary_data, line_of, pair_data, small_options

from halos_pl.cli.ablate import Parsers
from halos_pl.cli.main import main
from halos_pl.evaluation.arguments import digest_of, measuring
from halos_pl.evaluation.held_out import by_example, of_pairs, of_rows
from halos_pl.evaluation.judging import judged_by
from halos_pl.evaluation.metrics import METRICS
from halos_pl.objective.halo import Objective
from halos_pl.run_dir import LAST, SUMMARY
from halos_pl.study import drawing, execute, figures, gather, preflight, processes, report
from halos_pl.study.claim import claim
from halos_pl.study.headline import headline
from halos_pl.study.planned_power import hopeless, power_lines
from halos_pl.study.power import Noise, power
from halos_pl.study.preflight import Checked, CheckedArm, check, evaluate_arguments
from halos_pl.study.read import load_study
from halos_pl.study.results import Results
from halos_pl.study.spec import Study, StudyError, command
from halos_pl.study.standard_error import MARGIN
from halos_pl.study.state import failure, record_failure, state

RULE = """
def ends(answer, finished):
    return len(answer) % 2 == 0

def longer(prompt, answer, other):
    return 0.5 if len(answer) == len(other) else float(len(answer) > len(other))
"""


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a study of a tiny model; what is given replaces its keys, None removes one."""
    binary_data(tmp_path / "train.jsonl", 12)
    pair_data(tmp_path / "held_out.jsonl", 6, seed=1)
    (tmp_path / "prompts.txt").write_text("one\ntwo why\nthree so\n")
    (tmp_path / "rule.py").write_text(RULE)

    def made(**given: Any) -> Path:
        content: dict[str, Any] = {
            "note": "does it matter?",
            "configs": [f"{ROOT}/experiments/base.yaml"],
            "options": small_options(
                tiny_folder,
                tmp_path / "train.jsonl",
                **{"trainer.enable_progress_bar": False, "model.optimizer.init_args.lr": 0.01},
            ),
            "arms": {
                name: {"objective": f"{ROOT}/experiments/objectives/{file}.yaml"}
                for name, file in (("kto", "kto"), ("no loss aversion", "kto_identity"))
            },
            "seeds": [0, 1],
            "evaluate": {
                "held_out": [{"path": str(tmp_path / "held_out.jsonl")}],
                "prompts": str(tmp_path / "prompts.txt"),
                "rule": f"{tmp_path}/rule.py:ends",
                "judge": f"{tmp_path}/rule.py:longer",
                "max_new_tokens": 4,
            },
            "metrics": ["reward_accuracy", "reward_auroc", "brier", "kl", "rule", "judge"],
            **given,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return path

    return made


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs a study's commands in this process, and notes them."""
    called: list[str] = []

    def process(words: list[str], log: Path, env: Any, lock: Any = None) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        called.append(command(words))
        try:
            main(words)
        except SystemExit as error:
            return int(error.code or 0)
        except Exception as error:
            with log.open("a") as file:
                file.write(f"halos: Error: {error}\n")
            return 1
        return 0

    monkeypatch.setattr(processes, "run_command", process)
    return called


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown key": ({"metrixs": ["kl"]}, "metrixs", "'metrixs'"),
    "unknown metric": ({"metrics": ["kl", "accuracy"]}, "- accuracy", "'accuracy'"),
    "empty axis": (
        {"axes": {"model.value_function.init_args.beta": []}},
        "init_args.beta",
        "axis model.value_function.init_args.beta",
    ),
    "no arm": ({"arms": None}, "note", "arms"),
    "no metric": ({"metrics": None}, "note", "reward_accuracy"),
    "seed twice": ({"seeds": [1, 1]}, "seeds:", "[1, 1]"),
    "a seed that is none": ({"seeds": ["one"]}, "seeds:", "['one']"),
    "unknown baseline": ({"baseline": "dpo"}, "baseline", "'dpo'"),
    "arms is a list": ({"arms": ["kto"]}, "arms:", "mapping"),
    "unknown key of evaluate": (
        {"evaluate": {"helt_out": ["x"]}, "metrics": ["kl"]},
        "helt_out",
        "'helt_out'",
    ),
    "a metric without its data": (
        {"evaluate": {"prompts": "x.txt"}, "metrics": ["reward_accuracy"]},
        "- reward_accuracy",
        "no held_out",
    ),
    "a win rate without a judge": ({"metrics": ["win_rate"]}, "- win_rate", "no win_rate"),
    "a name that YAML takes for a number": ({"arms": {0.1: {}}}, "arms:", "quotes"),
    "a name that cannot be shown": ({"arms": {"a\rb": {}}}, "arms:", "'a\\rb'"),
    "a metric that is a list": ({"metrics": [["kl"]]}, "- - kl", "['kl']"),
    "a metric twice": ({"metrics": ["kl", "rule", "kl"]}, "metrics:", "metric kl "),
    "no held-out data": (
        {"evaluate": {"held_out": []}, "metrics": ["reward_accuracy"]},
        "- reward_accuracy",
        "no held_out",
    ),
    "an axis that an arm sets": (
        {"arms": {"a": {"trainer.max_epochs": 4}}, "axes": {"trainer.max_epochs": [2, 6]}},
        "trainer.max_epochs",
        "arm 'a'",
    ),
    "a primary metric that is none": ({"primary": "length"}, "primary:", "'length'"),
    "a margin that is none": ({"equivalence": 0}, "equivalence:", "above 0"),
    "a margin of a ratio": (
        {"metrics": ["kl"], "equivalence": 0.9},
        "equivalence:",
        "above 1",
    ),
    "a share's margin": ({"equivalence": 5}, "equivalence:", "below 1"),
    "unknown key of power": ({"power": {"prompt_sd": 0.5, "runs_sd": 0.1}}, "runs_sd", "'runs_sd'"),
    "half of power": ({"power": {"prompt_sd": 0.5}}, "power:", "run_sd"),
    "a negative deviation": ({"power": {"prompt_sd": 0.5, "run_sd": -1}}, "run_sd", "power.run_sd is -1"),
    "an infinite deviation": (
        {"power": {"prompt_sd": float("inf"), "run_sd": 1}},
        "prompt_sd",
        "power.prompt_sd is inf",
    ),
    "points for a share's deviation": (
        {"metrics": ["rule"], "power": {"prompt_sd": 50, "run_sd": 0.1}},
        "prompt_sd",
        "at most 1",
    ),
    "nothing that varies": ({"power": {"prompt_sd": 0, "run_sd": 0}}, "power:", "run_sd must be above 0"),
    "an effect that is none": ({"power": {"effect": 1.5}}, "effect", "below 1"),
    "a factor below 1": ({"metrics": ["kl"], "power": {"effect": 0.9}}, "effect", "above 1"),
    "a seed too large": ({"seeds": [0, 2**32]}, "seeds:", "4294967295"),
    "two sources of power": ({"power": {"values": "x.csv.gz", "run_sd": 1}}, "values:", "run_sd"),
    "sample of more than there are": ({"sample": {"size": 9}}, "sample:", "2 arms"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_study_that_cannot_be_read_is_refused_by_its_line(name: str, make: Any) -> None:
    given, text, message = FAULTS[name]
    path = make(**given)
    with pytest.raises(StudyError) as error:
        load_study(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}:{line_of(path, text)}:")


def test_power_is_said_of_the_planned_seeds_and_prompts(make: Any, tmp_path: Path) -> None:
    """By what the study states, or for a share at worst; of one seed, or one arm, there is none."""
    many = {"metrics": ["rule", "length"], "seeds": [0, 1, 2]}
    for own, wanted in (
        ({}, ["2 arms x 3 seeds x 80 prompts", "prompt_sd 0.71, run_sd 0 ", "run_sd 0.2 "]),
        ({"power": {"prompt_sd": 0.4, "run_sd": 0.05}}, ["prompt_sd 0.4, run_sd 0.05 (as stated)"]),
        ({"seeds": [0]}, ["2 arms x 1 seed x", "none"]),
        ({"primary": "length"}, ["unknown"]),
        ({"primary": "length", "power": {"prompt_sd": 0.4, "run_sd": 0.05}}, ["a factor of"]),
    ):
        said = "\n".join(power_lines(load_study(make(**many | own)), 80))
        for text in wanted:
            assert text in said
    noise = Noise.planned(prompt_sd=0.4, run_sd=0.05, sampling_sd=0, count=80, seeds=3, arms=2)
    said = "\n".join(power_lines(load_study(make(**many, power={"prompt_sd": 0.4, "run_sd": 0.05})), 80))
    assert f"{power(0.2, noise, 0.05 / MARGIN):.2f} for 20 points" in said
    path = make(**many)
    (tmp_path / "prompts.txt").write_text("one\ntwo why\none\nthree so\none\n")  # those listed twice count once
    assert check(load_study(path), Parsers()).examples == 3
    assert check(load_study(make(metrics=["reward_auroc"])), Parsers()).examples == 6
    path = make(power={"values": str(tmp_path / "none.csv.gz")})
    with pytest.raises(StudyError, match=r"none\.csv\.gz cannot be read") as error:
        check(load_study(path), Parsers())
    assert str(error.value).startswith(f"{path}:{line_of(path, 'power:')}:")
    # A second file that changes the metrics says what they are decided by.
    (tmp_path / "over.yaml").write_text("metrics: [kl]")
    with pytest.raises(StudyError, match="equivalence"):
        load_study(make(**many, equivalence=0.05), tmp_path / "over.yaml")


def test_a_study_that_would_probably_miss_what_it_looks_for_runs_only_anyway(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    noise = {"prompt_sd": 0.5, "run_sd": 0.02}
    many: dict[str, Any] = {"metrics": ["rule", "kl"], "seeds": [0, 1, 2]}

    def said(examples: int, **own: Any) -> str | None:
        line = hopeless(load_study(make(**many | own)), examples)
        assert line is None or "\n" not in line
        return line

    for own, examples, weak in (
        ({}, 20, False),  # it names no difference
        ({"power": noise}, 20, False),
        ({"power": {**noise, "effect": 0.2}}, 20, True),
        ({"power": {**noise, "effect": 0.2}}, 400, False),
        ({"power": {**noise, "effect": 0.9}}, 20, False),
        ({"power": {**noise, "effect": 0.9}, "seeds": [0]}, 20, True),  # nothing is significant over one seed
        ({"equivalence": 0.05}, 80, True),  # a share at worst
        ({"power": noise, "equivalence": 0.4}, 400, False),
        ({"power": {**noise, "effect": 1.05}, "primary": "kl"}, 80, True),  # a factor
        ({"power": {**noise, "effect": 3.0}, "primary": "kl"}, 80, False),
        ({"primary": "kl", "equivalence": 1.1}, 80, False),  # nothing is known of its variance
    ):
        assert (said(examples, **own) is not None) == weak, (own, examples)
    line = said(20, power={**noise, "effect": 0.2})
    planned = Noise.planned(prompt_sd=0.5, run_sd=0.02, sampling_sd=0, count=20, seeds=3, arms=2)
    assert f"power of {power(0.2, planned, 0.05 / MARGIN):.2f} for 20 points" in str(line)
    # What would help is true, and enough.
    [(stated, prompts)] = re.findall(r"(\d\.\d\d) with (\d+) prompts", str(line))
    more = Noise.planned(prompt_sd=0.5, run_sd=0.02, sampling_sd=0, count=int(prompts), seeds=3, arms=2)
    assert power(0.2, more, 0.05 / MARGIN) == pytest.approx(float(stated), abs=0.005)
    assert float(stated) >= 0.8
    assert re.search(r"\d\.\d\d with \d+ seeds", str(line))
    # Before anything is written, in one line that names the study's; and not if nothing is left to run.
    path, out = make(**many, power={**noise, "effect": 0.2}), tmp_path / "out"
    study = load_study(path)
    checked = Checked({arm.title: CheckedArm(1, arm.name, arm.name) for arm in study.arms}, 20, measured_as(study))
    monkeypatch.setattr(preflight, "check", lambda *_: checked)
    monkeypatch.setattr(report, "PICTURES", {})

    def process(words: list[str], log: Path, env: Any, lock: Any = None) -> int:
        folder = Path(words[1] if words[0] == "evaluate" else words[-1].partition("=")[2])
        if words[0] == "fit" and folder.name.startswith("seed"):
            values = {f"{i:02}": float(i % 2) for i in range(20)}
            _pretend(study, out, [r.folder for r in study.runs(out)].index(folder), "rule", values)
            (folder / "evaluation.json").rename(folder / "later.json")
        elif words[0] == "evaluate":
            values = json.loads((folder / "later.json").read_text())
            (folder / "evaluation.json").write_text(json.dumps(values | {"kl": values["rule"]}))
        else:
            log.write_text("halos: RuntimeError: not timed\n")
            return 1
        return 0

    monkeypatch.setattr(processes, "run_command", process)
    with pytest.raises(SystemExit):
        main(["ablate", str(path), f"--out={out}"])
    error = capsys.readouterr().err
    assert f"{path}:{line_of(path, 'effect:')}: the planned power is hopeless" in error
    assert "--anyway" in error
    assert not out.exists()
    main(["ablate", str(path), f"--out={out}", "--anyway"])
    capsys.readouterr()
    main(["ablate", str(path), f"--out={out}"])
    page = (out / "report.md").read_text()
    assert f"--out {out} --anyway" in page
    assert "the planned power is hopeless" in page


def test_a_detectable_size_is_stated_only_of_arms_that_have_one(make: Any, tmp_path: Path) -> None:
    arms = {name: {"objective": f"{ROOT}/experiments/objectives/kto.yaml"} for name in ("a", "b", "c")}
    study = load_study(make(metrics=["rule"], seeds=[0, 1, 2], arms=arms))
    draw = np.random.default_rng(0)
    base = (draw.random(40) < 0.5) * 1.0
    for number, run in enumerate(study.runs(tmp_path / "out")):
        values = base if run.arm.name == "a" else np.roll(base, 1 if run.arm.name == "b" else 2)
        noise = draw.random(40) < 0.1
        values = np.where(noise, 1 - values, values)
        _pretend(study, tmp_path / "out", number, "rule", {f"{i:02}": v for i, v in enumerate(values.tolist())})
    results = Results(study, tmp_path / "out")
    found = results.comparisons("rule")
    assert all(c.decision == "not significant" and c.detectable for c in found.values())
    assert f"a difference of {max(c.detectable or 0 for c in found.values()):.2g})" in " ".join(headline(results))
    # So much noise in one arm's comparison that no difference of shares would be found.
    assert found["b"].noise is not None
    found["b"].__dict__.pop("detectable")
    object.__setattr__(found["b"], "noise", replace(found["b"].noise, run=1.0))
    assert found["b"].detectable is None
    said = " ".join(headline(results))
    assert f"80% power of c for a difference of {found['c'].detectable:.2g}" in said
    assert "too few values of b" in said
    object.__setattr__(found["c"], "noise", found["b"].noise)
    found["c"].__dict__.pop("detectable")
    assert "80% power for a" not in " ".join(headline(results))


def test_arms_are_crossed_with_axes_and_sampled(make: Any) -> None:
    axes = {"model.value_function.init_args.beta": [0.1, 0.2], "data.batch_size": [2, 4, 6]}
    study = load_study(make(axes=axes))
    assert len(study.arms) == 12
    assert study.arms[0].name == "kto beta=0.1 batch_size=2"
    assert "--data.batch_size=2" in study.arms[0].words("out", 3)
    assert study.arms[0].words("out", 3)[-2:] == ["--seed_everything=3", "--run_dir=out"]
    some = load_study(make(axes=axes, sample={"size": 5, "seed": 1}))
    assert [arm.name for arm in some.arms] == [
        arm.name for arm in study.arms if arm.name in {a.name for a in some.arms}
    ]
    assert len(some.arms) == 5
    assert len(load_study(make(arms=None, axes=axes)).arms) == 6
    for seed in range(5):  # the baseline is always among them
        drawn = {"size": 2, "seed": seed}
        some = load_study(make(axes=axes, sample=drawn, baseline="no loss aversion beta=0.2 batch_size=4"))
        assert some.baseline in [arm.name for arm in some.arms]
        assert len(some.arms) == 2


ARM_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "an option that is none": ({"model.value_funktion": "Logistic"}, "value_funktion"),
    "a number outside its range": ({"model.warmup_ratio": 2}, "warmup_ratio is 2"),
    "data of another kind": ({"objective": f"{ROOT}/experiments/objectives/dpo.yaml"}, "compares the two completions"),
    "the same as another": ({"objective": f"{ROOT}/experiments/objectives/kto.yaml"}, "arm 'kto'"),
    "no such file": ({"objective": "experiments/objectives/kato.yaml"}, "kato.yaml"),
    "a device that is not there": ({"trainer.accelerator": "tpu"}, "torch_xla"),
    "a plug-in that is none": ({"model.value_function": "Nope"}, "KahnemanTversky"),
    "a text for a number": ({"data.batch_size": "many"}, "many"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARM_FAULTS)
def test_an_arm_that_is_not_valid_is_refused_before_the_first_run(name: str, make: Any) -> None:
    own, message = ARM_FAULTS[name]
    arms = {"kto": {"objective": f"{ROOT}/experiments/objectives/kto.yaml"}, "second": {}}
    arms["second"] = {"objective": f"{ROOT}/experiments/objectives/kto.yaml"} | own
    path = make(arms=arms)
    with pytest.raises(StudyError) as error:
        check(load_study(path), Parsers())
    assert message in str(error.value)
    assert f"{path}:{line_of(path, 'second:')}: arm 'second'" in str(error.value)


EVALUATE_FAULTS: dict[str, tuple[dict[str, Any], list[str], str, str]] = {
    "a metric of pairs without any": (
        {"held_out": ["train.jsonl"]},
        ["reward_accuracy"],
        "metrics:",
        "reward_accuracy",
    ),
    "pairs and single rows": (
        {"held_out": ["train.jsonl", {"path": "held_out.jsonl"}]},
        ["kl_held_out"],
        "evaluate:",
        "pairs",
    ),
    "a faulty row": ({"held_out": ["faulty.jsonl"]}, ["kl_held_out"], "evaluate:", "faulty.jsonl:1"),
    "no such file": ({"held_out": ["none.jsonl"]}, ["kl_held_out"], "evaluate:", "none.jsonl: no such file"),
    "a number that is none": (
        {"held_out": ["train.jsonl"], "batch_size": "many"},
        ["kl_held_out"],
        "evaluate:",
        "batch_size",
    ),
    "a source that is none": ({"held_out": 7}, ["kl_held_out"], "evaluate:", "held_out"),
    "no undesirable rows": (
        {"held_out": ["good.jsonl"]},
        ["nll_undesirable"],
        "metrics:",
        "nll_undesirable needs undesirable rows",
    ),
    "no desirable rows": (
        {"held_out": ["bad.jsonl"]},
        ["reward_auroc"],
        "metrics:",
        "reward_auroc needs desirable rows",
    ),
    "a rule without answers": (
        {"held_out": ["train.jsonl"], "rule": "rule.py:ends"},
        ["kl_held_out"],
        "evaluate:",
        "--prompts",
    ),
    "no tokens": (
        {"prompts": "prompts.txt", "max_new_tokens": 0},
        ["kl"],
        "evaluate:",
        "max_new_tokens is 0",
    ),
    "prompts that are not there": ({"prompts": "none.txt"}, ["kl"], "prompts: none.txt", "none.txt: no such file"),
    "a rule that is not there": (
        {"prompts": "prompts.txt", "rule": "rule.py:begins"},
        ["rule"],
        "rule: ",
        "'begins'",
    ),
    "a judge that takes something else": (
        {"prompts": "prompts.txt", "judge": "rule.py:ends"},
        ["judge"],
        "judge: ",
        "judge(answer, other, row)",
    ),
    "a judge of single answers that should compare": (
        {
            "prompts": "prompts.txt",
            "win_rate": "quality",
            "against": "x",
            "endpoint": {"url": "http://x", "model": "y"},
        },
        ["grade"],
        "win_rate: ",
        "--against",
    ),
    "a judge without a server": (
        {"prompts": "prompts.txt", "win_rate": "kto"},
        ["win_rate"],
        "win_rate: ",
        "endpoint.url",
    ),
    "scores without others of their prompts": (
        {"held_out": ["scored.jsonl"]},
        ["kl_held_out"],
        "held_out:",
        "3 were dropped",
    ),
    "no batch": ({"held_out": ["train.jsonl"], "batch_size": 0}, ["kl_held_out"], "evaluate:", "batch_size is 0"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVALUATE_FAULTS)
def test_what_cannot_be_measured_is_refused_before_the_first_run(
    name: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faulty.jsonl").write_text('{"prompt": "a", "completion": 3, "label": true}\n')
    scores = [{"prompt": p, "completion": "b", "score": 1.0} for p in "abc"]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    for file, label in (("good", "true"), ("bad", "false")):
        (tmp_path / f"{file}.jsonl").write_text(f'{{"prompt": "a", "completion": "b", "label": {label}}}\n')
    evaluate, metrics, place, message = EVALUATE_FAULTS[name]
    path = make(evaluate=evaluate, metrics=metrics)
    with pytest.raises(StudyError) as error:
        check(load_study(path), Parsers())
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}:{line_of(path, place)}:")


def test_a_key_that_is_written_twice_is_refused(make: Any) -> None:
    path = make()
    lines = path.read_text().splitlines()
    again = lines.index("seeds:")
    path.write_text(
        "\n".join([*lines[:again], f"  kto: {{objective: {ROOT}/experiments/objectives/dpo.yaml}}", *lines[again:]])
    )
    with pytest.raises(StudyError, match=rf"study.yaml:{again + 1}: 'kto' .*line {line_of(path, '  kto:')}"):
        load_study(path)


def test_arms_keep_apart_whatever_they_are_called(make: Any) -> None:
    beta = "model.value_function.init_args.beta"
    study = load_study(make(arms={"β 0.1": {}, "λ 0.1": {beta: 0.2}, "基线": {beta: 0.3}}))
    assert len({arm.folder for arm in study.arms}) == 3
    with pytest.raises(StudyError, match=r"'10' and '10 %'.*'10'"):
        load_study(make(arms={"10": {}, "10 %": {beta: 0.2}}))


def measured_as(study: Study) -> dict[str, Any]:
    return measuring(evaluate_arguments(study, Parsers()))


def claimed(study: Study, out: Path, digests: dict[str, str]) -> None:
    claim(
        study, out, Checked({name: CheckedArm(1, each, each) for name, each in digests.items()}, 3, measured_as(study))
    )


def _pretend(study: Study, out: Path, run: int, metric: str, values: dict[str, float]) -> None:
    folder = study.runs(out)[run].folder
    folder.mkdir(parents=True)
    (folder / "measured.json").write_text(json.dumps(measured_as(study)))
    (folder / "evaluation.json").write_text(json.dumps({metric: values}))
    (folder / "summary.json").write_text(json.dumps({"steps": 3, "planned_steps": 3, "finished": True}))


def test_a_folder_is_refused_where_it_holds_other_results(make: Any, tmp_path: Path) -> None:
    out, metrics = tmp_path / "out", ["kl"]

    def study(over: str | None = None, **given: Any) -> Study:
        if over is not None:
            (tmp_path / "over.yaml").write_text(over)
        return load_study(make(metrics=metrics, **given), tmp_path / "over.yaml" if over is not None else None)

    digests = {"kto": "1", "no loss aversion": "2"}
    plain = study()
    claimed(study("seeds: [5]\n"), out, digests)
    claimed(plain, out, digests)
    assert not (out / "overrides.yaml").exists()  # or the report would be of the seed 5 for ever
    # Nothing is measured yet: other ways of measuring are free.
    measured = {"prompts": str(tmp_path / "prompts.txt"), "max_new_tokens": 3}
    claimed(study(evaluate=measured), out, digests)
    _pretend(study(evaluate=measured), out, 0, "kl", {"a": 1.0})
    claimed(study(evaluate=measured), out, digests)
    with pytest.raises(StudyError, match="kto/seed-0 was measured"):
        claimed(study(evaluate={**measured, "max_new_tokens": 2}), out, digests)
    (tmp_path / "prompts.txt").write_text("others\n")
    with pytest.raises(StudyError, match="kto/seed-0 was measured"):
        claimed(study(evaluate=measured), out, digests)
    (tmp_path / "prompts.txt").write_text("one\ntwo why\nthree so\n")
    # An arm that was taken out is still known when it comes back with another config.
    alone = {"no loss aversion": plain.arms[1].options | {"objective": plain.arms[1].configs[-1]}}
    claimed(study(evaluate=measured, arms=alone), out, {"no loss aversion": "2"})
    with pytest.raises(StudyError, match=r"arm 'kto' had another config.*remove .*kto"):
        claimed(study(evaluate=measured), out, {**digests, "kto": "3"})
    renamed = {"kto %": {"objective": plain.arms[0].configs[-1]}}  # another arm, in the same folder
    with pytest.raises(StudyError, match=r"arm 'kto %' had another config"):
        claimed(study(evaluate=measured, arms=renamed), out, {"kto %": "4"})
    shutil.rmtree(out / "kto")
    claimed(study(evaluate=measured), out, {**digests, "kto": "3"})
    other = tmp_path / "elsewhere.yaml"
    other.write_text((tmp_path / "study.yaml").read_text())
    claimed(load_study(other), out, {**digests, "kto": "3"})  # the same by another name
    (out / "kto").mkdir()
    taken = {"nothing": {"objective": plain.arms[0].configs[-1]}}
    third = tmp_path / "third.yaml"
    third.write_text(study(evaluate=measured, arms=taken).path.read_text())
    with pytest.raises(StudyError, match="another study"):
        claimed(load_study(third), out, {"nothing": "9"})


@pytest.mark.slow
def test_runs_say_how_they_were_measured(make: Any, here: list[str], tmp_path: Path, capsys: Any) -> None:
    """An arm that is left out while the measuring changes is not compared with the others when it comes back."""
    out = tmp_path / "out"
    path = make(metrics=["length"])
    arms = yaml.safe_load(path.read_text())["arms"]
    measured = {"prompts": str(tmp_path / "prompts.txt"), "max_new_tokens": 3}
    main(
        [
            "ablate",
            str(make(metrics=["length"], seeds=[0], arms={"kto": arms["kto"]}, evaluate=measured)),
            f"--out={out}",
        ]
    )
    [kept] = out.glob("*/seed-0/measured.json")
    said = json.loads(kept.read_text())
    assert said["evaluate"].items() >= measured.items()
    assert said["files"].keys() == {measured["prompts"]}
    trained = json.loads((kept.parent / "summary.json").read_text())
    assert (trained["by"], trained["steps"]) == (said["by"], said["step"])
    for known in (trained["digests"], said["files"]):
        for path, digest in known.items():
            assert f"{path}, sha256 " in (out / "report.md").read_text()
            assert digest in (out / "report.md").read_text()
    assert "## At the end of training" in (out / "report.md").read_text()
    assert set(said["by"]) == {"revision", "halos_pl", "versions", "machine"}
    made = (out / "report.md").read_text().partition("## Methods")[2]
    assert "1 run " in made
    for key in ("revision", "halos_pl", "machine"):
        assert said["by"][key] in made
    assert f"--out {out}" in (out / "report.md").read_text()
    other = {name: own for name, own in arms.items() if name != "kto"}
    more = {**measured, "max_new_tokens": 4}
    main(["ablate", str(make(metrics=["length"], seeds=[0], arms=other, evaluate=more)), f"--out={out}"])
    with pytest.raises(SystemExit):
        main(["ablate", str(make(metrics=["length"], seeds=[0], evaluate=more)), f"--out={out}"])
    assert "kto/seed-0 was measured differently" in capsys.readouterr().err


def test_a_run_that_cannot_be_compared_is_left_out_by_name(make: Any, tmp_path: Path) -> None:
    study = load_study(make(metrics=["kl"], seeds=[0, 1, 2]))
    sound = {"a": 1.0, "b": 2.0, "c": 4.0}
    for run in range(4):
        _pretend(study, tmp_path / "out", run, "kl", {k: v + run % 2 for k, v in sound.items()})
    _pretend(study, tmp_path / "out", 4, "kl", {**sound, "b": float("nan")})
    _pretend(study, tmp_path / "out", 5, "kl", {"a": 1.0, "b": 2.0})
    results = Results(study, tmp_path / "out")
    runs = study.runs(tmp_path / "out")
    assert results.faults == {
        runs[4]: "kl of 1 of 3 examples is not finite",
        runs[5]: "kl has 2 examples; 1 differ from those of other runs",
    }
    assert results.done == runs[:4]
    [found] = results.comparisons("kl").values()
    assert (found.seeds, found.scale, found.effect) == (2, "ratio", pytest.approx(10 / 7))


def test_examples_on_which_a_judge_abstains_are_left_out_of_all_runs(make: Any, tmp_path: Path) -> None:
    evaluate = {"prompts": "p.txt", "win_rate": "kto", "endpoint": {"url": "http://x", "model": "y"}}
    study, out = load_study(make(metrics=["win_rate"], seeds=[0, 1], evaluate=evaluate)), tmp_path / "out"
    shares = {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.5}
    for run, lost in enumerate(("", "b", "", "d")):
        values = {name: value * (run + 1) / 4 for name, value in shares.items() if name != lost}
        _pretend(study, out, run, "win_rate", values)
    (study.runs(out)[0].folder / "before.json").write_text(json.dumps({"win_rate": dict.fromkeys("abcd", 0.5)}))
    results = Results(study, out)
    assert not results.faults
    assert results.values("win_rate", study.arms[1], [0, 1]).tolist() == [[0.5, 0], [1, 0]]
    [compared] = results.comparisons("win_rate").values()
    assert (compared.examples, compared.seeds) == (2, 2)


def test_a_run_that_was_made_in_another_way_is_left_out(make: Any, tmp_path: Path) -> None:
    """As after a change of a config, of data, or of the rule while the study runs."""
    study = load_study(make(metrics=["kl"], seeds=[0, 1, 2]))
    out = tmp_path / "out"
    runs = study.runs(out)
    for number, run in enumerate(runs):
        _pretend(study, out, number, "kl", {"a": 1.0})
        config = {
            "run_dir": str(run.folder),
            "seed_everything": run.seed,
            "model": {"lr": 1e-3 if number != 2 else 1e-4},
        }
        (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
        (run.folder / "summary.json").write_text(json.dumps({"digests": {"x.jsonl": "1" if number != 3 else "2"}}))
    changed = runs[5].folder / "measured.json"
    said = json.loads(changed.read_text())
    said["files"][next(iter(said["files"]))] = "0"
    changed.write_text(json.dumps({**said, "by": {"revision": "other"}}))
    faults = Results(study, out).faults
    assert list(faults) == [runs[5], runs[2], runs[3]]
    assert re.fullmatch("trained .*: model.lr differs", faults[runs[2]])
    assert re.fullmatch("trained .*: the data x.jsonl differs", faults[runs[3]])
    assert re.match("measured .*: files.", faults[runs[5]])


def test_an_interrupted_study_keeps_what_failed_before(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(make())
    runs = study.runs(tmp_path / "out")
    record_failure(runs[3], ["fit"], "out of memory")
    called_off = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            called_off.set()
            super().shutdown(wait=wait)

    def interrupted(run: Any, *_: Any) -> str:
        if run.folder != runs[0].folder:  # a run takes longer than it takes to call off those behind it
            called_off.wait(60)
        record_failure(run, ["fit"], "killed by SIGINT")
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(execute, "execute_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute.execute(study, tmp_path / "out", 1, False)
    assert [state(run) for run in runs] == ["waiting"] * 3 + ["failed"]
    assert failure(runs[3])["error"] == "out of memory"


def test_a_prompt_with_more_rows_is_no_other_value() -> None:
    """Values that are alike have no spread, whoever has how many of them; and the error is that of a ratio."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 9, 40)

    def values(of_row: Callable[[int], float]) -> list[float]:
        rows = [(f"{i}.{k}", f"{i}") for i, n in enumerate(sizes) for k in range(n)]
        return list(by_example({row: of_row(j) for j, (row, _) in enumerate(rows)}, dict(rows)).values())

    assert values(lambda j: 0.7) == pytest.approx([0.7] * 40)
    # Of one row each the values are those of the rows to the bit, as McNemar's test has to see.
    single = {f"{i}": float(i % 8 == 0) for i in range(55)}
    assert by_example(single, {name: name for name in single}) == single
    x = draw.random(sizes.sum())
    found = np.array(values(lambda j: float(x[j])))
    assert found.mean() == pytest.approx(x.mean())
    sums = np.add.reduceat(x, np.concatenate([[0], sizes.cumsum()[:-1]]))
    theory = ((sums - x.mean() * sizes) ** 2).sum() / sizes.sum() ** 2  # Cochran 1977, eq. 6.9, n / (n - 1) left out
    assert found.var() / 40 == pytest.approx(theory)


def test_what_a_command_said_last_is_of_this_attempt(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("halos: DataError: the first attempt's\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("usage: ...\nerror: Parser key 'x': no such thing\n")
        file.write("  There is: y\n\nAll options: halos fit --help\n")
    assert processes.last_words(log, start, 1) == "error: Parser key 'x': no such thing There is: y"
    assert processes.last_words(log, start, -9).startswith("killed by SIGKILL")  # what was said before is not why


def test_what_is_measured_on_is_known_by_its_content_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "some").mkdir()
    file = tmp_path / "some" / "a.jsonl"
    (tmp_path / "some" / "b.jsonl").write_text("{}\n")
    places = [str(file), "~/some/a.jsonl", "$PLACE/some/a.jsonl", str(tmp_path / "some"), f"{tmp_path}/some/*.jsonl"]
    file.write_text("1\n")
    before = [digest_of(place) for place in places]
    assert len(set(before[:3])) == 1
    file.write_text("2\n")
    assert not set(before) & {digest_of(place) for place in places}
    assert digest_of("owner/hub-set") == "not a file here"


def test_a_run_whose_weights_are_gone_is_trained_again(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(make())
    run = study.runs(tmp_path / "out")[0]
    called: list[str] = []

    def process(words: list[str], log: Path, env: Any, lock: Any = None) -> int:
        called.append(words[0])
        return 0

    monkeypatch.setattr(processes, "run_command", process)
    run.folder.mkdir(parents=True)
    (run.folder / SUMMARY).write_text("{}")
    execute.execute_run(run, study)
    assert called == ["fit", "evaluate"]
    (run.folder / LAST).parent.mkdir()
    (run.folder / LAST).write_text("")
    execute.execute_run(run, study)
    assert called == ["fit", "evaluate", "evaluate"]


ORPHAN = """
import os, signal, sys
from pathlib import Path
from filelock import FileLock
from halos_pl.study import execute, processes

sys.executable = sys.argv[1]
lock = FileLock(sys.argv[2])
lock.acquire()
processes.run_command(["fit"], Path(sys.argv[3]), os.environ, execute.descriptor(lock))
"""


def test_a_run_whose_study_has_died_is_still_locked(tmp_path: Path) -> None:
    """Or the study, started again, would train in a folder that another process writes to."""
    child = tmp_path / "child.sh"
    child.write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nwhile [ ! -e {tmp_path}/end ]; do sleep 0.05; done\n")
    child.chmod(0o755)
    lock = tmp_path / "lock"
    study = subprocess.Popen([sys.executable, "-c", ORPHAN, str(child), str(lock), str(tmp_path / "log.txt")])
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    study.kill()
    study.wait()
    with pytest.raises(Timeout):
        FileLock(lock).acquire(timeout=0.1)
    (tmp_path / "end").touch()
    FileLock(lock).acquire(timeout=10)


@pytest.mark.parametrize("cluster", [None, {"cluster": "local"}])
def test_what_two_processes_are_given_is_done_once(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: dict[str, str] | None
) -> None:
    study = load_study(make(**({"cluster": cluster} if cluster else {})))
    run = study.runs(tmp_path / "out")[0]
    called: list[str] = []

    def process(words: list[str], log: Path, env: Any, lock: Any = None) -> int:
        called.append(words[0])
        time.sleep(0.05)
        run.folder.mkdir(exist_ok=True)
        if words[0] == "fit":
            (run.folder / "summary.json").write_text("{}")
        if words[0] == "evaluate":
            (run.folder / "evaluation.json").write_text("{}")
        return 0

    monkeypatch.setattr(processes, "run_command", process)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: execute.execute_run(run, study), range(2))) == [None, None]
    assert called == ["fit", "evaluate"]


def test_names_and_errors_are_shown_as_they_are(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To rich [a] is a style, to matplotlib $a$ a formula, and a name with _ in front one to leave out."""
    monkeypatch.setenv("COLUMNS", "200")
    arms = {"_x $\\alpha [a]": {}, "$\\frac": {}}
    study = load_study(make(arms=arms, metrics=["kl"], seeds=[0, 1]))
    out = tmp_path / "out"
    for number in range(4):
        if number != 3:
            _pretend(study, out, number, "kl", {"a": 1.0 * number, "b": 2.0})
    drawn = figures.forest(Results(study, out))
    assert drawn is not None
    drawn.draw_without_rendering()
    assert drawing.label(study.arms[0].name).strip().replace("\\$", "$") == study.arms[0].name
    failed = study.runs(out)[3]
    record_failure(failed, ["fit"], "RuntimeError: [/tmp/x] [enforce fail at alloc_cpu.cpp:117]")
    claimed(study, tmp_path / "other", {arm.name: arm.name for arm in study.arms})
    for name in ("plan.json", "study.yaml"):
        shutil.copy(tmp_path / "other" / name, out / name)
    (tmp_path / "rule.py").unlink()  # what was measured is known without it
    main(["ablate", "status", str(out)])
    assert "RuntimeError: [/tmp/x] [enforce fail at alloc_cpu.cpp:117]" in capsys.readouterr().out


def test_arms_in_one_place_of_the_grid_are_not_drawn_over_each_other(make: Any, tmp_path: Path) -> None:
    axes = {"model.value_function.init_args.beta": [0.1, 0.2], "data.batch_size": [2, 4]}
    beta = "model.value_function.init_args.beta"
    both = {str(n): {"data.max_length": n, "model.micro_batch_rows": n} for n in (8, 16)}  # two options, one side
    for arms, some, drawn in (
        (None, axes, True),
        ({"one": {}, "two": {"data.max_length": 99}}, axes, False),
        (both, {beta: axes[beta]}, True),
    ):
        study = load_study(make(arms=arms, axes=some, metrics=["kl"], seeds=[0]))
        out = tmp_path / f"{len(study.arms)} {len(some)} {drawn}"
        for number in range(len(study.arms)):
            _pretend(study, out, number, "kl", {"a": float(number)})
        assert (figures.heat_map(Results(study, out)) is not None) == drawn


@pytest.mark.filterwarnings("ignore")
def test_a_study_runs_goes_on_after_a_failure_and_reports(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first seed of each arm is trained and measured; the second is a copy of it with another KL."""
    path, out = make(), tmp_path / "out"
    verdicts = {"icml": SimpleNamespace(verdict="as checked elsewhere")}
    monkeypatch.setattr(gather, "reports", lambda objective, **_: verdicts if isinstance(objective, Objective) else {})
    broken = out / "no_loss_aversion" / "seed-1"
    faulty, called = [True], []

    def process(words: list[str], log: Path, env: Any, lock: Any = None) -> int:
        called.append(command(words))
        log.parent.mkdir(parents=True, exist_ok=True)
        fit = words[0] == "fit"
        folder = Path(next(w for w in words if w.startswith("--run_dir=")).partition("=")[2] if fit else words[1])
        if folder == broken and faulty[0]:  # a fault that no look at the config finds
            log.write_text("halos: RuntimeError: out of memory\n")
            return 1
        if folder.name == "timed_step":
            folder.mkdir()
            (folder / "summary.json").write_text('{"wall_seconds": 2.0}')
        elif folder.name == "seed-0":
            main(words)
        elif fit:
            shutil.copytree(folder.with_name("seed-0"), folder)
            (folder / "evaluation.json").unlink()
        else:
            measured = json.loads((folder.with_name("seed-0") / "evaluation.json").read_text())
            measured["kl"] = {prompt: 1.1 * value for prompt, value in measured["kl"].items()}
            (folder / "evaluation.json").write_text(json.dumps(measured))
        return 0

    monkeypatch.setattr(processes, "run_command", process)
    monkeypatch.setattr(report, "png", lambda figure: b"drawn")  # test_report saves some
    with pytest.raises(SystemExit):
        main(["ablate", str(path), f"--out={out}"])
    results = Results(load_study(path), out)
    assert [run.folder for run in results.runs if not run.done] == [broken]
    assert state(results.runs[-1]) == "failed"
    assert failure(results.runs[-1])["error"] == "halos: RuntimeError: out of memory"
    page = (out / "report.md").read_text()
    assert f"| {broken} | failed | halos: RuntimeError: out of memory |" in page
    assert "1 of 4 runs" in page
    # The commands of the report are those that were run.
    assert len(set(called)) == 1 + 2 * 4 - 1
    assert all(each in page.splitlines() for each in called if "timed_step" not in each)

    called.clear()
    faulty[0] = False
    main(["ablate", str(path), f"--out={out}"])
    assert [str(broken) in each for each in called if "timed_step" not in each] == [True, True]
    results = Results(load_study(path), out)
    for metric, n in (("reward_accuracy", 6), ("reward_auroc", 6), ("kl", 3), ("judge", 3)):
        e = results.estimates[metric, "kto"]
        assert (e.examples, e.seeds) == (n, 2), metric
    for metric in results.study.metrics:
        assert set(results.comparisons(metric)) == {"no loss aversion"}
        assert results.comparisons(metric)["no loss aversion"].exploratory == (metric != "reward_accuracy")
    for name in ("forest.png", "frontier.png", "curves.png", "value_functions.png"):
        assert (out / name).read_bytes() == b"drawn", name
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * 4  # for a screen and a phone
    assert page.count("as checked elsewhere") == 2
    assert not list(out.rglob("*.ckpt"))
    called.clear()
    assert execute.execute(results.study, out, 1, False) == {}
    assert called == []  # nothing is left to do

    main(["ablate", "status", str(out)])
    with pytest.raises(SystemExit):
        main(["ablate", "status", str(tmp_path / "absent")])


@pytest.mark.filterwarnings("ignore")
def test_the_figures_are_those_of_their_definitions(make: Any, tmp_path: Path) -> None:
    study = load_study(make())
    run = study.runs(tmp_path / "runs")[0]
    main(run.fit)
    main(study.evaluation(run))
    found = json.loads((run.folder / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (run.folder / "held_out.jsonl").read_text().splitlines()]
    reward = {row["row"]: row["policy_logp"] - row["reference_logp"] for row in rows}
    pairs: dict[str, dict[bool, float]] = {}
    for row in rows:
        pairs.setdefault(row["pair"], {})[row["desirable"]] = reward[row["row"]]
    assert len(pairs) == 6
    assert np.mean(list(found["reward_accuracy"].values())) == np.mean([p[True] > p[False] for p in pairs.values()])
    good = [reward[r["row"]] for r in rows if r["desirable"]]
    bad = [reward[r["row"]] for r in rows if not r["desirable"]]
    area = np.mean([[(g > b) + 0.5 * (g == b) for b in bad] for g in good])
    assert np.mean(list(found["reward_auroc"].values())) == pytest.approx(area)
    sigmoid = 1 / (1 + np.exp(-0.1 * np.array([p[True] - p[False] for p in pairs.values()])))
    assert np.mean(list(found["brier"].values())) == pytest.approx(np.mean((1 - sigmoid) ** 2))
    assert all(row["kl"] > 0 for row in rows)
    assert any(abs(r) > 1e-3 for r in reward.values())

    # A study may begin with the config of a run.
    again = make(configs=[str(run.folder / "config.yaml")], options=None, arms={"as it was": {}})
    assert check(load_study(again), Parsers()).arms["as it was"].steps == 2

    # One prompt with several rows is one example: of two pairs, cut to two lengths; and asked twice.
    (tmp_path / "prompts.txt").write_text("one\ntwo why\none\n")
    prompt = "one prompt " * 20
    lines = [{"prompt": prompt, "chosen": "a b c " * n, "rejected": "d e f"} for n in (1, 5)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--held_out", str([str(tmp_path / "long.jsonl")]), "--max_length=40"]
    main(["evaluate", str(run.folder), *words, "--prompts", str(tmp_path / "prompts.txt"), "--max_new_tokens=3"])
    found = json.loads((run.folder / "evaluation.json").read_text())
    assert {metric: len(values) for metric, values in found.items()} == {
        **dict.fromkeys(("reward_accuracy", "reward_margin", "brier", "reward_auroc", "kl_held_out"), 1),
        **dict.fromkeys(("policy_accuracy", "nll_desirable", "nll_undesirable", "displacement"), 1),
        **dict.fromkeys(("kl", "length", "finished"), 2),
    }


def test_rows_of_one_prompt_are_one_example() -> None:
    """A prompt three times over is no more evidence than once; the mean is that over all pairs."""
    counts = {"a": 3, "b": 1, "c": 2}
    records = [
        {"row": f"{p}{i}{d}", "pair": f"{p}{i}", "prompt": p, "desirable": d, "tokens": 2}
        | {"policy_logp": float(ord(p) + i) * (d or -1), "reference_logp": 200.0 * (p == "b"), "kl": float(i)}
        for p, count in counts.items()
        for i in range(count)
        for d in (True, False)
    ]
    found = of_pairs(records, 0.1) | of_rows(records)
    assert set(found) == {name for name, (unit, _, _) in METRICS.items() if unit != "prompts"}
    for values in found.values():
        assert len(values) == len(counts)
    margins = [2.0 * (ord(p) + i) for p, count in counts.items() for i in range(count)]
    assert np.mean(list(found["reward_margin"].values())) == pytest.approx(np.mean(margins))
    assert np.mean(list(found["kl_held_out"].values())) == pytest.approx(np.mean([r["kl"] for r in records]))
    ratios = [r["policy_logp"] - r["reference_logp"] for r in records if r["desirable"]]
    assert np.mean(list(found["displacement"].values())) == pytest.approx(np.mean(ratios))


_rewards = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=8)


@given(policy=_rewards, reference=_rewards)
def test_the_policys_own_accuracy_is_that_of_its_rewards_from_a_uniform_reference(
    policy: list[float], reference: list[float]
) -> None:
    """It needs no reference, and does not depend on one; without rewards, it is the reference's own."""
    size = min(len(policy), len(reference)) // 2 * 2

    def accuracy(logps: list[float], other: list[float] | None, name: str) -> dict[str, float]:
        records = [
            {"row": str(i), "pair": str(i // 2), "prompt": str(i // 2), "desirable": i % 2 == 0, "policy_logp": logp}
            | ({} if other is None else {"reference_logp": other[i], "kl": 0.0})
            for i, logp in enumerate(logps[:size])
        ]
        return of_pairs(records, 0.1)[name]

    found = accuracy(policy, None, "policy_accuracy")
    assert found == accuracy(policy, reference, "policy_accuracy")
    assert found == accuracy(policy, [-5.0] * size, "reward_accuracy")
    shifted = [r + 2.0 for r in reference]  # all completions have the same reward
    assert accuracy(shifted, reference, "policy_accuracy") == accuracy(reference, None, "policy_accuracy")
    assert set(accuracy(shifted, reference, "reward_accuracy").values()) == {0.5}


@given(good=_rewards, bad=_rewards)
def test_the_roc_area_varies_as_delong_says(good: list[float], bad: list[float]) -> None:
    """Rows by themselves: DeLong's variance. In pairs: Obuchowski's, with the covariance of both rows."""

    def figures(paired: bool) -> np.ndarray[Any, Any]:
        records = [
            {"row": f"{d}{i}", "pair": f"pair {i}" if paired else None, "desirable": d, "tokens": 1}
            | {"policy_logp": r, "reference_logp": 0.0, "kl": 0.0, "prompt": f"{'' if paired else d}{i}"}
            for d, rewards in ((True, good), (False, bad))
            for i, r in enumerate(rewards)
        ]
        return np.array(list(of_rows(records)["reward_auroc"].values()))

    def shares(a: list[float], b: list[float]) -> np.ndarray[Any, Any]:
        """psi[i, j] is 1 where the desirable row i has the higher reward, 0.5 where both have the same."""
        return (np.sign(np.subtract.outer(a, b)) + 1) / 2

    psi = shares(good, bad)
    single = figures(paired=False)
    assert single.mean() == pytest.approx(psi.mean())
    wanted = psi.mean(axis=1).var() / len(good) + psi.mean(axis=0).var() / len(bad)
    assert single.var() / len(single) == pytest.approx(wanted)
    if len(good) == len(bad):
        both = figures(paired=True)
        assert len(both) == len(good)
        assert both.mean() == pytest.approx(psi.mean())
        assert both.var() == pytest.approx((psi.mean(axis=1) + psi.mean(axis=0)).var())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_before_it_is_trained_a_policy_is_its_reference(lora: bool, make: Any, tmp_path: Path) -> None:
    """A rate of 0 trains nothing: no KL, no rewards, no difference."""
    own = {"model.policy.lora": {"r": 4}} if lora else {}
    arms = {"kto": {"objective": f"{ROOT}/experiments/objectives/kto.yaml", "model.optimizer.init_args.lr": 0.0, **own}}
    study = load_study(make(arms=arms))
    run = study.runs(tmp_path / "runs")[0]
    main(run.fit)
    main(study.evaluation(run))
    found = json.loads((run.folder / "evaluation.json").read_text())
    assert set(found["reward_accuracy"].values()) <= {0.0, 0.5, 1.0}
    assert max(map(abs, found["reward_margin"].values())) < 1e-4
    assert max(map(abs, found["kl"].values())) < 1e-5
    assert set(found["judge"].values()) == {0.5}


def test_a_cluster_that_is_none_is_refused_by_its_line(make: Any, tmp_path: Path) -> None:
    for cluster, said in (({"cluster": "slrum"}, "slrum"), ({"cluster": "local", "timeout": 3}, "timeout")):
        path = make(cluster=cluster)
        with pytest.raises(StudyError, match=said) as error:
            execute.executor_of(load_study(path), tmp_path / "out")
        assert str(error.value).startswith(f"{path}:{line_of(path, 'cluster:')}: cluster: ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_runs_are_handed_to_a_cluster(make: Any, tmp_path: Path) -> None:
    """submitit's own, which is processes of this machine; one of the two arms fails there."""
    arms = yaml.safe_load(make().read_text())["arms"]
    arms["no loss aversion"]["model.optimizer.init_args.lr"] = -1.0
    study = make(seeds=[0], arms=arms, metrics=["length"], cluster={"cluster": "local", "timeout_min": 5})
    with pytest.raises(SystemExit):
        main(["ablate", str(study), f"--out={tmp_path / 'out'}"])
    results = Results(load_study(study), tmp_path / "out")
    assert [state(run) for run in results.runs] == ["done", "failed"]
    assert "Invalid learning rate" in failure(results.runs[1])["error"]


@pytest.mark.slow
def test_from_a_shell_with_two_at_a_time(make: Any, tmp_path: Path) -> None:
    main(["ablate", str(make()), f"--out={tmp_path / 'out'}", "--jobs=2"])
    assert len(Results(load_study(make()), tmp_path / "out").done) == 4


def test_a_rule_may_use_dataclasses_and_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_the_rule.py").write_text("LIMIT = 3\n")
    (tmp_path / "of_mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_the_rule import LIMIT\n"
        "@dataclass\nclass Limit:\n    most: int = LIMIT\n\n"
        "def short(answer, finished):\n    return len(answer) <= Limit().most\n"
    )
    short = judged_by(f"{tmp_path}/of_mine.py:short", "rule").function
    assert (short("abc", True), short("abcd", True)) == (True, False)


def test_code_of_the_users_own_belongs_to_an_arm(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value function that is changed between two runs makes another arm; ours have a revision."""
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = tmp_path / "values_of_mine.py"
    mine.write_text("from value_functions import Logistic\n\nclass Mine(Logistic):\n    pass\n")
    arms = {
        name: {"objective": f"{ROOT}/experiments/objectives/kto.yaml", **own}
        for name, own in (("ours", {}), ("mine", {"model.value_function": "values_of_mine.Mine"}))
    }
    study = load_study(make(arms=arms))
    before = check(study, Parsers()).digests
    mine.write_text(mine.read_text() + "# changed\n")
    after = check(study, Parsers()).digests
    assert after["ours"] == before["ours"]
    assert after["mine"] != before["mine"]
