"""What is shown of others' texts is text: no markup in a report, no control character on a terminal.

As the HTML forms have it already; terminals: CVE-2021-42574 (reading direction), CVE-2003-0063 (escape sequences).
"""

from __future__ import annotations

import io
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from run_halos import fit, run_here, write_jsonl

from halos_pl.cli.cache import info
from halos_pl.cli.main import main
from halos_pl.common.messages import plain
from halos_pl.study import report
from halos_pl.study.markdown import markdown

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a|b|c",
    "two\nlines\r\nof | it",
    "`code` ``more``",
    "```\n# out of the fence",
    "**bold** *it* __b__ _i_ ~~s~~",
    "[x](javascript:alert(1)) ![y](http://evil.example/a.png)",
    "[x][y] [y]: http://evil.example",
    "http://evil.example www.evil.example a@evil.example",
    "# heading #",
    "1. one",
    "- one",
    "> quoted",
    "a\\|b\\",
    "&lt;b&gt;",
    "\x1b[31mred\x1b[0m \x1b]8;;http://evil.example\x07link\x1b]8;;\x07 \x9b2J",
    "abc\u202edcba\u2066",
    "[red]markup[/red] [link=http://evil.example]x[/link]",
    "---",
    "===",
]
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def _types(text: str) -> list[str]:
    """The kinds of all tokens of a Markdown text."""
    return [child.type for token in PARSER.parse(text) for child in [token, *(token.children or [])]]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_one_paragraph_of_itself(text: str) -> None:
    """Parsed as Markdown, it gives back the text, and nothing else."""
    tokens = PARSER.parse(markdown(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = tokens[1].children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == " ".join(plain(text).split())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_stays_one_cell(text: str) -> None:
    """Whatever a name holds, the table keeps its columns."""
    kinds = _types(f"| a | b |\n|---|---|\n| {markdown(text)} | end |\n")
    assert kinds.count("td_open") == 2
    assert "html_inline" not in kinds


def test_our_own_texts_stay_readable() -> None:
    """Only what is markup is escaped."""
    for text in ("reward_accuracy", "0.23 [-0.1, 0.5]", "sigmoid(beta * margin)", "kto beta=0.1", "12 x 3"):
        assert markdown(text) == text


def _everywhere(text: str) -> dict[str, Any]:
    row = dict.fromkeys(("mean", "figure", "n", "difference", "p", "verdict", "learned"), text)
    return {
        "title": text,
        "overview": [(text, [{**row, "how": ""}])],
        "note": text,
        "headline": text,
        "details": [text],
        "methods": text,
        "tables": [
            {"metric": text, "head": text, "what": text, "primary": True, "rows": [{**row, "arm": text, "how": ""}]}
        ],
        "learned": True,
        "several": True,
        "lengths": [{"arm": text, "figures": [text] * 4}],
        "baseline": "other",
        "versus": "other",
        "arms": [{"name": text, "verdict": text, "seeds": 1}],
        "missing": [{"run": text, "state": text, "error": text}],
        "command": text,
        "commands": [(text, text)],
        "curves": [text],
        "ends": [{"arm": text, "figures": [text]}],
        "made": [text],
        "data": [text],
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_a_report_is_the_same_report_with_any_names(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Markdown has the same structure as with plain names, and either form no control character."""
    monkeypatch.setattr(report, "PICTURES", {})
    recorded = SimpleNamespace(out=tmp_path)
    recorded.recorded = lambda: recorded
    kinds = {}
    for name, used in {"plain": "plain", "hostile": text}.items():
        monkeypatch.setattr(report, "content", lambda results, used=used: _everywhere(used))
        report.write_report(recorded)  # type: ignore[arg-type]
        written = (tmp_path / "report.md").read_text(encoding="utf-8")
        kinds[name] = [kind for kind in _types(written) if kind not in ("text", "text_special", "softbreak")]
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        for form in (written, page):
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", form)
        assert "<script" not in page
        assert "<img" not in page
    assert kinds["hostile"] == kinds["plain"]


def test_a_terminal_is_told_nothing(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data with escape sequences: shown by data inspect, and named in an error."""
    texts = [text for text in HOSTILE if text.strip()]
    rows = [{"prompt": text, "completion": text, "label": i % 2 == 0} for i, text in enumerate(texts)]
    data = write_jsonl(tmp_path / "hostile.jsonl", rows)
    main(["data", "inspect", data, f"--tokenizer={tiny_folder}", f"--examples={len(rows)}"])
    said = capsys.readouterr().out
    assert "\\x1b[31m" in said
    assert "[red]markup[/red]" in said
    assert not re.search("[\x1b\x07\x9b\u202e]", said)
    with pytest.raises(SystemExit):
        main(["export", "no\x1b[31m\u202erun", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "no\\x1b[31m\\u202erun" in said
    assert "\x1b" not in said


def test_a_fit_shows_names_in_the_data_as_text(tmp_path: Path, tiny_folder: Path, capfd: Any, caplog: Any) -> None:
    """In the log, where a column that is not used is named, and in a warning."""
    name = "no\x1b[31m\u202ete"
    rows = [{"prompt": f"p {i}", "completion": "c", "label": i % 2 == 0, name: str(i)} for i in range(4)]
    data = write_jsonl(tmp_path / "data\x1b[1m.jsonl", rows)
    said = run_here(capfd, fit(tiny_folder, "kto", data, tmp_path / "run\x07", "--trainer.fast_dev_run=true"))
    assert said.status == 0, said
    assert "no\\x1b[31m\\u202ete" in caplog.text
    assert not re.search("[\x1b\x07\u202e]", said + caplog.text)
    assert "\x1b" not in warnings.formatwarning("of \x1b[31m", UserWarning, "f.py", 1)


def test_a_path_is_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of rich's, in the title of a table."""
    monkeypatch.setenv("HALOS_CACHE", "c[red]a")
    monkeypatch.chdir(tmp_path)
    info()
    assert "c[red]a" in capsys.readouterr().out


def test_plain_keeps_what_is_text() -> None:
    """Line ends, tabs and letters of any script."""
    text = "a\tb\nc é 模型 😀 العربية"
    assert plain(text) == text
    console = Console(file=io.StringIO(), width=100)
    console.print(plain("\x1b[31m"), markup=False)
    assert json.dumps(console.file.getvalue()) == json.dumps("\\x1b[31m\n")  # type: ignore[attr-defined]
