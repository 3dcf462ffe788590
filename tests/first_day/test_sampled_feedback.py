"""What ``halos sample`` writes is what ``halos fit`` reads, in the format in which it was sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES, stub
from run_halos import binary_data, fit, one_in, write_jsonl
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from halos_pl.cli.main import main
from halos_pl.data.example import Example
from halos_pl.data.prompt_files import kept_columns
from halos_pl.data.schemas import SCHEMAS, Schema, find
from halos_pl.data.source import Source
from halos_pl.data.store import open_store
from halos_pl.data.tokenize import Encoder, Tokens, encode_prompt
from halos_pl.data.turns import turn_markers
from halos_pl.policy.drawing import Decoding, draw, plan_batches
from halos_pl.policy.loading import ModelSpec, load_model, load_tokenizer
from halos_pl.policy.sampled_text import SampledText, sampled_texts
from halos_pl.policy.sampling import Sample
from halos_pl.testing import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "question 1"}]


def sampled_rows(model: Path, rows: list[dict[str, Any]], folder: Path, *words: str) -> list[dict[str, Any]]:
    prompts = write_jsonl(folder / "p.jsonl", rows)
    out = ["--overwrite=true", f"--out={folder}/out.jsonl"]
    main(["sample", str(model), f"--prompts={prompts}", *out, "--max_new_tokens=4", *words])
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("convention", ["plain", "chat"])
def test_a_label_added_is_feedback_in_the_same_format(tiny_folder: Path, tmp_path: Path, convention: str) -> None:
    """The prompt's tokens are those that were sampled from; a completion that was cut gets no end."""
    rows = [{"prompt": "question 0", "id": 7}, {"prompt": MESSAGES, "gold": {"a": [1]}}]
    found = sampled_rows(tiny_folder, rows, tmp_path, "--one_per_row=true", "--n=3", f"--text_prompts={convention}")
    assert len(found) == 6
    assert [row["id"] for row in found[:3]] == [7] * 3
    assert [row["gold"] for row in found[3:]] == [{"a": [1]}] * 3
    asked = [{"role": "user", "content": "question 0"}] if convention == "chat" else "question 0"
    assert [row["prompt"] for row in found] == [asked] * 3 + [MESSAGES] * 3
    for i, row in enumerate(found):
        row |= {"label": i % 2 == 0, "finished": i % 3 == 0}
    tokenizer = load_tokenizer(ModelSpec(str(tiny_folder)))
    store = open_store(Source(write_jsonl(tmp_path / "f.jsonl", found)), tokenizer, tmp_path / "cache")
    assert store.fault_count == 0, store.faults
    end = tokenizer.eos_token
    for i, row in enumerate(found):
        assert store.prompt(int(store.rows["prompt"][i])).tolist() == encode_prompt(tokenizer, row["prompt"])
        assert tokenizer.decode(store.completion(i)) == row["completion"] + end * row["finished"]


def test_lists_of_completions_take_scores(tiny_folder: Path, tmp_path: Path) -> None:
    (row,) = sampled_rows(tiny_folder, [{"prompt": MESSAGES}], tmp_path, "--n=2")
    assert len(row["completions"]) == len(row["finished"]) == 2
    row["scores"] = [1.0, 0.0]
    tokenizer = load_tokenizer(ModelSpec(str(tiny_folder)))
    store = open_store(Source(write_jsonl(tmp_path / "f.jsonl", [row])), tokenizer, tmp_path / "cache")
    assert store.fault_count == 0, store.faults


@pytest.mark.slow
def test_blanks_that_part_a_text_from_its_completion_are_kept(tiny_folder: Path, tmp_path: Path) -> None:
    """They are tokens of the completion like others."""
    rows = [{"prompt": f"question {i}"} for i in range(40)]
    found = sampled_rows(tiny_folder, rows, tmp_path, "--temperature=3")
    texts = [row["completions"][0] for row in found]
    assert any(text != text.strip() for text in texts)


def test_judgements_of_other_answers_are_not_copied(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """A row of feedback may give the prompt; its label is of another completion."""
    (row,) = sampled_rows(tiny_folder, [{"prompt": MESSAGES, "completion": "a", "label": True, "id": 1}], tmp_path)
    answers = {"completions", "finished", "same_tokens", "seed", "logprob", "token_logprobs", "prompt_row"}
    assert row.keys() == {"prompt", "id", *answers}
    said = next(line for line in capsys.readouterr().out.splitlines() if "not copied" in line)
    assert "completion, label" in said


@pytest.mark.parametrize("of", SCHEMAS.values(), ids=SCHEMAS)
@pytest.mark.parametrize("form", ["unpaired", "paired", "scored", "scored_lists"])
def test_labelled_answers_to_the_prompts_of_any_feedback_fit_one_schema(form: str, of: Schema) -> None:
    prompt = {name: 1 for column in of.columns for name in column.split("|")} | {"answer": 1}
    kept = kept_columns(prompt)
    assert "answer" in kept
    # A gold answer belongs to the prompt, so pairs of new answers are triples.
    expected = "triple" if (form, of.name) == ("paired", "triple") else form
    assert find(kept | {column.partition("|")[0]: 1 for column in SCHEMAS[form].columns}, {}) is SCHEMAS[expected]


def test_the_prompt_column_may_have_the_name_of_another_format(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    prompts = [{"instruction": "say a", "prompt": "other", "id": 1}]
    (row,) = sampled_rows(tiny_folder, prompts, tmp_path, "--prompt_column=instruction")
    assert row["prompt"] == "say a"
    assert "instruction" not in row
    said = next(line for line in capsys.readouterr().out.splitlines() if "not copied" in line)
    assert "instruction (" in said
    assert "prompt (" in said


@pytest.mark.parametrize("convention", ["plain", "chat"])
def test_training_is_on_the_tokens_that_were_sampled_or_the_row_says_that_it_is_not(
    tiny_folder: Path, tmp_path: Path, capsys: Any, convention: Any
) -> None:
    rows = [{"prompt": f"question {i}"} for i in range(40)]
    words = ["--one_per_row=true", "--temperature=5", f"--text_prompts={convention}"]
    found = sampled_rows(tiny_folder, rows, tmp_path, *words)
    said = [line for line in capsys.readouterr().out.splitlines() if "same_tokens" in line]
    model, tokenizer = (load(ModelSpec(str(tiny_folder))) for load in (load_model, load_tokenizer))
    asked = [row["prompt"] for row in found]
    ids = [encode_prompt(tokenizer, prompt) for prompt in asked]
    samples: dict[int, list[int]] = {}
    for batch in plan_batches(model, ids, 4, 16):  # type: ignore[arg-type]
        some, how = [ids[i] for i in batch.rows], Decoding((), tokenizer.pad_token_id, 4, 5.0)  # type: ignore[attr-defined]
        names, seeds = [str(i) for i in batch.rows], [found[i]["seed"] for i in batch.rows]
        samples |= {i: one.ids for i, one in zip(batch.rows, draw(model, some, names, how, seeds), strict=True)}  # type: ignore[arg-type]
    path = write_jsonl(tmp_path / "f.jsonl", [{**row, "label": True} for row in found])
    store = open_store(Source(path), tokenizer, tmp_path / "cache")
    trained = {store.name(i): store.completion(i).tolist() for i in range(len(store.rows))}
    for i, row in enumerate(found):
        assert row["same_tokens"] == (trained.get(f"{path}:{i + 1}") == samples[i])
    different = sum(not row["same_tokens"] for row in found)
    assert 0 < different < 40
    assert len(said) == 1
    assert f"{different} of 40 completions" in said[0]


def sampled(tokenizer: PreTrainedTokenizerBase, text: str, finished: bool, mode: Any = "refuse") -> SampledText:
    """The text of a sample that spelled ``text``, its end included where it is finished."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    raw = str(tokenizer.decode(ids[: -1 if finished else None], skip_special_tokens=True))
    sample = Sample(encode_prompt(tokenizer, MESSAGES), ids, raw, finished)
    [[found]] = sampled_texts(Encoder(tokenizer, mode), [(MESSAGES, None)], [[sample]])
    assert found.finished == finished
    if found.same_tokens:
        example = Example(MESSAGES, (found.text,), (None,), "a:1", finished=(finished,))
        [again] = Encoder(tokenizer, mode).encode([example])
        assert isinstance(again, Tokens)
        assert again.completions == [ids]
        assert again.prompt == sample.prompt_ids
    return found


#: What a template writes in front of a finished answer.
OPENED = {
    "qwen3": "<think>\n\n</think>\n\n",
    "glm4moe": "\n<think></think>\n",
    "gptoss": "<|channel|>final<|message|>",
    "deepseek_r1_distill": "Hm.\n</think>\n\n",  # of thoughts that the prompt opens
}


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("qwen3", "<|im_end|>"),
        ("llama3_1", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("deepseek_r1_distill", "<｜end▁of▁sentence｜>"),
        ("glm4moe", "<eos>"),
        ("gptoss", "<|return|>"),
    ],
)
def test_special_tokens_in_an_answer_stay_unless_they_would_forge_a_turn(name: str, end: str) -> None:
    tokenizer = stub(TEMPLATES[name])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "</tool>"]})
    marker = next(iter(sorted(turn_markers(tokenizer) - {end, "<eos>"})))
    answer = "So <tool>it</tool> is."
    opened = OPENED.get(name, "")
    for finished in (True, False):
        text = (opened if finished else "") + answer + end * finished
        found = sampled(tokenizer, text, finished)
        if name == "gptoss" and finished:  # its channel is a turn's form, which a text may not spell
            assert not found.same_tokens
            continue
        assert found.same_tokens, found.text
        assert found.text.endswith(answer)
        forged = sampled(tokenizer, text.replace("it", marker), finished)
        assert not forged.same_tokens
        assert marker not in forged.text
        assert sampled(tokenizer, text.replace("it", marker), finished, "allow").same_tokens
        assert not sampled(tokenizer, text, finished, "split").same_tokens
    assert not sampled(tokenizer, end, True).same_tokens  # a row with an empty answer is refused


def test_an_answer_without_the_thoughts_that_the_prompt_opens_follows_another_prompt_in_training() -> None:
    """It is rendered without ``<think>``; in one row with others, theirs then belongs to the completions."""
    tokenizer = stub(TEMPLATES["deepseek_r1_distill"])
    prompt = encode_prompt(tokenizer, MESSAGES)
    assert str(tokenizer.decode(prompt)).endswith("<think>\n")
    end = "<｜end▁of▁sentence｜>"
    texts = ["I think.\n</think>\n\nFour." + end, "Four." + end, "So.\n</think>\n\nFour." + end]
    every = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    samples = [Sample(prompt, ids, text.removesuffix(end), True) for ids, text in zip(every, texts, strict=True)]

    def same(some: list[Sample], **how: Any) -> list[bool]:
        [found] = sampled_texts(Encoder(tokenizer), [(MESSAGES, None)], [some], **how)
        return [each.same_tokens for each in found]

    assert same(samples) == [True, False, True]
    assert same(samples, together=True) == [False] * 3
    assert same(samples[::2], together=True) == [True, True]
    behind = list(tokenizer("<|good|>", add_special_tokens=False)["input_ids"])
    controlled = [Sample(prompt + behind, each.completion_ids, each.raw, True) for each in samples]
    assert same(controlled, control="<|good|>") == [True, False, True]
    assert same(controlled[::2], control="<|good|>", together=True) == [True, True]


@pytest.mark.slow
def test_the_convention_is_said(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    sampled_rows(tiny_folder, [{"prompt": "a"}], tmp_path)
    assert "plain text" in capsys.readouterr().out
    sampled_rows(tiny_folder, [{"prompt": "a"}], tmp_path, "--text_prompts=chat")
    assert "chat template" in capsys.readouterr().out
    sampled_rows(tiny_folder, [{"prompt": MESSAGES}], tmp_path)
    assert "text prompt" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_base_model_takes_a_template(tmp_path: Path, tiny_folder: Path, capfd: Any) -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    folder = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(tiny_folder).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(SystemExit):
        sampled_rows(folder, [{"prompt": "a"}], tmp_path, "--text_prompts=chat")
    assert "p.jsonl:1" in capfd.readouterr().err
    (row,) = sampled_rows(folder, [{"prompt": "a"}], tmp_path, "--text_prompts=chat", "--chat_template=chatml")
    assert row["prompt"] == [{"role": "user", "content": "a"}]
    (same,) = sampled_rows(tiny_folder, [{"prompt": "a"}], tmp_path, "--text_prompts=chat")
    assert row == same  # that of the tiny model is ChatML


def test_tools_go_through_the_template(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "{% for tool in tools or [] %}{{ tool.name }}!{% endfor %}"
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    words = [f"--chat_template={tmp_path}/t.jinja", "--temperature=0"]
    with_tool = {"prompt": MESSAGES, "tools": [{"name": "oven", "parameters": {}}]}
    (one,) = sampled_rows(tiny_folder, [with_tool], tmp_path, *words)
    (two,) = sampled_rows(tiny_folder, [{"prompt": "oven!user: question 1\nassistant: "}], tmp_path, "--temperature=0")
    (other,) = sampled_rows(tiny_folder, [{"prompt": MESSAGES}], tmp_path, *words)
    assert one["completions"] == two["completions"] != other["completions"]
    assert one["tools"] == with_tool["tools"]


@pytest.mark.slow
def test_a_run_is_sampled_as_it_was_trained(tmp_path: Path, tiny_folder: Path) -> None:
    """Without an export, and in the convention of its data."""
    words = fit(tiny_folder, "kto", binary_data(tmp_path / "d.jsonl"), tmp_path / "run", "--trainer.max_steps=1")
    main([*words, "--data.text_prompts=chat"])
    (row,) = sampled_rows(tmp_path / "run", [{"prompt": "a"}], tmp_path)
    assert row["prompt"] == [{"role": "user", "content": "a"}]
    main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    (same,) = sampled_rows(tmp_path / "out", [{"prompt": "a"}], tmp_path, "--text_prompts=chat")
    assert row == same


WRONG = {
    "--n=0": "n is 0",
    "--max_new_tokens=0": "max_new_tokens",
    "--batch_size=-1": "batch_size",
    "--temperature=-1": "temperature",
    "--temperature=inf": "temperature",
    "--top_p=0": "top_p",
    "--top_p=1.5": "top_p",
    "--seed=-1": "seed",
    "--text_prompts=no": "text_prompts",
    "--chat_template=nope.jinja": "nope.jinja",
    "--prompt_column=question": "question",
    "--prompts=nope.jsonl": "nope.jsonl",
    "--prompts=empty.jsonl": "empty.jsonl",
    "--prompts=lists.jsonl": "lists.jsonl:1",
    "--prompts=.": "folder",
    "--prompts=table.csv": "JSON lines",
    "--prompts=packed.jsonl.gz": "JSON lines",
    "--ckpt_path=best": "checkpoint best",
}


@pytest.mark.parametrize("word", one_in(3, WRONG))
def test_a_wrong_input_is_a_line_before_a_model_is_loaded(
    word: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("halos_pl.training.named_model.load_model", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "lists.jsonl").write_text("[1]\n")
    for other in ("table.csv", "packed.jsonl.gz"):
        (tmp_path / other).write_bytes(b"prompt\na\n")
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    prompts = [] if "--prompts" in word else ["--prompts=p.jsonl"]
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(tiny_folder), *prompts, word])
    said = [line for line in capfd.readouterr().err.splitlines() if line and not line.startswith("All options")]
    assert ended.value.code in (1, 2)
    assert len(said) == 1, said
    assert WRONG[word] in said[0]
