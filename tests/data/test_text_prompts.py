"""A prompt of plain text means the same in training and where answers are sampled, whatever the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_halos import write_jsonl

from halos_pl.cli.inspect import inspect
from halos_pl.data.columns import prompt_in_context
from halos_pl.data.example import Example, Fault
from halos_pl.data.prompts import asked, convention, text_settings
from halos_pl.data.read import read
from halos_pl.data.source import Source
from halos_pl.data.store import open_store
from halos_pl.data.tokenize import encode_prompt
from halos_pl.testing import tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": "Why?", "completion": "So it is.", "label": True},
    {"prompt": "Why?", "chosen": "So it is.", "rejected": "No."},
    {"prompt": "Why?", "completions": ["So it is.", "No."], "scores": [1, 0]},
]


@pytest.mark.parametrize("text_prompts", ["plain", "chat"])
@pytest.mark.parametrize("row", ROWS)
def test_what_is_sampled_and_trained_on_has_one_format(tmp_path: Path, row: Any, text_prompts: Any) -> None:
    tokenizer = tiny_tokenizer()
    source = Source(write_jsonl(tmp_path / "a.jsonl", [row]))
    store = open_store(source, tokenizer, tmp_path / "cache", text_prompts=text_prompts)
    sampled_from = prompt_in_context({"prompt": row["prompt"]}, text_prompts).prompt
    assert store.prompt(0).tolist() == encode_prompt(tokenizer, sampled_from)
    assert ("<|im_start|>" in tokenizer.decode(store.prompt(0))) == (text_prompts == "chat")
    assert tokenizer.decode(store.completion(0)) == "So it is.<|im_end|>"
    assert store.text_prompts == 1
    # Messages are messages under both.
    messages = [{"role": "user", "content": row["prompt"]}]
    source = Source(write_jsonl(tmp_path / "b.jsonl", [{**row, "prompt": messages}]))
    given = open_store(source, tokenizer, tmp_path / "cache", text_prompts=text_prompts)
    assert given.text_prompts == 0
    assert given.prompt(0).tolist() == encode_prompt(tokenizer, messages)
    if text_prompts == "chat":
        assert (given.tokens == store.tokens).all()


def test_a_system_column_has_a_place_before_a_text_prompt_in_the_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROWS[0], "system": "Be brief."}])
    [plain], [chat] = (list(read(Source(path), text_prompts=how)) for how in ("plain", "chat"))
    assert isinstance(plain, Fault)
    assert isinstance(chat, Example)
    assert isinstance(chat.prompt, list)
    assert [message["role"] for message in chat.prompt] == ["system", "user"]
    assert prompt_in_context({"prompt": "Why?", "system": "Be brief."}, "chat").prompt == chat.prompt


def test_the_convention_is_said_and_kept(tmp_path: Path) -> None:
    for how in ("plain", "chat"):
        path = write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
        found = inspect(Source(path), tiny_tokenizer(), cache_dir=tmp_path / "c", text_prompts=how)  # type: ignore[arg-type]
        assert f"text_prompts: {how}" in str(found.text_prompts)
    assert convention(0, "plain", True) is None
    assert text_settings({"text_prompts": "chat", "batch_size": 4})["text_prompts"] == "chat"
    assert text_settings({}) == {"special_tokens_in_text": "refuse", "text_prompts": "plain", "loss_on": "last"}
    with pytest.raises(ValueError, match="text_prompts"):
        asked("Why?", "both")  # type: ignore[arg-type]
    faults = open_store(Source(path), tiny_tokenizer(None), tmp_path / "c", text_prompts="chat").found_faults
    assert "no chat template" in faults[0][1]


def test_nulls_that_fill_up_columns_are_no_arguments(tmp_path: Path) -> None:
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"a": "1"}, {"b": "2"})]
    rows = [
        {
            "prompt": [{"role": "user", "content": "p", "tool_calls": None}],
            "completion": [{"role": "assistant", "content": None, "tool_calls": [call]}],
            "label": True,
            "tools": [{"name": "f", "parameters": call["function"]["arguments"]}],
        }
        for call in calls
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(read(Source(str(tmp_path / "a.parquet"))))
    for item, call in zip(found, calls, strict=True):
        assert isinstance(item, Example)
        assert item.prompt == [{"role": "user", "content": "p"}]
        assert item.completions[0][0]["tool_calls"] == [call]  # type: ignore[index]
        assert item.tools == [{"name": "f", "parameters": call["function"]["arguments"]}]
