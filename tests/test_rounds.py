"""Online training: the file, the stages and their resumption, and the report."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_halos import ROOT, refused, write_jsonl

from halos_pl.cli.main import main
from halos_pl.rounds.diversity import distinct
from halos_pl.rounds.read import load_rounds
from halos_pl.rounds.spec import RoundsError
from halos_pl.rounds.windows import window, wraps
from halos_pl.study import processes

RULE = """
def short(answer, row):
    return len(answer) % 2
"""


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a file of rounds with these keys replaced, and everything that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rule.py").write_text(RULE)
    (tmp_path / "prompts.txt").write_text("".join(f"question {i}\n" for i in range(6)))
    (tmp_path / "held_out.txt").write_text("".join(f"another question {i}\n" for i in range(4)))

    def write(**keys: Any) -> str:
        options = {
            "model.policy.lora": {"r": 2},
            "model.optimizer.init_args.lr": 1e-3,
            "data.batch_size": 4,
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": False,
            "trainer.enable_model_summary": False,
        }
        content = {
            "model": str(tiny_folder),
            "prompts": "prompts.txt",
            "held_out_prompts": "held_out.txt",
            "rounds": 2,
            "window": 4,
            "sample": {"n": 2, "max_new_tokens": 4},
            "label": {"by": "rule: rule.py:short", "form": "binary"},
            "fit": {"objective": "kto", "options": options},
            "reference": "first",
            "answers": 2,
            **keys,
        }
        content = {key: value for key, value in content.items() if value is not None}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return "study.yaml"

    return write


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs the commands of the stages in this process, and records them."""
    commands: list[list[str]] = []

    def process(words: list[str], log: Path, env: Any, lock: Any = None) -> int:
        commands.append(words)
        try:
            main(words)
        except SystemExit as error:
            log.write_text(f"halos: error: status {error.code}\n")
            return int(error.code or 0)
        return 0

    monkeypatch.setattr(processes, "run_command", process)
    return commands


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.slow
def test_rounds_train_on_answers_of_the_last_model_and_report(
    make: Any, tiny_folder: Path, here: list[list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Also: the second call repeats nothing, a lost record of a stage repeats that stage alone, changes are refused."""
    shutil.copytree(tiny_folder, "model")
    make = functools.partial(make, offline="sampled", model="model")
    make()
    with open("held_out.txt", "a") as file:
        file.write("another question 0\n")
    main(["rounds", "study.yaml"])
    stages = ["sample", "label", "fit", "evaluate"]
    assert [words[0] for words in here] == stages * 3
    assert here[4][1] == "runs/study/round-1/run"  # the second round samples from the first one's model
    printed = capfd.readouterr().out
    assert "[1/12] round 1, sample" in printed
    assert "[12/12] offline, evaluate" in printed
    assert "used again" in printed  # 8 prompts of 6
    assert "1 repeated prompt" in printed

    out = Path("runs/study")
    used = [row["prompt"] for number in (1, 2) for row in rows(f"runs/study/round-{number}/prompts.jsonl")]
    assert used == [f"question {i % 6}" for i in range(8)]
    assert [row["prompt"] for row in rows("runs/study/offline/prompts.jsonl")] == used
    report = json.loads((out / "report.json").read_text())
    assert report["rounds"] == {"finished": 2, "planned": 2}
    training = report["training"]
    assert training["offline"]["steps"] == training["round 1"]["steps"] + training["round 2"]["steps"]
    means = report["means"]
    assert means["first model"]["kl"]["value"] == 0 < means["round 1"]["kl"]["value"] < means["round 2"]["kl"]["value"]
    answers = rows("runs/study/round-2/run/answers.jsonl")
    assert len(answers) == 8
    mine, before = ([len(each["answer"]) % 2 for each in some] for some in (answers, [a["before"] for a in answers]))
    effect = report["against_first"]["rule"]["round 2"]["effect"]
    assert means["round 2"]["rule"]["value"] == pytest.approx(sum(mine) / 8)
    assert effect == pytest.approx((sum(mine) - sum(before)) / 8)
    assert "not significant" in (out / "report.md").read_text()  # no effect on 4 prompts can be
    assert (out / "rounds.png").stat().st_size > 0
    assert not (out / "round-1/run/checkpoints/last.ckpt").exists()
    assert (out / "round-2/run/checkpoints/last.ckpt").exists()

    here.clear()
    main(["rounds", "study.yaml"])
    assert here == []
    stages_file = out / "offline/stages.json"
    recorded = json.loads(stages_file.read_text())
    del recorded["evaluate"]
    stages_file.write_text(json.dumps(recorded))
    main(["rounds", "study.yaml"])
    assert [words[:2] for words in here] == [["evaluate", "runs/study/offline/run"]]

    make(sample={"n": 2, "max_new_tokens": 5})
    assert "sample.max_new_tokens was 4" in refused(capfd, ["rounds", "study.yaml"])
    content = yaml.safe_load(Path(make()).read_text())
    content["fit"]["options"]["model.optimizer.init_args.lr"] = 2e-3
    Path("study.yaml").write_text(yaml.safe_dump(content))
    assert "fit: model.optimizer.lr was 0.001" in refused(capfd, ["rounds", "study.yaml"])
    make(rounds=3)
    assert "rounds was 2" in refused(capfd, ["rounds", "study.yaml"])
    make()
    config = Path("model/config.json")
    config.write_text(config.read_text() + " ")
    assert "the content of model was" in refused(capfd, ["rounds", "study.yaml"])
    shutil.copy(tiny_folder / "config.json", config)
    with (out / "round-1/labels.jsonl").open("a") as file:  # the restored model is accepted
        file.write("\n")
    assert "round-1/labels.jsonl" in refused(capfd, ["rounds", "study.yaml"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "keys"),
    [
        ("dpo", {"reference": "last", "optimizer": "fresh"}),
        ("humanline_dpo", {"reference": None}),
        ("kto", {"reference": "last"}),
    ],
)
def test_the_reference_is_that_of_the_file(
    make: Any, here: list[list[str]], objective: str, keys: dict[str, Any]
) -> None:
    """A round whose reference is the last model starts at a reward of 0; several labellers give a score."""
    Path("rule_2.py").write_text(RULE.replace("% 2", "% 3 / 2"))
    label = {
        "by": ["rule: rule.py:short", "rule: rule_2.py:short"],
        "form": "pairs" if "dpo" in objective else "binary",
    }
    options = {"model.policy.lora": {"r": 2}, "model.optimizer.init_args.lr": 1e-2, "trainer.accelerator": "cpu"}
    # Two steps per round: SyncedCopy follows after the second one.
    options |= {"data.batch_size": 8, "trainer.max_epochs": 2, "trainer.max_steps": 2}
    make(label=label, sample={"n": 4, "max_new_tokens": 4}, fit={"objective": objective, "options": options}, **keys)
    main(["rounds", "study.yaml"])
    stages = ["sample", "label", "fit", "evaluate", "label"]
    last = ["export"] if keys["reference"] == "last" else []
    assert [words[0] for words in here] == [*stages, *last, *stages]
    with open("runs/study/round-2/run/metrics.csv") as file:
        start = next(csv.DictReader(file))
    assert any("margin" in name for name in start)
    margin = float(next(value for name, value in start.items() if "margin" in name and value))
    assert margin == pytest.approx(0, abs=1e-4)
    report = json.loads(Path("runs/study/report.json").read_text())
    assert report["primary"] == "score"
    assert 0 <= report["means"]["round 2"]["score"]["value"] <= 1


def _kill_at(words: list[str], reached: Callable[[], bool]) -> None:
    """Starts a command, and kills it and its processes once a state is reached."""
    process = subprocess.Popen([sys.executable, "-m", "halos_pl", *words], start_new_session=True)
    while not reached() and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before that state"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_rounds_resume_with_equal_results(
    make: Any, here: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it samples, labels and fits, in both rounds."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    study = make(sample={"n": 2, "max_new_tokens": 4, "batch_size": 2}, offline=None)
    content = yaml.safe_load(Path(study).read_text())
    content["fit"]["options"] |= {"checkpoint.every_n_steps": 1, "data.batch_size": 2}
    Path(study).write_text(yaml.safe_dump(content))
    main(["rounds", study, "--out=whole"])
    out = Path("killed")
    words = ["rounds", study, f"--out={out}"]

    def has(name: str) -> Callable[[], bool]:
        return lambda: (out / name).exists() and (out / name).stat().st_size > 0

    for name in (
        "round-1/samples.jsonl.halos.part",
        "round-1/run/checkpoints/last.ckpt",
        "round-2/samples.jsonl",
        "round-2/run/checkpoints/last.ckpt",
    ):
        _kill_at(words, has(name))
    here.clear()
    main(words)
    assert [words[0] for words in here][-1] == "evaluate"
    for number in (1, 2):
        for file in ("samples.jsonl", "labels.jsonl", "run/answers.jsonl"):
            one, other = (rows(f"{folder}/round-{number}/{file}") for folder in ("whole", out))
            dropped = ("logprob", "token_logprobs")  # rounding
            one, other = ([{k: v for k, v in row.items() if k not in dropped} for row in some] for some in (one, other))
            assert one == other


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"windows": 3}, "'windows'"),
    "missing key": ({"model": None}, "model"),
    "no rounds": ({"rounds": 0}, "rounds"),
    "option of a stage": ({"sample": {"n": 2, "temprature": 1}}, "'temprature'"),
    "option that is set": ({"sample": {"out": "x"}}, "sample.out"),
    "optimizer": ({"optimizer": "kept"}, "'kept'"),
    "labeller": ({"label": {"by": "rules: x"}}, "'rules: x'"),
    "rule": ({"label": {"by": "rule: rule.py:long"}}, "long"),
    "prompts": ({"prompts": "none.txt"}, "none.txt"),
    "held-out prompts": ({"held_out_prompts": "prompts.txt"}, "6 of 6"),
    "range": ({"sample": {"n": 2, "temperature": -1}}, "temperature"),
    "equal samples": ({"sample": {"n": 2, "temperature": 0}}, "study.yaml:6: sample: n is 2"),
    "no model": ({"model": "./none"}, "study.yaml:1: model: ./none"),
    "too few for pairs": ({"sample": {"n": 1}, "label": {"by": "rule: rule.py:short", "form": "pairs"}}, "sample.n"),
    "form of labels": ({"fit": {"objective": "dpo"}}, "label.form"),
    "option without effect": ({"label": {"by": "rule: rule.py:short", "threshold": 0.3}}, "threshold"),
    "reward model": ({"label": {"by": "reward: /none"}}, "/none"),
    "server": (
        {"label": {"by": "judge: kto", "endpoint": {"url": "http://127.0.0.1:1/v1", "model": "x"}}},
        "no connection",
    ),
    "objective": ({"fit": {"objective": "kt0"}}, "kt0"),
    "objective without text": ({"fit": {"objective": "bradley_terry"}}, "reward model"),
    "option of fit": ({"fit": {"objective": "kto", "options": {"model.lr": 1}}}, "lr"),
    "run's folder": ({"fit": {"objective": "kto", "options": {"run_dir": "x"}}}, "run_dir"),
    "reference": ({"fit": {"objective": "humanline_kto"}}, "model.reference_model"),
    "offline": ({"offline": "none.jsonl"}, "none.jsonl"),
}


#: Faults that only the parsers of other commands find; those take a second each.
PARSED = (
    *(
        "rule",
        "prompts",
        "range",
        "equal samples",
        "no model",
        "too few for pairs",
        "form of labels",
        "objective",
        "option of fit",
        "labeller",
    ),
    *("option without effect", "reward model", "server", "objective without text"),
)


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.slow if fault in PARSED else []) for fault in FAULTS]
)
def test_faults_are_refused_with_their_line(
    fault: str, make: Any, no_model: None, capfd: pytest.CaptureFixture[str]
) -> None:
    keys, named = FAULTS[fault]
    message = refused(capfd, ["rounds", make(**keys)])
    assert message.startswith("halos: RoundsError: study.yaml:")
    assert named in message
    assert not Path("runs").exists()


def test_a_held_out_prompt_with_two_gold_answers_is_refused(
    make: Any, no_model: None, capfd: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(Path("gold.jsonl"), [{"prompt": "a", "answer": answer} for answer in ("b", "c")])
    message = refused(capfd, ["rounds", make(held_out_prompts="gold.jsonl")])
    assert "gold.jsonl:2" in message
    assert "gold.jsonl:1" in message


def test_a_foreign_folder_is_refused(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    Path("other").mkdir()
    Path("other/file").touch()
    assert "other is not empty" in refused(capfd, ["rounds", make(), "--out=other"])


def test_windows_follow_each_other_and_wrap() -> None:
    assert [window(number, 3, 8) for number in (1, 2, 3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 0]]
    assert [wraps(number, 3, 8) for number in (1, 2, 3)] == [False, False, True]
    assert window(1, 5, 2) == [0, 1, 0, 1, 0]


def test_distinct_bigrams() -> None:
    assert distinct(["a b a b"]) == 2 / 3
    assert distinct(["a b", "a b", "c d"]) == 2 / 3
    assert distinct(["a b c"]) == distinct(["a"]) == distinct([""]) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/online").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_file_is_read_by_name(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = load_rounds(f"online/{path.stem}")
    assert study.prompts.is_file()
    assert study.held_out_prompts.is_file()
    assert Path(str(study.rule).rpartition(":")[0]).is_file()


def test_a_name_that_is_no_file_is_refused() -> None:
    with pytest.raises(RoundsError, match=r"none\.yaml"):
        load_rounds("none.yaml")
