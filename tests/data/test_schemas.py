"""Each schema says what its rows mean, and the real files of each kind load without a fault."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_halos import write_jsonl
from schema_rows import BOT, HH, OTHER, ROWS, USER

from halos_pl.data.example import Example, Fault, Skipped
from halos_pl.data.parsers import shared_text
from halos_pl.data.read import read
from halos_pl.data.schemas import SCHEMAS, find
from halos_pl.data.source import Source
from halos_pl.data.values import BadRow

SYSTEM = {"role": "system", "content": "be brief"}
HH_PROMPT = [USER, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "who?"}]


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def read_rows(tmp_path: Path, *rows: Any, **settings: Any) -> list[Example | Fault | Skipped]:
    return list(read(Source(write_jsonl(tmp_path / "a.jsonl", rows), **settings)))


def example(tmp_path: Path, row: Any, **settings: Any) -> Example:
    [item] = read_rows(tmp_path, row, **settings)
    assert isinstance(item, Example), item
    assert item.row_id == f"{tmp_path / 'a.jsonl'}:1"
    return item


def pair(tmp_path: Path, row: Any) -> tuple[Any, Any, Any]:
    found = example(tmp_path, row)
    assert found.paired
    assert found.labels == (True, False)
    return (found.prompt, *found.completions)


def refused(tmp_path: Path, row: Any, **settings: Any) -> str:
    [item] = read_rows(tmp_path, row, **settings)
    assert isinstance(item, Fault)
    return str(item)


def skipped(tmp_path: Path, row: Any) -> list[str]:
    items = read_rows(tmp_path, row)
    assert all(isinstance(item, Skipped) for item in items)
    return [item.reason for item in items if isinstance(item, Skipped)]


def test_every_schema_is_found_by_its_columns() -> None:
    assert set(ROWS) == set(SCHEMAS)
    for name, row in ROWS.items():
        assert find(row, {}).name == name
        nulls = {column: None for other in ROWS.values() for column in other} | row  # as in a table of all of them
        assert find(nulls, {}).name == name


@pytest.mark.parametrize(
    ("one", "two"), [("unpaired", "paired"), ("implicit", "messages"), ("sharegpt", "sharegpt_pair"), ("shp", "oasst")]
)
def test_a_row_of_two_schemas_needs_a_name(one: str, two: str) -> None:
    with pytest.raises(BadRow, match=r"the row fits .*; name one of them as 'schema'"):
        find(ROWS[one] | ROWS[two], {})


@pytest.mark.parametrize(
    ("one", "two", "found"),
    [
        ("implicit", "paired", "paired"),  # part of the other
        ("implicit", "sharegpt_pair", "sharegpt_pair"),
        ("scored", "unpaired", "unpaired"),  # a label says more than a score
    ],
)
def test_a_row_of_two_schemas_where_one_goes_first(one: str, two: str, found: str) -> None:
    assert find(ROWS[one] | ROWS[two], {}).name == found


# TRL


@pytest.mark.parametrize("prompt", ["hi", " hi\n"])
def test_a_text_prompt_that_the_conversations_hold(tmp_path: Path, prompt: str) -> None:
    """The binarised forms of UltraFeedback."""
    row = {"prompt": prompt, "chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, OTHER], "score_chosen": 8.0}
    found = example(tmp_path, {**row, "score_rejected": "5"})
    assert (found.prompt, found.completions) == ([SYSTEM, USER], ([BOT], [OTHER]))
    assert found.scores == (8.0, 5.0)
    assert "column 'score_rejected' is 'bad'" in refused(tmp_path, {**row, "score_rejected": "bad"})
    assert "'prompt' is plain text" in refused(tmp_path, {**row, "prompt": "what?"})
    assert "different prompt than 'chosen'" in refused(tmp_path, {**row, "rejected": [USER, OTHER]})
    assert example(tmp_path, {"prompt": "hi", "completion": [USER, BOT], "label": 1}).prompt == [USER]


def test_the_prompt_column_wins(tmp_path: Path) -> None:
    assert pair(tmp_path, {"prompt": "p", "chosen": "same a", "rejected": "same b"}) == ("p", "same a", "same b")
    row = {"prompt": [SYSTEM], "chosen": [USER, BOT], "rejected": [USER, OTHER]}
    assert pair(tmp_path, row) == ([SYSTEM, USER], [BOT], [OTHER])  # what the user says is no part of an answer


def test_what_the_user_says_in_a_completion_does_not_carry_the_loss(tmp_path: Path) -> None:
    later = [BOT, {"role": "user", "content": "and now?"}, OTHER]
    found = example(tmp_path, {"prompt": [USER], "completion": [USER, *later], "label": True})
    assert (found.prompt, found.completions) == ([USER, *later[:2]], ([OTHER],))
    rows: list[dict[str, Any]] = [  # these answer different questions
        {"prompt": [USER], "chosen": later, "rejected": [BOT]},
        {"prompt": [USER], "completions": [later, [BOT]], "scores": [1, 2]},
    ]
    for row in rows:
        found = read_rows(tmp_path, row)
        assert [item.reason for item in found if isinstance(item, Skipped)] == ["a completion contains a user message"]


def test_conversations_that_end_in_different_questions_are_no_pair(tmp_path: Path) -> None:
    def turn(role: str, text: str) -> dict[str, str]:
        return {"from": role, "value": text}

    row = {"conversations": [turn("human", "Hi"), turn("gpt", "Hello")]}
    both = {
        "chosen": [turn("human", "2 + 2?"), turn("gpt", "4")],
        "rejected": [turn("human", "2 + 2?"), turn("gpt", "5")],
    }
    prompt, chosen, rejected = pair(tmp_path, row | both)
    assert [m["content"] for m in prompt] == ["Hi", "Hello", "2 + 2?"]
    assert (chosen[0]["content"], rejected[0]["content"]) == ("4", "5")
    both["rejected"][0] = turn("human", "3 + 3?")
    assert "different prompt than 'chosen'" in refused(tmp_path, row | both)


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_what_a_template_would_need_is_refused_and_not_lost(tmp_path: Path, column: str) -> None:
    row = {"prompt": [USER], "completion": [BOT], "label": True}
    for empty in (None, "", [], {}, "[]"):
        assert example(tmp_path, {**row, column: empty}).tools is None
    if column == "tools":
        row = {"prompt": "a", "completion": "b", "label": True}  # a text prompt has no place for them
    assert "is for the chat template" in refused(tmp_path, {**row, column: [{"name": "search"}]})
    example(tmp_path, {"prompt": "a", "completion": "b", "label": True, column: "hammer"})  # no template is used


def test_a_system_column_goes_before_the_messages(tmp_path: Path) -> None:
    row = {"messages": [USER, BOT], "label": 1, "system": SYSTEM["content"]}
    assert example(tmp_path, row).prompt == [SYSTEM, USER]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("Q?\nYes", "Q?\nNo", "Q?\n"),
        ("Q: x\n\nA: Yes", "Q: x\n\nA: No", "Q: x\n\nA:"),
        ("The sky is blue", "The sky is blueish", "The sky is"),
        ("The sky is blue", "The sky is blue.", "The sky is"),
        ("天空是蓝色的", "天空是绿色的", "天空是"),
        ("Was? übel", "Was? über", "Was?"),
    ],
)
def test_an_implicit_prompt_of_text(tmp_path: Path, chosen: str, rejected: str, prompt: str) -> None:
    assert pair(tmp_path, {"chosen": chosen, "rejected": rejected}) == (
        prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    )  # fmt: skip


@given(st.text("ab .\n\u5929", max_size=8), st.text("ab .\n\u5929", max_size=8), st.text("ab .\n\u5929", max_size=8))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_shared_text_is_shared(start: str, a: str, b: str) -> None:
    one, two = start + a, start + b
    end = shared_text(one, two)
    assert one[:end] == two[:end]
    shared = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))
    assert end <= shared
    assert one[end:shared].lstrip(" ").isalnum() or not one[end:shared].strip(" ")


def test_as_trl_extracts_prompts(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl.data_utils")
    rows: list[Any] = [
        {"chosen": [USER, BOT, USER, BOT], "rejected": [USER, BOT, USER, OTHER]},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "Q?\nYes", "rejected": "Q?\nNo"},
    ]
    for row in rows:
        theirs = trl.extract_prompt(row)
        assert pair(tmp_path, row) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("Yes", "No", "column 'rejected' and 'chosen' .*prompt.*column 'prompt'"),
        (" Yes", " No", "column 'rejected' and 'chosen' .*prompt"),
        ("Q. A.", "Q. A. B.", "column 'chosen' .*prompt"),
        ([USER, BOT], [USER], "column 'rejected' .*prompt"),
        ([USER, BOT], [{"role": "user", "content": "x"}, BOT], "column 'chosen', message 1 .*'user'"),
        ([BOT], [OTHER], "column 'rejected' and 'chosen' .*prompt"),
        ([USER, BOT], "hi yo", "column 'rejected' and 'chosen' .*text.*message lists"),
        ([], [USER], "column 'chosen' is empty"),
        (HH + " a\n\nHuman: x", HH + " b", "column 'chosen' .*dialogue.*Human:.*Assistant:"),
        (HH + " a", "\n\nHuman: hi", "column 'rejected' must be a dialogue"),
        ("hi " + HH + " a", HH + " b", "column 'chosen' must be a dialogue"),
    ],
)
def test_implicit_prompts_that_are_refused(tmp_path: Path, chosen: Any, rejected: Any, reason: str) -> None:
    assert re.search(reason, refused(tmp_path, {"chosen": chosen, "rejected": rejected}))


def test_a_prompt_by_another_name_is_no_implicit_prompt(tmp_path: Path) -> None:
    row = {"question": "Who?", "chosen": "The cat", "rejected": "The dog"}
    assert "lacks 'prompt'" in refused(tmp_path, row)
    assert example(tmp_path, row, columns={"prompt": "question"}).prompt == "Who?"


def test_sampled_completions_that_were_given_a_label(tmp_path: Path) -> None:
    row = {"prompt": "Who?", "completions": ["The cat"], "finished": [True], "label": True}
    assert re.search("completions .*no 'scores'.*--one_per_row", refused(tmp_path, row))
    assert "--one_per_row" in refused(tmp_path, row)


def test_raw_hh_dialogues(tmp_path: Path) -> None:
    row = {"chosen": HH + " I am\n\nme ", "rejected": HH + " no one"}
    assert pair(tmp_path, row) == (HH_PROMPT, said("I am\n\nme"), said("no one"))
    assert skipped(tmp_path, {"chosen": HH + " ", "rejected": HH + " a"}) == ["empty response"]
    assert skipped(tmp_path, {"chosen": HH + " a", "rejected": HH + " a "}) == ["both completions are the same"]


def test_pairs_of_the_same_completion_say_nothing(tmp_path: Path) -> None:
    for row in (
        {"prompt": "p", "chosen": "c", "rejected": "c"},
        {"chosen": "p c", "rejected": "p c"},
        {"chosen": [USER, BOT], "rejected": [USER, BOT]},
        {**ROWS["halos_pairwise"], "output_A": [OTHER]},
        {**ROWS["shp"], "human_ref_B": "a"},
    ):
        assert skipped(tmp_path, row) == ["both completions are the same"]


# HALOs


def test_halos_binary(tmp_path: Path) -> None:
    found = example(tmp_path, ROWS["halos_binary"])
    assert found == Example([USER], ([BOT],), (True,), found.row_id, (0.5,))


def test_halos_pairwise(tmp_path: Path) -> None:
    """As their train/data.py reads it: 1 says that A is preferred, anything else that B is."""
    row = ROWS["halos_pairwise"]
    assert pair(tmp_path, row) == ([USER], [OTHER], [BOT])
    assert example(tmp_path, row).scores == (0.7, 0.1)
    assert pair(tmp_path, {**row, "label": 1, "reward_A": 1}) == ([USER], [BOT], [OTHER])
    assert skipped(tmp_path, {**row, "reward_A": 0.7}) == ["tie"]
    assert "column 'label' is 2; it must be true or 1 (A is preferred)" in refused(tmp_path, {**row, "label": 2})


# Conversations


def test_messages(tmp_path: Path) -> None:
    found = example(tmp_path, {"messages": [SYSTEM, USER, BOT, USER, OTHER], "label": False})
    assert found == Example([SYSTEM, USER, BOT, USER], ([OTHER],), (False,), found.row_id)
    row = ROWS["messages"]
    assert re.search("column 'messages' .*end with .*assistant", refused(tmp_path, {**row, "messages": [USER]}))
    assert "column 'messages' is 'hi'; it must be a list" in refused(tmp_path, {**row, "messages": "hi"})
    assert "has no prompt before" in refused(tmp_path, {**row, "messages": [BOT]})
    assert "column 'messages', last message is empty" in refused(tmp_path, {**row, "messages": [USER, *said(" ")]})


@pytest.mark.parametrize("label", ["kto_tag", "label"])
def test_sharegpt(tmp_path: Path, label: str) -> None:
    row = {"conversations": ROWS["sharegpt"]["conversations"], label: False}
    found = example(tmp_path, row)
    assert found == Example([USER], ([BOT],), (False,), found.row_id)
    assert example(tmp_path, {**row, "system": "be brief"}).prompt == [SYSTEM, USER]
    assert f"column '{label}' is None" in refused(tmp_path, {**row, label: None})


def test_sharegpt_pairs(tmp_path: Path) -> None:
    row = ROWS["sharegpt_pair"]
    assert pair(tmp_path, row) == ([USER], [BOT], [OTHER])
    assert pair(tmp_path, {**row, "chosen": "yo"}) == ([USER], "yo", [OTHER])
    assert "column 'chosen' has the value 3; every message needs a 'from'" in refused(
        tmp_path, {**row, "chosen": {"from": "gpt", "value": 3}}
    )


# Scores


@pytest.mark.parametrize(
    ("column", "value", "score"),
    [("score", 0.25, 0.25), ("rating", 4, 4.0), ("rank", 2, -2.0), ("rank", 0, 0.0), ("score", "1e-3", 0.001)],
)
def test_scored(tmp_path: Path, column: str, value: Any, score: float) -> None:
    found = example(tmp_path, {"prompt": "p", "completion": "c", column: value})
    assert found == Example("p", ("c",), (None,), found.row_id, (score,))
    assert math.copysign(1, found.scores[0] or 0.0) == math.copysign(1, score)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "high", "nan", [1], 10**400])
def test_scores_that_are_no_numbers(tmp_path: Path, value: Any) -> None:
    row = {"prompt": "p", "completion": "c", "score": value}
    assert "column 'score' is" in refused(tmp_path, row)
    assert "finite number" in refused(tmp_path, row)
    lists = {"prompt": "p", "completions": ["a", "b"], "scores": [1, value]}
    assert "column 'scores', item 2 is" in refused(tmp_path, lists)


def test_null_scores_are_skipped(tmp_path: Path) -> None:
    assert skipped(tmp_path, {"prompt": "p", "completion": "c", "rank": None}) == ["no score"]
    first, second = read_rows(tmp_path, {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, None, 3]})
    assert first == Example("p", ("a", "c"), (None, None), f"{tmp_path / 'a.jsonl'}:1", (1.0, 3.0))
    assert second == Skipped(f"{tmp_path / 'a.jsonl'}:1#2", "no score")
    assert skipped(tmp_path, {"prompt": "p", "completions": [], "scores": []}) == ["no completions"]


def test_scored_lists(tmp_path: Path) -> None:
    row = {"prompt": [USER], "completions": [[BOT], [USER, OTHER]], "scores": [2, 1]}
    assert example(tmp_path, row).completions == ([BOT], [OTHER])
    assert "has 1 values for 2 completions" in refused(tmp_path, {**row, "scores": [1]})
    assert "'completions' is 'ab'; it must be a list" in refused(tmp_path, {**row, "completions": "ab"})
    assert "'completions', item 2 is empty" in refused(
        tmp_path, {"prompt": "p", "completions": ["a", ""], "scores": [1, 2]}
    )


def test_ultrafeedback(tmp_path: Path) -> None:
    row = ROWS["ultrafeedback"]
    found = example(tmp_path, row)
    assert (found.prompt, found.completions, found.scores) == ("p", ("a", "b"), (8.5, 2.0))
    empty = {**row, "completions": [*row["completions"], {"response": " ", "overall_score": 1}]}
    assert [type(item) for item in read_rows(tmp_path, empty)] == [Example, Skipped]
    assert skipped(tmp_path, {**row, "completions": []}) == ["no completions"]
    bad = {**row, "completions": [{"response": "a", "overall_score": "N/A"}]}
    assert "column 'completions', item 1, 'overall_score' is 'N/A'" in refused(tmp_path, bad)
    assert re.search("item 1 is 'a'.*'response'", refused(tmp_path, {**row, "completions": ["a"]}))


# Verdicts


def test_shp(tmp_path: Path) -> None:
    assert pair(tmp_path, ROWS["shp"]) == ("p", "a", "b")
    assert pair(tmp_path, {**ROWS["shp"], "labels": 0}) == ("p", "b", "a")
    assert example(tmp_path, {**ROWS["shp"], "labels": 0}).scores == (166.0, 340.0)
    assert skipped(tmp_path, {**ROWS["shp"], "human_ref_A": ""}) == ["empty response"]


def test_pandalm(tmp_path: Path) -> None:
    row = {**ROWS["pandalm"], "annotator2": 2, "annotator3": 0, "annotator4": None, "annotator10": 2}
    place = f"{tmp_path / 'a.jsonl'}:1"
    ab, ba, tie, none, ten = read_rows(tmp_path, row)
    assert ab == Example("p\nx", ("a", "b"), (True, False), f"{place}#annotator1", paired=True)
    assert ba == Example("p\nx", ("b", "a"), (True, False), f"{place}#annotator2", paired=True)  # they do disagree
    assert (tie, none) == (Skipped(f"{place}#annotator3", "tie"), Skipped(f"{place}#annotator4", "no verdict"))
    assert isinstance(ten, Example)
    assert ten.row_id == f"{place}#annotator10"
    assert "column 'annotator2' is 3" in refused(tmp_path, {**row, "annotator2": 3})
    assert "column 'response1' is ['a']" in refused(tmp_path, {**row, "response1": ["a"]})
    assert skipped(tmp_path, {**row, "response1": True}) == ["response is not text"]
    assert skipped(tmp_path, {**row, "response1": ""}) == ["empty response"]


def _tree(*rows: tuple[str, str | None, str, Any]) -> list[dict[str, Any]]:
    return [
        {"message_id": name, "parent_id": parent, "role": role, "text": f"text of {name}", "rank": rank, "lang": "en"}
        for name, parent, role, rank in rows
    ]


def test_oasst(tmp_path: Path) -> None:
    rows = _tree(
        ("a2", "q", "assistant", 1),  # before its parent
        ("q", None, "prompter", None),
        ("a1", "q", "assistant", 0),
        ("q2", "a1", "prompter", 0),
        ("b1", "q2", "assistant", 0),
        ("b2", "q2", "assistant", None),
        ("b3", "q2", "assistant", 2),
    )
    rows[-1]["deleted"] = True
    items = read_rows(tmp_path, *rows)
    place = str(tmp_path / "a.jsonl")
    q, a1, q2 = (
        {"role": r, "content": f"text of {n}"} for r, n in (("user", "q"), ("assistant", "a1"), ("user", "q2"))
    )
    assert items == [
        Example([q], (said("text of a2"),), (None,), f"{place}:1", (-1.0,)),
        Skipped(f"{place}:2", "prompter's message"),
        Example([q], (said("text of a1"),), (None,), f"{place}:3", (0.0,)),
        Skipped(f"{place}:4", "prompter's message"),
        Example([q, a1, q2], (said("text of b1"),), (None,), f"{place}:5", (0.0,)),
        Skipped(f"{place}:6", "no rank"),
        Skipped(f"{place}:7", "deleted message"),
    ]
    rows[1]["deleted"] = True
    assert Counter(type(item) for item in read_rows(tmp_path, *rows)) == {Skipped: 7}


def test_oasst_trees_that_are_no_trees(tmp_path: Path) -> None:
    rows = _tree(
        ("q", None, "prompter", None),
        ("lost", "nowhere", "assistant", 0),
        ("root", None, "assistant", 0),
        ("c1", "c2", "assistant", 0),
        ("c2", "c1", "prompter", None),
        ("q", None, "prompter", None),
        ("x", "q", "bot", 0),
        ("y", "q", "assistant", "first"),
        ("z", "lost", "assistant", 0),
    )
    items = read_rows(tmp_path, *rows, {"message_id": 3, "text": "a", "role": "prompter"}, "no row")
    reasons = {
        2: "column 'parent_id' is 'nowhere'",
        3: "column 'parent_id' leads to no prompt",
        4: "column 'parent_id' leads back to this message",
        6: "column 'message_id' is 'q', as in an earlier row",
        7: "column 'role' is 'bot'; it must be 'prompter' or 'assistant'",
        8: "column 'rank' is 'first'",
        9: "column 'parent_id' of a message above is 'nowhere'",
        10: "column 'message_id' is 3",
        11: "the row is 'no row', not an object",
    }
    assert len(items) == 11
    for line, reason in reasons.items():
        item = items[line - 1]
        assert isinstance(item, Fault)
        assert str(item).startswith(f"{tmp_path / 'a.jsonl'}:{line}: ")
        assert reason in str(item)


# Real files: rows, examples, completions, skipped

REAL: dict[str, tuple[str, int, int, dict[str, int]]] = {
    "hh_rlhf_train": ("paired", 2898, 2898, {}),
    "hh_rlhf_test": ("paired", 1000, 1000, {}),
    "oasst_en100_scored": ("scored", 687, 641, {"no score": 46}),
    "oasst_en100_pairs": ("paired", 754, 754, {}),
    # 999 * 3 verdicts; the 60 rows that are skipped whole have three each.
    "pandalm_testset_3annotators": (
        "pandalm",
        999,
        2501,
        {"tie": 316, "empty response": 54, "response is not text": 6},
    ),
    "gsm8k_solutions_unpaired": ("unpaired", 5276, 5276, {}),
    "kto_en_demo": ("messages", 300, 300, {}),
    "dpo_en_demo": ("sharegpt_pair", 300, 300, {}),
    "hhh_alignment_pairs": ("paired", 221, 221, {}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_load_without_a_fault(shared_data: Path, name: str) -> None:
    schema, rows, examples, skips = REAL[name]
    path = str(shared_data / "feedback" / f"{name}.jsonl.gz")
    items = list(read(Source(path)))
    assert not [str(item) for item in items if isinstance(item, Fault)]
    assert Counter(item.reason for item in items if isinstance(item, Skipped)) == skips
    found = [item for item in items if isinstance(item, Example)]
    assert len(found) == examples
    places = {i.row_id if isinstance(i, Example) else i.place for i in items}
    assert {place.split("#")[0] for place in places} == {f"{path}:{line}" for line in range(1, rows + 1)}
    assert items == list(read(Source(path, schema=schema)))


def test_no_real_file_was_forgotten(shared_data: Path) -> None:
    assert {path.name.removesuffix(".jsonl.gz") for path in (shared_data / "feedback").iterdir()} == set(REAL)


def test_real_annotators_contradict_each_other(shared_data: Path) -> None:
    path = str(shared_data / "feedback" / "pandalm_testset_3annotators.jsonl.gz")
    orders: dict[str, set[Any]] = {}
    for item in read(Source(path)):
        if isinstance(item, Example):
            orders.setdefault(item.row_id.split("#")[0], set()).add(item.completions)
    with gzip.open(path) as file:
        verdicts = [{row[f"annotator{i}"] for i in (1, 2, 3)} for row in map(json.loads, file)]
    assert sum(both >= {1, 2} for both in verdicts) == 69
    assert sum(len(both) == 2 for both in orders.values()) == 68  # one of the 69 has an empty response


@pytest.mark.parametrize("name", ["train", "test"])
def test_raw_hh_gives_what_its_messages_say(shared_data: Path, name: str) -> None:
    path = str(shared_data / "feedback" / f"hh_rlhf_{name}.jsonl.gz")
    raw = Source(path, schema="implicit", columns={"chosen": "chosen_raw", "rejected": "rejected_raw"})
    assert list(read(raw)) == list(read(Source(path)))


def test_a_rank_does_not_stand_in_for_a_missing_score(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": f"c{i}", "score": s, "rank": i} for i, s in enumerate([5, None, 1])]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(read(Source(str(path))))
    assert [item.scores for item in found if isinstance(item, Example)] == [(5.0,), (1.0,)]
    assert [item.reason for item in found if isinstance(item, Skipped)] == ["no score"]


def test_a_score_beside_a_label_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completion": "c", "label": True, "score": 0.25}) + "\n")
    [found] = read(Source(str(path)))
    assert isinstance(found, Example)
    assert (found.labels, found.scores) == ((True,), (0.25,))


def test_calls_of_tools_are_kept_in_whatever_form_they_are_stored(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": None}}}]
    for stored in (calls, json.dumps(calls), [json.dumps(calls[0])]):
        for content in ({"content": None}, {"content": ""}, {}):
            said = {"role": "assistant", **content, "tool_calls": stored}
            found = example(tmp_path, {"prompt": [USER], "completion": [said], "label": True, "tools": stored})
            assert found.completions == ([{"role": "assistant", "content": "", "tool_calls": calls}],)
            assert found.tools == calls
    for wrong in ("f(x) -> int", [{"x": 1}], {"name": "f"}, [["f"]], 3):
        said = {"role": "assistant", "content": "ok", "tool_calls": wrong}
        assert "tool_calls" in refused(tmp_path, {"prompt": [USER], "completion": [said], "label": True})
        assert "'tools'" in refused(tmp_path, {"prompt": [USER], "completion": [BOT], "label": True, "tools": wrong})


def test_dialogues_that_part_early_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"chosen": HH + " a", "rejected": HH.replace("who", "what") + " b"}) + "\n")
    [found] = read(Source(str(path)))
    assert isinstance(found, Skipped)
    assert found.reason == "dialogues differ before the last turn"
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    other = [turns[0], {"role": "assistant", "content": "x"}, *turns[2:]]
    path.write_text(json.dumps({"chosen": turns, "rejected": other}) + "\n")
    [found] = read(Source(str(path)))
    assert isinstance(found, Skipped)
    assert found.reason == "dialogues differ before the last turn"


def test_a_score_that_is_not_asked_for_is_kept_where_it_is_one(tmp_path: Path) -> None:
    for score, kept in ((0.5, 0.5), ("0.5", 0.5), ("good", None), (10**400, None), (True, None), (None, None)):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"prompt": "p", "completion": "c", "label": True, "score": score}) + "\n")
        [found] = read(Source(str(path)))
        assert isinstance(found, Example)
        assert found.scores == (kept,)


def test_a_dialogue_repeated_but_for_the_system_message_is_repeated(tmp_path: Path) -> None:
    row = {"prompt": [SYSTEM, USER], "chosen": [USER, BOT], "rejected": [USER, OTHER]}
    assert pair(tmp_path, row) == ([SYSTEM, USER], [BOT], [OTHER])


def test_what_a_tool_says_in_a_completion_belongs_to_it(tmp_path: Path) -> None:
    tool = {"role": "tool", "content": "42"}
    assert pair(tmp_path, {"prompt": [USER], "chosen": [BOT, tool, OTHER], "rejected": [BOT]}) == (
        [USER],
        [BOT, tool, OTHER],
        [BOT],
    )
    found = read_rows(tmp_path, {"prompt": [USER], "chosen": [BOT, tool], "rejected": [BOT]})
    reasons = [item.reason for item in found if isinstance(item, Skipped)]
    assert reasons == ["a completion does not end with the assistant"]
