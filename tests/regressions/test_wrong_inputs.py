"""What a user can mend is said in a line that names file, line or key, and no command ends in a traceback.

Of public reports: trl#1651 (a division by zero where a class is missing).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from run_halos import ROOT, binary_data, fit, pair_data, write_jsonl

from halos_pl.cli.lightning_cli import HalosCLI
from halos_pl.cli.main import main
from halos_pl.common.messages import cause
from halos_pl.common.yaml_files import YAMLFileError, read_yaml
from halos_pl.evaluation.arguments import check_arguments
from halos_pl.study.read import load_study
from halos_pl.study.spec import StudyError

ALIASES = "\n".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10) if i else 1}]" for i in range(9))

# A file's content, and what its error names.
FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", ".yaml is empty"),
    "only a comment": ("# nothing\n", ".yaml is empty"),
    "a list": ("- a\n- b\n", "a list"),
    "a text": ("only text\n", "only text"),
    "a tab": ("data:\n\ttrain: x\n", ".yaml:2"),
    "not closed": ("a: 1\nb: [1, 2\nc: 3\n", ".yaml:3"),
    "a key twice": ("data:\n  batch_size: 4\n  batch_size: 8\n", ".yaml:3"),
    "a key twice, far down": ("a: {b: [{c: 1, d: 2, c: 3}]}\n", "'c'"),
    "UTF-16": ("a: 1\n".encode("utf-16"), "UTF-8"),
    "Latin-1": ("a: é\n".encode("latin-1"), "UTF-8"),
    "itself": ("a: &a [*a]\n", ".yaml:1"),
    "a billion": (ALIASES, "aliases"),
    "nested": ("a: " + "[" * 150 + "]" * 150, "nested"),
    "nested very deeply": ("a: " + "[" * 100_000, "nesting"),
    "octal": ("data:\n  batch_size: 010\n", ".yaml:2"),
    "sexagesimal": ("trainer:\n  max_time: 1:30:00\n", ".yaml:2"),
    "code": ("a: !!python/object/apply:os.system [x]\n", ".yaml:1"),
    "two documents": ("a: 1\n---\nb: 2\n", ".yaml:2"),
    "a mapping as key": ("{a: 1}: 2\n", ".yaml:1"),
    "a number for a part": ("data: 5\n", ".yaml:1"),
    "null for a part": ("model: null\n", ".yaml:1"),
    "a list for a part": ("a: 1\ntrainer: [x]\n", ".yaml:2"),
}


def _every_sixth(names: Iterable[str]) -> list[Any]:
    """The others belong to the slow suite."""
    return [pytest.param(name, marks=pytest.mark.slow if i % 6 else []) for i, name in enumerate(names)]


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Exit status and what a command prints as its error; an exception that it lets through is a fault of ours."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_is_refused_by_its_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a config of a fit, before anything else is read."""
    content, named = FILES[name]
    path = tmp_path / "given.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, error = said(["fit", "--config", str(path)], capsys)
    assert status == 1
    assert named in error
    assert "given.yaml" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", _every_sixth(name for name in FILES if not name.endswith("part")))
def test_so_is_a_study_and_an_objective(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the config of another's run."""
    content, named = FILES[name]
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for words, failed in ((["ablate"], 1), (["check"], 2)):
        status, error = said([*words, str(path)], capsys)
        assert (status, len(error.splitlines())) == (failed, 1), error
        assert named in error
    status, error = said(["export", str(tmp_path), str(tmp_path / "out")], capsys)
    assert status == 1
    assert named in error


def test_what_yaml_allows_is_read(tmp_path: Path) -> None:
    """Merges, anchors, a byte-order mark, dates as the texts that they are."""
    path = tmp_path / "good.yaml"
    text = "\ufeffa: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a\nd: 2024-11-28\ne: '010'\nf: 0\ng: 1e-5\nh: 0.5\n"
    path.write_text(text, encoding="utf-8")
    content, lines = read_yaml(path)
    assert content == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1},
        "d": "2024-11-28",
        "e": "010",
        "f": 0,
        "g": "1e-5",
        "h": 0.5,
    }
    assert lines[("d",)] == 4
    path.write_text("a: 1\n'a': 2\n", encoding="utf-8")
    with pytest.raises(YAMLFileError, match="already"):
        read_yaml(path)


# An option as it stands in YAML, and what its error names beside it.
OPTIONS = {
    "run_dir: 20241128": "run_dir",
    "run_dir: yes": "run_dir",
    "run_dir: [a]": "run_dir",
    "run_dir: ''": "run_dir",
    "data: {train: 5}": "data.train",
    "data: {train: [5]}": "data.train",
    "data: {train: {path: 123}}": "data.train",
    "data: {train: {path: x, split: 5}}": "split",
    "data: {batch_size: 4.5}": "data.batch_size",
    "data: {on_bad_rows: no}": "data.on_bad_rows",
    "data: nothing": "data",
    "model: {policy: {path: 123}}": "model.policy.path",
    "model: {policy: 5}": "policy.path",
    "model: {reflect_undesirable: mirror}": "model.reflect_undesirable",
    "model: {value_function: 3}": "model.value_function",
    "model: {value_function: mine.Nope}": "mine",
    "model: {value_function: {class_path: Logistic, init_args: {beta: -0.1}}}": "beta",
    "model: {optimizer: {class_path: AdamW, init_args: {lr: fast}}}": "lr",
    "trainer: {precision: bf61}": "trainer.precision",
    "model: {value_function: {class_path: Logistic, init_args: {beta: null}}}": "model.value_function.init_args.beta",
    "model: {warmup_ratio: null}": "model.warmup_ratio",
    "model: {optimizer: null}": "model.optimizer",
    "model: {optimizer: {class_path: AdamW, init_args: {betas: [0.9]}}}": "betas is [0.9]",
    "data: {batch_size: null}": "data.batch_size",
    "data: {train: {path: x, columns: {1: prompt}}}": "columns",
    "trainer: {accelerator: cpu, devices: cpu}": "devices",
    "trainer: {max_epochs: -5}": "max_epochs",
    "trainer: {max_steps: many}": "trainer.max_steps",
    "trainer: {accelerator: gpu}": "",
    "seed_everything: abc": "seed_everything",
}


@pytest.mark.parametrize("option", _every_sixth(OPTIONS))
def test_a_value_of_the_wrong_kind_is_named(
    option: str, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, by its key."""
    monkeypatch.chdir(tmp_path)
    words = [f"--config={ROOT}/experiments/base.yaml", f"--config={ROOT}/experiments/objectives/kto.yaml"]
    (tmp_path / "given.yaml").write_text(option + "\n", encoding="utf-8")
    words += [f"--model.policy.path={tiny_folder}"] * ("path" not in option and "policy: 5" not in option)
    status, error = said(["fit", *words, "--config=given.yaml"], capsys)
    lines = [line for line in error.splitlines() if line]
    assert status in (1, 2)
    assert OPTIONS[option] in lines[0]
    assert len(lines) == 1, error


def test_an_unknown_key_of_a_config_file_names_the_command_that_lists_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given.yaml").write_text("model: {nope: 1}\n", encoding="utf-8")
    status, error = said(["fit", f"--config={ROOT}/experiments/base.yaml", f"--config={tmp_path}/given.yaml"], capsys)
    assert status == 2
    assert "model.nope" in error
    assert re.search("All options: .* fit --help\n$", error)


def test_a_wall_comes_down_to_its_cause() -> None:
    """Of the types that a value may have, the one that has something to say."""
    wall = (
        'Parser key "a.b":\n  Does not validate against any of the Union subtypes\n'
        "  Subtypes: [X, <class 'NoneType'>]\n"
        "  Errors:\n    - {}\n    - Expected a <class 'NoneType'>\n  Given value type: <class 'int'>\n  Given value: 7"
    )
    assert cause(wall.format("Logistic: beta is -1")) == "a.b: Logistic: beta is -1"
    assert cause(wall.format("Expected a <class 'float'>")) == "a.b is 7; it takes a number or null"
    assert "quotes" in cause(wall.format("Expected a <class 'str'>"))
    assert cause("anything else:\n  of two lines") == "anything else:\n  of two lines"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with a run of one step, and files of many kinds beside it."""
    home = tmp_path_factory.mktemp("trained")
    main(fit(tiny_folder, "kto", binary_data(home / "rows.jsonl"), home / "run", "--trainer.max_steps=1"))
    pair_data(home / "pairs.jsonl")
    (home / "binary.dat").write_bytes(bytes(range(256)) * 4)
    (home / "empty.jsonl").touch()
    (home / "empty.txt").touch()
    (home / "folder").mkdir()
    (home / "prompts.txt").write_text("hello\n", encoding="utf-8")
    (home / "numbers.jsonl").write_text('{"prompt": "a"}\n{"prompt": 5}\n', encoding="utf-8")
    (home / "rule.py").write_text("def rule(answer, finished):\n    return True\nnumber = 5\n", encoding="utf-8")
    (home / "says.py").write_text(SAYS, encoding="utf-8")
    (home / "deep.jsonl").write_text('{"prompt": ' + "[" * 100_000, encoding="utf-8")
    (home / "digits.jsonl").write_text('{"prompt": "a", "n": ' + "1" * 5000 + "}", encoding="utf-8")
    (home / "broken.py").write_text("def rule(answer:\n", encoding="utf-8")
    (home / "raises.py").write_text("raise KeyError('boom')\n", encoding="utf-8")
    (home / "leaves.py").write_text("raise SystemExit(0)\n", encoding="utf-8")
    return home


# Rules and judges that answer something else than they are asked, or fail.
SAYS = """
def text(answer, finished): return "no"
def nothing(answer, finished): pass
def nan(answer, finished): return float("nan")
def divides(answer, finished): return 1 / 0
def leaves(answer, finished): raise SystemExit(0)
def judge_text(prompt, answer, other): return "A"
def judge_nothing(prompt, answer, other): pass
"""
# A command, and what its error names.
COMMANDS = {
    "nope": "nope",
    "--nope": "--nope",
    "export": "run",
    "export nope out": "nope",
    "export folder out": "folder",
    "export rows.jsonl out": "rows.jsonl",
    "export run rows.jsonl": "rows.jsonl",
    "export run run": "run",
    "export run out --adapter maybe": "adapter",
    "export run out --adapter=true": "adapter",
    "sample": "prompts",
    "sample MODEL --prompts nope.txt": "nope.txt",
    "sample MODEL --prompts folder": "folder",
    "sample MODEL --prompts binary.dat": "binary.dat:1",
    "sample MODEL --prompts empty.txt": "empty.txt",
    "sample MODEL --prompts numbers.jsonl": "numbers.jsonl:2",
    "sample MODEL --prompts prompts.txt --max_new_tokens -1": "max_new_tokens",
    "sample MODEL --prompts prompts.txt --temperature nan": "temperature",
    "sample MODEL --prompts prompts.txt --out folder": "folder",
    "sample folder --prompts prompts.txt": "folder",
    "evaluate run": "held_out",
    "evaluate nope --prompts prompts.txt": "nope",
    'evaluate run --held_out ["nope.jsonl"]': "nope.jsonl",
    'evaluate run --held_out ["empty.jsonl"]': "empty.jsonl",
    'evaluate run --held_out ["binary.dat"]': "binary.dat",
    'evaluate run --held_out [{"path":5}]': "path",
    'evaluate run --held_out ["pairs.jsonl"] --beta -5': "beta",
    'evaluate run --held_out ["pairs.jsonl"] --batch_size 0': "batch_size",
    "evaluate run --prompts prompts.txt --rule nope.py:rule": "nope.py",
    "evaluate run --prompts prompts.txt --rule rule.py": "rule.py",
    "evaluate run --prompts prompts.txt --rule rule.py:number": "number",
    "evaluate run --prompts prompts.txt --rule broken.py:rule": "broken.py",
    "evaluate run --prompts prompts.txt --rule raises.py:rule": "boom",
    "evaluate run --prompts prompts.txt --rule leaves.py:rule": "leaves.py",
    "evaluate run --prompts prompts.txt --judge rule.py:rule": "judge",
    "sample MODEL --prompts deep.jsonl": "deep.jsonl:1",
    "sample MODEL --prompts digits.jsonl": "digits.jsonl:1",
    "sample MODEL --prompts prompts.txt --out prompts.txt": "prompts.txt",
    "sample MODEL --prompts prompts.txt --out nope/out.jsonl": "nope",
    "sample MODEL --prompts prompts.txt --temperature 1e-40": "temperature",
    "sample MODEL --prompts prompts.txt --seed 99999999999999999999": "seed",
    "evaluate run --prompts prompts.txt --seed 99999999999999999999": "seed",
    **{f"evaluate run --prompts prompts.txt --rule says.py:{name}": "'hello'" for name in ("text", "nothing", "nan")},
    "evaluate run --prompts prompts.txt --rule says.py:divides": "prompts.txt:1: ZeroDivisionError",
    "evaluate run --prompts prompts.txt --rule says.py:leaves": "prompts.txt:1: SystemExit",
    "evaluate run --prompts prompts.txt --judge says.py:judge_text": "'hello'",
    "evaluate run --prompts prompts.txt --judge says.py:judge_nothing": "'hello'",
    "check nope.yaml": "nope.yaml",
    "check folder": "folder",
    "check binary.dat": "binary",
    "check broken.py:X": "broken.py",
    "check raises.py:X": "boom",
    "check rule.py:Nope": "Nope",
    "check Logistic --init_args [": "init_args",
    'check Logistic --init_args {"beta":"x"}': "beta",
    "ablate nope.yaml": "nope.yaml",
    "ablate folder": "folder",
    "ablate status nope": "nope",
    "ablate report rows.jsonl": "rows.jsonl",
    "data": "inspect",
    "data inspect nope.jsonl": "nope.jsonl",
    "data inspect folder --tokenizer MODEL": "folder",
    "data inspect binary.dat --tokenizer MODEL": "binary.dat",
    "data inspect empty.jsonl --tokenizer MODEL": "empty.jsonl",
    "data inspect rows.jsonl --tokenizer folder": "folder",
    "data inspect rows.jsonl --tokenizer MODEL --rows -1": "rows",
    "data inspect rows.jsonl --tokenizer MODEL --columns [a]": "columns",
    "data inspect rows.jsonl --tokenizer MODEL --json_file folder": "folder",
    "cache nope": "nope",
    "cache info x": "x",
    "cache clear --kind x": "kind",
    "fit --config nope.yaml": "nope.yaml",
    "fit --config folder": "folder",
}


@pytest.mark.parametrize("command", _every_sixth(COMMANDS))
def test_a_command_names_what_is_wrong(
    command: str,
    trained: Path,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And ends with a status, not with an exception."""
    monkeypatch.chdir(trained)
    words = [str(tiny_folder) if word == "MODEL" else word for word in command.split()]
    status, error = said(words, capsys)
    assert status in (1, 2)
    assert COMMANDS[command] in error.replace("Loading weights", "")
    assert "please report" not in error


# Rows held out, and the metrics that they give.
ROWS = ("nll_desirable", "displacement", "kl_held_out")
HELD_OUT: dict[str, tuple[list[dict[str, Any]], set[str]]] = {
    "unpaired": (
        [{"prompt": f"p{i}", "completion": "c", "label": i % 3 != 0} for i in range(6)],
        {*ROWS, "nll_undesirable", "reward_auroc"},
    ),
    "desirable only": ([{"prompt": f"p{i}", "completion": "c", "label": True} for i in range(3)], set(ROWS)),
    "undesirable only": (
        [{"prompt": f"p{i}", "completion": "c", "label": False} for i in range(3)],
        {"nll_undesirable", "kl_held_out"},
    ),
    "one row": ([{"prompt": "p", "completion": "c", "label": True}], set(ROWS)),
    "one pair": (
        [{"prompt": "p", "chosen": "c", "rejected": "d"}],
        {*ROWS, "nll_undesirable", "reward_auroc", "reward_accuracy", "reward_margin", "policy_accuracy", "brier"},
    ),
}


BOTH_KINDS = ("unpaired", "one pair")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in BOTH_KINDS else pytest.mark.slow) for name in HELD_OUT]
)
def test_metrics_are_those_that_the_rows_give(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are absent, and that is said."""
    monkeypatch.chdir(trained)
    rows, metrics = HELD_OUT[name]
    data = write_jsonl(tmp_path / "held_out.jsonl", rows)
    main(["evaluate", "run", "--held_out", json.dumps([data])])
    found = json.loads((trained / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert set(found) == metrics
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert bool(lines) == (name != "one pair")
    assert not lines or "reward_accuracy" in lines[0]


def test_arguments_of_a_measurement_are_checked_beforehand() -> None:
    """With values at their edges, such as a beta of 0."""
    given = {"prompts": "x", "rule": None, "judge": None, "max_length": 2, "max_new_tokens": 1, "temperature": 0}
    check_arguments(held_out=["x.jsonl"], batch_size=1, beta=0.1, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta"):
        check_arguments(held_out=["x.jsonl"], batch_size=1, beta=0.0, **given)  # type: ignore[arg-type]


# The part of a study that is wrong, and the line of it.
STUDIES = {
    "seeds: 1": "seeds",
    "seeds: [1.5]": "seeds",
    "arms: {1: {}}": "quotes",
    "arms: {no: {}}": "quotes",
    "arms: 5": "arms",
    "arms: {a: 5}": "'a'",
    "axes: {5: [1]}": "quotes",
    "axes: {a: 5}": "axis",
    "options: {5: 6}": "quotes",
    "options: [a]": "options",
    "evaluate: {5: 6}": "quotes",
    "evaluate: 5": "evaluate",
    "metrics: length": "metrics",
    "metrics: [5]": "5",
    "baseline: 5": "baseline",
    "note: 5": "note",
    "cluster: 5": "cluster",
    "sample: 5": "sample",
    "sample: {size: 1, seed: [1]}": "sample",
    "sample: {size: 1, seed: null}": "sample",
    "options: {run_dir: there}": "run_dir",
    "arms: {a: {seed_everything: 7}}": "seeds",
    "axes: {run_dir: [a, b]}": "run_dir",
    "configs: x.yaml": "configs",
    "configs: [x.yaml, 5]": "quotes",
    "configs: [null]": "quotes",
    "arms: {a: {objective: no}}": "quotes",
    "arms: {a: {objective: [1.5]}}": "quotes",
    "nothing: 5": "nothing",
}


@pytest.mark.parametrize("part", STUDIES)
def test_a_study_is_refused_by_its_line(part: str, tmp_path: Path) -> None:
    """Where a number, a truth value or a list stands for a name, or the other way round."""
    parts = {"metrics": "metrics: [length]", "evaluate": "evaluate: {prompts: p.txt}", "arms": "arms: {a: {}}"}
    parts[part.partition(":")[0]] = part
    text = "".join(f"{line}\n" for line in parts.values())
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StudyError) as error:
        load_study(path)
    line = text.splitlines().index(part) + 1
    assert str(error.value).startswith(f"{path}:{line}:")
    assert STUDIES[part] in str(error.value)


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither HOME nor an entry for the user ID, as in a container."""
    monkeypatch.delenv("HALOS_CACHE")
    monkeypatch.setenv("HOME", "")
    assert said(["cache", "info"], capsys)[0] == 1
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    status, error = said(["cache", "info"], capsys)
    assert status == 1
    assert "HALOS_CACHE" in error
    assert said(["check", "nope.yaml"], capsys)[0] == 2  # needs none


def test_a_folder_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one where the command was started."""
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert said(["cache", "info"], capsys)[0] == 1


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not said to be the user's; a note says whose it is."""

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("of the program")

    monkeypatch.setattr(HalosCLI, "__init__", broken)
    with pytest.raises(KeyError) as error:
        main(["fit"])
    assert any("halos_pl" in note and "report" in note for note in error.value.__notes__)
