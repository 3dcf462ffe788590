"""``halos label``: scores of sampled completions in the formats of ``halos fit``, bound to the samples."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import completion, serving
from run_halos import one_error, write_jsonl

import halos_pl.labelling.run as run
from halos_pl.cli.main import main
from halos_pl.common.messages import listed
from halos_pl.data.example import Example
from halos_pl.data.read import read
from halos_pl.data.source import Source
from halos_pl.labelling.agreement import agreement_lines
from halos_pl.labelling.groups import read_groups
from halos_pl.labelling.options import thresholds_of
from halos_pl.labelling.output import OutputSettings, rows_of, share_of_votes

ROWS = [
    {"prompt": "a?", "completions": ["x", "xxx", "xx"], "finished": [True, False, True], "seed": [1, 2, 3], "id": 7},
    {"prompt": [{"role": "user", "content": "b?"}], "completions": ["xx", "xx"], "finished": [True, True]},
    {"prompt": "c?", "completions": ["xxxx", "x"], "finished": [True, True]},
]
SINGLE = [
    {"prompt": row["prompt"], "completion": text, "finished": finished, "prompt_row": i, "sample_index": k}
    for i, row in enumerate(ROWS, start=1)
    for k, (text, finished) in enumerate(zip(row["completions"], row["finished"], strict=True))  # type: ignore[call-overload]
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With samples, and a rule for which longer is better."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "s.jsonl", ROWS)
    write_jsonl(tmp_path / "single.jsonl", SINGLE)
    (tmp_path / "rule.py").write_text(
        "def longer(answer, row):\n    return len(answer) / 4\n\n"
        "def shorter(answer, row):\n    return 1 - len(answer) / 4\n"
    )
    return tmp_path


def labelled(folder: Path, *options: str, file: str = "s.jsonl", form: str = "scored") -> list[dict[str, Any]]:
    main(
        ["label", file, "--by=rule: rule.py:longer", f"--form={form}", "--out=out.jsonl", "--overwrite=true", *options]
    )
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def examples(folder: Path) -> list[Example]:
    """What a fit reads; every row must be usable."""
    items = list(read(Source(str(folder / "out.jsonl"))))
    assert all(isinstance(item, Example) for item in items), items
    return items  # type: ignore[return-value]


def test_a_weight_of_the_prompt_survives_and_a_confidence_does_not(folder: Path) -> None:
    """The confidence is in an earlier judgement."""
    write_jsonl(folder / "s.jsonl", [row | {"weight": 0.5, "confidence": 0.25, "votes": [1]} for row in ROWS])
    for form in ("scored", "binary", "pairs"):
        assert all(
            row["weight"] == 0.5 and not row.keys() & {"confidence", "votes"} for row in labelled(folder, form=form)
        )
        assert {each.weight for each in examples(folder)} == {0.5}


def test_scores(folder: Path) -> None:
    rows = labelled(folder)
    assert [row["scores"] for row in rows] == [[0.25, 0.75, 0.5], [0.5, 0.5], [1.0, 0.25]]
    assert rows[0]["id"] == 7
    assert rows[0]["seed"] == [1, 2, 3]
    assert next(each.finished for each in examples(folder)) == (True, False, True)
    rows = labelled(folder, file="single.jsonl")
    assert [row["score"] for row in rows] == [0.25, 0.75, 0.5, 0.5, 0.5, 1.0, 0.25]
    assert len(examples(folder)) == 7


@pytest.mark.parametrize("file", ["s.jsonl", "single.jsonl"])
def test_binary_labels(folder: Path, file: str, capsys: Any) -> None:
    rows = labelled(folder, file=file, form="binary")
    assert [row["label"] for row in rows] == [False, True, True, True, True, True, False]
    assert [row["finished"] for row in rows] == [True, False, True, True, True, True, True]
    assert len(examples(folder)) == 7
    assert "5 desirable" in capsys.readouterr().out
    assert sum(row["label"] for row in labelled(folder, "--threshold=0.7", file=file, form="binary")) == 2


@pytest.mark.parametrize("file", ["s.jsonl", "single.jsonl"])
def test_pairs(folder: Path, file: str, capsys: Any) -> None:
    rows = labelled(folder, file=file, form="pairs")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("xxx", "x"), ("xxxx", "x")]
    assert (rows[0]["chosen_finished"], rows[0]["rejected_finished"]) == (False, True)
    assert "equal scores" in capsys.readouterr().out
    assert [each.scores for each in examples(folder)] == [(0.75, 0.25), (1.0, 0.25)]
    rows = labelled(folder, "--min_gap=0.6", file=file, form="pairs")
    assert [row["chosen"] for row in rows] == ["xxxx"]
    drawn = [labelled(folder, "--pairs=random", f"--seed={s}", file=file, form="pairs") for s in (0, 0, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    first = {(rows[0]["chosen"], rows[0]["rejected"]) for rows in drawn}
    assert first <= {("xxx", "x"), ("xxx", "xx"), ("xx", "x")}
    assert len(first) > 1


def test_labels_resume_and_are_bound_to_the_samples(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    words = ["label", "s.jsonl", "--by=rule: rule.py:longer", "--out=out.jsonl"]
    monkeypatch.setattr(run, "CHUNK", 1)
    source = (folder / "rule.py").read_text()
    calls = folder / "calls"
    counting = source.replace("    return len", "    open('calls', 'a').write('1')\n    return len", 1)
    # Fails as long as there is a file; the rule itself stays the same.
    (folder / "rule.py").write_text(
        f"import os\n{counting}".replace(
            "    open", "    assert row.text != 'c?' or not os.path.exists('stop')\n    open"
        )
    )
    (folder / "stop").touch()
    assert "s.jsonl:3" in one_error(words, capfd)
    assert calls.read_text() == "1" * 5
    (folder / "stop").unlink()
    main(words)
    assert calls.read_text() == "1" * 7
    complete = (folder / "out.jsonl").read_bytes()
    main(words)
    assert calls.read_text() == "1" * 7
    for change in ("--form=binary", "--form=pairs"):
        assert change.strip("-").partition("=")[0] in one_error([*words, change], capfd)
    (folder / "rule.py").write_text(source)
    changed = "the content of {} has changed"
    assert changed.format("rule: rule.py:longer") in one_error(words, capfd)
    (folder / "rule.py").write_text(source + "\n\nimport helper\n")
    (folder / "helper.py").touch()
    main([*words, "--overwrite=true"])
    complete = (folder / "out.jsonl").read_bytes()
    (folder / "helper.py").write_text("CHANGED = True\n")
    assert changed.format("rule: rule.py:longer") in one_error(words, capfd)
    write_jsonl(folder / "s.jsonl", ROWS[:2])
    assert changed.format("file") in one_error(words, capfd)
    assert (folder / "out.jsonl").read_bytes() == complete


def test_votes_of_several(folder: Path, capsys: Any) -> None:
    by = '--by=["rule: rule.py:longer", "rule: rule.py:shorter"]'
    main(["label", "s.jsonl", by, "--out=out.jsonl", "--form=binary", "--overwrite=true"])
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [(row["completion"], row["label"], row["score"]) for row in rows] == [("xx", True, 1.0)] * 3
    out = capsys.readouterr().out
    assert "4 completions skipped" in out
    assert "without a verdict" not in out  # they are counted once
    assert "0 of 4 comparisons" in out


def test_every_row_has_its_own_columns(folder: Path, capsys: Any) -> None:
    """Also where rows share a prompt: in the rule, in the output, and in a judge's prompt; pairs leave them out."""
    rows = [{"prompt": "p", "answer": a, "completion": c, "id": 1} for a, c in (("4", "4"), ("7", "7"), ("9", "5"))]
    write_jsonl(folder / "gold.jsonl", rows)
    (folder / "gold.py").write_text("def exact(answer, row):\n    return answer == row['answer']\n")
    main(["label", "gold.jsonl", "--by=rule: gold.py:exact", "--form=binary", "--out=out.jsonl"])
    written = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row["label"] for row in written] == [True, True, False]
    assert [{key: row[key] for key in rows[0]} for row in written] == rows
    main(["label", "gold.jsonl", "--by=rule: gold.py:exact", "--form=pairs", "--out=pairs.jsonl"])
    (pair,) = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert pair["id"] == 1
    assert "answer" not in pair
    assert "answer" in capsys.readouterr().out


def test_labels_replace_earlier_ones(folder: Path, capsys: Any) -> None:
    labelled(folder)
    (folder / "out.jsonl").rename(folder / "scored.jsonl")
    rows = labelled(folder, file="scored.jsonl", form="binary")
    assert all("scores" not in row and row["score"] == len(row["completion"]) / 4 for row in rows)
    assert "column scores" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["scored", "binary", "pairs"])
@pytest.mark.parametrize("one_per_row", [False, True])
def test_empty_completions_change_nothing_but_their_count(
    folder: Path, form: str, one_per_row: bool, capsys: Any
) -> None:
    """A fit reads the rows, which are those of a file without them; lists that describe completions stay aligned."""
    file = "single.jsonl" if one_per_row else "s.jsonl"
    expected = labelled(folder, file=file, form=form)
    more: list[dict[str, Any]]
    if one_per_row:
        first, second = SINGLE[:2]
        more = [first | {"completion": ""}, *SINGLE, second | {"completion": " \n"}]
        more.append(first | {"completion": "", "prompt": "d?", "prompt_row": 4})
    else:
        empty = {"completions": "", "finished": True, "seed": 4}
        more = [{key: [empty[key], *value] if key in empty else value for key, value in row.items()} for row in ROWS]
    write_jsonl(folder / "empty.jsonl", more)
    capsys.readouterr()
    assert labelled(folder, file="empty.jsonl", form=form) == expected
    assert examples(folder)
    assert "3 empty completions" in capsys.readouterr().out


def test_empty_completions_are_kept_on_request(folder: Path, capfd: Any) -> None:
    write_jsonl(
        folder / "empty.jsonl", [{"prompt": "a?", "completions": ["", "x"]}, {"prompt": "b?", "completion": ""}]
    )
    rows = labelled(folder, "--keep_empty=true", file="empty.jsonl")
    assert [row.get("scores", row.get("score")) for row in rows] == [[0.0, 0.25], 0.0]
    write_jsonl(folder / "empty.jsonl", [{"prompt": "a?", "completions": ["", " "]}])
    assert "empty.jsonl" in one_error(["label", "empty.jsonl", "--by=rule: rule.py:longer"], capfd)


class Fixed:
    """A labeller with these bounds."""

    def __init__(self, threshold: float | None, scale: tuple[float, float] | None) -> None:
        self.threshold, self.scale = threshold, scale


RULE, REWARD, GRADE = Fixed(0.5, (0.0, 1.0)), Fixed(None, None), Fixed(None, (1.0, 10.0))


@pytest.mark.parametrize(
    ("labellers", "threshold", "expected"),
    [
        ([RULE, RULE], None, [0.5, 0.5]),
        ([RULE, RULE], 0.7, [0.7, 0.7]),
        ([RULE, REWARD], 2.0, [0.5, 2.0]),
        ([GRADE, RULE, REWARD], [5.0, -2.0], [5.0, 0.5, -2.0]),
        ([GRADE, REWARD], 5.0, "list"),
        ([GRADE, REWARD], [5.0, 1.0, 2.0], "list"),
        ([RULE, REWARD], None, "natural zero"),
        ([GRADE, RULE], 11.0, "at most 10"),
        ([GRADE], 1.0, "above 1"),
        ([RULE], float("nan"), "at most 1"),
        ([REWARD], float("inf"), "finite"),
    ],
)
def test_a_threshold_is_for_scores_without_a_natural_zero(labellers: Any, threshold: Any, expected: Any) -> None:
    names = [f"labeller {i}" for i in range(len(labellers))]
    if isinstance(expected, list):
        assert thresholds_of(names, labellers, threshold) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            thresholds_of(names, labellers, threshold)


def test_a_rule_that_fails_at_once_leaves_nothing(folder: Path, capfd: Any) -> None:
    (folder / "fails.py").write_text("def f(answer, row):\n    raise ValueError\n")
    before = {*folder.iterdir()}
    assert "s.jsonl:1" in one_error(["label", "s.jsonl", "--by=rule: fails.py:f", "--out=out.jsonl"], capfd)
    no_pair = ["label", "s.jsonl", "--by=rule: rule.py:longer", "--form=pairs", "--min_gap=1", "--out=out.jsonl"]
    assert "no row" in one_error(no_pair, capfd)
    assert {*folder.iterdir()} - before <= {folder / "__pycache__"}
    main(["label", "s.jsonl", "--by=rule: rule.py:longer", "--out=out.jsonl"])


def test_counts_agree_with_their_nouns() -> None:
    counts = {"empty completions left out": 1, "pairs": 0, "prompts whose column scores is left out": 1, "desirable": 1}
    expected = "1 empty completion left out, 1 prompt whose column scores is left out, 1 desirable"
    assert listed(counts) == expected
    assert listed(dict.fromkeys(counts, 2)) == ", ".join(f"2 {what}" for what in counts)


def test_shares_of_votes() -> None:
    assert share_of_votes([[0.9, 0.1, None], [0.6, 0.7, 0.2]], [0.5, 0.5]) == [1.0, 0.5, 0.0]
    shares = share_of_votes([[3.0, 1.0, 2.0], [0.3, 0.2, 0.2]], [])
    assert shares == [1.0, 0.125, 0.375]
    assert share_of_votes([[None, 1.0]], []) == [None, None]


def test_agreement_of_labellers() -> None:
    first, second = [[1, 2, 3], [1, 2]], [[1, 2, 3], [2, 1]]
    (line,) = agreement_lines(["a", "b"], [first, second])
    assert "3 of 4 comparisons (75%)" in line
    assert "kappa" not in line  # the first always prefers the second completion, so kappa is undefined
    (line,) = agreement_lines(["a", "b"], [[[1, 2], [2, 1], [1, 2]], [[1, 2], [2, 1], [2, 1]]])
    assert "kappa 0.40" in line  # p_o = 2/3, p_e = 4/9
    (line,) = agreement_lines(["a", "b"], [[[1, 1]], [[1, 2]]])
    assert "no comparison" in line


def test_completions_without_a_verdict_are_left_out(folder: Path) -> None:
    (group, *_), counts = read_groups(folder / "s.jsonl"), Counter[str]()
    output = OutputSettings("scored", 0.5, "best_worst", 0.0, 0)
    (row,) = rows_of(group, [None, 1.0, 2.0], output, counts)
    assert (row["completions"], row["scores"], row["finished"]) == (["xxx", "xx"], [1.0, 2.0], [False, True])


def test_a_gap_is_that_of_the_decimals(folder: Path) -> None:
    """Two scores in whole tenths are a pair exactly if they would be in whole numbers."""
    group = read_groups(folder / "s.jsonl")[2]
    for gap in range(1, 10):
        output = OutputSettings("pairs", 0.5, "best_worst", gap / 10, 0)
        for low in range(-5, 10):
            for high in (low + gap - 1, low + gap):
                pairs = list(rows_of(group, [high / 10, low / 10], output, Counter()))
                assert len(pairs) == (high - low == gap), (high, low, gap)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("s.jsonl --by nothing", "nothing"),
        ("s.jsonl --by rule:nope.py:f", "nope.py"),
        ("s.jsonl --by rule:rule.py:nope", "nope"),
        ("nope.jsonl --by rule:rule.py:longer", "nope.jsonl"),
        ("bare.jsonl --by rule:rule.py:longer", "bare.jsonl:1"),
        ("short.jsonl --by rule:rule.py:longer", "short.jsonl:1"),
        ("s.jsonl --by rule:rule.py:longer --out s.jsonl", "s.jsonl"),
        ("s.jsonl --by []", "empty"),
        ("s.jsonl --by rule:rule.py:longer --form pairs --min_gap -1", "min_gap"),
        ("s.jsonl --by rule:rule.py:longer --min_gap 0", "min_gap"),
        ("s.jsonl --by rule:rule.py:longer --pairs best_worst", "pairs"),
        ("s.jsonl --by rule:rule.py:longer --form pairs --seed 0", "seed"),
        ("s.jsonl --by rule:rule.py:longer --form pairs --threshold 0.5", "threshold"),
        ("s.jsonl --by rule:rule.py:longer --batch_size 16", "batch_size"),
        ("s.jsonl --by rule:rule.py:longer --text_prompts plain", "text_prompts"),
        ("s.jsonl --by rule:rule.py:longer --endpoint.url http://localhost:9/v1 --endpoint.model x", "endpoint"),
        ("s.jsonl --by rule:rule.py:longer --form binary --threshold 7", "7"),
        ("s.jsonl --by reward:/none", "halos: ModelError: /none"),
        (
            "s.jsonl --by judge:mt_bench_single --endpoint.url http://localhost:9/v1 --endpoint.model x",
            "halos evaluate",
        ),
        ("empty.jsonl --by rule:rule.py:longer", "empty.jsonl:1"),
        ("message.jsonl --by rule:rule.py:longer", "message.jsonl:1: completion 1, message 1"),
        ("both.jsonl --by rule:rule.py:longer", "both.jsonl:1"),
        ("s.jsonl --by rule:rule.py:longer --form pairs --min_gap 9", "min_gap"),
        ("s.jsonl --by reward:folder --form binary", "threshold"),
        ("s.jsonl --by judge:kto", "endpoint.url"),
    ],
)
def test_a_wrong_input_is_a_line(folder: Path, capfd: Any, words: str, names: str) -> None:
    write_jsonl(folder / "bare.jsonl", [{"prompt": "a?"}])
    write_jsonl(folder / "empty.jsonl", [{"prompt": "a?", "completion": []}])
    write_jsonl(folder / "message.jsonl", [{"prompt": "a?", "completions": [["x"], "y"]}])
    write_jsonl(folder / "both.jsonl", [{"prompt": "a?", "completions": ["x"], "completion": "y"}])
    write_jsonl(folder / "short.jsonl", [{"prompt": "a?", "completions": ["x", "y"], "finished": [True]}])
    assert names in one_error(["label", *words.split()], capfd)
    assert not list(folder.glob("s.*.jsonl"))


def longest_first(body: dict[str, Any]) -> dict[str, Any]:
    """A judge that prefers the longer answer, and abstains if an answer is `xxxx`."""
    first, second = body["messages"][-1]["content"].split("|")
    verdict = "?" if "xxxx" in (first, second) else "A" if len(first) > len(second) else "B"
    return completion(f"[{verdict}]")


def test_a_judge_compares_every_two_completions(folder: Path, capfd: Any) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("halos_pl.judge.panel")
    (folder / "judge.yaml").write_text(
        "prompt: '{answer_a}|{answer_b}'\nchoices: {first: A, second: B}\nverdict: '\\[([AB])\\]'\n"
    )
    with serving() as server:
        server.reply = longest_first
        words = ["label", "s.jsonl", "--by=judge: judge.yaml", "--out=out.jsonl", f"--endpoint.url={server.url}"]
        words += ["--endpoint.model=judge", "--endpoint.retries=0"]
        rejected = (400, {}, {"error": {"message": "too long"}})
        server.plan = ["good", rejected]
        message = one_error(words, capfd)
        assert re.search(r"s\.jsonl:\d completions \d and \d: ", message)
        assert "too long" in message
        assert "--skip_failed" in message
        asked = len(server.requests)
        server.plan = [rejected]
        main([*words[:3], "--out=skipped.jsonl", *words[4:], "--skip_failed=true"])
        assert "1 request of 8 failed" in capfd.readouterr().out
        asked, server.plan = len(server.requests), []
        main(words)
        assert len(server.requests) == asked + 1  # the others are in the transcripts
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row["scores"] for row in rows] == [[0.0, 1.0, 0.5], [0.5, 0.5]]  # equal texts tie, and one pair has none
    out = capfd.readouterr().out
    assert "2 completions without a verdict" in out
    assert "7 replies are in the transcripts; judge: 1 request" in out
    hot = '--endpoint.extra_body={"top_k": 1}'
    with serving() as server:
        assert "top_k" in one_error([*words, f"--endpoint.url={server.url}", hot], capfd)
        assert not server.requests


def test_a_judge_that_follows_the_position_is_noticed(folder: Path, capfd: Any) -> None:
    pytest.importorskip("openai")
    (folder / "judge.yaml").write_text(
        "prompt: '{answer_a}|{answer_b}'\nchoices: {first: A, second: B}\nverdict: '\\[([AB])\\]'\n"
    )
    with serving() as server:
        server.reply = lambda body: completion("[A]")
        words = ["label", "s.jsonl", "--by=judge: judge.yaml", f"--endpoint.url={server.url}", "--endpoint.model=judge"]
        main(words)
    out = capfd.readouterr().out
    assert "position bias +1.00" in out
    assert "1.00" in out.partition("position bias")[2].partition("of pairs won by the same position")[0]


def test_a_column_that_a_judge_lacks_is_found_before_the_first_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    pytest.importorskip("openai")
    monkeypatch.setattr(run, "CHUNK", 1)
    write_jsonl(
        folder / "gold.jsonl", [{"prompt": "a", "completion": "b", "gold": "c"}, {"prompt": "d", "completion": "e"}]
    )
    (folder / "grade.yaml").write_text("prompt: '{answer} {gold}'\nscale: [1, 10]\n")
    with serving() as server:
        words = ["label", "gold.jsonl", "--by=judge: grade.yaml", f"--endpoint.url={server.url}", "--endpoint.model=x"]
        assert "gold.jsonl:2" in one_error(words, capfd)
        assert not server.requests


def test_a_reward_model_scores(folder: Path, tiny_folder: Path, capfd: Any) -> None:
    reward_model = pytest.importorskip("halos_pl.policy.reward_model")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig.from_pretrained(tiny_folder, num_labels=1, pad_token_id=0, initializer_range=0.5)
    LlamaForSequenceClassification(config).save_pretrained(folder / "rm")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder / "rm")
    main(["label", "s.jsonl", "--by=reward: rm", "--out=out.jsonl"])
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    pairs = [(row["prompt"], text) for row in ROWS for text in row["completions"]]  # type: ignore[attr-defined]
    finished = [flag for row in ROWS for flag in row["finished"]]  # type: ignore[attr-defined]
    expected = reward_model.RewardModel.load("rm").score(pairs, finished)
    assert [score for row in rows for score in row["scores"]] == pytest.approx(expected, rel=1e-5)
    assert len({round(score, 6) for score in expected}) > 2
    (folder / "rm" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    words = ["label", "s.jsonl", "--by=reward: rm", "--out=out.jsonl"]
    assert "reward: rm has changed" in one_error(words, capfd), "another chat template gives other scores"
    most = LlamaConfig.from_pretrained(tiny_folder).max_position_embeddings
    long = {"prompt": "a " * most, "completion": "b"}
    write_jsonl(folder / "long.jsonl", [{"prompt": "a", "completion": "b"}, long])
    capfd.readouterr()
    main(["label", "long.jsonl", "--by=reward: rm", "--out=long_out.jsonl"])
    assert re.search(r"1 of 2 .*long\.jsonl:2", capfd.readouterr().out)
    write_jsonl(folder / "long.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b " * most}])
    assert "long.jsonl:2" in one_error(["label", "long.jsonl", "--by=reward: rm", "--out=long_out_2.jsonl"], capfd)
    assert not list(folder.glob("long_out_2*.part"))
