"""What the README shows is what the project does."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml
from make_rows import random_rows

from halos_pl.data import FeedbackDataModule
from halos_pl.data.schemas import SCHEMAS
from halos_pl.evaluation.judging import Row, judged_by
from value_functions import ValueFunction

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_yaml_shown_is_kto():
    shipped = (ROOT / "experiments" / "objectives" / "kto.yaml").read_text()
    shown = next(block for block in blocks("yaml") if block.startswith("model:"))
    assert yaml.safe_load(shown) == yaml.safe_load(shipped)


def test_the_sources_shown_are_understood():
    shown = next(block for block in blocks("yaml") if block.startswith("data:"))
    sources = FeedbackDataModule(**yaml.safe_load(shown)["data"]).sources["train"]
    assert [source.weight for source in sources] == [1.0, 0.5, 1.0, 1.0]
    assert sources[2].streaming
    assert sources[3].columns == {"prompt": "question", "completion": "answer"}


def test_the_schemas_named_are_those_there_are():
    table = README[README.index("| schema | columns |") : README.index("Presets for HH")]
    rows = [line for line in table.splitlines()[2:] if line.startswith("|")]
    named = [name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(named) == sorted(SCHEMAS)


def test_the_value_function_shown_works():
    space: dict[str, object] = {}
    exec(next(block for block in blocks("python") if "class Softsign" in block), space)
    cls = space["Softsign"]
    assert isinstance(cls, type)
    assert issubclass(cls, ValueFunction)
    u = torch.linspace(-5, 5, 11)
    assert torch.equal(cls(beta=0.3)(u), torch.nn.functional.softsign(0.3 * u))


def test_the_objective_shown_works():
    rows = random_rows(0, 3, dtype=torch.float32)
    names = ("policy_logps", "reference_logps", "mask", "labels")
    exec(next(block for block in blocks("python") if "HALO(" in block), {name: getattr(rows, name) for name in names})
    assert rows.policy_logps.grad is not None
    assert rows.policy_logps.grad.abs().sum() > 0


def test_files_and_commands_named_exist():
    for name in re.findall(r"(?:experiments|halos_pl|value_functions)/[\w./]+\w", README):
        assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_rule_and_the_judge_shown_work(tmp_path):
    code = tmp_path / "rule.py"
    code.write_text(next(block for block in blocks("python") if "exact_match" in block))
    row = Row({"answer": "4"}, "2 + 2?", "p:1", True, True)
    assert judged_by(f"{code}:exact_match", "rule")(row, "It is 4") == 1
    assert judged_by(f"{code}:shorter", "judge")(row, "4", "It is 4") == 1
