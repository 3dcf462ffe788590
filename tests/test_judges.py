"""Judges: their prompts, and how their replies are read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from halos_pl.common.yaml_files import YAMLFileError
from halos_pl.data.example import DataError
from halos_pl.endpoint.exchange import Choice
from halos_pl.evaluation.arguments import measuring
from halos_pl.judge.base import Answer, BenchmarkFiles, JudgeError, Pair
from halos_pl.judge.named import judge_names, named_judge

PAIR = Pair("p.jsonl:1", "Why {answer_b}?", "Because {question}.", "No idea.")
SHIPPED = ("accurate", "kto", "quality")


def said(text: str, **top: float) -> Choice:
    return Choice(text, True, top_logprobs=[{name: math.log(p) for name, p in top.items()}] if top else None)


def test_the_shipped_judges_are_found_by_name() -> None:
    assert {*SHIPPED, "alpaca_eval2", "mt_bench_pair", "mt_bench_single"} == {*judge_names()}
    for name in SHIPPED:
        assert named_judge(name).name == name
    with pytest.raises(JudgeError, match="kto"):
        named_judge("ktoo")


@pytest.mark.parametrize("swapped", [False, True])
def test_a_prompt_shows_both_answers_unchanged_in_either_order(swapped: bool) -> None:
    """Braces in a question or an answer are text."""
    content = named_judge("kto").messages(PAIR, swapped)[-1]["content"]
    assert content.count("Why {answer_b}?") == 1
    assert content.count("Because {question}.") == 1
    assert (content.index("Because") < content.index("No idea")) is not swapped


@pytest.mark.parametrize(
    ("judge", "reply", "verdict"),
    [
        ("kto", "Response A", 1),
        ("kto", "response B is better than ", 0),
        ("kto", " **B**\n", 0),
        ("kto", "A good answer", None),
        ("kto", "Response A is longer than Response B", None),
        ("kto", "Either Response A or", None),
        ("kto", "Neither.", None),
        ("kto", "", None),
        ("accurate", "B is wrong.\n[[A]]", 1),
        ("accurate", "[[C]]", 0.5),
        ("accurate", "[[A]] or [[B]]", None),
        ("accurate", "[[A]] ... [[A]]", 1),
        ("accurate", "[[D]]", None),
        ("accurate", "A", None),
        ("quality", "Fine. [[7]]", 7),
        ("quality", "[[7.5]]", 7.5),
        ("quality", "[[11]]", None),
        ("quality", "[[0]]", None),
        ("quality", "7", None),
        ("quality", "[[3]] or [[4]]", None),
    ],
)
def test_a_reply_is_a_verdict_only_if_it_names_one(judge: str, reply: str, verdict: float | None) -> None:
    assert named_judge(judge).verdict(said(reply)) == verdict


RUBRIC = "prompt: '{question} {answer_a} {answer_b} {gold}'\nchoices: {first: X, second: Y}\n"


def test_a_rubric_of_ones_own_takes_columns_of_the_row(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("system: 'Gold: {gold}'\n" + RUBRIC)
    judge = named_judge(str(tmp_path / "mine.yaml"))
    pair = Pair("p.jsonl:1", [{"role": "user", "content": "Why?"}], "a", "b", {"gold": 42})
    assert judge.messages(pair, swapped=True) == [
        {"role": "system", "content": "Gold: 42"},
        {"role": "user", "content": "Why? b a 42"},
    ]
    assert [judge.verdict(said(text)) for text in ("X", "[[Y]]", "x", "X Y")] == [1, 0, None, None]
    with pytest.raises(DataError, match=r"p\.jsonl:1.*'gold'"):
        judge.messages(PAIR)


@pytest.mark.parametrize(
    ("verdict", "replies"),
    [
        ("scale: [-5, 5]", {"-3": -3, "[[-3]]": -3, "Grade: [[-3]]": -3, "**-3.**": -3, ".5": 0.5, "-.5": -0.5}),
        (
            "scale: [-5, 5]",
            {"+3": 3, "(3)": 3, "\u22123": None, "\u2013 3": None, "- 3": None, "...5": None, "[[+2]]": 2},
        ),
        (
            "scale: [0, 10]",
            {"-1": None, "[[-1]]": None, ".5": 0.5, "[[.5]]": 0.5, "7.5.": 7.5, "3/10": None, "11": None},
        ),
        ("choices: {first: '1', second: '-1', tie: '0'}", {"1": 1, "-1": 0, "[[-1]]": 0, "*-1*.": 0, "0.": 0.5}),
        ("choices: {first: '1', second: '-1', tie: '0'}", {"- 1": None, "\u22121": None, "--1": None, "0.1": None}),
        ("choices: {first: '1', second: '2'}", {"-1": None, ".2": None, "(2)": 0, "1.": 1}),
        ("choices: {first: '>', second: '>>', tie: '='}", {">": 1, ">>": 0, "'='": 0.5, "> >": None, ">=": None}),
        ("choices: {first: A, second: A+}", {"A": 1, "A+": 0, "A+.": 0, "A++": None, "A-": None}),
    ],
)
def test_signs_and_words_of_a_verdict_are_not_taken_for_punctuation(
    verdict: str, replies: dict[str, float | None], tmp_path: Path
) -> None:
    places = "{answer}" if "scale" in verdict else "{answer_a} {answer_b}"
    (tmp_path / "mine.yaml").write_text(f"prompt: '{places}'\n{verdict}\n")
    judge = named_judge(str(tmp_path / "mine.yaml"))
    assert {reply: judge.verdict(said(reply)) for reply in replies} == replies


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        (RUBRIC + "scal: [1, 2]\n", 3, "scal"),
        (RUBRIC + "scale: [1, 2]\n", 1, "choices"),
        ("prompt: '{answer_a}'\nchoices: {first: X, second: Y}\n", 1, "answer_b"),
        ("choices: {first: X, second: Y}\nprompt: '{answer_a} {answer_b} {answer}'\n", 2, "answer"),
        ("prompt: '{answer}'\nscale: [2, 1]\n", 2, "scale"),
        ("prompt: '{answer}'\nscale: 10\n", 2, "scale"),
        ("prompt: 5\nscale: [1, 2]\n", 1, "prompt"),
        ("prompt: '{answer_a} {answer_b}'\nchoices: {first: X, second: X}\n", 2, "choices"),
        ("prompt: '{answer_a} {answer_b}'\nchoices: {first: X}\n", 2, "choices"),
        ("prompt: '{answer_a} {answer_b}'\nchoices: {first: X, second: Y, best: Z}\n", 2, "choices"),
        (RUBRIC + "verdict: '(X'\n", 3, "verdict"),
        (RUBRIC + "verdict: 'X'\n", 3, "verdict"),
        (RUBRIC + "max_tokens: 0\n", 3, "max_tokens"),
        (RUBRIC + "temperature: hot\n", 3, "temperature"),
        ("prompt: '\n", 2, "YAML"),
    ],
)
def test_a_wrong_rubric_is_refused_in_a_line_that_names_its_key(text: str, line: int, key: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises((JudgeError, YAMLFileError), match=rf"mine\.yaml:{line}: .*{key}") as error:
        named_judge(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(error.value)


def test_a_missing_rubric_is_named(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"none\.yaml"):
        named_judge(str(tmp_path / "none.yaml"))


# MT-bench, with the published files.


@pytest.fixture(scope="module")
def mt_bench(shared_data: Path) -> BenchmarkFiles:
    return BenchmarkFiles(mt_bench=shared_data / "eval")


def published(shared_data: Path) -> list[dict[str, Any]]:
    lines = (shared_data / "stats" / "mtbench_gpt4_pair_judgments_phi3.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_mt_bench_asks_and_reads_as_fastchat_did(mt_bench: BenchmarkFiles, shared_data: Path) -> None:
    """75 pairs that GPT-4 judged in both orders."""
    judge = named_judge("mt_bench_pair", mt_bench)
    questions = {int(q.name.rpartition(":")[2]): q for q in judge.questions()}
    assert len(questions) == 80
    assert all(len(q.turns) == 2 for q in questions.values())
    verdicts = {"model_1": (1.0, 0.0), "model_2": (0.0, 1.0), "tie": (0.5, 0.5), "error": (None, None)}
    for row in published(shared_data):
        question = questions[row["question_id"]]
        assert question.turns[0] in row["g1_user_prompt"]
        answers = {}
        for letter in "AB":
            begin, end = (f"[The {which} of Assistant {letter}'s Answer]" for which in ("Start", "End"))
            answers[letter] = row["g1_user_prompt"].partition(f"{begin}\n")[2].rpartition(f"\n{end}")[0]
        pair = Pair("q", question.turns[0], answers["A"], answers["B"], question.columns)
        assert judge.messages(pair)[1]["content"] == row["g1_user_prompt"]
        assert judge.messages(pair, swapped=True)[1]["content"] == row["g2_user_prompt"]
        assert judge.verdict(said(row["g1_judgment"])) == verdicts[row["g1_winner"]][0]
        assert judge.verdict(said(row["g2_judgment"])) == verdicts[row["g2_winner"]][1]


@pytest.mark.parametrize("category", ["writing", "math"])
def test_mt_bench_judges_the_second_turn_in_its_conversation(category: str, mt_bench: BenchmarkFiles) -> None:
    judge = named_judge("mt_bench_pair", mt_bench)
    question = next(q for q in judge.questions() if q.columns["category"] == category)
    columns = {**question.columns, "earlier": [(question.turns[0], "mine 1", "theirs 1")]}
    for swapped in (False, True):
        text = judge.messages(Pair("q", question.turns[1], "mine 2", "theirs 2", columns), swapped)[1]["content"]
        a, b = ("theirs", "mine") if swapped else ("mine", "theirs")
        shown = [question.turns[0], f"{a} 1", question.turns[1], f"{a} 2", f"{b} 1", f"{b} 2"]
        assert [text.rindex(each) for each in shown[4:]] == sorted(text.rindex(each) for each in shown[4:])
        assert text.index(shown[1]) < text.index(shown[3]) < text.index(shown[4])
        assert all(turn in text for turn in question.turns)
        assert ("Reference Answer" in text) is (category == "math")
    single = named_judge("mt_bench_single", mt_bench)
    columns["earlier"] = [(question.turns[0], "mine 1")]
    text = single.messages(Answer("q", question.turns[1], "mine 2", columns))[1]["content"]
    assert text.index("mine 1") < text.index("mine 2")
    assert single.verdict(said("Rating: [[5]]")) == 5


def test_the_folder_of_mt_bench_may_hold_other_files(shared_data: Path) -> None:
    """Those of other benchmarks, whose names would make several splits of training data."""
    folder = str(shared_data / "eval")
    arguments = {"win_rate": "mt_bench_pair", "mt_bench": folder}
    assert {*measuring(arguments)["files"]} == {folder}


def test_mt_bench_needs_its_files(tmp_path: Path) -> None:
    for files, what in ((BenchmarkFiles(), "--mt_bench"), (BenchmarkFiles(mt_bench=tmp_path), "judge_prompts")):
        with pytest.raises(JudgeError, match=what):
            named_judge("mt_bench_pair", files)


@pytest.mark.parametrize(
    ("judge", "files"), [("kto", {"mt_bench": Path("x")}), ("quality", {"alpaca_data": Path("x")})]
)
def test_files_that_a_judge_does_not_read_are_refused(judge: str, files: dict[str, Path]) -> None:
    with pytest.raises(JudgeError, match=f"--{next(iter(files))}"):
        named_judge(judge, BenchmarkFiles(**files))


# AlpacaEval 2.


def test_alpaca_eval_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halos_pl.judge.judges.alpaca_eval.find_spec", lambda _: None)
    with pytest.raises(JudgeError, match="alpaca-eval"):
        named_judge("alpaca_eval2")


def test_alpaca_eval_asks_and_reads_as_its_package_does() -> None:
    pytest.importorskip("alpaca_eval")
    from alpaca_eval.completion_parsers import logprob_parser

    judge = named_judge("alpaca_eval2")
    system, user = judge.messages(PAIR)
    assert (system["role"], user["role"]) == ("system", "user")
    assert user["content"].index('"""Because {question}."""') < user["content"].index('"""No idea."""')
    assert "<|im_" not in user["content"]
    for probabilities in ({"m": 0.7, "M": 0.2, "x": 0.1}, {"M": 0.5}, {"m": 0.5}, {"x": 0.9}):
        top = [{"token": name, "logprob": math.log(p)} for name, p in probabilities.items()]
        completion = {"logprobs": {"content": [{"top_logprobs": top}]}}
        (theirs,) = logprob_parser(completion, "m", ["m", "M"], is_binarize=False)
        ours = judge.verdict(said("m", **probabilities))
        assert (ours is None) if math.isnan(theirs) else ours == pytest.approx(2 - theirs)
    assert [judge.verdict(said(text)) for text in ("m", "M", "m or M", "")] == [1, 0, None, None]
