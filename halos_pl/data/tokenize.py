"""From text or messages to token ids: BOS at most once, EOS exactly once, and the boundary in one place.

A completion is tokenised alone, never together with its prompt: that is what the model meets in use, where
generation starts after the prompt's last token. So prompt and completion cannot merge into other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos_pl.data.example import Prompt


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    # verbose=False: a text longer than model_max_length is cut later and counted there.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens (BOS, [CLS]) that the tokenizer itself puts before a text.

    Found by encoding, because ``add_bos_token``, post-processors and ``bos_token`` need not agree.
    """
    with_special, plain = _ids(tokenizer, "a", special=True), _ids(tokenizer, "a")
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def _blank_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a line break, where the tokenizer puts a blank before a text (SentencePiece's dummy prefix).

    What comes after a prompt's rendering is no beginning of a text, so no blank belongs there: it is tokenised behind a
    line break, which is then cut off. Empty for a tokenizer to which a text is the same wherever it stands.
    """
    head = _ids(tokenizer, "\n")
    return head if _ids(tokenizer, "\na") != head + _ids(tokenizer, "a") else []


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so the model could never learn to stop: "
            "set tokenizer.eos_token to a token of its vocabulary and save the tokenizer again."
        )
    return int(tokenizer.eos_token_id)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, prompt: bool, begun: bool = False
) -> str:
    """What the chat template writes; a ``prompt`` ends in the head of an answer or, ``begun``, in its last message."""
    if not tokenizer.chat_template:
        raise ValueError(
            "The data are message lists, but the tokenizer has no chat template: use an instruct model's "
            "tokenizer, set tokenizer.chat_template and save it, or give prompt and completion as plain text."
        )
    try:
        how: dict[str, Any] = {"add_generation_prompt": prompt and not begun, "continue_final_message": begun}
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **how))
    except Exception as error:  # templates raise what they like (jinja2.TemplateError, TypeError, ...)
        roles = [message.get("role") for message in messages]
        raise ValueError(f"The chat template refuses messages with the roles {roles}: {error}") from error


def _begun(prompt: Prompt) -> bool:
    """Whether the prompt ends in what the assistant has begun to say, and the completion goes on with."""
    return isinstance(prompt, list) and bool(prompt) and prompt[-1].get("role") == "assistant"


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else _render(tokenizer, prompt, prompt=True, begun=_begun(prompt))


def _prompt_ids(prefix: list[int], prompt: Prompt, ids: list[int]) -> list[int]:
    if isinstance(prompt, str) and ids[: len(prefix)] != prefix:  # the text may spell its BOS itself
        ids = prefix + ids
    if not ids:
        raise ValueError("The prompt gives no token with this tokenizer; give it some text.")
    return ids


def _completion_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, before: str, completion: Prompt) -> str:
    """What the completion adds to the prompt's text ``before``."""
    given = completion
    _refuse_eos_inside(tokenizer, completion)
    eos: Any = tokenizer.eos_token
    if isinstance(completion, str):
        completion = _unended(eos, completion)
    else:
        completion = [{**message, "content": _unended(eos, message["content"])} for message in completion]
    if not any(text.strip() for text in _texts(completion)) and any(text.strip() for text in _texts(given)):
        raise ValueError("The completion is nothing but the EOS token; give it some text, or remove the row.")
    if isinstance(prompt, str):
        if isinstance(completion, str):
            return completion
        raise ValueError(
            "The completion is a message list but the prompt is plain text: give both as messages "
            'or both as text (a prompt as messages: [{"role": "user", "content": ...}]).'
        )
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if _begun(prompt) and completion[0]["role"] == "assistant":
        said = {**prompt[-1], "content": prompt[-1]["content"] + completion[0]["content"]}
        prompt, completion = prompt[:-1], [said, *completion[1:]]
    whole = _render(tokenizer, prompt + completion, prompt=False)
    if not whole.startswith(before):
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
        raise ValueError(
            "The chat template does not continue the prompt when the completion is added: at the end of the "
            f"prompt it writes {before[same : same + 40]!r}, and with the completion "
            f"{whole[same : same + 40]!r} in its place. "
            "Use a template whose generation prompt is the start of an assistant message, or plain text."
        )
    text = whole[len(before) :]
    if not text:
        raise ValueError(
            "The chat template writes nothing for the completion; its messages should have the role 'assistant'."
        )
    ended = text.rstrip()  # ChatML writes "<|im_end|>\n"; generation stops at EOS, so nothing follows it
    return ended if eos and ended.endswith(eos) else text


def _texts(completion: Prompt) -> list[str]:
    return [completion] if isinstance(completion, str) else [message["content"] for message in completion]


def _unended(eos: str | None, text: str) -> str:
    """The text without the EOS tokens at its end, and what is blank behind them, as a rendered dialogue has it."""
    while eos and text.rstrip().endswith(eos):
        text = text.rstrip().removesuffix(eos)
    return text


def _refuse_eos_inside(tokenizer: PreTrainedTokenizerBase, completion: Prompt) -> None:
    """The model would learn to stop there, and to go on; at the end of a text it is the one that belongs there."""
    eos: Any = tokenizer.eos_token
    for text in _texts(completion):
        if eos and eos in _unended(eos, text):
            raise ValueError(f"The completion spells the EOS token {eos} before its end; remove it, or the row.")


def _completion_ids(eos: int, ids: list[int]) -> list[int]:
    while ids and ids[-1] == eos:
        ids.pop()
    return [*ids, eos]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: at least one, never followed by EOS.

    Text: its plain tokens, with BOS first iff the tokenizer puts one before a text. Messages: the chat
    template with the generation prompt, or up to the end of the last message if that is the assistant's, which the
    completion then goes on with; whether there is a BOS is the template's to say, as in use.

    Raises:
        ValueError: messages without a chat template, messages that the template refuses, or a prompt
            that gives no token at all.
    """
    return _prompt_ids(prefix_ids(tokenizer), prompt, _ids(tokenizer, _prompt_text(tokenizer, prompt)))


def encode_completion(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt) -> list[int]:
    """Token ids of a completion; EOS is the last one and is not doubled.

    Text after a text prompt is tokenised alone, as any text is. Messages (or text, taken as one assistant message)
    after a message prompt are what the chat template writes for the whole conversation, less what it writes for
    the prompt; anything blank that it writes after the final EOS is cut.

    Raises:
        ValueError: no EOS token; no chat template for messages; messages after a text prompt; a template
            that does not continue the prompt's rendering.
    """
    [encoded] = encode_batch(tokenizer, [(prompt, [completion])])
    if isinstance(encoded, ValueError):
        raise encoded
    return encoded[1][0]


Encoded = tuple[list[int], list[list[int]]]
"""Token ids of a prompt and of each of its completions."""


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[tuple[Prompt, Sequence[Prompt]]]
) -> Iterator[Encoded | ValueError]:
    """As ``encode_prompt`` and ``encode_completion`` of each prompt and its completions, many at a time.

    Each prompt is rendered once, and all texts go through the tokenizer in one call, on all cores.

    Yields:
        For each conversation, in order, its token ids, or what the one-by-one functions would raise for it.
    """
    eos, prefix, blank = _eos(tokenizer), prefix_ids(tokenizer), _blank_before(tokenizer)
    texts: list[str] = []
    faults: dict[int, ValueError] = {}
    for i, (prompt, completions) in enumerate(conversations):
        start = len(texts)
        try:
            before = _prompt_text(tokenizer, prompt)
            behind = "\n" if blank and not isinstance(prompt, str) else ""
            texts += [before, *(behind + _completion_text(tokenizer, prompt, before, c) for c in completions)]
        except ValueError as error:
            faults[i] = error
            del texts[start:]
    ids: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    at = 0
    for i, (prompt, completions) in enumerate(conversations):
        if i in faults:
            yield faults[i]
            continue
        end = at + 1 + len(completions)
        first, *own = (list(each) for each in ids[at:end])
        if blank and not isinstance(prompt, str):
            # A line break that has merged with what follows cannot be cut off.
            pieces = zip(own, texts[at + 1 : end], strict=True)
            own = [c[len(blank) :] if c[: len(blank)] == blank else _ids(tokenizer, text[1:]) for c, text in pieces]
        at = end
        try:
            yield _prompt_ids(prefix, prompt, first), [_completion_ids(eos, c) for c in own]
        except ValueError as error:
            yield error
