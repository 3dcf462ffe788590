"""Files are read whole or refused with the file, the line, the column and what to do."""

from __future__ import annotations

import gzip
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from halos_pl.data.read import DataError, Example, read_files

ROW = {"prompt": "p", "completion": "c", "label": True}
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def read(path: str | Path) -> list[Example]:
    return read_files([str(path)])[str(path)]


def refused(path: str | Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


# What is read


@pytest.mark.parametrize(("label", "meaning"), [(True, True), (False, False), (1, True), (0, False)])
def test_binary(tmp_path: Path, label: Any, meaning: bool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROW, "label": label, "score": None}])
    assert read(path) == [Example("p", ("c",), (meaning,), f"{path}:1")]


def test_pairs_of_messages_lose_the_repeated_prompt(tmp_path: Path) -> None:
    other = {"role": "assistant", "content": "no"}
    rows = [{"prompt": [USER], "chosen": [USER, BOT], "rejected": [other], "id": 3}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert read(path) == [Example([USER], ([BOT], [other]), (True, False), f"{path}:1")]


def test_null_columns_do_not_count(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROW, "chosen": None, "rejected": None}])
    assert read(path)[0].labels == (True,)


def test_all_formats_give_the_same_rows_and_lines(tmp_path: Path) -> None:
    rows = [{**ROW, "completion": f"c{i}\u2028\n"} for i in range(3)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    one_list = "[\n" + ",\n".join(json.dumps(row, indent=2) for row in rows) + "\n]\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(lines)
    (tmp_path / "c.json").write_text(one_list)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines.encode() + b"\r\n\r\n"))
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(one_list.encode()))
    for path in sorted(tmp_path.iterdir()):
        examples = read(path)
        assert [example.completions for example in examples] == [(row["completion"],) for row in rows]
        places = [2, 7, 12] if path.name[0] in "ce" else [1, 2, 3]
        assert [example.row_id for example in examples] == [f"{path}:{place}" for place in places]


def test_a_long_list_is_read_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROW] * 20_000, indent=1))
    start = time.perf_counter()
    assert len(read(path)) == 20_000
    assert time.perf_counter() - start < 5


def test_real_data(shared_data: Path) -> None:
    start = time.perf_counter()
    examples = read(shared_data / "feedback" / "hh_rlhf_train.jsonl.gz")
    assert len(examples) == 2898
    assert all(example.is_pair for example in examples)
    assert len(read(shared_data / "feedback" / "gsm8k_solutions_unpaired.jsonl.gz")) == 5276
    assert time.perf_counter() - start < 10


# What is refused


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ROW, "label": 2}, "column 'label' is 2; it must be true or 1"),
        ({**ROW, "label": "yes"}, "column 'label' is 'yes'"),
        ({**ROW, "label": None}, "column 'label' is None"),
        ({**ROW, "label": 0.5}, r"column 'label' is 0\.5"),
        ({**ROW, "label": [1]}, r"column 'label' is \[1\]"),
        ({**ROW, "completion": " \n"}, "column 'completion' is empty; give it some text"),
        ({**ROW, "completion": ""}, "column 'completion' is empty"),
        ({**ROW, "prompt": ""}, "column 'prompt' is empty"),
        ({**ROW, "prompt": []}, "column 'prompt' is empty"),
        ({**ROW, "prompt": [{"role": "user", "content": " "}]}, "column 'prompt' is empty"),
        ({**ROW, "prompt": None}, "column 'prompt' is None; it must be text or a list of messages"),
        ({**ROW, "completion": 3}, "column 'completion' is 3; it must be text or a list"),
        ({**ROW, "prompt": ["hi"]}, "column 'prompt', message 1 is 'hi'; it must be an object"),
        ({**ROW, "prompt": [USER, {"role": "user"}]}, "column 'prompt', message 2 has no 'content'"),
        ({**ROW, "prompt": [{"content": "hi"}]}, "column 'prompt', message 1 has no 'role'"),
        ({**ROW, "prompt": [{"role": "user", "content": 1}]}, "message 1 has the content 1; every message"),
        ({**ROW, "prompt": [{"role": " ", "content": "a"}]}, "message 1 has an empty role"),
        ({**ROW, "completion": [BOT]}, "'completion' is a message list but 'prompt' is plain text"),
        ({**ROW, "completion": "\ud800"}, "column 'completion' holds half of a surrogate pair"),
        ({**PAIR, "rejected": " "}, "column 'rejected' is empty"),
        ({**PAIR, "prompt": [USER], "chosen": [USER]}, "column 'chosen' only repeats the prompt"),
        ({"prompt": "p", "completion": "c"}, r"lacks 'label'; .* \(this one has: 'prompt', 'completion'\)"),
        ({"prompt": "p", "chosen": "c"}, "lacks 'rejected'"),
        ({"chosen": "c", "rejected": "r"}, "lacks 'prompt'"),
        ({}, "lacks 'prompt', 'completion', 'label'"),
        (
            {**ROW, **PAIR},
            r"fits prompt\+completion\+label and prompt\+chosen\+rejected; keep the columns of one",
        ),
        (["a"], r"the row is \['a'\], not an object"),
        (None, "the row is None, not an object"),
        (
            PAIR,
            r"row of prompt\+chosen\+rejected, but line 1 is a row of .*; put the two kinds into two files",
        ),
    ],
)
def test_a_faulty_row_is_named(tmp_path: Path, row: Any, reason: str) -> None:
    faulty = write_jsonl(
        tmp_path / "a.jsonl", [PAIR if {"chosen", "rejected"} & set(row or ()) else ROW, row]
    )
    if row == PAIR:
        faulty = write_jsonl(tmp_path / "a.jsonl", [ROW, row])
    message = refused(faulty)
    assert message.startswith(f"{faulty}:2: ")
    assert re.search(reason, message)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b'{"prompt": "p"', 1, "invalid JSON .*; write one JSON object on each line"),
        (json.dumps(ROW).encode() + b"\n{oops}\n", 2, "invalid JSON .* at column 2"),
        (b'{"label": ' + b"9" * 5000 + b"}", 1, "invalid JSON"),
        (b"[" * 100_000, 1, "invalid JSON"),
        (b"\xff\xfe", 1, "not UTF-8 text .*; save it as UTF-8"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, content: bytes, line: int, reason: str) -> None:
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert re.match(re.escape(f"{path}:{line}: ") + reason, refused(path))


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('[{"prompt": 1}\n', 1, "no ',' or '\\]' after this row"),
        ('[\n{"prompt": "p"},\n{oops}]', 3, "invalid JSON"),
        ("[]x", 1, "more text after the closing"),
        ("[\n1]", 2, "not an object"),
        ("[" * 100_000, 1, "invalid JSON"),
    ],
)
def test_a_faulty_list_is_named(tmp_path: Path, content: str, line: int, reason: str) -> None:
    (tmp_path / "a.json").write_text(content)
    message = refused(tmp_path / "a.json").splitlines()[-1]
    assert message.startswith(f"{tmp_path / 'a.json'}:{line}: ")
    assert re.search(reason, message)


def test_faulty_files(tmp_path: Path) -> None:
    assert re.search(r"nope\.jsonl: no such file .*; check the path", refused(tmp_path / "nope.jsonl"))
    assert "is a folder; name the file in it" in refused(tmp_path)
    (tmp_path / "a.parquet").touch()
    assert re.search(r"unknown kind of file; supported are \.jsonl", refused(tmp_path / "a.parquet"))
    for name, content in (("a.jsonl", ""), ("b.jsonl", "\n \n"), ("c.json", "[]"), ("d.json", " [ ] ")):
        (tmp_path / name).write_text(content)
        assert re.match(re.escape(str(tmp_path / name)) + ": holds no rows", refused(tmp_path / name))
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps(ROW))
    assert re.search(
        r"plain\.jsonl\.gz:1: cannot be read .*may not be a gzip file", refused(tmp_path / "plain.jsonl.gz")
    )


def test_truncated_gzip(tmp_path: Path) -> None:
    rows = "".join(json.dumps({**ROW, "prompt": str(i * 7919)}) + "\n" for i in range(2000))
    whole = gzip.compress(rows.encode())
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    assert re.search(
        r"a\.jsonl\.gz:\d+: the gzip stream ends early.*copy or download it again", refused(path)
    )
    path.write_bytes(whole[: len(whole) // 2] + b"\0" * 200)
    assert re.search(r"a\.jsonl\.gz:\d+: ", refused(path))


def test_ten_faults_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", [{}] * 7)
    two = write_jsonl(tmp_path / "b.jsonl", [{**ROW, "label": 2}] * 6)
    with pytest.raises(DataError) as caught:
        read_files([one, two])
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[6].startswith(f"{one}:7:")
    assert lines[9].startswith(f"{two}:3:")
    assert lines[10] == "... and 3 more faults"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": anything | st.just("user"), "content": st.text(max_size=4) | anything}
    )
)
values = st.text(max_size=4) | messages | anything | st.booleans()
rows = anything | st.fixed_dictionaries(
    {},
    optional={column: values for column in ("prompt", "completion", "label", "chosen", "rejected", "extra")},
)


@given(content=st.lists(rows, max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_json_reads_or_is_refused_by_line(
    content: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "fuzz.json").write_text(json.dumps(content))
    lines = write_jsonl(folder / "fuzz.jsonl", content)
    for path in (lines, str(folder / "fuzz.json")):
        try:
            examples = read(path)
        except DataError as error:
            named = [re.escape(path) + r":\d+: ", re.escape(path) + ": holds no rows", r"\.\.\. and \d+ more"]
            for line in str(error).splitlines():
                assert re.match("|".join(named), line)
        else:
            assert len(examples) == len(content) > 0
