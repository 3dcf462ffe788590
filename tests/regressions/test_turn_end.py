"""The loss ends at the token that ends an assistant's turn, which need not be EOS, and generation stops there.

transformers#32110, axolotl#3756, trl#7039: Gemma ends a turn with ``<end_of_turn>``. With EOS appended behind it the
model learnt ``\\n<eos>``, which is never generated, and little else.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_templates import TEMPLATES, shipped, stub
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from halos_pl.batch import TokenBatch
from halos_pl.data.tokenize import Encoder, encode_completion, encode_prompt
from halos_pl.data.turns import stop_ids, turn_end, turn_markers
from halos_pl.labels import Labels
from halos_pl.policy.architecture import add_eos_ids
from halos_pl.policy.sampling import PolicySamples, generate

ASK = [{"role": "user", "content": "Why?"}]
ANSWER = [{"role": "assistant", "content": "So it is."}]
DIALOGUES = {
    "one turn": (ASK, ANSWER),
    "two turns": ([*ASK, {"role": "assistant", "content": "Hm."}, {"role": "user", "content": "And?"}], ANSWER),
    "system": ([{"role": "system", "content": "Be brief."}, *ASK], ANSWER),
}

#: (the token that ends a turn, what the template writes behind it at the end of a dialogue) by the start of the name,
#: the longest that fits. TRL 1.16 trains on what is behind it, too; a model never generates it, so it has no loss here.
#: glm4moe ends a turn with the head of the next one, so EOS is added, which TRL does not do.
ENDS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>", ""),
    "deepseek": ("<｜end▁of▁sentence｜>", ""),
    "diffusion_gemma": ("<turn|>", "\n"),
    "gemma": ("<end_of_turn>", "\n"),
    "gemma4": ("<turn|>", "\n"),
    "glm4moe": ("<eos>", ""),
    "gptoss": ("<|return|>", ""),
    "lfm2": ("<|im_end|>", "\n"),
    "llama3": ("<|eot_id|>", ""),
    "muse_glimmer": ("<|eot|>", ""),
    "nemotron": ("<|im_end|>", "\n"),
    "phi3": ("<|end|>", "\n<eos>"),
    "qwen": ("<|im_end|>", "\n"),
}
#: These want messages with parts, as of pictures, and refuse or ignore a content that is text.
NO_TEXT = {"idefics3", "llava_next", "smolvlm"}
TEXT = [name for name in TEMPLATES if name not in NO_TEXT]


def end_of(name: str) -> tuple[str, str]:
    return ENDS[max((start for start in ENDS if name.startswith(start)), key=len)]


def trl_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
    """Prompt and completion as TRL 1.16 tokenises them; see ``test_trl_tokenises_as_is_said_here``."""

    def ids(messages: Any, **how: Any) -> list[int]:
        found: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **how)
        return list(found["input_ids"])

    asked, whole = ids(prompt, add_generation_prompt=True), ids(prompt + completion)
    same = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), min(len(asked), len(whole)))
    return whole[:same], whole[same:]


def accepted(tokenizer: PreTrainedTokenizerBase, messages: Any) -> bool:
    try:
        tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        return False
    return True


def test_all_of_trls_templates_are_here() -> None:
    assert len(TEMPLATES) >= 40
    assert len(TEXT) >= 30


@pytest.mark.parametrize("name", TEXT)
def test_trls_templates(name: str) -> None:
    tokenizer = shipped(name)
    token, behind = end_of(name)
    end = tokenizer.convert_tokens_to_ids(token)
    encoder, seen = Encoder(tokenizer), 0
    for prompt, completion in DIALOGUES.values():
        if not accepted(tokenizer, prompt + completion):  # Gemma refuses a system prompt
            continue
        seen += 1
        text = completion[0]["content"]
        # An end that the data spell themselves is that of the turn.
        spelled = (text + token, f"{text}{token}\n", f"{text}{token}\n{tokenizer.eos_token}")
        [found] = encoder.batch([(prompt, [completion, *spelled])])
        assert not isinstance(found, ValueError)
        our_prompt, (ours, *others) = found
        theirs_prompt, theirs = trl_ids(tokenizer, prompt, completion)
        assert ours[-1] == end
        assert others == [ours] * 3
        assert our_prompt == theirs_prompt
        if name == "glm4moe":
            assert ours == [*theirs, end]
        else:
            assert ours == theirs[: len(ours)]
            assert tokenizer.decode(theirs[len(ours) :]) == behind
        assert tokenizer.decode(ours).count(text) == 1
    assert seen >= 2
    assert token in turn_markers(tokenizer)
    assert set(stop_ids(tokenizer)) == {end, tokenizer.eos_token_id}


@pytest.mark.parametrize("name", sorted(NO_TEXT))
def test_templates_that_cannot_be_used_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="chat template"):
        encode_completion(shipped(name), ASK, ANSWER)


@pytest.mark.slow
def test_trl_tokenises_as_is_said_here() -> None:
    from trl.data_utils import _tokenize, common_prefix_length  # takes seconds

    for name in TEXT:
        tokenizer = shipped(name)
        for prompt, completion in DIALOGUES.values():
            if accepted(tokenizer, prompt + completion):
                asked = _tokenize(tokenizer, prompt, add_generation_prompt=True)["input_ids"]
                whole = _tokenize(tokenizer, prompt + completion)["input_ids"]
                same = common_prefix_length(asked, whole)
                assert trl_ids(tokenizer, prompt, completion) == (whole[:same], whole[same:])


EACH = "{% for m in messages %}"
HEAD = "{% endfor %}{% if add_generation_prompt %}"
# (template, the completion of "So it is.", up to its end)
OTHERS = {
    "always writes the head of an answer": (
        EACH + "<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant:",
        "So it is.<|im_end|>",
    ),
    "EOS at once behind the last turn": (
        EACH
        + "<|im_start|>{{ m.role }}:{{ m.content }}<|end|>"
        + HEAD
        + "<|im_start|>assistant:{% else %}<eos>{% endif %}",
        "So it is.<|end|>",
    ),
    "EOS behind every turn's own end": (
        EACH + "<|im_start|>{{ m.role }}:{{ m.content }}<|end|><eos>\n" + HEAD + "<|im_start|>assistant:{% endif %}",
        "So it is.<|end|><eos>",
    ),
    "closes a part of the turn first": (
        EACH
        + "<|im_start|>{{ m.role }}:<out>{{ m.content }}</out>\n<|im_end|>\n\n"
        + HEAD
        + "<|im_start|>assistant:<out>{% endif %}",
        "So it is.</out>\n<|im_end|>",
    ),
    "the last turn ends in another way": (
        EACH + "<|im_start|>{{ m.role }}:{{ m.content }}{% if loop.last and m.role == 'assistant' %}<|return|>"
        "{% else %}<|end|>{% endif %}" + HEAD + "<|im_start|>assistant:{% endif %}",
        "So it is.<|return|>",
    ),
    "one turn only": (
        EACH + "{% if loop.index > 2 %}{{ raise_exception('one turn') }}{% endif %}<|im_start|>{{ m.role }}:"
        "{{ m.content }}<|im_end|>" + HEAD + "<|im_start|>assistant:{% else %}<eos>{% endif %}",
        "So it is.<|im_end|>",
    ),
    "tags": (
        EACH
        + "<{{ m.role }}>{{ m.content }}</{{ m.role }}>"
        + HEAD
        + "<assistant>{% endif %}{# <user></user></assistant> #}",
        "So it is.</assistant>",
    ),
    "a text behind the end": (
        EACH
        + "<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>\n----\n"
        + HEAD
        + "<|im_start|>assistant:{% endif %}",
        "So it is.<|im_end|>",
    ),
    "EOS at the end alone": (
        EACH + "<|im_start|>{{ m.role }}:{{ m.content }}\n" + HEAD + "<|im_start|>assistant:{% else %}<eos>{% endif %}",
        "So it is.\n<eos>",
    ),
    "nothing": (EACH + "{{ m.role }}: {{ m.content }}" + HEAD + "assistant: {% endif %}", "So it is.<eos>"),
    "a text, which is no token": (
        EACH + "{{ m.role }}: {{ m.content }} END" + HEAD + "assistant: {% endif %}",
        "So it is. END<eos>",
    ),
    "EOS twice": (
        EACH + "{{ m.role }}: {{ m.content }}<eos><eos>" + HEAD + "assistant: {% endif %}",
        "So it is.<eos>",
    ),
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("what", OTHERS)
def test_other_templates(what: str, special: bool) -> None:
    template, expected = OTHERS[what]
    tokenizer = stub(template, special=special)
    ids = encode_completion(tokenizer, ASK, ANSWER)
    assert tokenizer.decode(ids) == expected
    assert ids[-1] in stop_ids(tokenizer)
    begun = [*ASK, {"role": "assistant", "content": "So "}]
    if what not in ("always writes the head of an answer",):
        assert encode_completion(tokenizer, begun, "it is.") == ids[len("So ") :]


def test_a_template_that_wants_a_system_prompt() -> None:
    tokenizer = stub(
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
        + EACH
        + "<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>\n"
        + HEAD
        + "<|im_start|>assistant:{% endif %}"
    )
    ids = encode_completion(tokenizer, DIALOGUES["system"][0], ANSWER)
    assert tokenizer.decode(ids) == "So it is.<|im_end|>"


def test_roles_that_a_plain_dialogue_does_not_have() -> None:
    tokenizer = stub(
        EACH + "{% if m.role == 'user' %}{{ raise_exception('say human') }}{% endif %}"
        "<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>\n" + HEAD + "<|im_start|>assistant:{% endif %}"
    )
    ids = encode_completion(tokenizer, [{"role": "human", "content": "Why?"}], ANSWER)
    assert tokenizer.decode(ids) == "So it is.<|im_end|>"


def test_several_answers_in_one_completion() -> None:
    tokenizer = shipped("qwen2_5")
    ids = encode_completion(tokenizer, ASK, [*ANSWER, *ANSWER])
    assert tokenizer.decode(ids) == "So it is.<|im_end|>\n<|im_start|>assistant\nSo it is.<|im_end|>"


def test_text_after_a_text_prompt_ends_with_eos_unless_it_spells_the_end_of_a_turn() -> None:
    tokenizer = shipped("gemma")
    rendered = "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.decode(encode_completion(tokenizer, rendered, "So")) == "So<eos>"
    for spelled in ("So<end_of_turn>", "So<end_of_turn>\n", "So<end_of_turn>\n<eos>"):
        assert tokenizer.decode(encode_completion(tokenizer, rendered, spelled)) == "So<end_of_turn>"


def test_the_end_of_a_turn_inside_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="<end_of_turn>"):
        encode_completion(shipped("gemma"), ASK, "So<end_of_turn> it is.")


def test_a_template_that_ignores_a_message_is_refused() -> None:
    tokenizer = stub(
        EACH
        + "{% if m.role != 'system' %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endif %}"
        + HEAD
        + "<|im_start|>assistant:{% endif %}"
    )
    with pytest.raises(ValueError, match=r"message 1.*'system'"):
        encode_completion(tokenizer, DIALOGUES["system"][0], ANSWER)
    cut = [*ASK, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}, *ASK]
    encode_completion(shipped("qwen3"), cut, ANSWER)  # earlier thoughts are cut, which is no mistake


def test_thoughts_in_the_content() -> None:
    """trl#6361, #5213: templates read them from the content, or they would write a second span."""
    said = "<think>\nHm.\n</think>\n\nYes."
    for name in ("qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8"):
        tokenizer = shipped(name)
        whole = tokenizer.decode([*encode_prompt(tokenizer, ASK), *encode_completion(tokenizer, ASK, said)])
        assert whole.endswith(f"<|im_start|>assistant\n{said}<|im_end|>")
    # These open the span in the prompt. The first one cuts it from every turn, the last one included.
    for name, end in (("deepseek_r1_distill", "<｜end▁of▁sentence｜>"), ("nemotron_3_nano", "<|im_end|>")):
        tokenizer = shipped(name)
        for thoughts in (said, said.removeprefix("<think>\n")):  # as written by people, and as the model says it
            assert tokenizer.decode(encode_completion(tokenizer, ASK, thoughts)) == f"Hm.\n</think>\n\nYes.{end}"
    cut = "<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>{# <think> #}"
    cut = "<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>{# <think> #}"
    drops = stub(EACH + cut + HEAD + "<|im_start|>{% endif %}")
    with pytest.raises(ValueError, match=r"drops what stands in <think>"):
        encode_completion(drops, ASK, said)


# Generation


class Always(nn.Module):
    """A head that gives all probability to one token."""

    def __init__(self, token: int, size: int) -> None:
        super().__init__()
        self.logits = torch.full((size,), -1e4)
        self.logits[token] = 1e4

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*hidden.shape[:-1], -1)


def speaks(tokenizer: PreTrainedTokenizerBase, token: str) -> Any:
    """A model that says one token for ever, and whose own settings name EOS alone."""
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.lm_head = Always(int(tokenizer.convert_tokens_to_ids(token)), size)  # type: ignore[assignment, arg-type]
    return model


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", ["gemma", "llama3", "phi3", "gptoss"])
def test_generation_stops_at_the_end_of_a_turn(name: str, special: bool) -> None:
    tokenizer, token = stub(TEMPLATES[name], special=special), end_of(name)[0]
    model = speaks(tokenizer, token)
    ((sample,),) = generate(model, tokenizer, [ASK], max_new_tokens=5, progress=False)
    assert tokenizer.decode(sample.completion_ids) == token
    assert sample.finished
    assert sample.text == ""
    # And where it is used without this package.
    assert add_eos_ids(model, stop_ids(tokenizer)) == [tokenizer.convert_tokens_to_ids(token)]
    out = model.generate(torch.tensor([encode_prompt(tokenizer, ASK)]), max_new_tokens=5, do_sample=False)
    assert out[0].tolist() == [*encode_prompt(tokenizer, ASK), *sample.completion_ids]
    assert add_eos_ids(model, stop_ids(tokenizer)) == []


def test_training_samples_stop_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = shipped("gemma")
    seen: list[Any] = []
    monkeypatch.setattr("halos_pl.policy.sampling.sample_tokens", lambda *_, stops, **__: seen.append(stops) or [[7]])
    policy: Any = SimpleNamespace(model=nn.Identity())
    batch = TokenBatch(
        prompts=[torch.tensor([5])],
        completions=[torch.tensor([6])],
        prompt=torch.zeros(1, dtype=torch.long),
        labels=Labels(torch.tensor([True])),
        row_ids=["a"],
    )
    with_sample = PolicySamples(policy, tokenizer, 4)(batch)
    assert seen == [stop_ids(tokenizer)]
    assert with_sample.labels.mismatched.tolist() == [False, True]
    assert with_sample.completions[1].tolist() == [7]


def test_no_template() -> None:
    tokenizer = stub("")
    tokenizer.chat_template = None
    assert turn_end(tokenizer) is None
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]
