"""Laws of tokenising, over tokenizers of several families trained on the spot."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from halos_pl.data.tokenize import Encoder, encode_batch, encode_completion, encode_prompt
from halos_pl.policy.sampled_text import sampled_texts
from halos_pl.policy.sampling import Sample
from halos_pl.testing import CHATML, CORPUS, tiny_tokenizer

BOS_CHATML = "{{ bos_token }}" + CHATML
SAY = [{"role": "user", "content": "Say something"}]


def adds(tokenizer: Tokenizer, *, first: str | None = None, last: str | None = None) -> None:
    """Let the tokenizer put ``first`` before and ``last`` after every text."""
    around = [token for token in (first, last) if token]
    template = [token for token in (first, "$A", last) if token]
    tokenizer.post_processor = TemplateProcessing(
        single=" ".join(template), special_tokens=[(token, tokenizer.token_to_id(token)) for token in around]
    )


def fast(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)


@cache
def byte_level() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@cache
def byte_level_bos() -> PreTrainedTokenizerBase:
    base = tiny_tokenizer().backend_tokenizer
    base.add_special_tokens(["<s>"])
    adds(base, first="<s>")
    return fast(base, bos_token="<s>", eos_token="<|im_end|>", chat_template=BOS_CHATML)


@cache
def word_piece() -> PreTrainedTokenizerBase:
    base = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    base.normalizer = normalizers.BertNormalizer(lowercase=True)
    base.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    base.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    base.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    adds(base, first="[CLS]", last="[SEP]")
    return fast(base, cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]", unk_token="[UNK]")


def _metaspace(base: Tokenizer, trainer: Any) -> Tokenizer:
    base.pre_tokenizer = pre_tokenizers.Metaspace()
    base.decoder = decoders.Metaspace()
    base.train_from_iterator(CORPUS, trainer)
    return base


@cache
def metaspace_bpe() -> PreTrainedTokenizerBase:
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    base = _metaspace(Tokenizer(models.BPE(unk_token="<unk>")), trainer)
    adds(base, first="<s>")
    llama = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}"
        "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
    )
    return fast(base, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=llama)


@cache
def metaspace_unigram() -> PreTrainedTokenizerBase:
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    base = _metaspace(Tokenizer(models.Unigram()), trainer)
    adds(base, last="</s>")
    return fast(base, eos_token="</s>", unk_token="<unk>")


ALL = [byte_level, byte_level_bos, word_piece, metaspace_bpe, metaspace_unigram]
FIRST = {"byte_level_bos": "<s>", "word_piece": "[CLS]", "metaspace_bpe": "<s>"}  # what is put before a text
LOSSLESS = [byte_level, byte_level_bos]
CHAT = [byte_level, byte_level_bos, metaspace_bpe]

letters = st.text(alphabet="abcdefgh ,.!\nABé水", min_size=1, max_size=40).filter(str.strip)


@pytest.mark.parametrize("make", [byte_level, byte_level_bos, metaspace_bpe])
def test_a_sample_of_the_tokens_that_training_gives_is_kept_as_text_that_gives_them(make: Any) -> None:
    tokenizer = make()
    for prompt in ("Say something", SAY):
        for text in ("The answer is lost", "A duck: 3 + 4 = 7, and 9 are left."):
            ids = encode_completion(tokenizer, prompt, text)
            raw = tokenizer.decode(ids[:-1], skip_special_tokens=True)
            sample = Sample(encode_prompt(tokenizer, prompt), ids, raw, finished=True)
            [[found]] = sampled_texts(Encoder(tokenizer), [(prompt, None)], [[sample]])
            assert found.same_tokens
            assert encode_completion(tokenizer, prompt, found.text) == ids


@pytest.mark.parametrize("make", ALL)
@given(text=letters)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_text_prompt_has_the_tokenizers_bos_once_and_no_eos(make: Any, text: str) -> None:
    tokenizer = make()
    ids, plain = encode_prompt(tokenizer, text), tokenizer(text, add_special_tokens=False)["input_ids"]
    first = FIRST.get(make.__name__)
    assert ids == ([tokenizer.convert_tokens_to_ids(first)] if first else []) + plain
    assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("make", ALL)
@given(text=letters)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_text_completion_is_tokenised_alone_and_ends_with_eos_once(make: Any, text: str) -> None:
    tokenizer = make()
    ids = encode_completion(tokenizer, "A prompt", text)
    assert ids == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert encode_completion(tokenizer, "A prompt", text + tokenizer.eos_token) == ids


@cache
def zephyr() -> PreTrainedTokenizerBase:
    """Puts a blank before a text and has line breaks by themselves, as SentencePiece's with bytes."""
    special = ["<unk>", "<s>", "</s>", "\n"]
    base = Tokenizer(models.BPE(unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("\n", "isolated")]
    )
    base.decoder = decoders.Metaspace()
    base.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=200, special_tokens=special[:3], show_progress=False, initial_alphabet=["\n"]),
    )
    template = (
        "{% for m in messages %}{{ m['role'] + ':\\n' + m['content'] + '</s>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    )
    return fast(base, eos_token="</s>", unk_token="<unk>", chat_template=template)


@given(text=letters)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_completion_begins_as_it_does_in_the_conversation(text: str) -> None:
    """And not with a blank that the tokenizer puts before a text."""
    tokenizer = zephyr()
    assert tokenizer.tokenize("a")[0].startswith("▁")
    whole = tokenizer.apply_chat_template([*SAY, {"role": "assistant", "content": text}], tokenize=False)
    together = tokenizer(whole.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, SAY) + encode_completion(tokenizer, SAY, text) == together


@pytest.mark.parametrize("make", LOSSLESS)
@given(text=letters)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_completions_are_lossless(make: Any, text: str) -> None:
    tokenizer = make()
    for prompt in ("A prompt", SAY):
        assert tokenizer.decode(encode_completion(tokenizer, prompt, text)[:-1]) == text


@pytest.mark.parametrize("make", CHAT)
@given(text=letters)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_messages_have_eos_once_and_the_templates_bos(make: Any, text: str) -> None:
    tokenizer = make()
    completion = [{"role": "assistant", "content": text}]
    prompt, ids = encode_prompt(tokenizer, SAY), encode_completion(tokenizer, SAY, completion)
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids == encode_completion(tokenizer, SAY, text)  # text is one assistant message
    if tokenizer.bos_token_id is not None:
        assert prompt[0] == tokenizer.bos_token_id
        assert (prompt + ids).count(tokenizer.bos_token_id) == 1
    else:
        in_use = tokenizer.apply_chat_template(SAY, add_generation_prompt=True, return_dict=False)
        assert prompt == in_use


def test_prompt_and_completion_are_what_the_template_writes_for_the_whole_conversation() -> None:
    tokenizer = byte_level()
    completion = [
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "More."},
        {"role": "assistant", "content": "Two. "},
    ]
    ids = encode_prompt(tokenizer, SAY) + encode_completion(tokenizer, SAY, completion)
    whole = tokenizer.apply_chat_template(SAY + completion, tokenize=False)
    assert tokenizer.decode(ids) == whole.removesuffix("\n")


def test_a_text_may_spell_its_bos_itself() -> None:
    tokenizer = byte_level_bos()
    assert encode_prompt(tokenizer, "<s>Hello") == encode_prompt(tokenizer, "Hello")


def test_nothing_follows_the_templates_end_of_a_turn_where_eos_is_another_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    assert tokenizer.decode(encode_completion(tokenizer, SAY, "Yes")) == "Yes<|im_end|>"
    assert tokenizer.decode(encode_completion(tokenizer, "Say", "Yes")) == "Yes<|pad|>"


@given(text=letters)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_boundary_does_not_depend_on_the_completion(text: str) -> None:
    assume(not text.startswith(" "))
    tokenizer = byte_level()
    together = encode_prompt(tokenizer, "The du") + encode_completion(tokenizer, "The du", text)
    assert tokenizer.decode(together[:-1]) == "The du" + text


# Errors


def test_no_eos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no EOS token.*set tokenizer\.eos_token"):
        encode_completion(tokenizer, "a", "b")


def test_no_chat_template() -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    with pytest.raises(ValueError, match=r"no chat template.*instruct model"):
        encode_prompt(tokenizer, SAY)
    with pytest.raises(ValueError, match="no chat template"):
        encode_completion(tokenizer, SAY, "b")


def test_message_completion_after_a_text_prompt() -> None:
    with pytest.raises(ValueError, match="prompt is plain text"):
        encode_completion(byte_level(), "a", [{"role": "assistant", "content": "b"}])


def test_template_that_does_not_continue_its_prompt() -> None:
    tokenizer = tiny_tokenizer(CHATML.replace("assistant\n' }}{% endif", "assistant\nAnswer: ' }}{% endif"))
    with pytest.raises(ValueError, match=r"does not continue the prompt.*Answer: "):
        encode_completion(tokenizer, SAY, "Yes")


def test_template_that_refuses() -> None:
    with pytest.raises(ValueError, match=r"refuses messages with the roles \['wizard'\]: no such role"):
        encode_prompt(metaspace_bpe(), [{"role": "wizard", "content": "a"}])


def test_template_that_ignores_the_completion() -> None:
    with pytest.raises(ValueError, match="writes nothing for the completion"):
        encode_completion(
            tiny_tokenizer("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"),
            SAY,
            "Yes",
        )


def test_prompt_without_tokens() -> None:
    with pytest.raises(ValueError, match="gives no token"):
        encode_prompt(byte_level(), "")


@pytest.mark.parametrize("chat", [False, True])
def test_an_eos_inside_a_completion_is_refused(chat: bool) -> None:
    tokenizer = CHAT[0]() if chat else byte_level()
    eos = tokenizer.eos_token
    prompt: Any = [{"role": "user", "content": "a"}] if chat else "a"
    with pytest.raises(ValueError, match=r"spells the EOS token .* before its end"):
        encode_completion(tokenizer, prompt, f"foo{eos}bar")
    plain = encode_completion(tokenizer, prompt, "foo")
    for end in (eos, f"{eos}\n", f"{eos} {eos}\n"):  # as a rendered dialogue ends
        assert encode_completion(tokenizer, prompt, f"foo{end}") == plain


texts = st.text(st.characters(codec="utf-8"), max_size=20)


@pytest.mark.parametrize("make", ALL)
@given(conversations=st.lists(st.tuples(texts, st.lists(texts, max_size=3)), max_size=5))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_batch_is_encoded_as_one_by_one(make: Any, conversations: list[tuple[str, list[str]]]) -> None:
    """Rows that cannot be encoded included: each gets what it would get alone, and no other row suffers."""
    tokenizer = make()
    messages = [{"role": "user", "content": "a"}]
    asked: list[tuple[Any, list[Any]]] = [*conversations, (messages, ["b"]), ("a", [messages])]
    for (prompt, completions), got in zip(asked, encode_batch(tokenizer, asked), strict=True):
        alone: Any
        try:
            alone = encode_prompt(tokenizer, prompt), [encode_completion(tokenizer, prompt, c) for c in completions]
        except ValueError as error:
            alone = str(error)
        assert (str(got) if isinstance(got, ValueError) else got) == alone


def test_a_completion_goes_on_with_what_the_assistant_has_begun() -> None:
    tokenizer = byte_level()
    begun = [*SAY, {"role": "assistant", "content": "Sure, "}]
    prompt = tokenizer.decode(encode_prompt(tokenizer, begun))
    assert prompt.endswith("<|im_start|>assistant\nSure, ")
    for completion in ("here", [{"role": "assistant", "content": "here"}]):
        assert tokenizer.decode(encode_completion(tokenizer, begun, completion)) == "here<|im_end|>"
    whole = [*SAY, {"role": "assistant", "content": "Sure, here"}]
    assert (prompt + "here<|im_end|>\n") == tokenizer.apply_chat_template(whole, tokenize=False)


@pytest.mark.parametrize("prompt", ["Say", SAY])
@pytest.mark.parametrize("completion", ["<|im_end|>", " <|im_end|>\n"])
def test_a_completion_that_is_eos_alone_is_refused(prompt: Any, completion: str) -> None:
    with pytest.raises(ValueError, match="nothing but the EOS token"):
        encode_completion(byte_level(), prompt, completion)


@pytest.mark.parametrize("make", [*ALL, zephyr])
@given(texts=st.lists(letters, min_size=2, max_size=4), which=st.integers(0, 9))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_split_special_tokens_are_plain_text(make: Any, texts: list[str], which: int) -> None:
    """Also where a vocabulary holds their text as a piece (Unigram), which the tokenizers' own option finds."""
    tokenizer = make()
    special = sorted(token.content for token in tokenizer.added_tokens_decoder.values())
    spelled = special[which % len(special)]
    text = spelled.join(texts)
    encoder = Encoder(tokenizer, "split")
    [got] = encoder.batch([(text, [text + "."])])
    assert not isinstance(got, ValueError)
    prefix, unknown = encode_prompt(tokenizer, "a")[: -len(encoded(tokenizer, "a"))], tokenizer.unk_token_id
    assert got[0][: len(prefix)] == prefix
    for ids in (got[0][len(prefix) :], got[1][0][:-1]):
        assert not (set(ids) & set(tokenizer.added_tokens_decoder)) - {unknown}
    if make is not metaspace_unigram:
        assert got[0][len(prefix) :] == encoded(tokenizer, text, split_special_tokens=True)
    if tokenizer.chat_template:
        said = [{"role": "user", "content": text}]
        [chat] = encoder.batch([(said, ["b"])])
        usual = encode_prompt(tokenizer, [{"role": "user", "content": "b"}])
        added = set(tokenizer.added_tokens_decoder) - {unknown}
        assert [token for token in chat[0] if token in added] == [token for token in usual if token in added]


def encoded(tokenizer: Any, text: str, **how: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, **how)["input_ids"])
