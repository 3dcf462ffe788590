"""The quickstart's rule, and that the data shipped with it obey it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

QUICKSTART = Path(__file__).resolve().parents[1] / "experiments" / "quickstart"

_spec = importlib.util.spec_from_file_location("quickstart_rule", QUICKSTART / "rule.py")
assert _spec is not None
assert _spec.loader is not None
rule: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rule)


@pytest.mark.parametrize(
    "text",
    [
        "Bread rises in the warm because yeast makes gas.",
        "  Bread rises in the warm because yeast makes gas.\n",
        "Is it not simply because of yeast and warmth?",
        "What a surprise, it is yeast that does it!",
        "Water boils at about 99.5 degrees up here.",  # the point of a number ends nothing
        "Visit example.com to see it for yourself today.",
        "I do not know the answer to that...",
        " ".join(["word"] * 20) + ".",
    ],
)
def test_meets(text: str) -> None:
    assert rule.meets_rule(text, True)
    assert not rule.meets_rule(text, False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "Yeast.",
        "It is the yeast that does it.",  # seven words
        " ".join(["word"] * 21) + ".",
        "Bread rises in the warm because yeast makes gas",
        "Bread rises in the warm because yeast makes gas,",
        "Bread rises in the warm because yeast makes gas:",
        "Bread rises in the warm. Yeast makes the gas.",
        "Does it really rise? Yes, of course it does.",
        "Bread rises in the warm because\nyeast makes gas.",
        "- Bread rises in the warm.\n- Yeast makes gas.",
        'The answer to this is "Bread rises by yeast."',  # ends in a quotation mark
    ],
)
def test_does_not_meet(text: str) -> None:
    assert not rule.meets_rule(text, True)


words = st.lists(st.from_regex(r"[a-z]{1,9}", fullmatch=True), min_size=1, max_size=30)


@given(words, st.sampled_from(".!?"))
def test_a_line_of_words_meets_it_by_their_number(some: list[str], mark: str) -> None:
    assert rule.meets_rule(" ".join(some) + mark, True) == (8 <= len(some) <= 20)


@given(words, words, st.sampled_from(".!?"), st.sampled_from([" ", "\n"]))
def test_two_sentences_never_meet_it(first: list[str], second: list[str], mark: str, between: str) -> None:
    assert not rule.meets_rule(f"{' '.join(first)}{mark}{between}{' '.join(second)}{mark}", True)


@given(st.text(), st.booleans())
def test_it_answers_for_any_text(text: str, finished: bool) -> None:
    met = rule.meets_rule(text, finished)
    assert isinstance(met, bool)
    if met:
        assert finished
        assert text.strip()[-1] in ".!?"


# The shipped data --------------------------------------------------------------------------------------


def questions(name: str) -> list[str]:
    return (QUICKSTART / name).read_text().splitlines()


@pytest.fixture(scope="module")
def feedback() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUICKSTART / "feedback.jsonl").read_text().splitlines()]


def test_labels_are_the_rules(feedback: list[dict[str, Any]]) -> None:
    for row in feedback:
        (answer,) = row["completion"]
        assert answer["role"] == "assistant"
        assert row["label"] is rule.meets_rule(answer["content"], row["finished"])


def test_feedback_is_of_the_training_prompts(feedback: list[dict[str, Any]]) -> None:
    asked = {json.dumps(rule.ask(question)) for question in questions("prompts_train.txt")}
    assert {json.dumps(row["prompt"]) for row in feedback} == asked


def test_both_labels_are_well_represented(feedback: list[dict[str, Any]]) -> None:
    assert 0.2 <= sum(row["label"] for row in feedback) / len(feedback) <= 0.6


def test_data_are_small() -> None:
    assert (QUICKSTART / "feedback.jsonl").stat().st_size <= 1_000_000


def test_no_question_is_asked_twice_and_none_of_the_held_out_ones_in_training() -> None:
    def content(question: str) -> str:
        return " ".join(re.findall(r"[a-z]+", question.lower()))

    train, held_out = ([content(q) for q in questions(f"prompts_{part}.txt")] for part in ("train", "heldout"))
    assert len(train) >= 200
    assert len(held_out) >= 100
    assert len({*train, *held_out}) == len(train) + len(held_out)
