"""``halos judge agreement``: labels of people, and what is reported of a judge beside them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from misbehaving_server import completion, serving
from run_halos import write_jsonl

from halos_pl.cli.main import main
from halos_pl.data.example import DataError
from halos_pl.data.prompt_files import prompt_row
from halos_pl.evaluation.win_rates import column_answers
from halos_pl.judge.human_labels import ORDER, read_labels
from halos_pl.judge.simulated import SimulatedJudge


def test_labels_of_real_files_are_read(shared_data: Path) -> None:
    folder, three = shared_data / "feedback", [f"annotator{i}" for i in (1, 2, 3)]
    path = str(folder / "pandalm_testset_3annotators.jsonl.gz")
    labels = read_labels(path, ["instruction", "input"], ["response1", "response2"], three, limit=60, seed=1)
    assert (len(labels.pairs), labels.rows, [*labels.labels]) == (60, 999, three)
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    for pair in labels.pairs:
        row = rows[int(pair.name.rpartition(":")[2]) - 1]
        assert (pair.answer, pair.other) == (str(row["response1"]), str(row["response2"]))
        assert pair.prompt == "\n\n".join(filter(None, (row["instruction"], row["input"])))
        for name in three:
            assert labels.labels[name][pair.name] == {1: 1, 2: -1, 0: 0}[row[name]]
    again = read_labels(path, ["instruction"], ["response1", "response2"], three, limit=60, seed=1)
    assert [pair.name for pair in again.pairs] == [pair.name for pair in labels.pairs]
    hhh = read_labels(str(folder / "hhh_alignment_pairs.jsonl.gz"), ["prompt"], ["chosen", "rejected"], [])
    assert {*hhh.labels[ORDER].values()} == {1}
    assert len(hhh.pairs) == 221


@pytest.mark.parametrize(
    ("row", "arguments", "named"),
    [
        ({"by": 3}, {}, "'by'"),
        ({"by": None}, {}, "'by'"),
        ({"by": True}, {}, "'by'"),
        ({"by": [1]}, {}, "'by'"),
        ({"by": "nan"}, {}, "'by'"),
        ({"by": 10**400}, {}, "'by'"),
        ({"a": [5]}, {}, "'a'"),
        ({}, {"prompt": ["question"]}, "no column 'question'; .*'p', 'a', 'b', 'by'$"),
        ({}, {"annotators": ["nobody"]}, "no column 'nobody'; .*'by'$"),
        ({str(i): i for i in range(9)}, {"answers": ["a", "c"]}, "no column 'c'; .*…$"),
        ({}, {"answers": ["a"]}, "--answers"),
        ({}, {"answers": ["a", "a"]}, "--answers"),
        ({}, {"annotators": ["by", "by"]}, "--annotators"),
        ({}, {"prompt": ["p", ""]}, "--prompt"),
        ({}, {"limit": 0}, "limit"),
    ],
)
def test_wrong_labels_are_named(row: dict[str, Any], arguments: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"p": "Why?", "a": "1", "b": "2", "by": 1} | row])
    given: dict[str, Any] = {"prompt": ["p"], "answers": ["a", "b"], "annotators": ["by"]}
    with pytest.raises(DataError, match=named) as error:
        read_labels(path, **given | arguments)
    assert "\n" not in str(error.value)
    assert not row or "x.jsonl:1" in str(error.value)


@pytest.mark.parametrize("label", [2, 2.0, "2", " 2", "2.0"])
def test_a_label_may_be_a_number_or_text(label: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"p": "Why?", "a": "1", "b": "2", "by": label}])
    assert [*read_labels(path, ["p"], ["a", "b"], ["by"]).labels["by"].values()] == [-1]


def test_answers_of_messages_are_shown_as_an_evaluation_shows_them(tmp_path: Path) -> None:
    """Their content alone; and rows of the same prompt are one example."""
    asked = [{"role": "user", "content": "Why?"}]
    row = {"p": asked, "a": [*asked, {"role": "assistant", "content": "No"}], "b": "Yes"}
    path = write_jsonl(tmp_path / "x.jsonl", [row, {**row, "a": "Maybe"}, {**row, "p": "How?"}])
    pairs = read_labels(path, ["p"], ["a", "b"], []).pairs
    assert [(pair.prompt, pair.answer, pair.other) for pair in pairs[:2]] == [
        ("Why?", "No", "Yes"),
        ("Why?", "Maybe", "Yes"),
    ]
    assert [pair.example for pair in pairs] == [pairs[0].name, pairs[0].name, pairs[2].name]
    assert column_answers([prompt_row({"prompt": "Why?", **row}, "x:1", "chat")], "a") == [pairs[0].answer]


def test_the_command_recovers_a_simulated_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two people who agree with the truth nine times in ten, and a judge of known accuracy and bias."""
    pytest.importorskip("openai")
    rng, judge = np.random.default_rng(0), SimulatedJudge(accuracy=0.85, position_bias=0.25, abstains=0.05)
    better, rows = rng.integers(1, 3, size=120), []
    for i, winner in enumerate(better):
        labels = {f"by{k}": int(winner if rng.random() < 0.9 else 3 - winner) for k in (1, 2)}
        rows.append({"q": f"Why {i}?", "one": f"one {i}", "two": f"two {i}"} | labels)
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    with serving() as server:

        def reply(body: dict[str, Any]) -> dict[str, Any]:
            text = body["messages"][-1]["content"]
            number = int(text.split("Why ")[1].split("?")[0])
            one_first = text.index(f"one {number}") < text.index(f"two {number}")
            # The order of the requests varies, so each has a generator of its own.
            draws = np.random.default_rng([number, one_first, body.get("seed") or 0])
            verdict = judge.verdict((better[number] == 1) == one_first, draws)
            return completion("Hm." if verdict is None else f"Response {'A' if verdict else 'B'}")

        server.reply = reply
        at = [f"--endpoint.url={server.url}", "--endpoint.model=judge", "--judging.again=10", f"--out={tmp_path}/out"]
        words = ["judge", "agreement", path, "--judge=kto", "--prompt=q", "--answers=one, two", "--annotators=by1, by2"]
        main([*words, *at])
        asked = len(server.requests)
        main([*words, *at])
        assert len(server.requests) == asked == 2 * 120 + 2 * 10
    report = json.loads((tmp_path / "out" / "agreement.json").read_text())
    bias = report["judge"]["position_bias"]
    assert abs(bias["value"] - 0.25) < 3.5 * bias["error"]
    assert 0 < report["judge"]["abstentions"] < 40
    people = {each["by"]: each for each in report["agreement"]}
    assert {*people} == {"by1", "by2", "majority"}
    # A person who is right nine times in ten agrees with a judge as often as 0.9 a + 0.1 (1 - a).
    for by in ("by1", "by2"):
        for name, a in (("accuracy", judge.agreement), ("without_position", judge.accuracy)):
            expected = 0.9 * a + 0.1 * (1 - a)
            assert abs(people[by][name]["value"] - expected) < 3.5 * people[by][name]["error"]
    assert people["by1"]["kappa"]["value"] > 0.2
    assert report["people"]["without_majority"] > 0
    printed = capsys.readouterr().out
    assert "majority" in printed
    assert "Fleiss" in printed


def _words(server: str, data: Path, out: Path) -> list[str]:
    at = [f"--endpoint.url={server}", "--endpoint.model=x", f"--out={out}"]
    return ["judge", "agreement", str(data), "--judge=kto", *at]


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(_words("http://localhost:1/v1", tmp_path / "none.jsonl", tmp_path / "out"))
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kept", "at"), [({"verdicts.jsonl": ""}, 0), ({"agreement.json": "{}", "verdicts.jsonl": ""}, 0), ({}, 1)]
)
def test_files_of_others_and_the_data_are_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: dict[str, str], at: int
) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    data = tmp_path / ("data.jsonl", "verdicts.jsonl")[at]
    write_jsonl(data, rows)
    for name, text in kept.items():
        (tmp_path / name).write_text(text)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit):
        main(_words("http://localhost:1/v1", data, tmp_path))
    assert "would be replaced" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
