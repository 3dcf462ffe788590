"""What README.md and the docs show is what the project does. That their code blocks run is tested in tests/docs/."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from run_halos import OBJECTIVES

import value_functions
from halos_pl.data import FeedbackDataModule
from halos_pl.data.schemas import SCHEMAS
from halos_pl.evaluation.judging import Row, judged_by
from value_functions import ValueFunction

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))}
README = PAGES[ROOT / "README.md"]


def page(name: str) -> str:
    return PAGES[ROOT / "docs" / name]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}[^\n]*\n(.*?)```", text, flags=re.DOTALL)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(ROOT / "docs"))  # as MkDocs does for a hook
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return module


def test_the_yaml_shown_is_kto():
    shipped = (ROOT / "experiments" / "objectives" / "kto.yaml").read_text()
    shown = next(block for block in blocks(page("howto/loss.md"), "yaml") if block.startswith("model:"))
    assert yaml.safe_load(shown) == yaml.safe_load(shipped)


def test_the_sources_shown_are_understood():
    shown = next(block for block in blocks(page("howto/data.md"), "yaml") if block.startswith("data:"))
    sources = FeedbackDataModule(**yaml.safe_load(shown)["data"]).sources["train"]
    assert [source.weight for source in sources] == [1.0, 0.5, 1.0, 1.0]
    assert sources[2].streaming
    assert sources[3].columns == {"prompt": "question", "completion": "answer"}


def test_the_schemas_named_are_those_there_are():
    table = page("howto/data.md").partition("| schema | columns |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines()[2:] if line.startswith("|")]
    named = [name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(named) == sorted(SCHEMAS)


@pytest.mark.parametrize("text", [README, page("howto/value_function.md")])
def test_the_value_function_shown_works(text):
    space: dict[str, object] = {}
    exec(next(block for block in blocks(text, "python") if "class Softsign" in block), space)
    cls = space["Softsign"]
    assert isinstance(cls, type)
    assert issubclass(cls, ValueFunction)
    u = torch.linspace(-5, 5, 11)
    assert torch.equal(cls(beta=0.3)(u), torch.nn.functional.softsign(0.3 * u))


def test_the_rule_and_the_judge_shown_work(tmp_path):
    code = tmp_path / "rule.py"
    code.write_text(next(block for block in blocks(page("howto/evaluate.md"), "python") if "exact_match" in block))
    row = Row({"answer": "4"}, "2 + 2?", "p:1", True, True)
    assert judged_by(f"{code}:exact_match", "rule")(row, "It is 4") == 1
    assert judged_by(f"{code}:shorter", "judge")(row, "4", "It is 4") == 1


def test_files_and_targets_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for path, text in PAGES.items():
        for name in re.findall(r"(?:experiments|halos_pl|value_functions|benchmarks|tests)/[\w./]+\w", text):
            assert (ROOT / name).exists() or "products.py" in name, (path, name)
        for target in re.findall(r"`make ([a-z-]+)", text):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), (path, target)


def test_the_links_of_the_readme_lead_to_files():
    """MkDocs checks those of the site, which the README is not part of."""
    links = re.findall(r"\]\(([^)#]+)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_readme_is_short_and_names_real_losses():
    assert len(README.splitlines()) <= 130
    table = README.partition("| family |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) <= set(OBJECTIVES)


def test_the_picture_is_what_the_script_draws(tmp_path):
    """Up to what another version of matplotlib draws otherwise at the edges of lines."""
    picture = script("picture")
    picture.main(tmp_path / "drawn.png")
    drawn, shown = (
        np.asarray(Image.open(path).convert("L"), dtype=float) for path in (tmp_path / "drawn.png", picture.PICTURE)
    )
    assert drawn.shape == shown.shape
    assert np.abs(drawn - shown).mean() < 1


def test_every_plug_in_and_objective_has_a_section_of_the_reference():
    pytest.importorskip("mkdocs")
    hooks = script("hooks")
    named = {cls.__name__ for _, _, kind, modules, _ in hooks.KINDS for cls in hooks.plugins(kind, *modules)}
    assert set(value_functions.__all__) - {"ValueFunction"} <= named
    assert {"LogRatio", "MismatchedKL", "Binary", "NLL", "FrozenCopy", "FlipLabels"} <= named
    verdicts = hooks.verdicts()
    assert set(OBJECTIVES) <= set(verdicts)
    section, plot = hooks.objective_section(ROOT / "experiments" / "objectives" / "kto.yaml", verdicts)
    assert "desirable row: 1 − v(u); undesirable row: 1 − v(−u)" in section
    assert plot.startswith(b"<?xml")
