"""Which functions are rules and judges, what they are given, and what they may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halos_pl.data.example import DataError
from halos_pl.data.prompt_files import PromptRow
from halos_pl.evaluation.judging import Row, judged_by
from halos_pl.evaluation.measurement import Measured, Task, _columns
from halos_pl.policy.sampling import Sample

FITS = {
    "rule": {
        "plain": "def f(answer, row): return row['gold'] in answer",
        "other names": "def f(said, row): return row['gold'] in said",
        "a default": "f = lambda answer, row, k='gold': row[k] in answer",
        "a default row": "def f(answer, row=None): return row['gold'] in answer",
        "any": "def f(*given): return given[1]['gold'] in given[0]",
        "by name": "def f(answer, *, row): return row['gold'] in answer",
        "any by name": "def f(answer, **named): return named['row']['gold'] in answer",
        "by place": "def f(answer, row, /): return row['gold'] in answer",
        "a class": "class f:\n    def __call__(self, answer, row): return row['gold'] in answer",
        "an object": "class F:\n    def __call__(self, answer, row): return row['gold'] in answer\nf = F()",
        "in part": "import functools\ndef g(k, answer, row): return row[k] in answer\nf = functools.partial(g, 'gold')",
        "older": "def f(answer, finished): return finished is True and '42' in answer",
        "numpy": "import numpy\ndef f(answer, row): return numpy.bool_('42' in answer)",
        "a tensor": "import torch\ndef f(answer, row): return torch.tensor('42' in answer)",
    },
    "judge": {
        "plain": "def f(answer, other, row): return row['gold'] in answer and row['gold'] not in other",
        "other names": "def f(a, b, row): return row['gold'] in a and row['gold'] not in b",
        "by name": "def f(answer, other, *, row): return row['gold'] in answer and row['gold'] not in other",
        "older": "def f(prompt, answer, other): return prompt == 'Why?' and '42' in answer and '42' not in other",
    },
}
BAD = {
    "rule": {
        "one": "def f(answer): return 1",
        "none": "def f(): return 1",
        "three": "def f(answer, row, finished): return 1",
        "unnamed": "def f(a, b): return 1",
        "swapped": "def f(row, answer): return 1",
        "half old": "def f(text, finished): return 1",
        "a judge": "def f(prompt, answer, other): return 1",
        "by name": "def f(answer, row, *, k): return 1",
        "async": "async def f(answer, row): return 1",
        "async object": "class F:\n    async def __call__(self, answer, row): return 1\nf = F()",
        "yields": "def f(answer, row): yield 1",
        "built in": "f = len",
        "not callable class": "class f: pass",
        "arguments": "class f:\n    def __init__(self, x): pass\n    def __call__(self, answer, row): return 1",
        "a number": "f = 5",
        "missing": "g = 5",
    },
    "judge": {
        "a rule": "def f(answer, row): return 1",
        "swapped": "def f(other, answer, row): return 1",
        "half old": "def f(question, a, b): return 1",
        "four": "def f(prompt, answer, other, row): return 1",
    },
}


def made(tmp_path: Path, code: str, kind: str) -> Any:
    (tmp_path / "of_mine.py").write_text(code + "\n", encoding="utf-8")
    return judged_by(f"{tmp_path}/of_mine.py:f", kind)


def row(**given: Any) -> Row:
    return Row({"prompt": "Why?", "gold": "42"} | given, "Why?", "p.jsonl:7", True, False)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in FITS for name in FITS[kind]])
def test_a_function_that_fits_is_called_as_it_wants(kind: str, name: str, tmp_path: Path) -> None:
    function = made(tmp_path, FITS[kind][name], kind)
    assert function(row(), "it is 42", "it is not") == 1.0
    assert function(row(), "it is not", "it is 42") == 0.0


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in BAD for name in BAD[kind]])
def test_one_that_does_not_is_refused_in_a_line_that_names_it(kind: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of_mine\.py") as error:
        made(tmp_path, BAD[kind][name], kind)
    assert "\n" not in str(error.value)
    if name not in ("a number", "missing", "not callable class", "arguments"):
        assert {"rule": "rule(answer, row)", "judge": "judge(answer, other, row)"}[kind] in str(error.value)


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize("said", ["'yes'", "None", "float('nan')", "float('inf')", "2", "-0.5", "[1]", "f", "g()"])
@pytest.mark.parametrize("kind", ["rule", "judge"])
def test_what_it_says_is_a_number_from_0_to_1(said: str, kind: str, tmp_path: Path) -> None:
    parameters = {"rule": "answer, row", "judge": "answer, other, row"}[kind]
    function = made(tmp_path, f"async def g(): return 1\ndef f({parameters}): return {said}", kind)
    with pytest.raises(DataError, match=r"p\.jsonl:7") as error:
        function(row(), "a", "b")
    assert "\n" not in str(error.value)


def test_what_it_raises_names_the_row_and_its_own_line(tmp_path: Path) -> None:
    function = made(tmp_path, "def f(answer, row):\n    return row['nope']", "rule")
    with pytest.raises(DataError, match=r"p\.jsonl:7: KeyError: 'nope' .*of_mine\.py:2"):
        function(row(), "a")


def test_a_row_is_a_copy_of_all_its_columns() -> None:
    """With the prompt as text and as messages, whichever the file has."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    columns = {"prompt": messages, "gold": ["42"], "id": 3}
    found = Row(columns, messages, "p.jsonl:1", False)  # type: ignore[arg-type]
    assert found == columns
    assert (found.text, found.messages, found.finished, found.other_finished) == ("Why?", messages, False, None)
    found["gold"].append("43")
    found.messages.clear()
    assert columns["gold"] == ["42"]
    assert len(messages) == 2
    assert row().messages == [{"role": "user", "content": "Why?"}]


def test_equal_answers_are_a_tie(tmp_path: Path) -> None:
    """A judge that likes whichever comes first would prefer a model to itself."""
    judge = made(tmp_path, "def f(answer, other, row):\n    return 1", "judge")
    prompts = [PromptRow(f"p.jsonl:{i}", f"p.jsonl:{i}", {}, "Why?", True) for i in (1, 2)]
    mine, others = ([Sample([1], [2], text, True) for text in two] for two in (("a", "b"), ("a", "c")))
    task = Task(rows=prompts, data=None, judging={"judge": judge}, sampling={}, beta=0.1)
    assert _columns(Measured([], mine, []), task, others)["judge"] == [0.5, 1]
