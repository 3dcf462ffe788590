"""Every code block of README.md and docs/ runs.

Python blocks of a page run in order, with the page's files beside them (a block with a title is the file of that name).
Commands that train or sample run in ``make test-docs``, on a tiny model; the default suite holds them to the parsers.
A comment before a block says why it is not run, or that its commands end with status 1.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import yaml
from run_halos import OBJECTIVES, ROOT

from halos_pl.cli.commands import tool_parser
from halos_pl.cli.help_page import COMMANDS
from halos_pl.cli.main import main
from halos_pl.common.experiments import objectives
from halos_pl.conformance.target import load_target
from halos_pl.judge.named import named_judge
from halos_pl.rounds.read import load_rounds
from halos_pl.study.read import load_study

BLOCK = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*?) -->\n)?```(?P<head>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TRAINER = ("fit", "validate", "test", "predict")
BASE = ["--config", "experiments/base.yaml"]


@dataclass(frozen=True)
class Block:
    """A fenced block; ``note`` is the comment before it."""

    page: str
    line: int
    language: str
    title: str
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def blocks() -> list[Block]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = []
    for path in pages:
        text = path.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            head = re.fullmatch(r'(\w+)(?: title="([\w./]+)")?', match["head"])
            line = text[: match.start("head")].count("\n") + 1
            place = str(path.relative_to(ROOT))
            assert head, f"{place}:{line}: ```{match['head']}: a language, and perhaps a title"
            found.append(Block(place, line, head[1], head[2] or "", match["note"] or "", match["text"]))
    return found


def of(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


def commands(block: Block) -> Iterator[list[str]]:
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r" && ", line):
            if words := shlex.split(part, comments=True):
                yield words


def pages_with(language: str, program: str = "") -> list[str]:
    chosen = [b for b in of(language) if not program or any(words[0] == program for words in commands(b))]
    return list(dict.fromkeys(block.page for block in chosen))


# -- the folder of a page -----------------------------------------------------------------------------------


def titled(page: str, name: str) -> str:
    return next(block.text for block in blocks() if block.page == page and block.title == name)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that pages assume, as shown in the tutorial."""
    feedback = titled("docs/tutorial.md", "feedback.jsonl")
    for name in ("feedback.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(feedback)
    (tmp_path / "prompts.txt").write_text(titled("docs/tutorial.md", "prompts.txt"))
    pairs = (
        '{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}\n{"prompt": "Hello", "chosen": "Hi!", "rejected": "No"}\n'
    )
    (tmp_path / "pairs.jsonl").write_text(pairs)
    (tmp_path / "rule.py").write_text("def meets_rule(answer, row):\n    return float(bool(answer))\n")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write_files(page: str, folder: Path) -> None:
    for block in blocks():
        if block.page == page and block.title:
            (folder / block.title).write_text(block.text)


# -- commands -----------------------------------------------------------------------------------------------


def status(words: list[str]) -> tuple[int, str]:
    said = StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main(words)
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


def halos(page: str) -> Iterator[tuple[Block, list[str]]]:
    """The ``halos`` commands of a page, without the first word."""
    for block in of("bash"):
        if block.page == page:
            for words in commands(block):
                if words[0] == "halos":
                    yield block, words[1:]


def wanted(block: Block) -> int:
    """The exit status of a block's commands."""
    return 1 if block.note.startswith("exits with 1") else 0


def quick(words: list[str]) -> bool:
    """Commands that neither train nor sample nor read a tokenizer; a whole objective takes seconds to check."""
    if words[0] == "check":
        return not words[1].endswith(".yaml") and words[1] not in OBJECTIVES
    return words[0] in ("cache", "objectives", "new") or any(word.endswith("help") for word in words)


@pytest.mark.parametrize("page", pages_with("bash", "halos"))
def test_commands_parse(folder, page):
    write_files(page, folder)
    for block, words in halos(page):
        # What a config is converted to, a later command takes.
        if quick(words) or (words[0] == "convert" and not block.note.startswith("not run")):
            code, said = status(words)
            assert code == wanted(block), f"{block}: halos {' '.join(words)}\n{said}"
        elif words[0] == "check":
            load_target(str(objectives().get(words[1], words[1])), None)
        elif words[0] in (*TRAINER, "plan"):
            if "runs/mine/config.yaml" in words:  # what a run would have left
                words[words.index("runs/mine/config.yaml")] = BASE[1]
                words += ["--config", "experiments/objectives/kto.yaml"]
            code, said = status([*words, "--print_config"])
            assert code == 0, f"{block}: {said}"
        else:
            size = 2 if " ".join(words[:2]) in COMMANDS else 1
            said = StringIO()
            try:
                with redirect_stderr(said):
                    tool_parser(" ".join(words[:size])).parse_args(words[size:])
            except SystemExit as end:
                raise AssertionError(f"{block}: {said.getvalue()}") from end


@pytest.mark.docs
@pytest.mark.parametrize("page", pages_with("bash", "halos"))
def test_commands_run(folder, page, tiny_folder):
    write_files(page, folder)
    tiny = [f"--model.policy.path={tiny_folder}", "--trainer.accelerator=cpu"]
    todo = [(block, words) for block, words in halos(page) if not block.note.startswith("not run") and not quick(words)]
    if any("runs/mine" in " ".join(words) for _, words in todo) and {"fit", "--ckpt_path"} & {*todo[0][1]} != {"fit"}:
        run = [*BASE, "--config", "experiments/objectives/kto.yaml", "--data.train", "feedback.jsonl", *tiny]
        code, said = status(["fit", *run, "--run_dir", "runs/mine", "--trainer.max_steps=1"])
        assert code == 0, said
    for block, words in todo:
        words = [str(tiny_folder) if word == HUB_MODEL else word for word in words]
        if words[0] == "fit":
            words += [*tiny, "--trainer.max_steps=2"]
        if words[:2] == ["data", "inspect"]:
            words += ["--tokenizer", str(tiny_folder)]
        code, said = status(words)
        assert code == wanted(block), f"{block}: halos {' '.join(words)}\n{said[-3000:]}"


def test_other_programs_exist():
    makefile = (ROOT / "Makefile").read_text()
    for block in of("bash"):
        for words in commands(block):
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), (str(block), words)
            elif Path(words[0]).name == "python" and words[1] != "-m":
                assert (ROOT / words[1]).exists(), (str(block), words)
            else:
                assert words[0] in ("halos", "git", "cd", "pip", ".venv/bin/python"), (str(block), words)


# -- the other languages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(folder, page, tiny_folder):
    write_files(page, folder)
    executed(page, tiny_folder)


def executed(page: str, model: Path) -> dict[str, object]:
    """The namespace after the Python blocks of a page, with ``model`` in place of the hub's."""
    space: dict[str, object] = {"__name__": "page"}
    for block in of("python"):
        if block.page == page and not block.note.startswith("not run"):
            text = block.text.replace(HUB_MODEL, str(model))
            code = compile("\n" * block.line + text, str(ROOT / page), "exec")
            with redirect_stdout(StringIO()):
                exec(code, space)
    return space


def test_a_plain_loop_gives_the_losses_of_halos_fit(folder, tiny_folder):
    losses = executed("docs/howto/plain_pytorch.md", tiny_folder)["losses"]
    settings = {
        **{"model.policy.path": tiny_folder, "data.train": "feedback.jsonl", "data.batch_size": 4, "run_dir": "run"},
        **{"model.optimizer": "SGD", "model.optimizer.init_args.lr": 0.05, "model.micro_batch_rows": 2},
        **{"model.lr_schedule": "constant_with_warmup", "model.warmup_ratio": 0.0, "trainer.gradient_clip_val": 0},
        "trainer.accelerator": "cpu",
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    code, said = status(["fit", *BASE, "--config", "experiments/objectives/kto.yaml", *options])
    assert code == 0, said
    with open("run/metrics.csv", encoding="utf-8") as file:
        fitted = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert len(fitted) > 1
    assert losses == pytest.approx(fitted, rel=1e-6)


@pytest.mark.docs
@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.py")), ids=lambda path: path.stem)
def test_notebooks_run(folder, path):
    command = [sys.executable, str(path)]
    assert subprocess.run(command, cwd=folder, check=False, env=os.environ | {"MPLBACKEND": "Agg"}).returncode == 0


@pytest.mark.docs
def test_the_documented_tests_pass(folder):
    for block in of("python"):
        if block.title.startswith("test_"):
            (folder / block.title).write_text(block.text)
            command = [sys.executable, "-m", "pytest", "-q", block.title]
            assert subprocess.run(command, cwd=folder, check=False).returncode == 0


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_parses(folder, block):
    write_files(block.page, folder)
    content = yaml.safe_load(block.text)
    if "rounds" in content:
        (folder / "block.yaml").write_text(block.text)
        assert load_rounds("block.yaml").rounds == content["rounds"]
        return
    if {"choices", "scale"} & content.keys():
        assert named_judge(block.title).name
    elif {"arms", "primary"} & content.keys():
        study = yaml.safe_load(titled("docs/howto/study.md", "study.yaml"))
        (folder / "block.yaml").write_text(yaml.safe_dump(study | content))
        assert load_study("block.yaml").primary == content["primary"]
    else:
        (folder / "block.yaml").write_text(block.text)
        code, said = status(
            ["fit", *BASE, "--config", "experiments/objectives/kto.yaml", "--config", "block.yaml", "--print_config"]
        )
        assert code == 0, said


def test_json_lines_are_json():
    for block in of("json"):
        for line in block.text.splitlines():
            assert isinstance(yaml.safe_load(line), dict), str(block)


def test_languages_and_notes_are_known():
    assert {block.language for block in blocks()} <= {"python", "bash", "yaml", "json", "text"}
    for block in blocks():
        assert re.match(r"$|not run: \w+|exits with 1\b", block.note), str(block)
