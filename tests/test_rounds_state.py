"""Which settings of online training may change before its folder is continued."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from halos_pl.rounds.check import options_of
from halos_pl.rounds.identity import of_labeller
from halos_pl.rounds.read import load_rounds
from halos_pl.rounds.spec import Round, Rounds, RoundsError
from halos_pl.rounds.state import bind, claim

ENDPOINT = {"url": "http://a/v1", "model": "m", "retries": 1, "extra_body": {"top_k": 1}}


def study_of(folder: Path, **keys: Any) -> Rounds:
    content = {"model": "m", "prompts": "p", "held_out_prompts": "h", "rounds": 1, "window": 1}
    content |= {"label": {"by": "judge: kto", "endpoint": ENDPOINT}, "fit": {"objective": "kto"}, **keys}
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return load_rounds(folder / "study.yaml")


#: Settings by the first stage that uses them.
USED = {
    "sample": ["model", "prompts", "seed", "sample.n", "the content of model", "fit: data.chat_template"],
    "label": ["label.by", "label.endpoint.model", "the content of label.by rule: a.py:f"],
    "fit": ["fit: model.optimizer.lr", "fit: data.batch_size", "reference", "optimizer"],
    "evaluate": ["held_out_prompts", "answers", "evaluate.judge", "the content of evaluate.judge"],
}
STAGES = list(USED)


@pytest.mark.parametrize("is_partial", [False, True])
@pytest.mark.parametrize("begun", STAGES)
def test_a_setting_may_change_until_a_stage_that_uses_it_has_begun(
    begun: str, is_partial: bool, tmp_path: Path
) -> None:
    study, out = study_of(tmp_path), tmp_path / "out"
    settings = {key: "before" for keys in USED.values() for key in keys}
    claim(study, out, settings)
    first = Round(study, out, 1)
    for stage in STAGES[: STAGES.index(begun) + 1]:
        name = {"fit": "run/checkpoints/last.ckpt", "evaluate": "run/evaluation.json"}.get(stage, f"{stage}s.jsonl")
        part = first.folder / (f"{name}.halos.part" if is_partial and stage in STAGES[:2] else name)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("x")
    for stage, keys in USED.items():
        for key in keys:
            if STAGES.index(stage) > STAGES.index(begun):
                bind(study, out, settings | {key: "now"})
                bind(study, out, settings)
                continue
            for write in (claim, bind):
                with pytest.raises(RoundsError, match=re.escape(f'{key} was "before"')):
                    write(study, out, settings | {key: "now"})


def test_the_difference_of_long_settings_is_shown(tmp_path: Path) -> None:
    study, out = study_of(tmp_path), tmp_path / "out"
    claim(study, out, {"model": "m" * 200 + "before" + "m" * 200})
    samples = Round(study, out, 1).samples
    samples.parent.mkdir()
    samples.touch()
    with pytest.raises(RoundsError, match=r"before.* and is .*after") as refusal:
        claim(study, out, {"model": "m" * 200 + "after" + "m" * 200})
    assert "m" * 100 not in str(refusal.value)


def test_the_way_to_a_server_may_change(tmp_path: Path) -> None:
    options = options_of(study_of(tmp_path))
    for change in ({"url": "http://b/v1"}, {"retries": 9}, {"concurrency": 1}, {"timeout": 5.0}):
        label = {"by": "judge: kto", "endpoint": ENDPOINT | change}
        assert options_of(study_of(tmp_path, label=label)) == options
    for key, value in (("model", "n"), ("extra_body", {"top_k": 2})):
        label = {"by": "judge: kto", "endpoint": ENDPOINT | {key: value}}
        changed = options_of(study_of(tmp_path, label=label))
        (name,) = {name for name in options if options[name] != changed.get(name)}
        assert name.startswith(f"label.endpoint.{key}")


def test_a_rule_is_identified_with_the_files_that_it_imports(tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text("import helper\n")
    (tmp_path / "helper.py").write_text("a = 1\n")
    (tmp_path / "other.py").write_text("a = 1\n")
    name = f"rule: {tmp_path / 'rule.py'}:f"
    before = of_labeller(name)
    (tmp_path / "other.py").write_text("a = 2\n")
    assert of_labeller(name) == before
    (tmp_path / "helper.py").write_text("a = 2\n")
    assert of_labeller(name) not in (before, None)
    assert of_labeller(f"rule: {tmp_path / 'none.py'}:f") is None
