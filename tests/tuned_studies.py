"""A study that tunes the learning rate of tiny models, and commands that train nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_halos import ROOT, small_options, write_jsonl

from halos_pl.cli.ablate import Parsers
from halos_pl.evaluation.arguments import measuring
from halos_pl.evaluation.evaluate import ARGUMENTS
from halos_pl.study import preflight, processes, report
from halos_pl.study.contents import config_by_content, digest
from halos_pl.study.preflight import Checked, CheckedArm
from halos_pl.study.spec import Arm, Study

LR = "model.optimizer.init_args.lr"
OBJECTIVE = f"{ROOT}/experiments/objectives"


def pairs(prefix: str, n: int) -> list[dict[str, str]]:
    return [{"prompt": f"{prefix} {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(n)]


def maker(tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a study that tunes the learning rate; what is given replaces its keys, None removes one."""
    rows = [{"prompt": f"train {i}", "completion": f"answer {i}", "label": i % 3 != 0} for i in range(12)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "held_out.jsonl", pairs("report", 6))
    write_jsonl(tmp_path / "validation.jsonl", pairs("validation", 5))
    (tmp_path / "prompts.txt").write_text("ask one\nask two\n")

    def made(**given: Any) -> Path:
        tune = {
            "option": LR,
            "values": [1e-3, 1e-4, 1e-2],
            "seeds": [100],
            "held_out": [str(tmp_path / "validation.jsonl")],
            "metric": "reward_accuracy",
        }
        content: dict[str, Any] = {
            "configs": [f"{ROOT}/experiments/base.yaml"],
            "options": small_options(tiny_folder, tmp_path / "train.jsonl"),
            "arms": {
                "kto": {"objective": f"{OBJECTIVE}/kto.yaml"},
                "other": {"objective": f"{OBJECTIVE}/kto_identity.yaml", "tune": [0.1, 0.2]},
            },
            "seeds": [0, 1],
            "evaluate": {"held_out": [str(tmp_path / "held_out.jsonl")], "max_length": 64},
            "metrics": ["reward_accuracy", "kl_held_out"],
            **given,
            "tune": None if "tune" in given and given["tune"] is None else {**tune, **given.get("tune", {})},
        }
        if content["tune"] is not None:
            content["tune"] = {key: value for key, value in content["tune"].items() if value is not None}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return path

    return made


@cache
def _measuring(words: tuple[str, ...]) -> dict[str, Any]:
    parsed = Parsers().evaluate(["run", *words])
    return measuring({name: parsed[name] for name in ARGUMENTS})


class Fakes:
    """Commands of a study that train nothing: what an arm scores depends on its rate and seed alone."""

    def __init__(self) -> None:
        self.called: list[str] = []
        #: How many of the examples are right by arm and rate, and rates that fail, with the error.
        self.right = {"kto": {1e-4: 2, 1e-3: 4, 1e-2: 3}, "other": {0.1: 1, 0.2: 3, 0.4: 5}}
        self.fails: dict[tuple[str, float], str] = {}
        self.stops_after: int | None = None
        #: The machine that the commands run on, and metrics that they do not measure.
        self.machine = "one"
        self.lacks: set[str] = set()

    def run(self, words: list[str], log: Path, env: Any, lock: Any = None) -> int:
        option = {word.partition("=")[0]: word.partition("=")[2] for word in words}
        folder = Path(option["--run_dir"] if words[0] == "fit" else words[1])
        if folder.name == "timed_step":
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text('{"wall_seconds": 2.0}')
            return 0
        if self.stops_after is not None and len(self.called) >= self.stops_after:
            raise KeyboardInterrupt
        place = "/".join(folder.parts[-3:])
        self.called.append(f"{words[0]} {place}")
        arm, rate = folder.parts[-3], float(folder.parts[-2].removeprefix("lr="))
        if words[0] == "fit":
            if error := self.fails.get((arm, rate)):
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("a") as file:
                    file.write(f"halos: {error}\n")
                return 1
            assert float(option[f"--{LR}"]) == rate
            folder.mkdir(parents=True, exist_ok=True)
            summary = {"steps": 2, "planned_steps": 2, "finished": True, "trained": {"rows": 8, "tokens": 80}}
            (folder / "summary.json").write_text(json.dumps(summary))
            return 0
        how = _measuring(tuple(words[2:]))
        data = os.path.expandvars(how["evaluate"]["held_out"][0])
        prompts = [json.loads(line)["prompt"] for line in Path(data).read_text().splitlines()]
        right = self.right[arm][rate] + int(folder.name.removeprefix("seed-")) % 2
        scores = {f"{data}:{i}": float(i < right) for i in range(len(prompts))}
        kl = {name: 0.5 + rate + 0.1 * i for i, name in enumerate(scores)}
        metrics = {"reward_accuracy": scores, "kl_held_out": kl}
        metrics = {metric: values for metric, values in metrics.items() if metric not in self.lacks}
        by = {"revision": "abc", "versions": {}, "machine": self.machine}
        (folder / "measured.json").write_text(json.dumps(how | {"by": by}))
        (folder / "evaluation.json").write_text(json.dumps(metrics))
        before = {metric: dict.fromkeys(values, 0.25) for metric, values in metrics.items()}
        (folder / "before.json").write_text(json.dumps(before))
        return 0


def checked(study: Study, line: Any) -> Checked:
    """What the pre-flight finds, without building a model for each value."""
    of_report, of_tuning = (
        _measuring(tuple(s.evaluation(s.possible_runs(Path())[-1])[2:])) for s in (study, study.validation)
    )
    return Checked(
        {arm.title: CheckedArm(2, repr(arm), content_of(arm)) for arm in study.variants}, 6, of_report, of_tuning
    )


def content_of(arm: Arm) -> str:
    """A digest of what an arm is trained from, whatever the paths of its files."""
    return digest(config_by_content({"configs": arm.configs, "options": dict(arm.options)}, {}))


def faked(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Replaces the commands of a study, the pre-flight and the pictures."""
    made = Fakes()
    monkeypatch.setattr(processes, "run_command", made.run)
    monkeypatch.setattr(report, "PICTURES", {})
    monkeypatch.setattr(preflight, "check", checked)  # the tests of the data check real ones
    return made
