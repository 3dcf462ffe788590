"""Which tokens carry the loss: of one turn or of all, with tools, thoughts and cut answers among them.

The reference is what a template says itself by ``{% generation %}``, as transformers reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import FORMS, MARKED, TEMPLATES, shipped, stub
from run_halos import write_jsonl
from transformers import PreTrainedTokenizerBase

from halos_pl.cli.inspect import inspect
from halos_pl.data.example import Example, Skipped
from halos_pl.data.messages import messages_of
from halos_pl.data.read import read
from halos_pl.data.source import Source
from halos_pl.data.store import open_store
from halos_pl.data.tokenize import Encoder, Tokens, encode_prompt
from halos_pl.testing import tiny_tokenizer

Spans = list[tuple[str, bool]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "c"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Look.", "parameters": CITY}}]
TALK = [user("Why?"), bot("So it is."), user("And?"), bot("It ends.")]
SUNNY = {"role": "tool", "name": "weather", "content": "sunny"}
AGENT = [user("Sun?"), bot("", tool_calls=CALL), SUNNY, bot("Yes, it is.")]


def encoded(tokenizer: PreTrainedTokenizerBase, example: Example, loss_on: Any = "all", mode: Any = "refuse") -> Tokens:
    [found] = Encoder(tokenizer, mode, loss_on).encode([example])
    assert not isinstance(found, ValueError), found
    return found


def reason(tokenizer: PreTrainedTokenizerBase, example: Example, loss_on: Any = "last") -> str:
    [found] = Encoder(tokenizer, "refuse", loss_on).encode([example])
    assert isinstance(found, ValueError)
    return str(found)


def conversation(messages: list[dict[str, Any]], start: int = 1, **more: Any) -> Example:
    return Example(messages[:start], (messages[start:],), (True,), "a:1", **more)


def parts(tokenizer: PreTrainedTokenizerBase, found: Tokens, row: int = 0) -> Spans:
    """The completion as texts, and whether each carries the loss."""
    ids, out, at = found.completions[row], [], 0
    for start, stop in found.spans[row] or [(0, len(ids))]:
        out += [(tokenizer.decode(ids[at:start]), False)] * (start > at) + [(tokenizer.decode(ids[start:stop]), True)]
        at = stop
    return [*out, *([(tokenizer.decode(ids[at:]), False)] if at < len(ids) else [])]


def accepted(tokenizer: PreTrainedTokenizerBase, messages: Any, tools: Any) -> bool:
    try:
        text = str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    except Exception:
        return False
    words = {message["content"] for message in messages} | ({"Rome", "Look"} if tools else set())
    return all(word in text for word in words)


#: Its generation prompt writes no head after a tool has answered, so the model writes it, and has to learn it.
HEADLESS = "diffusion_gemma_training"


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", [*MARKED, *FORMS])
def test_what_carries_the_loss_is_what_the_template_marks(name: str, tools: Any) -> None:
    tokenizer, messages = shipped(name), TALK if tools is None else AGENT
    if not accepted(tokenizer, messages, tools) or (name == HEADLESS and tools):
        pytest.skip("the template takes no such dialogue")
    asked = str(tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, tokenize=False))
    head = asked.rpartition("Why?")[2]
    how: dict[str, Any] = {"tools": tools, "tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    theirs: Any = tokenizer.apply_chat_template(messages, **how)
    found = encoded(tokenizer, conversation(messages, tools=tools))
    ids = [*found.prompt, *found.completions[0]]
    assert ids == theirs["input_ids"][: len(ids)]
    ours = np.zeros(len(theirs["input_ids"]), int)
    for start, stop in found.spans[0]:
        ours[len(found.prompt) + start : len(found.prompt) + stop] = 1
    marked = np.array(theirs["assistant_masks"])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marked, [0]])))
    assert len(edges) == 2 * len(found.spans[0])
    for start, stop in edges.reshape(-1, 2).tolist():
        own = np.flatnonzero(ours[start:stop]) + start
        # They mark what the generation prompt has written already, and what stands behind the end.
        assert tokenizer.decode(theirs["input_ids"][start : own[0]]).strip() in head
        assert tokenizer.decode(theirs["input_ids"][own[-1] + 1 : stop]).strip() in ("", "<eos>")
        assert len(own) == own[-1] + 1 - own[0]
        ours[own] = 0
    assert not ours.any()


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in ("idefics3", "llava_next", "smolvlm")])
def test_the_last_turn_alone_is_the_last_part_of_all(name: str) -> None:
    tokenizer = shipped(name)
    last, every = (encoded(tokenizer, conversation(TALK), loss_on) for loss_on in ("last", "all"))
    assert (last.prompt, last.completions) == (every.prompt, every.completions)
    (first, second), *more = [parts(tokenizer, found) for found in (last, every)]
    assert not first[1]
    assert second[1]
    assert [text for text, carries in more[0] if carries][-1] == second[0]
    assert len([text for text, carries in more[0] if carries]) == 2
    assert "".join(text for text, _ in more[0]) == first[0] + second[0]
    # The same as if all that comes before were the prompt.
    alone = encoded(tokenizer, conversation(TALK, 3), "last")
    assert tokenizer.decode(alone.prompt + alone.completions[0]) == tokenizer.decode(last.prompt + last.completions[0])


def test_tools_are_rendered_as_in_use_and_only_the_assistant_is_trained_on() -> None:
    tokenizer = shipped("qwen3")
    for start, loss_on in ((1, "all"), (3, "last")):
        found = encoded(tokenizer, conversation(AGENT, start, tools=TOOLS), loss_on)
        how: dict[str, Any] = {"tools": TOOLS, "tokenize": False}
        whole = str(tokenizer.apply_chat_template(AGENT, **how))
        asked = str(tokenizer.apply_chat_template(AGENT[:start], add_generation_prompt=True, **how))
        assert tokenizer.decode(found.prompt) == asked
        assert asked + "".join(text for text, _ in parts(tokenizer, found)) == whole.removesuffix("\n")
        assert encode_prompt(tokenizer, AGENT[:start], tools=TOOLS) == found.prompt
        assert all("sunny" not in text for text, carries in parts(tokenizer, found) if carries)
    found = encoded(tokenizer, conversation(AGENT, tools=TOOLS))
    spoken = [text for text, carries in parts(tokenizer, found) if carries]
    assert [text.count("<|im_end|>") for text in spoken] == [1, 1]
    assert '"arguments": {"city": "Rome"}' in spoken[0]


def test_calls_are_rendered_alike_in_whatever_form_they_are_stored() -> None:
    text = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
    bare = [{"name": "weather", "arguments": {"city": "Rome"}}]
    for name in ("qwen3", "qwen2_5", "llama3_1", "qwen3_6", "gptoss"):
        tokenizer = shipped(name)
        found = [
            encoded(tokenizer, conversation([AGENT[0], bot("", tool_calls=calls), *AGENT[2:]], tools=TOOLS))
            for calls in (CALL, text, bare)
        ]
        assert found[0] == found[1] == found[2], name
    for name in ("qwen2_5", "qwen3_vl", "gptoss"):
        empty = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
        found = [encoded(shipped(name), conversation([AGENT[0], bot("", tool_calls=empty)], tools=TOOLS))]
        assert '"{}"' not in shipped(name).decode(found[0].completions[0])
    # This one takes arguments as text alone, and no tools.
    tokenizer = shipped("deepseekv3")
    forms = ([AGENT[0], bot("", tool_calls=calls), *AGENT[2:]] for calls in (CALL, text))
    found = [encoded(tokenizer, conversation(form)) for form in forms]
    assert found[0] == found[1]
    assert '{"city": "Rome"}' in tokenizer.decode(found[0].completions[0])


@pytest.mark.parametrize("name", ["qwen3_6", "lfm2_v2"])  # they write a call without arguments where they find none
def test_arguments_are_found_under_the_names_of_other_apis(name: str) -> None:
    tokenizer = shipped(name)
    for call in ({"name": "weather", "parameters": {"city": "Rome"}}, {"name": "weather", "input": {"city": "Rome"}}):
        messages = messages_of([user("Sun?"), {"role": "assistant", "content": None, "tool_calls": [call]}], "messages")
        assert "Rome" in tokenizer.decode(encoded(tokenizer, conversation(messages)).completions[0])


def test_tools_without_the_outer_object_are_rendered_where_a_template_wants_it() -> None:
    tokenizer = shipped("gemma4_v2")
    bare = [tool["function"] for tool in TOOLS]
    assert encode_prompt(tokenizer, [user("Sun?")], tools=bare) == encode_prompt(tokenizer, [user("Sun?")], tools=TOOLS)


PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("messages", "more", "named"),
    [
        (AGENT[:1] + AGENT[3:], {"tools": TOOLS}, "'tools'"),
        (AGENT, {}, "tool_calls"),
        ([user("a"), bot("b", reasoning_content="hm")], {}, "reasoning_content"),
        ([user("a"), bot("b", thinking="hm")], {}, "thinking"),
        ([{**user("a"), "name": "Ann"}, bot("b")], {}, "name"),
    ],
)
def test_what_the_template_ignores_is_refused_by_name(messages: Any, more: Any, named: str) -> None:
    for loss_on in ("last", "all"):
        assert named in reason(stub(PLAIN), conversation(messages, **more), loss_on)
    assert named in reason(stub(PLAIN), conversation([*messages, user("c"), bot("d")], len(messages) + 1, **more))
    with pytest.raises(ValueError, match=named):
        encode_prompt(stub(PLAIN), [*messages, user("c")], tools=more.get("tools"))


@pytest.mark.parametrize("content", ["a", "Let me see."])
def test_a_content_that_the_template_ignores_is_refused_however_short(content: str) -> None:
    """Llama writes a call alone; so short a content as this stands in the template's own words."""
    talk = [user("Sun?"), bot(content, tool_calls=CALL)]
    assert "content of message 2" in reason(shipped("llama3_1"), conversation(talk, tools=TOOLS))


def test_thoughts_are_rendered_where_the_template_does_and_cut_where_it_does() -> None:
    tokenizer = shipped("qwen3")
    for key in ("reasoning_content", "reasoning", "thinking"):
        thought = encoded(tokenizer, conversation([user("Why?"), bot("So.", **{key: "Hm."})]))
        assert tokenizer.decode(thought.completions[0]) == "<think>\nHm.\n</think>\n\nSo.<|im_end|>"
        earlier = [user("Why?"), bot("So.", **{key: "Hm."}), user("And?"), bot("It ends.")]
        assert "Hm." not in tokenizer.decode(encoded(tokenizer, conversation(earlier)).completions[0])


def test_a_pair_of_which_one_thinks_has_one_prompt() -> None:
    tokenizer = shipped("deepseek_r1_distill")
    chosen, rejected = [bot("<think>\nHm.\n</think>\n\nYes.")], [bot("Yes.")]
    found = encoded(tokenizer, Example([user("Why?")], (chosen, rejected), (True, False), "a:1", paired=True), "last")
    assert tokenizer.decode(found.prompt).endswith("<｜Assistant｜>")
    end = "<｜end▁of▁sentence｜>"
    assert parts(tokenizer, found) == [(f"<think>\nHm.\n</think>\n\nYes.{end}", True)]
    assert parts(tokenizer, found, 1) == [(f"Yes.{end}", True)]
    both = encoded(tokenizer, Example([user("Why?")], (chosen, chosen), (True, False), "a:1", paired=True), "last")
    assert both.prompt == encode_prompt(tokenizer, [user("Why?")])  # as in use


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma", "deepseek_r1_distill", "gptoss", "nemotron_3_nano"])
def test_a_cut_answer_is_what_was_sampled_and_gets_no_end(name: str) -> None:
    tokenizer = shipped(name)
    found = encoded(tokenizer, conversation([user("Why?"), bot("So it")], finished=(False,)), "last")
    assert found.prompt == encode_prompt(tokenizer, [user("Why?")])
    assert tokenizer.decode(found.completions[0]) == "So it"
    text = encoded(tokenizer, Example("Why?", ("So it", "So it"), (None, None), "a:1", finished=(False, True)))
    assert text.completions[1] == [*text.completions[0], tokenizer.eos_token_id]


@pytest.mark.parametrize("answer", ["d", "sentence", "end"])
def test_an_answer_that_the_end_of_a_turn_spells(answer: str) -> None:
    tokenizer = shipped("deepseek_r1_distill")
    found = encoded(tokenizer, conversation([user("Why?"), bot(f"<think>\nHm.\n</think>\n\n{answer}")]))
    assert tokenizer.decode(found.completions[0]) == f"Hm.\n</think>\n\n{answer}<｜end▁of▁sentence｜>"
    tokenizer = shipped("gemma4_v5")
    cut = encoded(tokenizer, conversation([user("Why?"), bot("turn", reasoning_content="Hm")], finished=(False,)))
    assert tokenizer.decode(cut.completions[0]).endswith("turn")


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "qwen3_6", "gemma4_v5", "glm4moe"])
@pytest.mark.parametrize("said", ["So it", ""])
def test_a_cut_answer_with_thoughts_gets_no_end(name: str, said: str) -> None:
    tokenizer = shipped(name)
    messages = [user("Why?"), bot(said, reasoning_content="Hm, well")]
    found = encoded(tokenizer, conversation(messages, finished=(False,)), "last")
    assert tokenizer.decode(found.completions[0]).endswith(said or "Hm, well")


@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("qwen3", "<think>\n\n</think>\n\n"),
        ("glm4moe", "\n<think></think>\n"),
        ("qwen3_6", "\n</think>\n\n"),
        ("nemotron_3_nano", "</think>"),
    ],
)
def test_an_empty_span_that_the_template_adds_carries_the_loss_and_is_noted(name: str, empty: str) -> None:
    """As in TRL, whose templates for training mark it as generated."""
    tokenizer = shipped(name)
    encoder = Encoder(tokenizer)
    thinks = bot("<think>\nHm.\n</think>\n\nSo.")
    added, own = encoder.encode([conversation([user("Why?"), said]) for said in (bot("So."), thinks)])
    assert isinstance(added, Tokens)
    assert isinstance(own, Tokens)
    [(text, carries)] = parts(tokenizer, added)
    assert carries
    assert text.startswith(f"{empty}So.")
    assert [number for note, number in encoder.notes.items() if repr(empty) in note] == [1]


@pytest.mark.parametrize(
    ("name", "end"),
    [("gemma4_v5", "<|tool_response>"), ("diffusion_gemma", "<|tool_response>"), ("gptoss", "<|call|>")],
)
def test_a_call_that_ends_a_conversation_ends_as_it_does_within_one(name: str, end: str) -> None:
    tokenizer = shipped(name)
    last = encoded(tokenizer, conversation(AGENT[:2], tools=TOOLS), "last")
    inner = encoded(tokenizer, conversation(AGENT, tools=TOOLS), "all")
    [(text, carries)] = parts(tokenizer, last)
    assert carries
    assert (text, True) == parts(tokenizer, inner)[0]
    assert text.endswith(end)
    assert "Rome" in text


def test_thoughts_before_a_call_are_cut_from_earlier_turns_only() -> None:
    """The head of a later turn is then found although the thoughts between head and content are this turn's own."""
    tokenizer = shipped("gptoss")
    thinks = bot("", tool_calls=CALL, reasoning_content="Look.")
    talk = [AGENT[0], thinks, SUNNY, bot("Yes.", reasoning_content="Seen.")]
    found = encoded(tokenizer, conversation(talk, tools=TOOLS))
    spoken = [text for text, carries in parts(tokenizer, found) if carries]
    whole = str(tokenizer.apply_chat_template(talk, tools=TOOLS, tokenize=False))
    assert tokenizer.decode(found.prompt + found.completions[0]) == whole
    assert spoken == [
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
        "<|channel|>analysis<|message|>Seen.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
    ]


THOUGHT = "<think>\nHm so.\n</think>\n\nYes, it is."


@pytest.mark.parametrize("at", [len("<think>\nHm"), THOUGHT.index("Yes"), THOUGHT.index(" it is")])
@pytest.mark.parametrize(
    "name", ["deepseek_r1_distill", "qwen3", "qwen3_6", "qwen3_8", "nemotron_3_nano", "glm4moe", "qwen2_5"]
)
def test_thoughts_that_the_prompt_begins_are_continued_as_in_use(name: str, at: int) -> None:
    tokenizer = shipped(name)
    prompt = [user("Why?"), bot(THOUGHT[:at])]
    found = encoded(tokenizer, Example(prompt, ([bot(THOUGHT[at:])],), (True,), "a:1"))
    assert found.prompt == encode_prompt(tokenizer, prompt)
    said = tokenizer.decode(found.completions[0])
    assert said.lstrip().startswith(THOUGHT[at:].lstrip())
    text = tokenizer.decode(found.prompt) + said
    assert text.count("<think>") == text.count("</think>") == 1
    if name != "glm4moe":  # it writes thoughts in another form than this one
        whole = encoded(tokenizer, conversation([user("Why?"), bot(THOUGHT)]))
        assert text == tokenizer.decode(whole.prompt + whole.completions[0])
    cut = encoded(tokenizer, Example(prompt, ([bot(THOUGHT[at:])],), (True,), "a:1", finished=(False,)))
    assert cut.prompt == found.prompt
    assert tokenizer.decode(cut.completions[0]) == THOUGHT[at:]


def test_an_answer_that_is_continued_is_closed_as_the_template_closes_answers() -> None:
    """Also where it cuts the thoughts that the prompt has begun."""
    said = "<out>{{ m.content.split('</think>')[-1] }}</out><|im_end|>"
    tokenizer = stub(
        f"{{% for m in messages %}}<|im_start|>{said}{{% endfor %}}{{# <think> #}}"
        "{% if add_generation_prompt %}<|im_start|><out>{% endif %}"
    )
    found = encoded(tokenizer, Example([user("Why?"), bot(THOUGHT[:11])], ([bot(THOUGHT[11:])],), (True,), "a:1"))
    assert tokenizer.decode(found.prompt).endswith(f"<out>{THOUGHT[:11]}")
    assert tokenizer.decode(found.completions[0]) == f"{THOUGHT[11:]}</out><|im_end|>"


def test_thoughts_that_the_prompt_opens_and_the_template_does_not_read() -> None:
    """It writes an empty span of its own before them, which goes on as the prompt does."""
    tokenizer = shipped("qwen3_8")
    for text in ("Hm.\n</think>\n\nSo.", "<think>\nHm.\n</think>\n\nSo."):
        found = encoded(tokenizer, conversation([user("Why?"), bot(text)]), "last")
        assert found.prompt == encode_prompt(tokenizer, [user("Why?")])
        assert tokenizer.decode(found.completions[0]) == "Hm.\n</think>\n\nSo.<|im_end|>"


def test_conversations_that_the_assistant_begins() -> None:
    talk = [bot("Hello."), *TALK]
    tokenizer = shipped("qwen2_5")
    found = encoded(tokenizer, conversation(talk, 0))
    assert [text for text, carries in parts(tokenizer, found) if carries] == [
        "Hello.<|im_end|>",
        "So it is.<|im_end|>",
        "It ends.<|im_end|>",
    ]
    whole = str(tokenizer.apply_chat_template(talk, tokenize=False))
    assert tokenizer.decode(found.prompt + found.completions[0]) == whole.removesuffix("\n")
    assert "alternate" in reason(shipped("gemma"), conversation(talk, 4))
    assert "alternate" in reason(shipped("gemma"), conversation(talk, 0), "all")


# Rows --------------------------------------------------------------------------------------------------


def items(tmp_path: Path, row: Any, loss_on: Any) -> list[Any]:
    return list(read(Source(write_jsonl(tmp_path / "a.jsonl", [row])), loss_on=loss_on))


def test_what_is_judged_of_each_schema(tmp_path: Path) -> None:
    messages = {"messages": TALK, "label": True}
    [last], [every] = (items(tmp_path, messages, loss_on) for loss_on in ("last", "all"))
    assert (last.prompt, last.completions) == (TALK[:3], (TALK[3:],))
    assert (every.prompt, every.completions) == (TALK[:1], (TALK[1:],))
    given = {"prompt": TALK[:3], "completion": TALK[3:], "label": True}
    [last], [every] = (items(tmp_path, given, loss_on) for loss_on in ("last", "all"))
    assert last == every  # a prompt in a column of its own is no completion
    long = {"prompt": TALK[:1], "completion": TALK[1:], "label": True}
    [last], [every] = (items(tmp_path, long, loss_on) for loss_on in ("last", "all"))
    assert (last.prompt, last.completions) == (TALK[:3], (TALK[3:],))
    assert (every.prompt, every.completions) == (TALK[:1], (TALK[1:],))
    # Of a pair what both begin with carries no loss; they may part before the last turn only if all turns do.
    other = [*TALK[:2], user("And?"), bot("It goes on.")]
    [last], [every] = (items(tmp_path, {"chosen": TALK, "rejected": other}, loss_on) for loss_on in ("last", "all"))
    assert last == every
    assert last.completions == (TALK[3:], other[3:])
    parted = {"chosen": TALK, "rejected": [TALK[0], bot("No."), *TALK[2:]]}
    [last], [every] = (items(tmp_path, parted, loss_on) for loss_on in ("last", "all"))
    assert isinstance(last, Skipped)
    assert (every.prompt, every.completions) == (TALK[:1], (TALK[1:], [bot("No."), *TALK[2:]]))


def test_answers_that_are_cut(tmp_path: Path) -> None:
    def ends(row: Any) -> tuple[bool, ...]:
        [found] = items(tmp_path, row, "last")
        return found.finished  # type: ignore[no-any-return]

    one = {"prompt": "p", "completion": "c", "label": True}
    assert ends(one) == ends({**one, "finished": None}) == ends({**one, "finished": "true"}) == (True,)
    assert ends({**one, "finished": False}) == ends({**one, "finished": "False"}) == (False,)
    assert ends({"prompt": "p", "completion": "c", "score": 1, "finished": False}) == (False,)
    lists = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, None, 2], "finished": [True, True, False]}
    found = [item for item in items(tmp_path, lists, "last") if isinstance(item, Example)]
    assert found[0].finished == (True, False)
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert ends({**pair, "finished": [True, False]}) == ends({**pair, "rejected_finished": False}) == (True, False)
    assert ends({"messages": TALK, "label": True, "finished": False}) == (False,)
    for row in ({**one, "finished": "maybe"}, {**lists, "finished": [True]}, {**pair, "finished": False}):
        [fault] = items(tmp_path, row, "last")
        assert fault.column == "finished"


def test_the_store_keeps_what_carries_the_loss(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    source = Source(write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK, "label": True}]))
    last = open_store(source, tokenizer, tmp_path / "cache")
    every = open_store(source, tokenizer, tmp_path / "cache", loss_on="all")
    again = open_store(source, tokenizer, tmp_path / "cache", loss_on="all")  # as it was written
    assert last.loss(0) is None
    for store in (every, again):
        loss = store.loss(0)
        assert loss is not None
        assert tokenizer.decode(store.completion(0)[loss]) == "So it is.<|im_end|>It ends.<|im_end|>"
    assert every.digest != last.digest
    found = inspect(source, tokenizer, cache_dir=tmp_path / "cache", loss_on="all")
    assert [kind for kind, _ in found.examples[0].parts()] == ["prompt", "loss", "context", "loss"]
