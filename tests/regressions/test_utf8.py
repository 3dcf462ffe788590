"""Every file is UTF-8, whatever the locale: LlamaFactory#3311 (a GBK locale), and a terminal that lacks a character."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_halos import ROOT, write_jsonl

PACKAGE = sorted(path for name in ("halos_pl", "value_functions") for path in (ROOT / name).rglob("*.py"))


def _text_io(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each call that reads or writes text and does not say in which encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in given or owner in ("self", "Image", "zipfile", "tarfile", "safetensors", "package"):
            continue
        if name in ("read_text", "write_text", "TextIOWrapper"):
            yield node.lineno, name
        elif name in ("open", "fdopen", "NamedTemporaryFile"):
            places = node.args[1:2] if owner in ("", "os", "io", "gzip") else node.args[:1]
            mode = given.get("mode", places[0] if places else None)
            text = "b" not in str(mode.value) if isinstance(mode, ast.Constant) else mode is None
            if text and owner != "os":  # os.open takes flags
                yield node.lineno, name
        elif name in ("run", "Popen", "check_output") and {"text", "universal_newlines"} & set(given):
            yield node.lineno, name


def test_every_text_file_has_an_encoding() -> None:
    """Of the package's own calls; those of libraries follow from UTF-8 mode."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in PACKAGE
        for line, name in _text_io(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found


@pytest.mark.parametrize(
    "code",
    ["p.read_text()", "open(p)", "p.open('a')", "open(p, 'w')", "subprocess.run(w, text=True)", "gzip.open(p, 't')"],
)
def test_a_call_without_one_is_found(code: str) -> None:
    """Else the test before shows nothing."""
    assert list(_text_io(ast.parse(code)))


def _ascii(words: list[str], folder: Path) -> subprocess.CompletedProcess[bytes]:
    """A command in a locale of 128 characters, with Python's own cures for it off."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, "-m", "halos_pl", *words], cwd=folder, env=env, capture_output=True)


@pytest.mark.slow
def test_a_file_by_a_name_of_other_letters_is_read(tmp_path: Path) -> None:
    """Its name, its content and what is said of it; ``check`` is the command that starts fastest."""
    text = "# Verlust für 模型\nmodel: {value_function: 'né😀'}\n"
    (tmp_path / "模型é.yaml").write_text(text, encoding="utf-8")
    done = _ascii(["check", "模型é.yaml"], tmp_path)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"\\u6a21\\u578b\\xe9.yaml" in done.stderr  # the terminal has no such letters


@pytest.mark.slow
def test_what_is_generated_is_utf8(tmp_path: Path, tiny_folder: Path) -> None:
    """Prompts of other letters, read, answered and written."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "模型 😀 é"}])
    words = ["sample", str(tiny_folder), "--prompts", prompts, "--out", "out.jsonl", "--max_new_tokens=2"]
    done = _ascii(words, tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["prompt"] == "模型 😀 é"


@pytest.mark.slow
def test_data_of_other_letters_are_shown(tmp_path: Path, tiny_folder: Path) -> None:
    """On a terminal that lacks them."""
    rows = [{"prompt": "模型", "completion": "😀 é", "label": i == 0} for i in range(2)]
    write_jsonl(tmp_path / "模型.jsonl", rows)
    done = _ascii(["data", "inspect", "模型.jsonl", f"--tokenizer={tiny_folder}"], tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert b"\\U0001f600 \\xe9" in done.stdout
