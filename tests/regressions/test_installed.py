"""The package runs where only its declared dependencies are installed, and may be used.

Found on a first day as a new user: every command died without the dev extra, for Hypothesis was imported by all.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from run_halos import ROOT, run, run_all

import halos_pl
from halos_pl.cli.commands import TOOLS
from halos_pl.common.experiments import EXPERIMENTS, presets

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


def _modules(nodes: Iterable[ast.AST]) -> set[str]:
    """Modules, or members of modules, that these statements import."""
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name for n in froms for alias in n.names for name in (str(n.module), f"{n.module}.{alias.name}")}


def test_every_import_is_declared() -> None:
    """What any part imports is a dependency; what an extra brings is imported only where it is used."""
    needed = {_name(text) for text in PROJECT["dependencies"]}
    extras = {_name(text) for texts in PROJECT["optional-dependencies"].values() for text in texts}
    homes = packages_distributions()
    found = 0
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE]
    early = set().union(*(_modules(tree.body) for tree in trees))
    by_functions = set().union(*(_modules(ast.walk(tree)) for tree in trees)) - early
    for path in PACKAGE:
        by_functions_only = ".".join(path.relative_to(ROOT).with_suffix("").parts) in by_functions
        for module, late in _imports(path):
            late = late or by_functions_only
            if module in sys.stdlib_module_names or module in ("halos_pl", "value_functions"):
                continue
            found += 1
            names = {_name(name) for name in homes.get(module, [module])}
            assert names & (needed | extras if late else needed), f"{path} imports {module}, which is not declared"
    assert found > 100


# What they import does not differ, but for check: the others are one module's.
QUICK = ["check", "fit", "sample", "new"]
OTHERS = ["validate", "test", "predict", *(name for name in TOOLS if name not in QUICK)]


@pytest.mark.parametrize("commands", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["quick", "others"])
def test_every_command_starts_without_extras(tmp_path: Path, commands: list[str]) -> None:
    """Each in a process that has no Hypothesis, TRL, submitit or TensorBoard."""
    said = run_all([[*command.split(), "--help"] for command in commands], tmp_path)
    for command, ended in zip(commands, said, strict=True):
        assert ended.status == 0, f"{command}: {ended}"
        assert "usage: halos" in ended


def test_a_fit_reads_its_options_without_extras(tmp_path: Path) -> None:
    ended = run(["fit", "--objective=kto", "--print_config"], tmp_path)
    assert ended.status == 0, ended
    assert "class_path: value_functions.Logistic" in ended


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of the wheel, built from a copy, as setuptools writes beside what it builds."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("halos_pl", "value_functions", "experiments"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    left = source / "build" / "lib" / "halos_pl" / "gone.py"  # by an earlier build, of a file that was removed since
    left.parent.mkdir(parents=True)
    left.touch()
    code = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    words = [sys.executable, "-c", code, str(source)]
    name = subprocess.run(words, cwd=source, capture_output=True, text=True, check=True).stdout.split()[-1]
    with zipfile.ZipFile(source / name) as archive:
        return archive.namelist()


def test_the_wheel_holds_what_a_command_reads(wheel: list[str]) -> None:
    """All code, all shipped configs with the data that they name, templates; no results of studies, no tests."""
    code = {str(path.relative_to(ROOT)) for path in PACKAGE}
    configs = {f"halos_pl/experiments/{path.relative_to(EXPERIMENTS)}" for path in presets().values()}
    others = {
        *("halos_pl/experiments/objectives.json", "halos_pl/experiments/quickstart/feedback.jsonl"),
        *("halos_pl/experiments/quickstart/rule.py", "halos_pl/experiments/ablations/prompts.txt"),
        *("halos_pl/experiments/ablations/prompts_60.txt", "halos_pl/experiments/ablations/held_out.jsonl"),
        *("halos_pl/py.typed", "value_functions/py.typed"),
        *(str(path.relative_to(ROOT)) for path in (ROOT / "halos_pl").rglob("*.jinja")),
    }
    assert code | configs | others <= {*wheel}
    top = {name.partition("/")[0] for name in wheel if ".dist-info/" not in name}
    assert top == {"halos_pl", "value_functions"}
    assert not [name for name in wheel if "/results/" in name or name.endswith((".png", "gone.py"))]


def test_the_citation_has_the_packages_version() -> None:
    assert f"\nversion: {halos_pl.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_an_installed_package_finds_its_configs_inside_itself(tmp_path: Path) -> None:
    """And not in an experiments folder that lies beside it and belongs to others."""
    shutil.copytree(ROOT / "halos_pl" / "common", tmp_path / "halos_pl" / "common")
    (tmp_path / "halos_pl" / "__init__.py").touch()
    (tmp_path / "experiments").mkdir()
    (tmp_path / "halos_pl" / "experiments" / "objectives").mkdir(parents=True)
    (tmp_path / "halos_pl" / "experiments" / "objectives" / "only.yaml").touch()
    code = "from halos_pl.common.experiments import *; print(EXPERIMENTS, *objectives())"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=tmp_path
    )
    assert said.stdout.split() == [str(tmp_path / "halos_pl" / "experiments"), "only"]


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
