"""What a command imports: facts, not seconds; benchmarks/startup.py has those."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from run_halos import ROOT

import halos_pl
from halos_pl.cli.cached_help import show_help

HEAVY = {"torch", "lightning", "transformers", "datasets", "scipy", "matplotlib", "statsmodels", "pandas", "peft"}


def file_of(module: str) -> str | None:
    """Of a module of ours."""
    base = ROOT / module.replace(".", "/")
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return str(path)
    return None


def names_in(node: ast.AST) -> Iterator[str]:
    """The modules that a piece of code imports when it is executed, functions and type checks apart."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from names_in(child)


@cache
def _imports_of(file: str) -> list[str]:
    return [*names_in(ast.parse(Path(file).read_text(encoding="utf-8")))]


def imported_by(module: str) -> set[str]:
    """All modules of ours that importing ``module`` imports, and the libraries by their top-level names."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        for part in [name.rsplit(".", i)[0] for i in range(name.count(".") + 1)]:
            file = file_of(part)
            if file is None:
                seen.add(part.partition(".")[0])
            elif part not in seen:
                seen.add(part)
                todo += _imports_of(file)
    return seen


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("halos_pl.cli.main", HEAVY | {"jsonargparse", "rich", "hypothesis"}),
        ("halos_pl.cli.commands", HEAVY | {"hypothesis"}),
        ("halos_pl.cli.cache", HEAVY | {"hypothesis"}),
        ("halos_pl.cli.objectives", HEAVY | {"hypothesis"}),
        ("halos_pl.cli.new", HEAVY | {"hypothesis"}),
        ("halos_pl.cli.cached_help", HEAVY | {"hypothesis"}),
        ("halos_pl.cli.check", HEAVY - {"torch"} | {"hypothesis", "halos_pl.study", "halos_pl.training"}),
        ("halos_pl.cli.inspect", HEAVY - {"torch", "transformers"} | {"hypothesis", "halos_pl.training"}),
        ("halos_pl.data", HEAVY | {"hypothesis"}),
        ("halos_pl.cli.lightning_cli", {"statsmodels", "hypothesis", "halos_pl.study", "halos_pl.conformance"}),
    ],
)
def test_a_command_imports_what_it_runs(module: str, never: set[str]) -> None:
    imported = imported_by(module)
    assert module in imported
    assert not imported & never


def test_the_reading_of_imports_finds_what_python_imports() -> None:
    """Else the test before shows nothing."""
    assert imported_by("halos_pl.cli.lightning_cli") >= {"torch", "lightning", "halos_pl.training.module", "yaml"}
    assert "halos_pl.cli.lightning_cli" not in imported_by("halos_pl.cli.main")


def test_commands_that_only_read_start_without_heavy_libraries() -> None:
    code = (
        "import contextlib, sys\n"
        "from halos_pl.cli.main import main\n"
        "for words in ['--version'], ['--help'], ['objectives'], ['cache', 'info']:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main(words)\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "kto" in done.stdout
    assert not HEAVY & set(done.stderr.split())


def test_the_help_of_a_fit_is_kept_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path))
    made: list[list[str]] = []

    def command(words: list[str]) -> None:
        made.append(words)
        print(f"options {len(made)}")
        raise SystemExit(0)

    def shown(words: list[str]) -> str:
        with pytest.raises(SystemExit) as ended:
            show_help(words, command)
        assert not ended.value.code
        return capsys.readouterr().out

    assert [shown(["fit", "--help"]) for _ in range(2)] == ["options 1\n"] * 2
    assert shown(["test", "--help"]) == "options 2\n"
    monkeypatch.setenv("COLUMNS", "50")
    assert shown(["fit", "--help"]) == "options 3\n"
    monkeypatch.setattr("halos_pl.cli.cached_help.version", lambda name: "0")
    assert shown(["fit", "--help"]) == "options 4\n"
    monkeypatch.setenv("HALOS_CACHE", "/dev/null/nowhere")  # which cannot be written to
    assert [shown(["fit", "--help"]) for _ in range(2)] == ["options 5\n", "options 6\n"]


def test_what_the_package_exports_is_there_and_an_old_name_is_answered_by_the_new_one() -> None:
    for name in halos_pl.__all__:
        assert getattr(halos_pl, name).__name__ == name
    with pytest.raises(ImportError, match="TokenBatch"):
        from halos_pl import FlatBatch  # noqa: F401
