"""What the data give is used or refused by name: trl#2385, LlamaFactory#6518 (system text and pictures were dropped).

One case for each column and each key of a message that carries meaning in a format of the field.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_halos import write_jsonl

from halos_pl.cli.inspect import inspect
from halos_pl.data.example import DataError, Example, Fault, Skipped
from halos_pl.data.prompt_files import read_prompts
from halos_pl.data.read import read
from halos_pl.data.source import Source, source_of
from halos_pl.testing import tiny_tokenizer

USER, BOT, OTHER = ({"role": r, "content": c} for r, c in (("user", "Who?"), ("assistant", "Arr"), ("assistant", "I")))
PIRATE = {"role": "system", "content": "Be a pirate"}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
PAIR: dict[str, Any] = {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]}
TEXT: dict[str, Any] = {"prompt": "Who?", "chosen": "Arr", "rejected": "I"}
ONE: dict[str, Any] = {"prompt": [USER], "completion": [BOT], "label": True}
ROWS: dict[str, dict[str, Any]] = {
    "unpaired": ONE,
    "paired": PAIR,
    "implicit": {"chosen": [USER, BOT], "rejected": [USER, OTHER]},
    "halos_binary": {"prompt": [USER], "output": [BOT], "label": 1},
    "halos_pairwise": {"prompt": [USER], "output_A": [BOT], "output_B": [OTHER], "label": 1},
    "messages": {"messages": [USER, BOT], "label": True},
    "messages_pair": {"messages": [USER], "chosen": [BOT], "rejected": [OTHER]},
    "sharegpt_pair": {"conversations": [USER], "chosen": BOT, "rejected": OTHER},
    "sharegpt": {"conversations": [USER, BOT], "kto_tag": True},
    "scored": {"prompt": [USER], "completion": [BOT], "score": 1},
    "scored_lists": {"prompt": [USER], "completions": [[BOT], [OTHER]], "scores": [1, 0]},
}


def items(tmp_path: Path, row: dict[str, Any], **settings: Any) -> list[Any]:
    return list(read(Source(write_jsonl(tmp_path / "a.jsonl", [row]), **settings)))


def example(tmp_path: Path, row: dict[str, Any], **settings: Any) -> Example:
    [found] = items(tmp_path, row, **settings)
    assert isinstance(found, Example), found
    return found


def refused(tmp_path: Path, row: dict[str, Any], **settings: Any) -> Fault:
    [found] = items(tmp_path, row, **settings)
    assert isinstance(found, Fault), found
    assert str(found).startswith(f"{tmp_path / 'a.jsonl'}:1: ")
    return found


@pytest.mark.parametrize("schema", ROWS)
def test_a_system_text_is_in_front_of_every_message_prompt(tmp_path: Path, schema: str) -> None:
    plain = example(tmp_path, ROWS[schema], schema=schema)
    assert plain.prompt == [USER]
    for column in ("system", "system_prompt", "System", "custom_system_prompt"):
        found = example(tmp_path, {**ROWS[schema], column: "Be a pirate"}, schema=schema)
        assert found.prompt == [PIRATE, USER]
        assert found.completions == plain.completions


@pytest.mark.parametrize("schema", ROWS)
def test_history_is_the_turns_before(tmp_path: Path, schema: str) -> None:
    row = {**ROWS[schema], "system": "Be a pirate"}
    if schema != "implicit":  # there history may be the prompt itself
        for history in ([["Hi", "Hello"]], EARLIER):
            assert example(tmp_path, {**row, "history": history}).prompt == [PIRATE, *EARLIER, USER]
        assert refused(tmp_path, {**row, "history": [["Hi"]]}).column == "history"
        assert refused(tmp_path, {**row, "history": "Hi"}).column == "history"


def test_a_system_message_is_given_once(tmp_path: Path) -> None:
    row = {**PAIR, "prompt": [PIRATE, USER]}
    assert example(tmp_path, {**row, "system": "Be a pirate"}).prompt == [PIRATE, USER]
    assert refused(tmp_path, {**row, "system": "Be brief"}).column == "system"
    repeated = {**PAIR, "prompt": [*EARLIER, USER], "chosen": [*EARLIER, USER, BOT], "system": "Be a pirate"}
    assert example(tmp_path, repeated).prompt == [PIRATE, *EARLIER, USER]
    ultrafeedback = {"prompt": "Who?", "chosen": [USER, BOT], "rejected": [USER, OTHER], "system": "Be a pirate"}
    assert example(tmp_path, ultrafeedback).prompt == [PIRATE, USER]


@pytest.mark.parametrize("column", ["system", "history", "input", "instruction", "question", "context", "query"])
def test_a_text_prompt_has_no_place_for_a_part_of_it(tmp_path: Path, column: str) -> None:
    row = {**TEXT, column: [["Hi", "Hello"]] if column == "history" else "W"}  # "W" is in "Who?" by chance
    fault = refused(tmp_path, row)
    assert fault.column == column
    assert f'ignore: ["{column}"]' in fault.reason
    assert example(tmp_path, row, ignore=[column]).prompt == "Who?"
    whole = {**TEXT, "prompt": "Answer as pirates do. Who?", column: "Answer as pirates do."}
    assert example(tmp_path, whole).prompt == whole["prompt"]  # it is there already


def test_orca_pairs(tmp_path: Path) -> None:
    row = {"system": "Be a pirate", "question": "Who?", "chosen": "Arr", "rejected": "I"}
    columns = {"prompt": "question"}
    assert refused(tmp_path, row, columns=columns).column == "system"
    assert example(tmp_path, {**row, "system": ""}, columns=columns).prompt == "Who?"


def test_the_input_of_an_instruction_is_used(tmp_path: Path) -> None:
    row = {"instruction": "Translate", "input": "Hund", "output": "dog", "kto_tag": True}
    columns = {"prompt": "instruction", "completion": "output", "label": "kto_tag"}
    assert example(tmp_path, row, columns=columns).prompt == "Translate\nHund"
    assert example(tmp_path, {**row, "input": ""}, columns=columns).prompt == "Translate"
    many = {"instruction": "Translate", "input": "Hund", "completions": [{"response": "dog", "overall_score": 1}]}
    assert example(tmp_path, many).prompt == "Translate\nHund"
    assert refused(tmp_path, {**TEXT, "input": "Hund"}).column == "input"  # whose it is, no one can tell


MEANT = {
    "images": ["a.jpg"],
    "image": {"path": "a.jpg"},
    "videos": ["a.mp4"],
    "audios": ["a.wav"],
    "Images": ["a.jpg"],
    "functions": [{"name": "f"}],
    "chat_template_kwargs": {"enable_thinking": True},
    "documents": [{"title": "t", "text": "x"}],
    "tool_calls": [{"name": "f"}],
    "thinking": "hm",
    "reasoning_content": "hm",
    "context_messages": EARLIER,
}


@pytest.mark.parametrize("column", MEANT)
def test_what_no_prompt_can_hold_is_refused_by_name(tmp_path: Path, column: str) -> None:
    for row in (PAIR, TEXT, ONE):
        fault = refused(tmp_path, {**row, column: MEANT[column]})
        assert fault.column == column
        example(tmp_path, {**row, column: MEANT[column]}, ignore=[column])
    empty = (None, "", [], {}, "[]", [None], [""], {"a": None}, float("nan"))
    path = write_jsonl(tmp_path / "a.jsonl", [{**PAIR, column: value} for value in empty])
    assert all(isinstance(item, Example) for item in read(Source(path)))


KEYS = {
    "function_call": {"name": "f"},
    "images": ["a.jpg"],
    "weight": 0,
    "train": False,
    "loss": False,
    "loss_weight": 0.5,
}


@pytest.mark.parametrize("schema", ROWS)
def test_a_key_of_a_judged_message_is_refused_by_name(tmp_path: Path, schema: str) -> None:
    plain = example(tmp_path, ROWS[schema])
    for key, value in KEYS.items():
        text = json.dumps(ROWS[schema]).replace('"content": "Arr"', f'"content": "Arr", "{key}": {json.dumps(value)}')
        row = json.loads(text)
        assert f"has {key}" in (reason := refused(tmp_path, row).reason) or f"has the {key}" in reason
        assert example(tmp_path, row, ignore=[key]) == plain


def test_flags_that_say_what_is_done_anyway(tmp_path: Path) -> None:
    """As OpenAI's files have them: earlier answers are not trained on, the last one is."""
    said = [USER, {**OTHER, "weight": 0}, {**USER, "train": False}, {**BOT, "weight": 1, "train": True}]
    assert example(tmp_path, {"messages": said, "label": 1}).completions == ([BOT],)


@pytest.mark.parametrize("text", ["<image>Who?", "Who is <video>?", "<audio>", "<|image|> Who?", "<image_1>", "[IMG]"])
@pytest.mark.parametrize("row", [PAIR, TEXT], ids=["messages", "text"])
def test_a_placeholder_is_no_text(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    given = {**row, "prompt": text if row is TEXT else [{"role": "user", "content": text}]}
    assert "contains " in refused(tmp_path, given).reason
    placeholder = next(p for p in ("<image>", "<video>", "<audio>", "<|image|>", "<image_1>", "[IMG]") if p in text)
    assert text in str(example(tmp_path, given, ignore=[placeholder]).prompt)


def test_markup_is_text(tmp_path: Path) -> None:
    for text in ("<video src='a'>", "<audio controls><source></audio>", "<image><url>u</url></image>", "a < b > c"):
        assert example(tmp_path, {**TEXT, "prompt": text}).prompt == text


def test_parts_of_a_content(tmp_path: Path) -> None:
    def asked(*parts: Any) -> dict[str, Any]:
        return {**PAIR, "prompt": [{"role": "user", "content": list(parts)}]}

    assert example(tmp_path, asked({"type": "text", "text": "Who?"})).prompt == [USER]
    for part in ({"type": "image"}, {"type": "image_url", "image_url": {"url": "u"}}, {"type": "audio"}, "Who?", 3):
        assert refused(tmp_path, asked({"type": "text", "text": "Who?"}, part)).column == "prompt"
    assert refused(tmp_path, {**PAIR, "prompt": [{"role": "user", "content": None}]}).column == "prompt"


@pytest.mark.parametrize(
    ("given", "role"),
    [
        *(("Assistant", "assistant"), ("ASSISTANT", "assistant"), ("gpt", "assistant"), ("GPT", "assistant")),
        *(("model", "assistant"), (" assistant ", "assistant"), ("AI", "assistant"), ("Bot", "assistant")),
    ],
)
def test_roles_count_in_any_case(tmp_path: Path, given: str, role: str) -> None:
    for asks in ("User", "HUMAN", "human", "prompter"):
        for role_key, text_key in (("role", "content"), ("from", "value")):
            said = [{role_key: asks, text_key: "Who?"}, {role_key: given, text_key: "Arr"}]
            found = example(tmp_path, {"messages": said, "label": 1})
            assert (found.prompt, found.completions) == ([USER], ([{"role": role, "content": "Arr"}],))


def test_a_misspelt_role_is_refused(tmp_path: Path) -> None:
    for role, meant in (("asistant", "assistant"), ("Usr", "user"), ("sytem", "system")):
        fault = refused(tmp_path, {**PAIR, "prompt": [{"role": role, "content": "x"}, USER]})
        assert repr(meant) in fault.reason
    assert refused(tmp_path, {**PAIR, "prompt": [{"role": "user", "content": "x", "from": "gpt"}]}).column == "prompt"


def test_columns_that_contradict_each_other(tmp_path: Path) -> None:
    assert refused(tmp_path, {**ONE, "kto_tag": False}).column == "label"
    assert refused(tmp_path, {"conversations": [USER, BOT], "label": 1, "kto_tag": False}).column == "kto_tag"
    assert example(tmp_path, {**ONE, "kto_tag": True}).labels == (True,)


def test_a_prompt_beside_answers_is_no_guess(tmp_path: Path) -> None:
    """What two texts both begin with was taken for the prompt, and the conversation dropped."""
    row = {"messages": [USER], "chosen": "The sky is blue", "rejected": "The sky is green"}
    assert example(tmp_path, row).prompt == [USER]
    assert example(tmp_path, row).completions == ("The sky is blue", "The sky is green")
    lists = {"messages": [USER, BOT], "chosen": [USER, BOT], "rejected": [USER, OTHER]}  # a copy
    assert example(tmp_path, lists).prompt == [USER]
    assert example(tmp_path, {**PAIR, "turns": 3}).prompt == [USER]
    turns = {"conversation": [{"input": "Who?", "output": "x"}], "chosen": "It is Ann", "rejected": "It is Bob"}
    assert refused(tmp_path, turns).column == "conversation"


@pytest.mark.parametrize("names", [("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating")])
def test_scores_of_pairs_by_any_name(tmp_path: Path, names: tuple[str, str]) -> None:
    for row in (PAIR, ROWS["implicit"], ROWS["sharegpt_pair"]):
        assert example(tmp_path, {**row, names[0]: 8, names[1]: "5.5"}).scores == (8.0, 5.5)


INVISIBLE = ["\u200b", "\ufeff", "\u200f \u200e", "\u2060\u00ad", "\u2800", "\u3164", "\ufe0f", "\x00", "\U000e0041"]


@pytest.mark.parametrize("text", INVISIBLE)
def test_a_text_of_nothing_visible_is_empty(tmp_path: Path, text: str) -> None:
    for column in TEXT:
        assert refused(tmp_path, {**TEXT, column: text}).column == column
    example(tmp_path, {**TEXT, "prompt": f"{text}a"})


def test_what_nothing_reads_is_listed(tmp_path: Path) -> None:
    rows = [{**PAIR, "id": 3, "empty": None}, {**PAIR, "prompt": [{**USER, "date": "2024"}], "lang": "en"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    unused: dict[str, None] = {}
    assert all(isinstance(item, Example) for item in read(Source(path), unused))
    assert list(unused) == ["id", "lang", "prompt: date"]
    assert inspect(Source(path), tiny_tokenizer(), cache_dir=tmp_path / "cache").unused == list(unused)


def test_settings_that_would_be_ignored(tmp_path: Path) -> None:
    fault = next(iter(read(Source(write_jsonl(tmp_path / "a.jsonl", [PAIR]), columns={"sytem": "s"}))))
    assert isinstance(fault, Fault)
    assert "'sytem'" in fault.reason
    assert source_of({"path": "a", "ignore": ["images"]}, "data.train").ignore == ["images"]
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="max_row_mb"):
            Source("a", max_row_mb=wrong)


def test_a_tree_has_no_context(tmp_path: Path) -> None:
    rows = [
        {"message_id": "q", "parent_id": None, "text": "Who?", "role": "Prompter"},
        {"message_id": "a", "parent_id": "q", "text": "Arr", "role": "ASSISTANT", "rank": 0},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert [type(item) for item in read(Source(path))] == [Skipped, Example]
    path = write_jsonl(tmp_path / "a.jsonl", [{**rows[0], "system": "Be a pirate"}, rows[1]])
    assert isinstance(next(iter(read(Source(path)))), Fault)


def test_prompts_to_be_answered_keep_their_context(tmp_path: Path) -> None:
    """``halos sample`` reads the same rows."""
    row = {**PAIR, "system": "Be a pirate", "history": [["Hi", "Hello"]], "id": 3}
    assert read_prompts(Path(write_jsonl(tmp_path / "a.jsonl", [row]))) == [[PIRATE, *EARLIER, USER]]
    for wrong in ({"images": ["a.jpg"]}, {"prompt": "<image>Who?"}, {"prompt": "Who?", "system": "Be a pirate"}):
        with pytest.raises(DataError, match=r"a\.jsonl:1: column") as found:
            read_prompts(Path(write_jsonl(tmp_path / "a.jsonl", [row | {"system": "", "history": None} | wrong])))
        assert "ignore" not in str(found.value)  # there is no such setting there


MEANT_TOO = {  # in the spellings of other formats
    "image_urls": ["a.jpg"],
    "img": "a.jpg",
    "pixel_values": [[0.5]],
    "multiModalData": {"image": "a.jpg"},
    "available_tools": '[{"name": "f"}]',
    "toolCalls": [{"name": "f"}],
    "tools": "get_weather(city) -> str",
    "documents": "The tower is 330 m tall.",
    "thoughts": "hm",
    "sampleWeight": 0.5,
    "passages": ["The tower is 330 m tall."],
    "Prompt": "Who is it?",
    "trajectory": [{"from": "user", "value": "Who is it?"}],
    "initial_reason_steps": "Step 1: look at it.",
    "chat_history": ["Hi there, my friend"],
}


@pytest.mark.parametrize("column", MEANT_TOO)
def test_other_spellings_are_refused_by_name(tmp_path: Path, column: str) -> None:
    for row in (PAIR, TEXT, {"chosen": "It is Ann", "rejected": "It is Bob"}):
        assert refused(tmp_path, {**row, column: MEANT_TOO[column]}).column == column
        example(tmp_path, {**row, column: MEANT_TOO[column]}, ignore=[column])
    for nothing in ({"image": False}, {"weight": 1}, {"sample_weight": "70 kg"}, {"tools": "none"}):
        example(tmp_path, {**PAIR, **nothing})


@pytest.mark.parametrize("column", ["systemPrompt", "System Message", "sys_prompt", "system-instruction"])
def test_other_spellings_of_system(tmp_path: Path, column: str) -> None:
    assert example(tmp_path, {**PAIR, column: "Be a pirate"}).prompt == [PIRATE, USER]


KEYS_TOO = {
    "toolCalls": [{"name": "f"}],
    "Images": ["a.jpg"],
    "reasoning_details": [{"text": "hm"}],
    "thoughts": "hm",
    "attachments": [{"name": "a.pdf"}],
    "context": "The tower is 330 m tall.",
    "channel": "analysis",
    "loss_mask": 0,
    "trainable": False,
    "train_detail": [{"train": False}],
}


@pytest.mark.parametrize("key", KEYS_TOO)
def test_other_spellings_of_keys_are_refused_by_name(tmp_path: Path, key: str) -> None:
    row = {"messages": [USER, {**BOT, key: KEYS_TOO[key]}], "label": 1}
    assert key in refused(tmp_path, row).reason
    assert example(tmp_path, row, ignore=[key]) == example(tmp_path, {"messages": [USER, BOT], "label": 1})
    example(tmp_path, {"messages": [USER, {**BOT, "channel": "final"}], "label": 1})


PLACEHOLDERS = ["<image 1>", "<IMG_CONTEXT>", "<image_placeholder>", "<ImageHere>", "<__media__>", "<|media_pad|>"]


@pytest.mark.parametrize("text", [*PLACEHOLDERS, "(<image>./</image>)", "<|image_start|>", "<|audio_bos|>"])
def test_placeholders_of_other_models(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, {**TEXT, "prompt": f"{text} Who?"}).column == "prompt"


def test_a_placeholder_is_found_wherever_it_stands(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "<image>Who?"}]}]
    for row in ({"prompt": parts}, {"system": "<image> Look"}, {"history": [["<image> Hi", "Hello"]]}):
        assert "<image>" in refused(tmp_path, {**PAIR, **row}).reason
        example(tmp_path, {**PAIR, **row}, ignore=["<image>"])
    alpaca = {"instruction": "Describe", "input": "<image>", "chosen": "Arr", "rejected": "I"}
    assert refused(tmp_path, alpaca, columns={"prompt": "instruction"}).column == "input"
    (tmp_path / "a.txt").write_text("Who?\n<image>Who?\n")
    with pytest.raises(DataError, match=r"a\.txt:2: column"):
        read_prompts(tmp_path / "a.txt")
    example(tmp_path, {**TEXT, "prompt": "[IMG]http://a/b.png[/IMG] Who?"})  # as forums write links
    linked = [{"role": "user", "content": [{"type": "text", "text": "Who?", "image_url": "a.jpg"}]}]
    assert "image_url" in refused(tmp_path, {**PAIR, "prompt": linked}).reason
    example(tmp_path, {**PAIR, "prompt": linked}, ignore=["image_url"])


def test_an_answer_that_quotes_it_is_no_prompt(tmp_path: Path) -> None:
    for column in ("context", "system"):
        row = {**TEXT, column: "The tower is 330 m tall.", "chosen": "It says: The tower is 330 m tall."}
        assert refused(tmp_path, row).column == column


def test_scores_of_a_pair_are_in_one_unit(tmp_path: Path) -> None:
    assert example(tmp_path, {**PAIR, "chosen-rating": 5, "rejected-rating": 2}).scores == (5, 2)
    assert example(tmp_path, {**PAIR, "chosen_avg_rating": 5, "rejected_avg_rating": 2}).scores == (5, 2)
    mixed = {**PAIR, "score_chosen": 0.5, "chosen_rating": 5, "rejected_rating": 2}
    assert example(tmp_path, mixed).scores == (5, 2)


def test_columns_that_no_row_has(tmp_path: Path) -> None:
    """A misspelt name of a column that need not be there dropped it in silence."""
    *_, fault = items(tmp_path, {**ONE, "my_score": 3}, columns={"score": "my_scroe"})
    assert isinstance(fault, Fault)
    assert fault.fatal
    assert "'my_scroe'" in fault.reason
    unused: dict[str, None] = {}
    path = write_jsonl(tmp_path / "a.jsonl", [{**TEXT, "question": "Why?"}])
    [found] = read(Source(path, columns={"prompt": "question"}), unused)
    assert isinstance(found, Example)
    assert found.prompt == "Why?"
    assert any("prompt" in name for name in unused)  # the file's own, which is not read


def test_a_prompt_to_be_answered_needs_no_weight(tmp_path: Path) -> None:
    row = {**PAIR, "weight": 0.5, "margin": 1.0, "reasoning": "hm"}
    assert read_prompts(Path(write_jsonl(tmp_path / "a.jsonl", [row]))) == [[USER]]


def test_what_is_ignored_but_in_no_row_is_said(tmp_path: Path) -> None:
    row = {**ONE, "weight": 2}
    unused: dict[str, None] = {}
    source = Source(write_jsonl(tmp_path / "a.jsonl", [row]), ignore=["weight", "weights", "<image>"])
    assert len(list(read(source, unused))) == 1
    assert [name for name in unused if "weights" in name]
    assert not [name for name in unused if name.startswith(("weight ", "<image>"))]
