"""The package runs where only its declared dependencies are installed, and may be used.

Found on a first day as a new user: every command died without the dev extra, for Hypothesis was imported by all.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from run_halos import ROOT, run, run_all

from halos_pl.cli.commands import TOOLS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGE = sorted(path for name in ("halos_pl", "value_functions") for path in (ROOT / name).rglob("*.py"))


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level name of each import, and whether it is made only when a function is called (or for type checkers)."""

    def walk(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name.partition(".")[0], late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and not child.level:
                yield (child.module or "").partition(".")[0], late
            else:
                checked = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, late or checked or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def test_every_import_is_declared() -> None:
    """What any part imports is a dependency; what an extra brings is imported only where it is used."""
    needed = {_name(text) for text in PROJECT["dependencies"]}
    extras = {_name(text) for texts in PROJECT["optional-dependencies"].values() for text in texts}
    homes = packages_distributions()
    found = 0
    for path in PACKAGE:
        for module, late in _imports(path):
            if module in sys.stdlib_module_names or module in ("halos_pl", "value_functions"):
                continue
            found += 1
            names = {_name(name) for name in homes.get(module, [module])}
            assert names & (needed | extras if late else needed), f"{path} imports {module}, which is not declared"
    assert found > 100


# What they import does not differ, but for check: the others are one module's.
QUICK = ["check", "fit", "generate"]
OTHERS = ["validate", "test", "predict", *(name for name in TOOLS if name not in QUICK)]


@pytest.mark.parametrize("commands", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["quick", "others"])
def test_every_command_starts_without_extras(tmp_path: Path, commands: list[str]) -> None:
    """Each in a process that has no Hypothesis, TRL, submitit or TensorBoard."""
    said = run_all([[*command.split(), "--help"] for command in commands], tmp_path)
    for command, ended in zip(commands, said, strict=True):
        assert ended.status == 0, f"{command}: {ended}"
        assert "usage: halos" in ended


def test_the_block_blocks(tmp_path: Path) -> None:
    """Else the test before shows nothing."""
    (tmp_path / "wants.py").write_text("import hypothesis\n", encoding="utf-8")
    ended = run(["check", "wants.py:Anything"], tmp_path)
    assert ended.status == 2
    assert "hypothesis" in ended


def test_a_fault_is_found_without_hypothesis(tmp_path: Path) -> None:
    """A check that fails shrinks its witness with Hypothesis; without, the verdict is the same."""
    code = (
        "from value_functions import ValueFunction\n"
        "class Falling(ValueFunction):\n"
        "    def forward(self, outcome):\n"
        "        return -outcome\n"
    )
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    objective = ROOT / "experiments" / "objectives" / "sft.yaml"
    plugin, loss = run_all([["check", "mine.py:Falling"], ["check", str(objective)]], tmp_path)
    assert (plugin.status, loss.status) == (1, 1)
    assert "Traceback" not in plugin + loss


def test_it_may_be_used() -> None:
    """A licence, in the words of the metadata and as a text."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert "Apache License" in text
    assert "halos_pl contributors" in text
    assert len(text.splitlines()) > 190


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """``halos --version`` says the version, without loading anything."""
    from halos_pl import __version__
    from halos_pl.cli.main import main

    main(["--version"])
    assert capsys.readouterr().out == f"halos_pl {__version__}\n"
    assert "version" in PROJECT["dynamic"]
